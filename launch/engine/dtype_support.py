"""Whether the device computes in a precision."""

from __future__ import annotations

from flexlora_ds.base_model.precision import Dtype
from flexlora_ds.errors import UserError


def require_dtype(dtype: Dtype, place: str) -> None:
    """See that DeepSpeed computes in the precision; after `choose_accelerator`.

    Args:
        place: where the precision was given, for messages.

    Raises:
        UserError: fp16 where the device has none.
    """
    if dtype != "fp16":
        return
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise UserError("DeepSpeed computes no fp16 on this device", place, "choose dtype bf16 or fp32")
