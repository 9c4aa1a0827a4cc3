"""PEFT's LoRA, and the kinds of it that one word of its configuration makes: rsLoRA, DoRA.

| method | ΔW | |
|---|---|---|
| `lora` | alpha / r · B A | Hu et al. 2021, LoRA, arXiv 2106.09685 |
| `rslora` | alpha / √r · B A | Kalajdzievski 2023, rsLoRA, arXiv 2312.03732 |
| `dora` | the rows of W + alpha / r · B A, each at a trained length | Liu et al. 2024, DoRA, arXiv 2402.09353 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launch.engine.methods.peft_adapter import PeftAdapter

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import LoraConfig


class PeftLoRA(PeftAdapter):
    """PEFT's LoRA, as it comes."""

    def peft_config(self) -> LoraConfig:
        """As the options say."""
        return self.lora_config()

    def lora_config(self, **others: Any) -> LoraConfig:
        """PEFT's configuration of these options; `others` are those of a kind of LoRA."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.options.rank,
            lora_alpha=self.options.alpha,
            lora_dropout=self.options.dropout,
            target_modules=self.matrices,
            task_type="CAUSAL_LM",
            **others,
        )

    @property
    def total_rank(self) -> int:
        """Σ of the ranks of all matrices."""
        return self.options.rank * len(self.matrices)


class RsLoRA(PeftLoRA):
    """LoRA at the scale alpha / √rank."""

    def peft_config(self) -> LoraConfig:
        """With PEFT's `use_rslora`."""
        return self.lora_config(use_rslora=True)


class DoRA(PeftLoRA):
    """LoRA that also trains the length of every row of W + ΔW."""

    def peft_config(self) -> LoraConfig:
        """With PEFT's `use_dora`."""
        return self.lora_config(use_dora=True)

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Tell ZeRO-3 that the lengths are computed from weights of other modules, which it must gather for that."""
        super().attach(engine, total_steps, validate)
        if engine.zero_optimization_partition_weights():
            for layer in engine.module.modules():
                if "default" in getattr(layer, "lora_magnitude_vector", {}):
                    _gather_together(layer)


def _gather_together(layer: Any) -> None:
    import deepspeed

    lengths = layer.lora_magnitude_vector["default"]
    for other in (layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]):
        deepspeed.zero.register_external_parameter(lengths, other.weight)
