"""Which tensor of a model each name in a checkpoint stands for, as transformers' `from_pretrained` decides it.

Names are renamed by transformers' own rules. What the model has no place for is left out. Two names that the
configuration ties are tied unless both are stored with different values.

Read from transformers 5.23: `core_model_loading.py`, `PreTrainedModel.tie_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Equal = Callable[[str, str], bool]
"""Whether the tensors of two stored names have equal shapes and values, in the dtype that is loaded."""


@dataclass(frozen=True)
class Places:
    """What is read from a checkpoint, and where it goes."""

    names: Mapping[str, str]
    """The model's name of each stored one: one stored tensor for each distinct tensor of the model."""
    untied: frozenset[str]
    """The model's names that its configuration ties and this checkpoint does not."""


def tie(model: PreTrainedModel, untied: Collection[str]) -> PreTrainedModel:
    """Tie a model's tensors as its configuration says, but for those named; returns it."""
    for name in untied:
        model.all_tied_weights_keys.pop(name)
    model.tie_weights(recompute_mapping=False)
    return model


def renamed(model: PreTrainedModel, stored: Collection[str]) -> tuple[dict[str, str], bool]:
    """The model's name of each stored tensor that is read as it is, and whether others are converted.

    Args:
        model: any with the modules and the configuration; its values do not matter.
        stored: the names in all of the checkpoint's files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    places, converts = {}, False
    for name in sorted(stored, key=dot_natural_key):  # some rules depend on the order
        place, rule = rename_source_key(name, renamings, converters, prefix, state)
        if place not in state and name in state:
            place, rule = rename_source_key(name, [], [], prefix, state)
        if rule is not None:
            converts = True
        elif place in state:
            places[name] = place
    return places, converts


def one_to_one(model: PreTrainedModel, places: Mapping[str, str], equal: Equal) -> Places | None:
    """One stored tensor for each distinct tensor of the model; None where that cannot be.

    Args:
        model: without values, and without ties but those of modules that are shared; it is tied here.
        places: the model's name of each stored one.
    """
    found = {place: name for name, place in places.items()}
    if len(found) < len(places):
        return None
    untied = _untied(model.all_tied_weights_keys, found, equal)
    if untied is None:
        return None
    tie(model, untied)
    read = _one_of_each(model, found, equal)
    return None if read is None else Places(read, untied)


def _untied(ties: Mapping[str, str], found: Mapping[str, str], equal: Equal) -> frozenset[str] | None:
    """The tied names that have values of their own; None where nothing can be said pair by pair."""
    untied, sources = set(), list(ties.values())
    for name, source in ties.items():
        if source not in found and (name not in found or sources.count(source) > 1):
            return None
        if source in found and name in found and not equal(found[source], found[name]):
            untied.add(name)
    return frozenset(untied)


def _one_of_each(model: PreTrainedModel, found: Mapping[str, str], equal: Equal) -> dict[str, str] | None:
    """The place of one stored name for each distinct tensor; None where one has no value, or two."""
    names: dict[int, list[str]] = {}
    for place, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(place)
    read = {}
    for shared in names.values():
        stored = [place for place in shared if place in found]
        if not stored or not all(equal(found[stored[0]], found[other]) for other in stored[1:]):
            return None
        read[found[stored[0]]] = stored[0]
    return read
