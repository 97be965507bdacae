"""The loss in a plain training loop: two sensors see the same hidden state, and learn which readings belong together.

python examples/plain_torch.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avppc import BilinearInfoNCE, InfoNCEStats


def readings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Readings [count, 20] and [count, 30] of the same hidden states, each with noise of its own."""
    hidden = torch.randn(count, 6, generator=generator)
    mixing = torch.Generator().manual_seed(1)
    seen = hidden @ torch.randn(6, 20, generator=mixing)
    heard = hidden @ torch.randn(6, 30, generator=mixing)
    noise = [0.5 * torch.randn(x.shape, generator=generator) for x in (seen, heard)]
    return seen + noise[0], heard + noise[1]


def main(steps: int = 200, batch: int = 128) -> InfoNCEStats:
    """Trains and returns what the loss says about a batch that was not trained on."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    seen_encoder, heard_encoder = nn.Linear(20, 16), nn.Linear(30, 24)
    loss_fn = BilinearInfoNCE(16, 24, normalize="layer_norm", learn_scale=True)
    modules = nn.ModuleList([seen_encoder, heard_encoder, loss_fn])
    optimizer = torch.optim.AdamW(modules.parameters(), 1e-2)
    for step in range(steps):
        seen, heard = readings(batch, generator)
        loss = loss_fn(seen_encoder(seen), heard_encoder(heard))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    seen, heard = readings(batch, generator)
    with torch.no_grad():
        loss, stats = loss_fn(seen_encoder(seen), heard_encoder(heard), return_stats=True)
    print(f"new readings: loss {loss.item():.3f}, {stats.accuracy.item():.0%} find their partner among {batch}")
    return stats


if __name__ == "__main__":
    main()
