"""`method: peft`: any kind of adapter that PEFT has, as a file describes it (`peft_settings`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flexlora_ds.adapter.inject import linear_names, match_modules
from flexlora_ds.base_model.loading import load_skeleton
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.orientation import LayerShape
from flexlora_ds.peft_reading.config import shown
from launch.engine.methods.peft_adapter import PeftAdapter
from launch.engine.methods.peft_names import listed_names, require_known, require_modules
from launch.engine.methods.peft_settings import OF_AN_ADAPTER, peft_faults, read_peft_config
from launch.engine.methods.protocol import ANEW, Beginning
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from peft import PeftConfig


def require_possible(options: TrainOptions, stage: int, shapes: Mapping[str, LayerShape]) -> None:
    """See that the file says how to train, before a weight is loaded.

    Raises:
        UserError: as `read_peft_config`; or a kind at ZeRO-3 that computes with whole tensors.
    """
    config = read_peft_config(options)
    kind = str(config.peft_type.value)
    if stage == 3 and kind != "LORA":
        raise UserError(
            f"peft_type {kind} needs ZeRO-0, 1 or 2: only LoRA's layers are known to work on partitioned weights",
            options.place("method"),
            "choose a DeepSpeed JSON of one of these",
        )


def count_parameters(options: TrainOptions) -> int | None:
    """What the adapter of the file trains, tried on the model's shape alone; None where a kind must see weights.

    Raises:
        UserError: as `read_peft_config`, or PEFT cannot make it on this model.
    """
    read_peft_config(options)
    try:
        wrapped = PeftFromFile(options).adapt(load_skeleton(options.model))
    except UserError as error:
        if "meta" in error.fault or isinstance(error.__cause__, NotImplementedError):
            return None
        raise
    return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


class PeftFromFile(PeftAdapter):
    """The kind and the settings of a file; `rank`, `alpha` and `dropout` of the options say nothing here."""

    def peft_config(self) -> PeftConfig:
        """As the file says."""
        return read_peft_config(self.options)

    def adapt(self, model: nn.Module, beginning: Beginning = ANEW) -> nn.Module:
        """Wrap the model; its targets are the file's, or those of the options where it names none.

        Raises:
            UserError: PEFT cannot make the adapter on this model, a name in the file means nothing there, or the base's
                weights would not stay as they are.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        config: Any = self.peft_config()
        self._settings = _plain(config)
        if hasattr(config, "target_modules") and config.target_modules is None:
            config.target_modules = match_modules(linear_names(model), self.options.target_modules)
        place = str(self.options.peft_config)
        require_modules(model, config, place)
        listed, base = listed_names(config), [name for name, _ in model.named_modules()]
        before = _sums(model)
        with peft_faults(place):
            wrapped: Any = self.wrapped_in(model, config)
        require_known(listed, base, wrapped, place)
        layers = wrapped.base_model.model.named_modules()
        self.matrices = [name for name, module in layers if isinstance(module, BaseTunerLayer)]
        self._require_same_base(wrapped, before)
        self.remarks.append(f"{config.peft_type.value} of {self.options.peft_config}")
        return wrapped  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """The settings, which a run that goes on must have again."""
        return self._settings

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Compare the settings.

        Raises:
            RunError: the file says something else than it did.
        """
        odd = [key for key in self._settings if self._settings[key] != state.get(key)]
        if odd:
            raise RunError(
                f"the checkpoint is of another adapter: {odd[0]} is {shown(state.get(odd[0]))} in it",
                str(self.options.peft_config),
                "give its file again, or choose another out",
            )

    def _require_same_base(self, wrapped: Any, before: Mapping[int, float]) -> None:
        after = _sums(wrapped)
        place = str(self.options.peft_config)
        if any(after.get(key) != value for key, value in before.items()):
            raise UserError(
                "this adapter changes the base's weights before the first step, and would belong to no base on disk",
                place,
                "choose another way for it to begin",
            )
        if not any(p.requires_grad for p in wrapped.parameters()):
            raise UserError("nothing of this adapter is trained", place, "correct the file")


def _plain(config: Any) -> dict[str, Any]:
    """A configuration's settings as JSON gives them back."""
    settings = {key: value for key, value in config.to_dict().items() if key not in OF_AN_ADAPTER}
    found: dict[str, Any] = json.loads(
        json.dumps(settings, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
    return found


def _sums(model: nn.Module) -> dict[int, float]:
    """The sum of every parameter that is there whole, by its identity."""
    return {
        id(p): float(p.detach().sum(dtype=torch.float64))
        for p in model.parameters()
        if p.numel() and not p.is_meta
    }
