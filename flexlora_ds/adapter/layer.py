"""The adapted linear layer, and what the adapted layers of a model share.

y = W x + b + s · P diag(λ) Q x, with W, b frozen, s = alpha / r0 constant for the whole run (r0 = the initial rank):
a scale that followed the current rank would change the function at every rank change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexlora_ds.adapter.function import adapted_linear, autocast_dtype, plain_adapted_linear
from flexlora_ds.adapter.penalty import PenaltyGradient
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.dropout.apply import SeededDropout, dropped_in_graph
from flexlora_ds.dropout.mask import name_key
from flexlora_ds.errors import UserError
from flexlora_ds.orientation import is_transposed, layer_shape
from flexlora_ds.seeds import generator


class RowObserver(Protocol):
    """Looks at a matrix's input and output on their way (`flexlora_ds.gradient.collect`)."""

    def attach(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """y [..., out] unchanged, with a node that sees its gradient; x: [..., in]."""


@dataclass
class Handed:
    """What the matrices of a compiled layer get handed over, for its compiled code is that of all layers."""

    row_keys: Tensor | None
    """As in `ForwardContext`; None drops nothing."""
    of_matrices: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    """By `AdaptedLinear.place`: the name's key, int64 [1]; the numbers of its input's features, int32; P, λ and Q."""


@dataclass
class ForwardContext:
    """What one forward pass of the whole model shares between its matrices.

    `row_keys`: int64, one key per row of the layers' input (`flexlora_ds.dropout.mask`), or None for keys drawn from
    torch's own generator at every layer.
    `penalty`: the coefficient source of a regulariser in the loss (`norm`, `squared`), or None.
    `row_folds`: int64 [rows], the part of the records that each row belongs to, for an observer that compares parts; or
    None for the rows' places.
    `observer`: what looks at the rows that pass by, and at their gradients, or None.
    `renew`: called after P and Q were written anew; what an observer has read of them is read again. Or None.
    `fused_masks`: compute dropout inside one kernel; None does so where there is one (`flexlora_ds.dropout.apply`).
    `plain`: compute in single operations with autograd's gradients, the reference, instead of in one node.
    `handed`: set inside a compiled layer only (`launch.model.compiled_blocks`).
    """

    row_keys: Tensor | None = None
    row_folds: Tensor | None = None
    penalty: PenaltyGradient | None = None
    observer: RowObserver | None = None
    renew: Callable[[], None] | None = None
    fused_masks: bool | None = None
    plain: bool = False
    handed: Handed | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: without what belongs to a run, which would bring its engine along."""
        return vars(self) | {"penalty": None, "observer": None, "renew": None, "handed": None}


class AdaptedLinear(nn.Module):
    """A frozen linear layer (out × in) plus s · P diag(λ) Q, P [out, r], λ [r], Q [r, in].

    `key` names it to the dropout, `place` is its number in a compiled layer.

    The three parameters keep their identity for the whole run: a rank change gives them new data.

    An ordinary linear layer's W and b become parameters of this module, `weight` and `bias`, so that ZeRO-3 gathers
    them with P, λ and Q; any other `base` (quantised, hooked, a subclass, a Conv1D) stays a submodule and is called as
    it is.
    """

    base: nn.Module
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, base: nn.Module, name: str, config: FlexLoRAConfig, context: ForwardContext) -> None:
        super().__init__()
        self._take_over(base)
        self.name = name
        self.scaling = config.alpha / config.rank
        self.dropout = config.dropout
        self.context = context
        self.key = name_key(name)
        self.place = 0
        rng = generator(config.seed, "init", name)
        self.out_features, self.in_features = out, features = layer_shape(base)
        weight = cast("Tensor", base.weight)
        device, dtype = weight.device, adapter_dtype(weight)
        self.P = nn.Parameter(gaussian(out, config.rank, init_std(config, out), rng).to(device, dtype))
        self.lam = nn.Parameter(torch.zeros(config.rank, device=device, dtype=dtype))
        self.Q = nn.Parameter(
            gaussian(config.rank, features, init_std(config, features), rng).to(device, dtype)
        )

    def _take_over(self, base: nn.Module) -> None:
        if is_ordinary(base):
            object.__setattr__(self, "base", base)  # no submodule: its parameters are this module's
            self.weight = cast("nn.Parameter", base.weight)
            self.bias = cast("nn.Parameter | None", base.bias)
        else:
            self.base, self.weight, self.bias = base, None, None

    @property
    def rank(self) -> int:
        """The current rank, also while ZeRO-3 holds the parameters partitioned."""
        return whole_shape(self.lam)[0]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Torch's; where the ranks are others, its complaint of three shapes comes after one that says what to do."""
        lam, errors = state_dict.get(f"{prefix}lam"), args[-1]
        if torch.is_tensor(lam) and tuple(lam.shape) != tuple(self.lam.shape):
            errors.append(
                f"{self.name} has rank {len(lam)} there and {self.rank} here: before an optimizer is built, call "
                "flexlora_ds.checkpoint.state.set_ranks(model, {name: rank}) for all matrices."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.context.handed is not None:
            return self._traced(x, self.context.handed)
        drop = self._drop(x) if self.training and self.dropout > 0 else None
        scale = self.scaling if drop is None else self.scaling / (1 - self.dropout)
        if self._in_one_node(x):
            assert self.weight is not None
            y = adapted_linear(x, self.weight, self.bias, self.P, self.lam, self.Q, scale, drop)
        else:
            y = plain_adapted_linear(x, self._of_base(x), self.P, self.lam, self.Q, scale, drop)
        if self.context.penalty is not None and torch.is_grad_enabled():
            y = self.context.penalty.attach(y, self.P, self.Q)
        if self.context.observer is not None and torch.is_grad_enabled():
            y = self.context.observer.attach(self.name, y, x)
        return y

    def _traced(self, x: Tensor, handed: Handed) -> Tensor:
        """The same in operations that a compiler fuses and differentiates, of tensors handed over; no mask is written.

        Nothing here is a number that differs between layers, and the penalty is not there: who compiles adds it.
        """
        assert self.weight is not None
        key, columns, P, lam, Q = handed.of_matrices[self.place]
        rows, scale = x.reshape(-1, x.shape[-1]), self.scaling
        y = F.linear(rows, self.weight, self.bias)
        if handed.row_keys is not None:
            # Computed again in the backward pass, as `checkpoint` says: a compiler's own choice is to keep masks.
            keys = handed.row_keys.reshape(-1)
            rows = checkpoint(
                dropped_in_graph,
                rows,
                keys,
                key,
                columns,
                self.dropout,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            scale /= 1 - self.dropout
        update = F.linear(F.linear(rows, Q) * (lam * scale), P)
        # A sum, and no addmm: whatever reads the result computes it while reading, without another pass over y.
        return (y + update).view(*x.shape[:-1], y.shape[-1])

    def _of_base(self, x: Tensor) -> Tensor:
        """W x + b, of this module's own parameters where they are: `torch.func.functional_call` puts others there."""
        y: Tensor = self.base(x) if self.weight is None else F.linear(x, self.weight, self.bias)
        return y

    def _in_one_node(self, x: Tensor) -> bool:
        if self.context.plain or self.weight is None or self.weight.requires_grad:
            return False
        if torch._C._are_functorch_transforms_active():  # torch.func's grad, vmap and jvp know no such node
            return False
        return self.weight.dtype == x.dtype or autocast_dtype(x) is not None

    def _drop(self, x: Tensor) -> SeededDropout:
        rows = x.numel() // x.shape[-1]
        keys = self.context.row_keys
        if keys is None:
            limit = torch.iinfo(torch.int64)
            keys = torch.randint(limit.min, limit.max, (rows,), device=x.device)
        elif keys.numel() != rows:
            raise ValueError(f"{self.name}: {rows} input rows, but {keys.numel()} row keys")
        return SeededDropout(keys.reshape(-1), self.key, self.dropout, self.context.fused_masks)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scaling={self.scaling}, dropout={self.dropout}"
        )


def is_ordinary(base: nn.Module) -> bool:
    """Whether a layer is torch's own linear layer and nothing observes or replaces its forward pass."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return type(base) is nn.Linear and "forward" not in vars(base) and not any(hooks)


def whole_shape(p: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape before ZeRO-3 partitioned it."""
    return tuple(getattr(p, "ds_shape", p.shape))


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """The base's dtype; that of torch's default for a base held in integers (quantised)."""
    return weight.dtype if weight.is_floating_point() else torch.get_default_dtype()


def init_std(config: FlexLoRAConfig, width: int) -> float:
    """`unit`: a direction's vector has expected norm 1."""
    return 1 / math.sqrt(width) if config.init_std == "unit" else float(config.init_std)


def gaussian(rows: int, columns: int, std: float, rng: torch.Generator) -> Tensor:
    """fp32 normal values [rows, columns], drawn on the CPU so that every device and process gets the same."""
    return torch.randn(rows, columns, generator=rng) * std


def require_scale(layers: Mapping[str, AdaptedLinear], config: FlexLoRAConfig) -> None:
    """Raise UserError where layers were made at another alpha / rank: saved by `config`, ΔW would be another."""
    for name, layer in layers.items():
        if not math.isclose(layer.scaling, config.scaling):  # 0.3 / 3 is not 0.1 / 1
            raise UserError(
                f"the adapters were made with alpha / rank {layer.scaling:g}, and this configuration has "
                f"{config.scaling:g}",
                name,
                "give the alpha and rank that they were injected with",
            )


def adapters(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by their names in the unwrapped model, in module order.

    Raises:
        UserError: two have the same name, for parts of the model were adapted by themselves.
    """
    found: dict[str, AdaptedLinear] = {}
    for layer in _layers(model):
        if found.setdefault(layer.name, layer) is not layer:
            raise UserError(
                f"two adapted layers are named {layer.name}, of parts that were adapted by themselves",
                mend="call inject_adapters once, on the whole model",
            )
    return found


def require_in_place(model: nn.Module) -> None:
    """Raise UserError where an adapted layer stands elsewhere than when it was adapted: it is saved by its name.

    What wraps a model or a part of it adds to a path, and changes nothing else.
    """
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and not _leads_to(path, module.name):
            raise UserError(
                f"the layer that was adapted as {module.name} stands at {path} now, and would be saved as the former",
                mend="change the model first, then call inject_adapters",
            )


def _leads_to(path: str, name: str) -> bool:
    """Whether the parts of a name follow each other in a path, others between them or not."""
    parts = iter(path.split("."))
    return all(part in parts for part in name.split("."))


def _layers(model: nn.Module) -> Iterator[AdaptedLinear]:
    return (m for m in model.modules() if isinstance(m, AdaptedLinear))


def any_transposed(layers: Mapping[str, AdaptedLinear]) -> bool:
    """Whether some of the adapted layers store their weight as [in, out]."""
    return any(is_transposed(layer.base) for layer in layers.values())


def forward_context(model: nn.Module) -> ForwardContext:
    """The context that all matrices of a model share.

    Raises:
        UserError: the model carries no adapters.
    """
    for layer in _layers(model):
        return layer.context
    raise UserError("the model carries no adapters", mend="call inject_adapters(model, config) first")
