"""The trainer for whom the Trainer itself is enough."""

from __future__ import annotations

from transformers import Trainer

from flexlora_ds.integrations.transformers.mixin import FlexLoRAMixin


class FlexLoRATrainer(FlexLoRAMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` whose adapters' ranks change; see `FlexLoRAMixin`."""
