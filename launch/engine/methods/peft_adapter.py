"""Any adapter of PEFT in the same loop: what its kinds have in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.inject import linear_names, match_modules
from flexlora_ds.files.safetensors_file import save_tensors
from flexlora_ds.files.text import write_text_atomically
from flexlora_ds.partitions import MASTER, live_shards
from flexlora_ds.peft_format import CONFIG_FILE, PROMPT_FILE, WEIGHTS_FILE, prompt_note, require_finite
from launch.engine.methods.fixed import FixedMethod
from launch.engine.methods.protocol import ANEW, Beginning

if TYPE_CHECKING:
    from peft import PeftConfig


class PeftAdapter(FixedMethod, ABC):
    """An adapter as PEFT makes it, under the same loop, data and loss; a kind says its configuration."""

    @abstractmethod
    def peft_config(self) -> PeftConfig:
        """PEFT's configuration of these options, for `matrices`."""

    def adapt(self, model: nn.Module, beginning: Beginning = ANEW) -> nn.Module:
        """Wrap the model in PEFT's adapter."""
        self.matrices = match_modules(linear_names(model), self.options.target_modules)
        return self.wrapped(model)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model in PEFT's adapter."""
        return self.wrapped_in(model, self.peft_config())

    def wrapped_in(self, model: nn.Module, config: PeftConfig) -> nn.Module:
        """The model in an adapter, drawn from the run's seed."""
        from peft import get_peft_model

        torch.manual_seed(self.options.seed)
        with _said_to_be_partitioned(model):
            found: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
        return found

    def save(self, folder: Path, base_model: str) -> dict[str, list[float]]:
        """Write PEFT's files, what was trained from the fp32 masters."""
        model = self.engine.module
        named = {p: name for name, p in model.named_parameters() if p.requires_grad}
        masters = {}
        for p, value in live_shards(self.engine).read(list(named), MASTER):
            if self.engine.global_rank == 0:
                masters[named[p]] = value.detach().to("cpu", copy=True)
        if self.engine.global_rank == 0:
            tensors = _of_the_adapter(model, masters)
            config = copy(model.peft_config["default"])
            config.base_model_name_or_path, config.inference_mode = base_model, True
            self._write(folder, self.on_the_base(tensors, config), config)
        return {}

    def on_the_base(self, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The tensors of the adapter that belongs on the base as it was loaded; may change `config` to fit."""
        return tensors

    def _write(self, folder: Path, tensors: dict[str, Tensor], config: Any) -> None:
        require_finite(tensors, str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(folder)
        _keep_order(folder / CONFIG_FILE, config)
        prompt = json.dumps(prompt_note(self.options.prompt, self.options.prompt_date))
        write_text_atomically(folder / PROMPT_FILE, prompt + "\n")


def _keep_order(path: Path, config: Any) -> None:
    """The keys of patterns as they were in training: the first match counts, and PEFT writes them by the alphabet."""
    settings = json.loads(path.read_text())
    for option, given in settings.items():
        if option.endswith("_pattern") and isinstance(given, dict):
            settings[option] = {key: given[key] for key in getattr(config, option)}
    write_text_atomically(path, json.dumps(settings, indent=2) + "\n")


@contextmanager
def _said_to_be_partitioned(model: nn.Module) -> Iterator[None]:
    """While active, PEFT gathers the weights that it begins with, where ZeRO-3 has partitioned them: it asks this."""
    from transformers.integrations import HfDeepSpeedConfig

    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        yield
        return
    said = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # it holds as long as the object lives
    yield
    del said


def _of_the_adapter(model: Any, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT keeps of the model in a file, under its names there."""
    from peft import get_peft_model_state_dict

    # The rest are frozen parts of an adapter, and the base's weights, which PEFT leaves out.
    everything = {**model.state_dict(), **masters}
    kept = get_peft_model_state_dict(model, everything, save_embedding_layers=False)
    # Copies: layers may share a frozen part, and a file holds each by itself.
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in kept.items()}
