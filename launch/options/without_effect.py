"""Options of the command line that the run does not look at."""

from __future__ import annotations

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.fields import option_specs
from launch.options.train_options import TrainOptions

_ALL_METHODS = ("weight_decay", "seed")
_RANK = ("rank", "alpha", "dropout", "target_modules")
_CALENDAR = ("adjust_start", "adjust_freeze", "adjust_interval")
_EVALUATION = ("eval_items", "eval_tasks", "eval_mode", "eval_data")
_COMMAND_LINE = " on the command line"


def without_effect(options: TrainOptions) -> list[str]:
    """Their names, in the order in which they are declared.

    A recipe's are left out: the same one is meant for FlexLoRA and for what it is compared with.
    """
    idle = {spec.name for spec in option_specs(FlexLoRAConfig)} - _looked_at(options)
    if options.method != "peft":
        idle.add("peft_config")
    if not options.eval_every:
        idle.update(_EVALUATION)
    typed = [spec.name for spec in option_specs(TrainOptions) if _typed(options, spec.name)]
    return [name for name in typed if name in idle]


def _looked_at(options: TrainOptions) -> set[str]:
    """The library's options that the method reads."""
    traits = options.traits
    if traits.changes_ranks:
        return {spec.name for spec in option_specs(FlexLoRAConfig)}
    found = {*_ALL_METHODS, *(_RANK if traits.has_rank else ()), *(_CALENDAR if traits.has_calendar else ())}
    if options.method == "peft":  # where its file names no targets
        found.add("target_modules")
    if options.method == "lora_ga":
        found.add("init_batches")
    return found


def _typed(options: TrainOptions, name: str) -> bool:
    return options.place(name).endswith(_COMMAND_LINE)
