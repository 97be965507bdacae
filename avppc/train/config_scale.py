"""Settings of pretraining that matter at scale: several processes, large batches, faults."""

from __future__ import annotations

from dataclasses import dataclass

from avppc.checks import check_integer, check_types


@dataclass(frozen=True)
class ScaleConfig:
    """How a step is computed; except sync_batch_norm and cached_negatives, nothing here changes what is learned."""

    sync_batch_norm: bool = True
    """Batch norms see the batches of all processes, so that the number of processes changes nothing."""
    cached_negatives: bool = False
    """One loss over all `accumulate` batches instead of one each: every clip is told apart from batch_size * accumulate
    clips, with the memory of one batch (each passes through the encoders twice). Batch norms still see one batch."""
    activation_checkpointing: bool = False
    """Keeps only the inputs of the encoders' blocks and computes the rest again in the backward pass."""
    compile: bool = False
    """Compiles the encoders with torch.compile; the first steps take minutes."""
    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite is skipped; more than this many in a row end the run. This is checked
    with each line of metrics (every log_every steps): skipped steps before the last good one do not count."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("max_skipped_steps", self.max_skipped_steps, 0)
