"""The loss of all 42 sub-tasks inside a LightningModule, with toy encoders of the four elements.

    pip install pytorch-lightning
    python examples/lightning_module.py

With several GPUs nothing changes but `Trainer(devices=..., strategy="ddp")`: gather="all" then takes the targets of all
processes as candidates, and DistributedDataParallel's averaged gradients are those of the whole batch.
"""

from __future__ import annotations

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from avppc import SUBTASKS, PermutativeInfoNCE


def clips(count: int) -> TensorDataset:
    """Past and future, seen and heard: four noisy views [count, 12] of what was said."""
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(count, 5, generator=generator)
    views = [said @ torch.randn(5, 12, generator=generator) for _ in range(4)]
    return TensorDataset(*[view + 0.3 * torch.randn(view.shape, generator=generator) for view in views])


class Permutative(lightning.LightningModule):
    """Four encoders that learn to predict each other."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(12, dim) for _ in range(4))
        weights = {subtask.name: 1.0 if subtask.between_modalities else 0.1 for subtask in SUBTASKS}
        self.loss = PermutativeInfoNCE(dim, task_weights=weights, normalize="layer_norm", gather="all")

    def training_step(self, views: list[Tensor], _: int) -> Tensor:
        loss, stats = self.loss(*self.embed(views), return_stats=True)
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", stats.accuracy.mean(), prog_bar=True)
        return loss

    def embed(self, views: list[Tensor]) -> list[Tensor]:
        return [encoder(view) for encoder, view in zip(self.encoders, views, strict=True)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def main(epochs: int = 5) -> float:
    """Trains on the CPU and returns the last accuracy, the mean over the sub-tasks."""
    lightning.seed_everything(0, verbose=False)
    module = Permutative()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, DataLoader(clips(512), batch_size=64, shuffle=True, drop_last=True))
    accuracy = trainer.callback_metrics["accuracy"].item()
    print(f"accuracy {accuracy:.0%}, mean over the {len(SUBTASKS)} sub-tasks")
    return accuracy


if __name__ == "__main__":
    main()
