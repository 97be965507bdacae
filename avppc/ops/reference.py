"""The definitions of the ops in plain torch: slow, differentiable, any float dtype.

They are the fallback, and what the tests compare with.
"""

from __future__ import annotations

from avppc.ops.reference_info_nce import (
    info_nce_accuracy_reference,
    info_nce_logits_reference,
    info_nce_rows_reference,
)
from avppc.ops.reference_log_mel import log_mel_reference

__all__ = [
    "info_nce_accuracy_reference",
    "info_nce_logits_reference",
    "info_nce_rows_reference",
    "log_mel_reference",
]
