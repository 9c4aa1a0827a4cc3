"""Linear layers of which PEFT (0.21) loads no adapter, by names in some kinds of model: a trained one would be lost.

It takes `down_proj` and its like for the stacked experts, also where a dense or shared layer has that name, and it
refuses the layers that Mamba's kernels read without calling them.
"""

from __future__ import annotations

from typing import Any

STACKED = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""`_MOE_TARGET_MODULE_MAPPING` of `peft/utils/transformers_weight_conversion.py`, by the kind that a model is like."""

MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
READ_BY_KERNELS = frozenset({"out_proj", "conv1d"})
"""`_check_lora_target_modules_mamba` of `peft/tuners/tuners_utils.py`."""


def lost_in_peft(model: Any) -> frozenset[str]:
    """The last parts of names that PEFT loads no adapter of, in this kind of model."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(kind, str):
        return frozenset()
    if kind in MAMBA:
        return READ_BY_KERNELS
    return STACKED.get(_alike().get(kind, kind), frozenset())


def _alike() -> dict[str, str]:
    """Transformers' own table of the kinds whose files are converted as those of another."""
    from transformers import conversion_mapping

    found: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return found
