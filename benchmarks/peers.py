"""What FlexLoRA is measured against, with the face of a `Method` as far as a step needs it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlora_ds.adapter.inject import linear_names, match_modules
from flexlora_ds.partitions import forget_construction
from launch.engine.adam import AdamSettings
from launch.options.train_options import TrainOptions

REGULARISER = 0.1  # the weight of the published code, and of PEFT's examples


class Peer:
    """A method whose ranks never change, trained by torch's own AdamW."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options

    def adapt(self, model: nn.Module) -> nn.Module:
        """Add what is trained."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """Over all that is trained."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            trained, lr=self.options.lr, betas=adam.betas, eps=adam.eps, weight_decay=0.0
        )

    def attach(self, engine: Any, total_steps: int, validate: None) -> None:
        """Keep the engine."""
        self.engine = engine
        forget_construction(engine)

    def before_forward(self, batch: Any, device: torch.device) -> None:
        """Nothing is seeded by records."""

    def after_step(self, step: int) -> None:
        """Nothing follows an update."""

    def regulariser(self) -> Tensor | None:
        """What is added to the loss."""
        return None


class FrozenBase(Peer):
    """The floor: the base alone, behind one trained number, so that gradients go through all of its layers."""

    def adapt(self, model: Any) -> nn.Module:
        """Scale the embeddings by a trained 1."""
        device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        gain = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        model.register_parameter("gain", gain)
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out * model.gain)
        return model


class PlainSVD(Peer):
    """y = W x + s · ((drop(x) Qᵀ) λ) Pᵀ written out, as in the published code, its regulariser in autograd."""

    def adapt(self, model: nn.Module) -> nn.Module:
        """Wrap the target layers."""
        options = self.options
        self.layers = []
        for name in match_modules(linear_names(model), options.target_modules):
            parent, _, leaf = name.rpartition(".")
            layer = _SVDLinear(model.get_submodule(name), options)
            setattr(model.get_submodule(parent), leaf, layer)
            self.layers.append(layer)
        return model

    def regulariser(self) -> Tensor:
        """γ · the mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖ over all matrices."""
        terms = [_violation(m) for layer in self.layers for m in (layer.P.t(), layer.Q)]
        return REGULARISER * torch.stack(terms).mean()


class _SVDLinear(nn.Module):
    def __init__(self, base: Any, options: TrainOptions) -> None:
        super().__init__()
        self.base, self.dropout, self.scale = base, nn.Dropout(options.dropout), options.alpha / options.rank
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.P = nn.Parameter(torch.randn(base.out_features, options.rank, **like) * 0.02)
        self.lam = nn.Parameter(torch.zeros(options.rank, **like))
        self.Q = nn.Parameter(torch.randn(options.rank, base.in_features, **like) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + F.linear(F.linear(self.dropout(x), self.Q) * self.lam, self.P) * self.scale


class AdaLoRA(Peer):
    """PEFT's AdaLoRA with its regulariser; its sensitivity averages and its masks are left out, in its favour."""

    def adapt(self, model: nn.Module) -> nn.Module:
        """As it comes, at a constant rank."""
        from peft import AdaLoraConfig, get_peft_model

        options = self.options
        config = AdaLoraConfig(
            init_r=options.rank,
            target_r=options.rank,
            lora_alpha=int(options.alpha),
            lora_dropout=options.dropout,
            target_modules=match_modules(linear_names(model), options.target_modules),
            total_step=10**6,
            tinit=1,
            tfinal=1,
            task_type="CAUSAL_LM",
        )
        wrapped: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
        named = wrapped.named_parameters()
        self.matrices = [(n, p) for n, p in named if p.requires_grad and ("lora_A" in n or "lora_B" in n)]
        self.weight = config.orth_reg_weight
        return wrapped

    def regulariser(self) -> Tensor:
        """What AdaLoraModel.forward adds where it computes the loss itself."""
        terms = [_violation(p if "lora_A" in n else p.t()) for n, p in self.matrices]
        return self.weight * torch.stack(terms).mean()


def _violation(rows: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(
        rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    )
