"""Names in the file of `method: peft` that mean nothing on this base: PEFT passes over them, and trains without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from flexlora_ds.errors import UserError
from flexlora_ds.fields import nearest
from flexlora_ds.peft_reading.config import shown
from flexlora_ds.peft_reading.idle import idle_keys

_LISTS = ("target_modules", "exclude_modules")
"""Options that may list the ends of modules' names."""


def require_modules(model: nn.Module, config: Any, place: str) -> None:
    """Raise UserError for a module to save that the base has not, or a text, of which PEFT would take each letter.

    PEFT passes over such a module, and writes its name into the adapter all the same.
    """
    names = [name for name, _ in model.named_modules()]
    given = getattr(config, "modules_to_save", None) or ()
    if isinstance(given, str):
        raise UserError(f"modules_to_save {shown(given)} is no list", place, "put it in brackets")
    for wanted in given:
        if not any(name.endswith(wanted) for name in names):
            raise UserError(
                f"modules_to_save {shown(wanted)} is no module of the base", place, "correct the file"
            )


def listed_names(config: Any) -> dict[str, list[str]]:
    """What a configuration lists, before PEFT resolves it."""
    given = {option: getattr(config, option, None) for option in _LISTS}
    return {option: sorted(names) for option, names in given.items() if isinstance(names, (list, set, tuple))}


def require_known(listed: Mapping[str, Sequence[str]], base: Sequence[str], wrapped: Any, place: str) -> None:
    """Raise UserError for the first name, layer or pattern of the file that meets nothing.

    Args:
        listed: what `listed_names` gave before the model was wrapped.
        base: the names of all modules of the base.
        wrapped: the model in its adapter.
    """
    for fault, remedy in _faults(listed, base, wrapped, place):
        raise UserError(fault, place, remedy)


def _faults(
    listed: Mapping[str, Sequence[str]], base: Sequence[str], wrapped: Any, place: str
) -> Iterator[tuple[str, str]]:
    config, tuner = wrapped.peft_config["default"], wrapped.base_model
    for option, names in listed.items():
        # PEFT renames what a newer Transformers calls otherwise: such a name is no longer there.
        for name in (name for name in names if name in (getattr(config, option) or ())):
            if not any(known == name or known.endswith(f".{name}") for known in base):
                yield f"{option} {shown(name)} is no module of the base", _meant(name, base)
    adapted = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    layers = getattr(config, "layers_to_transform", None)
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if not any(str(layer) in name.split(".") for name in adapted):
            yield f"layers_to_transform {layer} is no layer that is adapted", "correct the file"
    for key in idle_keys(vars(config), adapted, place):
        yield key.fault(), key.remedy()


def _meant(name: str, base: Sequence[str]) -> str:
    close = nearest(name, {known.rpartition(".")[2] for known in base} - {""})
    return f"did you mean {shown(close)}?" if close else "correct the file"
