"""The base model's element-wise pieces (norm, rotary embedding, SwiGLU) as Liger's fused kernels, where they can run.

The loss stays ours, and an MLP goes on calling its linear layers, adapted or not.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from flexlora_ds.config import Auto
from flexlora_ds.errors import UserError
from flexlora_ds.fields import show
from launch.options.train_options import Compile, Kernels

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""transformers' model types whose layers are RMSNorm, rotary embedding and down(act(gate(x)) · up(x)), and no more."""


def resolve_kernels(
    asked: Kernels | Auto, *, compiled: bool | Compile, config: Any, gpu: bool, installed: bool, place: str
) -> Kernels:
    """liger or none; `auto` takes liger where it can run.

    Args:
        compiled: what torch is to compile, as asked for.
        config: transformers' configuration of the model.
        installed: whether liger-kernel is.
        place: where `asked` was given, for messages.

    Raises:
        UserError: liger was asked for where it cannot run, or beside `compile`.
    """
    obstacle = _obstacle(compiled, config, gpu=gpu, installed=installed)
    if asked != "liger":
        return "none" if asked == "none" or obstacle else "liger"
    if obstacle:
        raise UserError(f"kernels liger {obstacle}", place, "choose auto or none")
    return "liger"


def liger_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("liger_kernel") is not None


def _obstacle(compiled: bool | Compile, config: Any, *, gpu: bool, installed: bool) -> str | None:
    if compiled:
        return f"replaces what compile {show(compiled)} would compile"
    if not gpu:
        return "needs a GPU"
    if not installed:
        return "needs the package liger-kernel, which is not installed"
    return foreign_base(config)


def foreign_base(config: Any) -> str | None:
    """What of a model is not the pieces known here; None where nothing is."""
    if config.model_type not in LLAMA_LIKE:
        return f"knows no models of type {config.model_type}, only {', '.join(LLAMA_LIKE)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"knows the activation silu, not {config.hidden_act}"
    return None


def apply_liger(model: Any) -> None:
    """Put Liger's kernels into a model: into its modules, and for the rotary embedding into transformers' module."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
