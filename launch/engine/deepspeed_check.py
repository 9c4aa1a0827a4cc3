"""Whether DeepSpeed itself takes a JSON: asked before anything is loaded, its refusal in one line.

DeepSpeed's own class says what is wrong, seldom where. The key is found by asking again about fewer keys.
"""

from __future__ import annotations

import bisect
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

from flexlora_ds.config import AboveZero
from flexlora_ds.errors import UserError
from flexlora_ds.fields import convert, quote, remedy
from flexlora_ds.partitions.unsupported import is_enabled, lookup
from flexlora_ds.terminal.command import one_line
from launch.engine.ds_config import AUTO, DECIDED
from launch.engine.ds_json import DsJson

Settings = Mapping[str, Any]

WRONG_VALUES = (
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
)
"""What DeepSpeed raises for a value of another type or range, beside its own DeepSpeedConfigError."""
UNCHECKED: Mapping[str, Any] = {
    **dict.fromkeys(
        (
            "dataloader_drop_last",
            "disable_allgather",
            "disable_python_gc",
            "dump_state",
            "memory_breakdown",
            "prescale_gradients",
            "wall_clock_breakdown",
        ),
        bool,
    ),
    "data_types.grad_accum_dtype": Literal["fp32", "fp16", "bf16"],
    "gradient_predivide_factor": AboveZero,
    "log_level": Literal["debug", "info", "warning", "error", "critical"],
    "steps_per_print": AboveZero,
}
"""What DeepSpeed reads without looking, and fails on in the middle of a run (0.19.8)."""
NEVER: Mapping[str, float] = {"steps_per_print": math.inf}
"""What some files write for 'never', and DeepSpeed takes."""
MONITORS: Mapping[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""The package of each of DeepSpeed's monitors that needs one."""
_LONGEST = 200
"""Characters of a value, and of DeepSpeed's words, in a message."""


def require_accepted(source: DsJson) -> None:
    """See that DeepSpeed takes what a user's JSON says itself; what the options decide is left out, and so is `auto`.

    After `choose_accelerator`. Needs no communication, and gives the same answer on every process.

    Raises:
        UserError: DeepSpeed refuses it; its words, and the dotted key that they are about.
    """
    settings = _own_part(source.settings)
    for unchecked, kind in UNCHECKED.items():
        value = lookup(settings, unchecked)
        if value is not None and value != NEVER.get(unchecked):
            _require_kind(value, kind, f"{source.origin}, key {unchecked}")
    error = _refusal(settings)
    if error is None:
        _require_monitors(source)
        return
    path, value, as_object = _refused(settings, lambda part: part)
    words = _words(error)
    if as_object is None and not isinstance(value, Mapping):
        words = "it expects an object there"
    raise UserError(
        f"DeepSpeed refuses {one_line(json.dumps(value), _LONGEST)}: {words}",
        f"{source.origin}, key {'.'.join(path)}",
        "correct or remove it",
    )


@contextmanager
def late_refusals(source: DsJson) -> Iterator[None]:
    """Name the key where DeepSpeed takes a JSON, and then refuses what it says while it makes an engine.

    Raises:
        UserError: DeepSpeed's words, and the dotted key of the JSON that stands in them, if one does.
    """
    try:
        yield
    except (*WRONG_VALUES, ImportError) as error:
        words = _words(error)
        key = _named(source.settings, words)
        if key is None:  # it need not be about the JSON
            raise
        raise UserError(
            f"DeepSpeed cannot begin with this: {words}",
            f"{source.origin}, key {key}",
            "correct or remove it",
        ) from error


def _named(settings: Settings, words: str) -> str | None:
    """The dotted key that stands in DeepSpeed's words: of several the longest, and none around another."""
    bare = _bare(words)
    named = {
        path: name for path in _paths(_own_part(settings)) if (name := _bare(path.split(".")[-1])) in bare
    }
    inner = [path for path in named if not any(other.startswith(f"{path}.") for other in named)]
    return max(inner, key=lambda path: len(named[path]), default=None)


def _paths(block: Settings, parents: str = "") -> Iterator[str]:
    """The dotted paths of all keys."""
    for key, value in block.items():
        yield f"{parents}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{parents}{key}.")


def _bare(text: str) -> str:
    """The letters of a text alone: DeepSpeed writes `pre-scale gradients` of prescale_gradients."""
    return "".join(filter(str.isalnum, text)).lower()


def _require_monitors(source: DsJson) -> None:
    for monitor, package in MONITORS.items():
        if is_enabled(source.settings.get(monitor)) and find_spec(package) is None:
            raise UserError(
                f"its package {package} is not installed",
                f"{source.origin}, key {monitor}.enabled",
                "install it, or write false",
            )


def _require_kind(value: Any, kind: Any, place: str) -> None:
    """Raise UserError where a value has another type, or is out of bounds."""
    try:
        convert(value, kind, text=False)
    except ValueError as error:
        raise UserError(
            f"{quote(value, text=False)} {error}", place, remedy(value, kind, text=False)
        ) from None


def _own_part(settings: Settings, parents: str = "") -> dict[str, Any]:
    """What neither the options nor the filling of `auto` decides."""
    return {
        key: _own_part(value, f"{parents}{key}.") if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value != AUTO and f"{parents}{key}" not in (*DECIDED, "optimizer")
    }


def _refused(
    block: Settings, whole: Callable[[Settings], Settings]
) -> tuple[list[str], Any, Exception | None]:
    """The path of the first key that DeepSpeed does not take beside those before it, its value, and why `{}` fails.

    Args:
        whole: all settings around a part of the block.
    """
    keys = list(block)

    def is_refused(count: int) -> bool:
        return _refusal(whole({key: block[key] for key in keys[:count]})) is not None

    taken = bisect.bisect_left(range(1, len(keys)), True, key=is_refused)
    key, before = keys[taken], {key: block[key] for key in keys[:taken]}
    value = block[key]
    as_object = _refusal(whole({**before, key: {}}))
    if isinstance(value, Mapping) and as_object is None:
        path, inner, why = _refused(value, lambda part: whole({**before, key: part}))
        return [key, *path], inner, why
    return [key], value, as_object


def _refusal(settings: Settings) -> Exception | None:
    """What DeepSpeed raises for some settings, if it does."""
    from deepspeed import DeepSpeedConfig, DeepSpeedConfigError

    # Without sizes it takes nothing. The third size follows from the number of processes.
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig(copy.deepcopy({**settings, **sizes}))
    except (*WRONG_VALUES, DeepSpeedConfigError) as error:
        return error
    return None


def _words(error: Exception) -> str:
    """What an error says; of several faults that pydantic found the first."""
    found = getattr(error, "errors", None)
    text = found()[0]["msg"] if callable(found) else str(error)
    return one_line(text, _LONGEST) or type(error).__name__
