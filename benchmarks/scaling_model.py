"""What a step costs on 1, 8, 64 and 512 GPUs: `python benchmarks/scaling_model.py [--help]`.

Arithmetic and bytes are counted from the model itself; speeds of the machine are settings, with their source below.
docs/scaling.md has the figures and what they rest on. Of the rows, efficiency is the encoders' share of a step, and
readers a GPU are the processes that read its clips from packed shards.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from avppc.clip import CLIP_FRAMES, CLIP_SAMPLES, CROP_SIZE, ClipBatch
from avppc.config import PretrainConfig
from avppc.draws import ClipGenerator
from avppc.tasks.permutative import PermutativeTask

CLIP_BYTES = CLIP_FRAMES * CROP_SIZE**2 + 2 * CLIP_SAMPLES
GPUS = (1, 8, 64, 512)


@dataclass(frozen=True)
class Machine:
    """Speeds of a cluster. Only product_tflops was measured (one H200); the others are assumptions to be replaced."""

    product_tflops: float = 790.0
    """bf16 matrix products of one GPU, TFLOP/s."""
    encoder_share: float = 0.4
    """Share of it that the encoders reach: an assumption; `avppc bench-train` on the GPU tells."""
    loss_share: float = 0.4
    """Share of it that the loss reaches: an assumption; `pytest benchmarks/ -k info_nce` tells."""
    gpus_per_node: int = 8
    node_gb_s: float = 300.0
    """GB/s that each GPU sends inside a node."""
    network_gb_s: float = 40.0
    """GB/s that each GPU sends to other nodes."""
    node_latency_us: float = 10.0
    """Microseconds of a message inside a node."""
    network_latency_us: float = 25.0
    """Microseconds of a message between nodes."""
    reader_gb_s: float = 4.0
    """GB/s at which one process gathers batches from packed shards: `pytest benchmarks/ -k packed` tells."""


@dataclass(frozen=True)
class Model:
    """A preset, counted."""

    clips: int = 512
    """Clips a GPU."""
    dim: int = 512
    subtasks: int = 42
    targets: int = 10
    """Sets of elements that are candidates."""
    parameters: int = 0
    batch_norms: int = 0
    clip_gflop: float = 0.0
    """Forward and backward of the encoders, a clip."""


def count_model(config: PretrainConfig, clips: int) -> Model:
    """Counts parameters, batch norms and arithmetic, on two clips."""
    task = PermutativeTask(config).train()
    numbers = torch.arange(2)
    video = torch.zeros(2, CLIP_FRAMES, CROP_SIZE, CROP_SIZE, dtype=torch.uint8)
    batch = ClipBatch(video, torch.ones(2, CLIP_SAMPLES, dtype=torch.int16), numbers, numbers, numbers)
    with FlopCounterMode(display=False) as counter:
        pieces = task.represent(batch, ClipGenerator(0, 0, 2))
        torch.stack([piece.sum() for piece in pieces if piece is not None]).sum().backward()
    return Model(
        clips=clips,
        dim=config.objective.dim,
        parameters=sum(parameter.numel() for parameter in task.parameters()),
        batch_norms=sum(isinstance(module, torch.nn.BatchNorm2d) for module in task.modules()),
        clip_gflop=counter.get_total_flops() / 2e9,
    )


def step_of(model: Model, machine: Machine, gpus: int, ring: bool) -> dict[str, float]:
    """Milliseconds of the parts of a step, MiB of memory, and the rate of all GPUs together."""
    inside = gpus <= machine.gpus_per_node
    rate = (machine.node_gb_s if inside else machine.network_gb_s) * 1e9
    latency = (machine.node_latency_us if inside else machine.network_latency_us) * 1e-6
    others = gpus - 1
    encoders = model.clips * model.clip_gflop * 1e9 / (machine.product_tflops * 1e12 * machine.encoder_share)
    # Logits and two gradient products; the ring computes the logits once more.
    products = 8 if ring and others else 6
    scores = model.subtasks * model.clips * model.clips * gpus * model.dim
    projections = 6 * model.subtasks * model.clips * model.dim**2
    loss = (products * scores + projections) / (machine.product_tflops * 1e12 * machine.loss_share)
    own_targets = model.targets * model.clips * model.dim  # numbers
    # Forward the targets of the others in bfloat16, backward their gradients in float32; the ring passes the targets
    # in the backward once more.
    moved = others * own_targets * (8 if ring else 6)
    depth = math.ceil(math.log2(gpus))  # messages one after the other in a tree
    exchange = moved / rate + latency * 2 * (others if ring else depth)
    if ring:  # the next targets travel while the present ones are scored
        exchange = max(0.0, exchange - loss)
    # Two thirds of the encoders' time is backward: it hides what gradients it can.
    reduce = 2 * others / gpus * model.parameters * 4 / rate + 2 * latency * depth
    norms = 2 * model.batch_norms * latency * depth
    shown_reduce = max(0.0, reduce - encoders * 2 / 3)
    total = encoders + loss + exchange + shown_reduce + norms
    return {
        "encoders ms": 1e3 * encoders,
        "loss ms": 1e3 * loss,
        "exchange ms": 1e3 * exchange,
        "gradients ms": 1e3 * shown_reduce,
        "batch norms ms": 1e3 * norms,
        "step ms": 1e3 * total,
        "clips/s": gpus * model.clips / total,
        "efficiency": encoders / total,
        "targets MiB": own_targets * (12 if ring else 6 * gpus) / 2**20,
        "sent MiB": (moved + 2 * others / gpus * model.parameters * 4) / 2**20,
        "read GB/s a node": min(gpus, machine.gpus_per_node) * model.clips / total * CLIP_BYTES / 1e9,
        "readers a GPU": model.clips / total * CLIP_BYTES / 1e9 / machine.reader_gb_s,
    }


def as_measured(machine: Machine, figures: Path) -> Machine:
    """The machine with the speed of products and the encoders' share of it that `avppc bench-train` printed there."""
    found = json.loads(figures.read_text(encoding="utf-8"))
    return replace(machine, product_tflops=found["ceiling_tflops"], encoder_share=found["model_flop_utilisation"])


def main(machine: Machine = Machine(), clips: int = 512, preset: str = "gpu", measured: Path | None = None) -> None:
    """Prints the cost model; `measured` is the JSON that `avppc bench-train` printed on one such machine."""
    if measured is not None:
        machine = as_measured(machine, measured)
    config = PretrainConfig.from_preset(preset, Path("data"), Path("out"))  # type: ignore[arg-type]  # checked there
    model = count_model(replace(config, batch_size=clips), clips)
    print(
        f"{preset}: {model.clips} clips a GPU, {model.clip_gflop:.1f} GFLOP a clip, {model.parameters / 1e6:.1f} M "
        f"parameters, {model.batch_norms} batch norms, D = {model.dim}; {machine}"
    )
    for ring in (False, True):
        columns = [step_of(model, machine, gpus, ring) for gpus in GPUS]
        print(f"\ngather={'ring' if ring else 'all'}")
        print(f"{'GPUs':<20}" + "".join(f"{gpus:>12}" for gpus in GPUS))
        print(f"{'clips of the loss':<20}" + "".join(f"{gpus * clips:>12}" for gpus in GPUS))
        for name in columns[0]:
            print(f"{name:<20}" + "".join(f"{column[name]:>12.3g}" for column in columns))


if __name__ == "__main__":
    tyro.cli(main)
