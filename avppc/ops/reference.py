"""The definitions of the ops in plain torch: slow, differentiable, any float dtype; the fallback and the tests' truth."""

from __future__ import annotations

from avppc.ops.reference_log_mel import log_mel_reference

__all__ = ["log_mel_reference"]
