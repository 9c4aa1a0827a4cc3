"""Options of the command line that the run does not look at, and why."""

from __future__ import annotations

from collections.abc import Iterator

from flexlora_ds.config import RANK_CHANGES, FlexLoRAConfig
from flexlora_ds.fields import option_specs
from launch.options.train_options import TrainOptions

_EVALUATION = ("eval_items", "eval_tasks", "eval_mode", "eval_data")
_WITHOUT_CHANGES = ("adjust_size", "orth_form", "orth_weight")
"""Options of rank changes that a run without any looks at."""
_COMMAND_LINE = " on the command line"


def without_effect(options: TrainOptions) -> dict[str, list[str]]:
    """By the reason, their names in the order in which they are declared; each is named once.

    A recipe's are left out: the same one is meant for FlexLoRA and for what it is compared with.
    """
    typed = [spec.name for spec in option_specs(TrainOptions) if _typed(options, spec.name)]
    found: dict[str, list[str]] = {}
    for reason, idle in _reasons(options):
        names = [name for name in typed if name in idle]
        typed = [name for name in typed if name not in names]
        if names:
            found.setdefault(reason, []).extend(names)
    return found


def idle_line(options: TrainOptions) -> str | None:
    """One line for the log and the dry run's page; None where everything counts."""
    found = without_effect(options)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in found.items()]
    return f"no effect: {'; '.join(parts)}" if parts else None


def _reasons(options: TrainOptions) -> Iterator[tuple[str, set[str]]]:
    """What takes the effect from options, the strongest first."""
    traits, method = options.traits, f"method {options.method}"
    known = {spec.name for spec in option_specs(FlexLoRAConfig)}
    yield method, {name for name in known if not traits.looks_at(name)}
    if options.method != "peft":
        yield method, {"peft_config"}
    if traits.changes_ranks and not options.adjust_size:
        changes = {spec.name for spec in option_specs(FlexLoRAConfig) if spec.group is RANK_CHANGES}
        yield "adjust_size 0", changes - {*_WITHOUT_CHANGES}
    if options.init_adapter:
        yield "init_adapter", {"init", "init_batches"}
    if traits.changes_ranks and options.init == "gaussian":
        yield "init gaussian", {"init_batches"}
    if options.match_params is not None:
        yield "match_params", {"rank"}
    if options.max_steps is not None:
        yield "max_steps", {"epochs"}
    if not options.eval_every:
        yield "eval_every 0", {*_EVALUATION}


def _typed(options: TrainOptions, name: str) -> bool:
    return options.place(name).endswith(_COMMAND_LINE)
