"""The dropout that a base model brings along: off, where its weights are frozen.

It is drawn from no named seed, so with it the loss would depend on how a batch is divided. A frozen base has nothing to
regularise; the adapters have dropout of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_RATE = re.compile(r"drop|pdrop|^(input_)?jitter_noise$|^moe_jitter_eps$")
"""Attributes that hold the rate of something drawn in training: dropout, whole layers left out, noise on experts."""

_OF_OTHER_HEADS = re.compile(r"^(classifier|summary)_")


def own_dropout(model: nn.Module) -> dict[str, float]:
    """The rates above 0 that the base draws with: by their names in its configuration, else in its modules."""
    named = {
        name: float(getattr(part, name))
        for part, name in _configured(model)
        if not _OF_OTHER_HEADS.search(name)
    }
    used = {name: float(getattr(owner, name)) for owner, name in _rates(model)}
    return named | {name: rate for name, rate in used.items() if rate not in named.values()}


def turn_off_dropout(model: nn.Module) -> None:
    """Set every such rate to 0: of modules, of attributes, and in the configuration, which some forward passes read."""
    for owner, name in list(_rates(model)):
        setattr(owner, name, 0.0)
    for part, name in list(_configured(model)):
        setattr(part, name, 0.0)


def _rates(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield module, "p"
        for name, value in vars(module).items():
            if _RATE.search(name) and _is_rate(value):
                yield module, name


def _configured(model: nn.Module) -> Iterator[tuple[Any, str]]:
    config = getattr(model, "config", None)
    for part in _configurations(config) if config is not None else ():
        for name, value in vars(part).items():
            if "drop" in name and _is_rate(value):
                yield part, name


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _configurations(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield from _configurations(part)
