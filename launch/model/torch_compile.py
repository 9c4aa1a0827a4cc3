"""`compile: pieces` (or true): the base model's element-wise pieces, compiled; a rank change touches none of them.

Compiled are the forward pass of every norm and `silu(gate) · up` of every MLP: one piece of code each for all layers,
any batch and any length. Linear layers and adapters stay outside, so ranks, dropout and ZeRO-3's gathering, which
happens in the hooks around a module's forward pass, are as without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from flexlora_ds.base_model.precision import Dtype
from flexlora_ds.config import Auto
from flexlora_ds.errors import UserError
from flexlora_ds.fields import show
from launch.model.liger import foreign_base
from launch.options.method_traits import TRAITS
from launch.options.train_options import Attention, Compile, Kernels, Method

_PROVEN = "2.11"
"""The oldest torch whose compiled layers were proven on a GPU."""


def resolve_compile(asked: bool | Compile | Auto, *, blocks: bool) -> Compile | None:
    """`true` means pieces, `false` nothing, `auto` blocks where that is `wants_blocks` and nothing is in the way."""
    if asked == "auto":
        return "blocks" if blocks else None
    return "pieces" if asked is True else asked or None


def wants_blocks(
    asked: bool | Compile | Auto,
    *,
    method: Method,
    config: Any,
    stage: int,
    dtype: Dtype,
    kernels: Kernels | Auto,
    gpu: bool,
) -> bool:
    """Whether `auto` is to compile whole layers: without it the host is slower than a GPU (docs/gpu.md).

    Args:
        config: transformers' configuration of the model.
        kernels: as asked for; Liger's would be in the way.
    """
    possible = gpu and dtype == "bf16" and stage != 3 and kernels != "liger"
    possible &= TorchVersion(torch.__version__) >= TorchVersion(_PROVEN)
    known = TRAITS[method].changes_ranks and foreign_base(config) is None
    return asked == "auto" and possible and known and shutil.which(_compiler()) is not None


def require_compiler(asked: bool | Compile | Auto, *, method: Method, config: Any, place: str) -> None:
    """See that what `compile` needs is there, before a model is loaded.

    Args:
        config: transformers' configuration of the model.
        place: where `asked` was given, for messages.

    Raises:
        UserError: no C++ compiler, a model whose pieces are not known, or whole layers for LoRA.
    """
    if not asked or asked == "auto":
        return
    wanted = f"compile {show(asked)}"
    if asked == "blocks" and not TRAITS[method].changes_ranks:
        raise UserError(f"{wanted} knows FlexLoRA's adapters only", place, "choose pieces or leave it false")
    foreign = foreign_base(config)
    if foreign:
        raise UserError(f"{wanted} {foreign}", place, "leave it false")
    if shutil.which(_compiler()) is None:
        raise UserError(
            f"{wanted} needs a C++ compiler, and there is no {_compiler()}",
            place,
            "install one, name yours in the variable CXX, or leave it false",
        )


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def require_stage(asked: bool | Compile | Auto, *, stage: int, place: str) -> None:
    """See that nothing gathers weights inside what is compiled.

    Raises:
        UserError: whole layers at ZeRO-3.
    """
    if asked == "blocks" and stage == 3:
        raise UserError(
            "compile blocks needs ZeRO-0, 1 or 2: ZeRO-3 gathers weights inside a layer",
            place,
            "choose pieces",
        )


def require_replayable(asked: bool, *, possible: bool, place: str) -> None:
    """See that compiled layers can be replayed (`launch.model.layer_stack`) where that was asked for.

    Raises:
        UserError: they cannot.
    """
    if asked and not possible:
        raise UserError(
            "cuda_graphs true replays compiled layers of packed examples on a GPU, their activations kept, orth_form "
            "decoupled",
            place,
            "leave it false, or choose compile blocks, padding_free true and gradient_checkpointing false",
        )


def blocks_obstacle(attention: Attention, *, packed: bool) -> str | None:
    """Why whole layers would run uncompiled, see `launch.model.compiled_blocks`; None where they are compiled."""
    if packed and attention != "varlen":
        return f"of packed examples it takes those under attention varlen only, not {attention}; try padding_free false"
    return None


def compile_pieces(model: nn.Module, backend: str = "inductor") -> int:
    """Compile the pieces of a model that `require_compiler` lets pass, in place; returns how many modules got one."""
    compiled = partial(torch.compile, dynamic=True, fullgraph=True, backend=backend)
    gated = compiled(_gated)
    norms: dict[type, Callable[..., Tensor]] = {}
    count = 0
    for module in list(model.modules()):
        kind: Any = type(module)
        if kind.__name__.endswith("RMSNorm"):
            norms.setdefault(kind, compiled(kind.forward))
            module.forward = MethodType(norms[kind], module)
        elif all(hasattr(module, name) for name in ("act_fn", "gate_proj", "up_proj", "down_proj")):
            module.forward = MethodType(partial(_mlp, gated), module)
        else:
            continue
        count += 1
    return count


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _mlp(gated: Callable[..., Tensor], mlp: Any, x: Tensor) -> Tensor:
    """Of these MLPs, [..., hidden] -> [..., hidden]; the activation's module, which ZeRO-3 hooks, is not called."""
    down: Tensor = mlp.down_proj(gated(mlp.gate_proj(x), mlp.up_proj(x)))
    return down
