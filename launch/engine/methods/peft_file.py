"""`method: peft`: any kind of adapter that PEFT has, from a file in the format of its own `adapter_config.json`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flexlora_ds.adapter.inject import linear_names, match_modules
from flexlora_ds.base_model.loading import load_skeleton
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.fields import nearest
from flexlora_ds.files.reading import read_json_object
from flexlora_ds.orientation import LayerShape
from flexlora_ds.peft_reading.attach import FAULTS
from flexlora_ds.peft_reading.config import shown
from launch.engine.methods.peft_adapter import PeftAdapter
from launch.engine.methods.protocol import ANEW, Beginning
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from peft import PeftConfig

OF_AN_ADAPTER = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)
"""Keys that say what an adapter is or was made with, and nothing of how one is trained."""
_ELSEWHERE: Mapping[str, str] = {
    "ADALORA": "choose method adalora, which calls its allocator",
    "POLY": "choose a kind that asks for no task with each record",
    "XLORA": "choose a kind that needs no adapters of others",
    "ADAPTION_PROMPT": "choose a kind that adapts layers",
    "SHADOW": "choose a kind that adapts layers",
}
"""What to do instead of a kind that this loop cannot train."""
START_OF_ITS_OWN: Mapping[str, str] = {
    "pissa": "choose method pissa",
    "olora": "choose method olora",
    "lora_ga": "choose method lora_ga",
    "corda": "prepare such an adapter with PEFT itself",
    "eva": "prepare such an adapter with PEFT itself",
    "loftq": "choose true",
}
"""What to do instead of a LoRA's start that looks at data, or changes the base; by how its name begins."""


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


def read_peft_config(options: TrainOptions) -> PeftConfig:
    """PEFT's configuration of the file that `peft_config` names.

    Raises:
        UserError: no file is named, it is none, PEFT does not know its kind or one of its keys, a value is not allowed,
            or the kind cannot be trained in this loop.
    """
    if options.peft_config is None:
        raise UserError(
            "method peft needs peft_config",
            options.place("method"),
            "name a file as PEFT's adapter_config.json",
        )
    path = Path(options.peft_config)
    values = read_json_object(path, "write one as PEFT's adapter_config.json")
    kind = _known_kind(values, str(path))
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"task_type {shown(values['task_type'])}", str(path), "leave it out: it is CAUSAL_LM")
    settings = {key: value for key, value in values.items() if key not in OF_AN_ADAPTER}
    _require_known(settings, list(kind.__dataclass_fields__), str(path))
    with _peft_faults(str(path)):
        config: PeftConfig = kind(**settings, task_type="CAUSAL_LM")
    _require_trainable(config, str(path))
    return config


def _known_kind(values: Mapping[str, Any], place: str) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    given = values.get("peft_type")
    if not isinstance(given, str) or given not in known:
        close = nearest(given, [kind.lower() for kind in known]) if isinstance(given, str) else None
        todo = f"did you mean {close.upper()}?" if close else f"give one of {', '.join(sorted(known))}"
        what = f"peft_type {shown(given)} is not known to PEFT" if "peft_type" in values else "no peft_type"
        raise UserError(what, place, todo)
    return known[given]


def _require_known(settings: Mapping[str, Any], known: list[str], place: str) -> None:
    for key in settings:
        if key not in known:
            close = nearest(key, known)
            todo = f"did you mean {close}?" if close else "leave it out, or install the peft that knows it"
            raise UserError(f"{shown(key)} is not known to PEFT", place, todo)


def _require_trainable(config: Any, place: str) -> None:
    kind = str(config.peft_type.value)
    if config.is_prompt_learning or kind in _ELSEWHERE:
        todo = _ELSEWHERE.get(
            kind, "choose one that adapts layers: virtual tokens do not go with packed records"
        )
        raise UserError(f"peft_type {kind} cannot be trained here", place, todo)
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str):
        for word, todo in START_OF_ITS_OWN.items():
            if init.lower().startswith(word):
                raise UserError(f"init_lora_weights {shown(init)} is more than a file can say", place, todo)


@contextmanager
def _peft_faults(place: str) -> Iterator[None]:
    """What PEFT raises for a configuration, as one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"PEFT cannot make this adapter: {lines[0][:300]}", place, "correct the file"
        ) from error


class PeftFromFile(PeftAdapter):
    """The kind and the settings of a file; `rank`, `alpha` and `dropout` of the options say nothing here."""

    def peft_config(self) -> PeftConfig:
        """As the file says."""
        return read_peft_config(self.options)

    def adapt(self, model: nn.Module, beginning: Beginning = ANEW) -> nn.Module:
        """Wrap the model; its targets are the file's, or those of the options where it names none.

        Raises:
            UserError: PEFT cannot make the adapter on this model, or the base's weights would not stay as they are.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        config: Any = self.peft_config()
        self._settings = _plain(config)
        if hasattr(config, "target_modules") and config.target_modules is None:
            config.target_modules = match_modules(linear_names(model), self.options.target_modules)
        before = _sums(model)
        with _peft_faults(str(self.options.peft_config)):
            wrapped: Any = self.wrapped_in(model, config)
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
