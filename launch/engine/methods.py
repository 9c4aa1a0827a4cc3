"""What is trained: FlexLoRA, or PEFT's LoRA in the same loop. One small class each, with the same interface."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from flexlora_ds.adapter.inject import inject_adapters, linear_names, match_modules
from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.adapter.parameter_groups import build_optimizer
from flexlora_ds.controller import RankController
from flexlora_ds.files.safetensors_file import save_tensors
from flexlora_ds.files.text import write_text_atomically
from flexlora_ds.gradient.growth import FOLDS
from flexlora_ds.partitions import MASTER, forget_construction, live_shards
from flexlora_ds.peft_format import PROMPT_FILE, prompt_note, require_finite
from flexlora_ds.rank_change import RankChange
from flexlora_ds.saving import save_adapter
from launch.data.batches import MicroBatch
from launch.engine.adam import AdamSettings
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Method(Protocol):
    """One training method: built in the order of these functions."""

    matrices: list[str]

    @property
    def controller(self) -> RankController | None:
        """What changes ranks, for the checkpoint; None where nothing does."""

    def adapt(self, model: nn.Module) -> nn.Module:
        """Freeze the base, add what is trained, return the model to train."""

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters."""

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Begin to live with a DeepSpeed engine."""

    def before_forward(self, batch: MicroBatch, device: torch.device) -> None:
        """Called for every micro-batch just before the model sees it."""

    def after_step(self, step: int) -> RankChange | None:
        """Called once after every attempted update."""

    def orthogonality(self) -> float | None:
        """Mean ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F; None where there is nothing of the kind."""

    @property
    def total_rank(self) -> int:
        """Σ of the ranks of all matrices."""

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters now."""

    def save(self, folder: Path, base_model: str) -> dict[str, list[float]]:
        """Write the adapter in PEFT's format; collective. Returns λ by matrix (empty without λ) on process 0."""


class FlexLoRA:
    """The method of this project."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.config = options.to_flexlora_config()
        self.matrices: list[str] = []
        self._controller: RankController | None = None

    @property
    def controller(self) -> RankController:
        """The rank controller, once there is an engine."""
        assert self._controller is not None, "attach(engine) comes first"
        return self._controller

    def adapt(self, model: nn.Module) -> nn.Module:
        """Inject the adapters in place."""
        self.matrices = inject_adapters(model, self.config)
        return model

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """Our AdamW, with λ in groups of its own."""
        return build_optimizer(model, self.config, self.options.lr, betas=adam.betas, eps=adam.eps)

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Start the rank controller."""
        self._controller = RankController(engine, self.config, total_steps, validate)
        self._context = forward_context(engine.module)

    def before_forward(self, batch: MicroBatch, device: torch.device) -> None:
        """Seed the dropout masks of this micro-batch, and say whose its rows are where gradients are looked at."""
        context = self._context
        context.row_keys = batch.row_keys.to(device, non_blocking=True)
        folds = None if context.observer is None else batch.folds_of_rows(FOLDS)
        context.row_folds = None if folds is None else folds.to(device)

    def after_step(self, step: int) -> RankChange | None:
        """Regularise, and change ranks where a change is due."""
        return self.controller.after_step(step)

    def orthogonality(self) -> float | None:
        """How far P and Q are from orthonormal; collective."""
        return self.controller.orthogonality()

    @property
    def total_rank(self) -> int:
        """Σ of the ranks of all matrices."""
        return self.controller.total_rank

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters now."""
        return self.controller.trainable_parameters()

    def save(self, folder: Path, base_model: str) -> dict[str, list[float]]:
        """Write P diag(λ) Q of every matrix, from the fp32 masters, as a LoRA with rank and alpha patterns."""
        return save_adapter(
            self.controller.engine,
            folder,
            self.config,
            base_model=base_model,
            prompt=self.options.prompt,
            prompt_date=self.options.prompt_date,
        )


class PeftLoRA:
    """PEFT's LoRA, as it comes, under the same loop, data and loss."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.matrices: list[str] = []

    @property
    def controller(self) -> None:
        """Ranks never change."""
        return None

    def adapt(self, model: nn.Module) -> nn.Module:
        """Wrap the model in PEFT's LoRA."""
        from peft import LoraConfig, get_peft_model

        self.matrices = match_modules(linear_names(model), self.options.target_modules)
        torch.manual_seed(self.options.seed)
        wrapped: nn.Module = get_peft_model(
            model,
            LoraConfig(
                r=self.options.rank,
                lora_alpha=self.options.alpha,
                lora_dropout=self.options.dropout,
                target_modules=self.matrices,
                task_type="CAUSAL_LM",
            ),
            autocast_adapter_dtype=False,
        )
        return wrapped

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """torch's AdamW over all of LoRA's parameters."""
        params = [p for p in model.parameters() if p.requires_grad]
        options = self.options
        return torch.optim.AdamW(
            params, lr=options.lr, betas=adam.betas, eps=adam.eps, weight_decay=options.weight_decay
        )

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Remember the engine."""
        self.engine = engine
        forget_construction(engine)

    def before_forward(self, batch: MicroBatch, device: torch.device) -> None:
        """PEFT draws its dropout from torch's generator."""

    def after_step(self, step: int) -> RankChange | None:
        """Ranks never change."""
        return None

    def orthogonality(self) -> float | None:
        """There is no P and Q."""
        return None

    @property
    def total_rank(self) -> int:
        """Σ of the ranks of all matrices."""
        return self.options.rank * len(self.matrices)

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(
            getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters() if p.requires_grad
        )

    def save(self, folder: Path, base_model: str) -> dict[str, list[float]]:
        """Write PEFT's files from the fp32 masters."""
        named = {p: n for n, p in self.engine.module.named_parameters() if p.requires_grad}
        tensors = {}
        for p, value in live_shards(self.engine).read(list(named), MASTER):
            if self.engine.global_rank == 0:
                tensors[named[p].replace(".default.", ".")] = value.detach().cpu().clone().contiguous()
        if self.engine.global_rank == 0:
            require_finite(tensors, str(folder))
            folder.mkdir(parents=True, exist_ok=True)
            config = self.engine.module.peft_config["default"]
            config.base_model_name_or_path, config.inference_mode = base_model, True
            save_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(folder)
            prompt = json.dumps(prompt_note(self.options.prompt, self.options.prompt_date))
            write_text_atomically(folder / PROMPT_FILE, prompt + "\n")
        return {}


METHODS: dict[str, Callable[[TrainOptions], Method]] = {"flexlora": FlexLoRA, "lora": PeftLoRA}
"""Every method by its name in the option `method`."""


def build_method(options: TrainOptions) -> Method:
    """The method that the options name."""
    return METHODS[options.method](options)
