"""The definitions of the ops in plain torch: slow, differentiable, any float dtype.

They are the fallback, and what the tests compare with.
"""

from __future__ import annotations

from avppc.ops.info_nce.reference import info_nce_accuracy_reference, info_nce_logits_reference, info_nce_rows_reference
from avppc.ops.log_mel.reference import log_mel_reference

__all__ = [
    "info_nce_accuracy_reference",
    "info_nce_logits_reference",
    "info_nce_rows_reference",
    "log_mel_reference",
]
