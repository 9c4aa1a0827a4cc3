"""Every method by its name, and what each needs of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flexlora_ds.orientation import LayerShape
from launch.engine.methods import lora_ga, peft_file, weight_start
from launch.engine.methods.adalora import AdaLoRA
from launch.engine.methods.adalora_calendar import calendar_of
from launch.engine.methods.flexlora import FlexLoRA
from launch.engine.methods.full import FullFineTuning
from launch.engine.methods.peft_file import PeftFromFile
from launch.engine.methods.peft_lora import DoRA, PeftLoRA, RsLoRA
from launch.engine.methods.protocol import Method
from launch.options.train_options import TrainOptions

METHODS: dict[str, Callable[[TrainOptions], Method]] = {
    "flexlora": FlexLoRA,
    "lora": PeftLoRA,
    "rslora": RsLoRA,
    "dora": DoRA,
    "pissa": weight_start.PiSSA,
    "olora": weight_start.OLoRA,
    "lora_ga": lora_ga.LoraGA,
    "adalora": AdaLoRA,
    "peft": PeftFromFile,
    "full": FullFineTuning,
}
"""The values of the option `method`."""

_NEEDS: dict[str, Callable[[TrainOptions, int, Mapping[str, LayerShape]], None]] = {
    "pissa": weight_start.require_rank,
    "olora": weight_start.require_rank,
    "lora_ga": lora_ga.require_possible,
    "peft": peft_file.require_possible,
}


def build_method(options: TrainOptions) -> Method:
    """The method that the options name."""
    return METHODS[options.method](options)


def require_possible(options: TrainOptions, stage: int, shapes: Mapping[str, LayerShape]) -> None:
    """See that a run can train so, before a weight is loaded.

    Args:
        stage: ZeRO's.
        shapes: (out, in) of the layers to be adapted.

    Raises:
        UserError: the stage, a layer's shape or a file does not go with the method.
    """
    if options.method in _NEEDS:
        _NEEDS[options.method](options, stage, shapes)


def require_calendar(options: TrainOptions, total_steps: int) -> None:
    """See that the method's calendar fits into the run, before a weight is loaded.

    FlexLoRA's is looked at where the steps are counted (`launch.data.prepare`).

    Raises:
        UserError: as `calendar_of` of AdaLoRA.
    """
    if options.method == "adalora":
        calendar_of(total_steps, options)
