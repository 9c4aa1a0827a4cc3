"""Which layers of a model are adapted, and their injection in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from flexlora_ds.adapter.heads import modules_named
from flexlora_ds.adapter.layer import AdaptedLinear, ForwardContext, adapters
from flexlora_ds.adapter.peft_names import lost_in_peft
from flexlora_ds.adapter.running_statistics import keep_statistics
from flexlora_ds.adapter.torch_layers import call_adapted_layers, read_not_called
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.orientation import LayerShape, is_linear, layer_shape
from flexlora_ds.patterns import full_matches


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers that can be adapted, Conv1D among them: all but the output head, in module order.

    Left out, too, are what PEFT could not load, and the `out_proj` of torch's attention, which reads its weight without
    calling it.

    Of a language model that takes more than text, those of its decoder of text: nothing else is trained on text. Of an
    encoder with a decoder (T5, Whisper) and of encoders beside each other (CLIP) all are trained.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    left_out = {find_head() if callable(find_head) else None, *read_not_called(model)}
    inside = _text_decoder(model)
    layers = [(n, m) for n, m in model.named_modules() if is_linear(m) and m not in left_out]
    lost = lost_in_peft(model)
    return [n for n, _ in layers if n and n.startswith(inside) and n.rpartition(".")[2] not in lost]


def _text_decoder(model: nn.Module) -> str:
    """What begins the names inside the decoder of text; empty where a model is nothing else."""
    config: Any = getattr(model, "config", None)
    find_text, find_decoder = getattr(config, "get_text_config", None), getattr(model, "get_decoder", None)
    # Of an encoder and a decoder transformers gives a copy of the configuration, as if it held one of text.
    if not callable(find_text) or not callable(find_decoder) or getattr(config, "is_encoder_decoder", False):
        return ""
    text = find_text(decoder=True)
    if text is config or not _writes_text(model, text):
        return ""
    decoder = find_decoder()
    return next((f"{n}." for n, m in model.named_modules() if m is decoder and n), "")


def _writes_text(model: Any, text: Any) -> bool:
    """Whether a model, or one with its configuration of text, is a language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    can_generate = getattr(model, "can_generate", None)
    return (callable(can_generate) and bool(can_generate())) or getattr(text, "model_type", "") in CAUSAL


def match_modules(names: list[str], targets: tuple[str, ...]) -> list[str]:
    """The names that `target_modules` means: suffixes, else regular expressions over the whole name.

    Raises:
        UserError: a target matches nothing (the message lists what there is), or is matched without end.
    """
    if not names:
        raise UserError(
            f"target_modules: {', '.join(targets)} matches nothing, for the model has no linear layer but its head",
            mend="choose a model whose layers are nn.Linear or Conv1D",
        )
    if "all-linear" in targets:
        return names
    hits = {target: [n for n in names if n == target or n.endswith("." + target)] for target in targets}
    patterns = [target for target in targets if not hits[target]]
    hits |= dict(zip(patterns, full_matches(patterns, names, "target_modules"), strict=True))
    for target in targets:
        if not hits[target]:
            kinds = sorted({n.rsplit(".", 1)[-1] for n in names})
            raise UserError(
                f"target_modules: {target!r} matches no linear layer that can be adapted",
                mend=f"this model has {', '.join(kinds)}",
            )
    chosen = {name for target in targets for name in hits[target]}
    return [n for n in names if n in chosen]


def linear_shapes(model: nn.Module, names: list[str]) -> dict[str, LayerShape]:
    """(out, in) of these linear layers."""
    return {name: layer_shape(model.get_submodule(name)) for name in names}


def check_rank(rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError if a rank exceeds min(in, out) of any layer."""
    for name, shape in shapes.items():
        if rank > min(shape):
            raise UserError(
                f"rank {rank} exceeds the limit {min(shape)} = min(in, out) of {name}", mend="lower `rank`"
            )


def inject_adapters(
    model: nn.Module, config: FlexLoRAConfig, *, modules_to_save: Sequence[str] = ()
) -> list[str]:
    """Freeze `model` and adapt its matching linear layers in place; returns their names in module order.

    The statistics of a batch normalisation are frozen, too.

    Args:
        modules_to_save: modules that are trained whole beside the adapters, by name or the end of it, such as a task's
            head. No layer of theirs is adapted.

    Raises:
        UserError: nothing matches, the model carries adapters already (PEFT's too), or the rank exceeds a layer's
            min(in, out); or a module to save is none, or shares its weight with another.
    """
    if adapters(model):
        raise UserError("the model already carries adapters", mend="start from the base model")
    _require_none_of_peft(model)
    whole = modules_named(model, modules_to_save)
    inside = tuple(f"{name}." for name in whole)
    names = [n for n in linear_names(model) if n not in whole and not n.startswith(inside)]
    names = match_modules(names, config.target_modules)
    check_rank(config.rank, linear_shapes(model, names))
    for p in model.parameters():
        p.requires_grad_(False)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    context = ForwardContext()
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = AdaptedLinear(model.get_submodule(name), name, config, context)
        layer.train(model.training)
        setattr(model.get_submodule(parent), leaf, layer)
    call_adapted_layers(model)
    keep_statistics(model, whole)
    return names


def _require_none_of_peft(model: nn.Module) -> None:
    """PEFT's adapters would be frozen, and its names of layers would be in ours; said without importing PEFT."""
    tuned = (m for m in model.modules() if any(k.__name__ == "BaseTunerLayer" for k in type(m).__mro__))
    if hasattr(model, "peft_config") or next(tuned, None) is not None:
        raise UserError(
            "the model carries an adapter of PEFT's already",
            mend="merge_and_unload() or unload() it first",
        )


def use_fp32_adapters(model: nn.Module) -> None:
    """Hold P, λ and Q in fp32 on a base of lower precision, before an optimizer is built.

    DeepSpeed keeps fp32 masters of its own. In plain torch the parameters are the masters, and bf16 would lose most
    updates. Their outputs are computed in the base's precision as before.
    """
    for layer in adapters(model).values():
        for p in (layer.P, layer.lam, layer.Q):
            p.data = p.data.float()
