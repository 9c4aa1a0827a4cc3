"""Modules that are trained whole beside the adapters, such as a task's head: PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flexlora_ds.adapter.layer import adapters
from flexlora_ds.errors import UserError

_USUAL = ("classifier", "score", "qa_outputs")
"""What transformers names the heads of tasks that no base model has learnt."""


def usual_heads(model: nn.Module) -> tuple[str, ...]:
    """The head of a task that the base knows nothing of, where the model has one at its top.

    As PEFT finds it: by how a name ends, so that DistilBERT's `pre_classifier` is one too.
    """
    return tuple(name for name, _ in model.named_children() if name.endswith(_USUAL))


def all_usual_saved(model: nn.Module, whole: Sequence[str]) -> bool:
    """Whether `whole`, full names, holds every head that PEFT looks for in the adapter of a task."""
    inside = tuple(f"{name}." for name in whole)
    usual = [name for name, _ in model.named_modules() if name.endswith(_USUAL)]
    return all(name in whole or name.startswith(inside) for name in usual)


def modules_named(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The full names of the modules that `wanted` means, each a full name or the end of one, in module order.

    PEFT takes the names in an adapter for ends of names, dot or not. What it would look for is among them.

    Raises:
        UserError: one matches nothing, or a weight of it is shared with a module outside (tied).
    """
    found = []
    for end in wanted:
        hits = [name for name, _ in model.named_modules() if name == end or name.endswith(f".{end}")]
        if not hits:
            top = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"modules_to_save: {end!r} is no module", mend=f"at its top the model has {top}")
        found += hits
    names = [name for name, _ in model.named_modules() if name.endswith(tuple(found))]
    outermost = [name for name in names if not name.startswith(tuple(f"{other}." for other in names))]
    _require_untied(model, outermost)
    return outermost


def trained_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained and no adapter's, by name."""
    of_adapters = {p for layer in adapters(model).values() for p in (layer.P, layer.lam, layer.Q)}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p not in of_adapters}


def _require_untied(model: nn.Module, whole: Sequence[str]) -> None:
    inside = tuple(f"{name}." for name in whole)
    every = dict(model.named_parameters(remove_duplicate=False))
    outside = {p: name for name, p in every.items() if not name.startswith(inside)}
    for name, p in every.items():
        if name.startswith(inside) and p in outside:
            raise UserError(
                f"modules_to_save: {name} is tied to {outside[p]}, and only one of them would be saved",
                mend="untie them (tie_word_embeddings false), or leave it out",
            )
