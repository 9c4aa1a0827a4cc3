"""A base model without its weights: what is decided before they are loaded looks at this."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexlora_ds.adapter.inject import check_rank, linear_names, linear_shapes, match_modules
from flexlora_ds.base_model.attention_support import supported_attention
from flexlora_ds.base_model.loading import load_skeleton
from flexlora_ds.base_model.own_dropout import own_dropout
from flexlora_ds.base_model.vocabulary import Vocabulary
from flexlora_ds.config import ALL_LINEAR

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
"""Of transformers' `layer_types`; others are states, convolutions and chunks, which run over the ends of examples."""


@dataclass(frozen=True)
class Skeleton:
    """A model's configuration, and the shapes of the layers to be adapted."""

    config: Any
    """transformers' configuration."""
    parameters: int
    """Of the whole base."""
    shapes: dict[str, tuple[int, int]]
    """(out, in) of every layer to be adapted, by module name in the order of the model."""
    name: str
    """Of the model's class."""
    vocabulary: Vocabulary
    separable: bool
    """Whether it can keep packed examples apart, as far as its class and configuration say."""
    file_parameters: int | None = None
    """Trained ones of the adapter that `peft_config` describes, where that could be counted."""
    remarks: tuple[str, ...] = ()
    """What of the base a run does without, one line each."""
    attention: frozenset[str] = frozenset({"eager", "sdpa", "flash_attention_2"})
    """The kernels that its class can compute with, under transformers' names."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Where an adapter begins at another rank than the options'."""

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder of text, where others stand beside it: its sizes are the run's."""
        return self.config.get_text_config(decoder=True)


def read_skeleton(model: str, target_modules: tuple[str, ...], limited_rank: int | None = None) -> Skeleton:
    """Read a model's configuration and shapes.

    Args:
        model: a hub id, a folder, or a GGUF file.
        limited_rank: a rank that no layer's shape may forbid; None: nothing is checked.

    Raises:
        UserError: the model is missing or gated, a target matches nothing, or the rank exceeds a layer's limit.
    """
    base = load_skeleton(model)
    shapes = linear_shapes(base, match_modules(linear_names(base), target_modules))
    if limited_rank is not None:
        check_rank(limited_rank, shapes)
    return Skeleton(
        config=base.config,
        parameters=sum(p.numel() for p in base.parameters()),
        shapes=shapes,
        name=type(base).__name__,
        vocabulary=Vocabulary.of(base),
        separable=_separable(base),
        remarks=(*_dropout_remark(base), *_experts_remark(base, target_modules)),
        attention=supported_attention(base),
    )


def _dropout_remark(base: Any) -> Iterator[str]:
    rates = own_dropout(base)
    if rates:
        listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        yield f"the base's own dropout is off: {listed}"


def _experts_remark(base: Any, target_modules: tuple[str, ...]) -> Iterator[str]:
    """all-linear promises what stacked experts do not give: they are one tensor, and no linear layers."""
    settings = vars(base.config.get_text_config(decoder=True))
    counts = {value for key, value in settings.items() if "experts" in key and type(value) is int}
    stacked = [
        (name, p)
        for name, p in base.named_parameters()
        if p.dim() == 3 and ("expert" in name or p.shape[0] in counts)  # some classes call them an MLP
    ]
    if ALL_LINEAR in target_modules and stacked:
        kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, _ in stacked}))
        share = sum(p.numel() for _, p in stacked) / sum(p.numel() for p in base.parameters())
        yield (
            f"all-linear leaves out the stacked experts ({kinds}), which are no linear layers: {share:.0%} of the "
            "base's weights get no adapter"
        )


def _separable(base: Any) -> bool:
    """Its attention takes boundaries, its forward pass hands them on, and nothing else goes from token to token."""
    parameters = inspect.signature(base.forward).parameters
    hands_on = "position_ids" in parameters and any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    layers = getattr(base.config.get_text_config(decoder=True), "layer_types", None) or ()
    return (
        bool(getattr(base, "_supports_attention_backend", False))
        and not getattr(base, "_is_stateful", False)
        and hands_on
        and set(layers) <= _ATTENTION_LAYERS
    )
