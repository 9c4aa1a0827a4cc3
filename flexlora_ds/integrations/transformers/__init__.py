"""Rank changes in `transformers.Trainer`, and by the mixin in any trainer derived from it, TRL's among them."""

from flexlora_ds.integrations.transformers.mixin import FlexLoRAMixin
from flexlora_ds.integrations.transformers.trainer import FlexLoRATrainer

__all__ = ["FlexLoRAMixin", "FlexLoRATrainer"]
