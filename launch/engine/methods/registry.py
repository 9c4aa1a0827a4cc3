"""Every method by its name."""

from __future__ import annotations

from collections.abc import Callable

from launch.engine.methods.flexlora import FlexLoRA
from launch.engine.methods.lora_ga import LoraGA
from launch.engine.methods.peft_lora import PeftLoRA
from launch.engine.methods.protocol import Method
from launch.options.train_options import TrainOptions

METHODS: dict[str, Callable[[TrainOptions], Method]] = {
    "flexlora": FlexLoRA,
    "lora": PeftLoRA,
    "lora_ga": LoraGA,
}
"""The values of the option `method`."""


def build_method(options: TrainOptions) -> Method:
    """The method that the options name."""
    return METHODS[options.method](options)
