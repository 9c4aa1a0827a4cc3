"""A model without its values: its modules, shapes and configuration, on the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexlora_ds.base_model.model_folder import Shapes, model_folder, stored_shapes
from flexlora_ds.base_model.source import FORESEEN, LONGEST_TEXT, ModelSource
from flexlora_ds.base_model.stored_names import Places, one_to_one, renamed
from flexlora_ds.errors import UserError
from flexlora_ds.terminal.command import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN_ATTENTION = "eager"
"""Every model has it, and it needs no package."""
_MOST_MISSING = 3
"""Times what is stored; a tied head counts twice."""


def read_config(source: ModelSource, folder: Path) -> Any:
    """transformers' configuration of the model in a folder; code that lies there is never run.

    Raises what transformers raises; call it inside `one_line_errors`.
    """
    from transformers import AutoConfig

    gguf = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    with _described(source.name):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **gguf)


def build(
    config: Any, dtype: torch.dtype | None = None, attention: str | None = _PLAIN_ATTENTION
) -> PreTrainedModel:
    """The modules that a configuration describes, with no values read."""
    from transformers import AutoModelForCausalLM

    given = {} if dtype is None else {"dtype": dtype}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, trust_remote_code=False, **given
    )
    return model


class NotCausalError(UserError):
    """A model that is there, and of another kind."""


def blueprint(
    name: str, config: Any, dtype: torch.dtype | None = None, *, tied: bool = True
) -> PreTrainedModel:
    """The model of a configuration on the meta device; a causal language model, as text needs.

    Args:
        name: the model's, for messages.
        dtype: of its tensors; None takes the configuration's.
        tied: whether tensors are tied as the configuration says.

    Raises:
        UserError: the configuration describes no model, or one of another kind.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not own_code:
        raise NotCausalError(
            f"model {name} is of type {config.model_type}, of which transformers has no causal language model",
            "config.json",
            "name a model that continues text alone",
        )
    with ExitStack() as stack:
        stack.enter_context(_described(name))
        stack.enter_context(torch.device("meta"))
        if not tied:
            stack.enter_context(no_init_weights())  # which leaves out the tying, too
        return build(config, dtype)


@contextmanager
def _described(name: str) -> Iterator[None]:
    """Raise UserError for whatever a constructor of transformers raises that is called with a file's values."""
    try:
        yield
    except FORESEEN:
        raise
    except Exception as error:
        kind = f"{type(error).__name__}: {one_line(str(error), LONGEST_TEXT)}"
        raise UserError(
            f"config.json of model {name} describes no model", kind, "fetch the model again"
        ) from error


def _is_quantised(config: Any) -> bool:
    parts = (config, config.get_text_config())
    return any(getattr(part, "quantization_config", None) is not None for part in parts)


class StoredModel:
    """A model's folder with safetensors, its configuration, and how the two fit together."""

    def __init__(self, source: ModelSource, dtype: torch.dtype) -> None:
        self.folder = model_folder(source, "model")
        self.config = read_config(source, self.folder)
        self.shards: Mapping[Path, Shapes] = stored_shapes(source.name, self.folder)
        self._dtype = dtype
        self._model = blueprint(source.name, self.config, dtype, tied=False)
        names = [name for shapes in self.shards.values() for name in shapes]
        self._twice = len(names) != len(set(names))
        self._renamed, self._converts = renamed(self._model, names)
        self._quantised = _is_quantised(self.config)
        if not self._quantised:
            self._require_shapes()
            self._require_sizes()

    def places(self) -> Places | None:
        """Where each stored tensor goes; None where that is not one to one, and transformers has to load it."""
        if self._converts or self.read_as_it_is() is None:
            return None
        return one_to_one(self._model, self._renamed, self._equal)

    def read_as_it_is(self) -> Mapping[str, str] | None:
        """The model's name of each stored tensor that is not converted; None where the files do not say all of it."""
        plan = self._model._get_dtype_plan(self._dtype)
        more_files = getattr(type(self.config), "extra_files", ())  # Transformers 5.20 has none
        return None if self._twice or self._quantised or plan or more_files else self._renamed

    def _require_shapes(self) -> None:
        """Before anything of the model's size is held: transformers finds this out afterwards."""
        state = self._model.state_dict()
        for path, shapes in self.shards.items():
            for name, shape in shapes.items():
                place = self._renamed.get(name)
                expected = None if place is None else tuple(state[place].shape)
                if expected is not None and shape != expected:
                    raise UserError(
                        f"{path}: {name} is {shape}, but config.json makes it {expected}",
                        mend="fetch the model again",
                    )

    def _require_sizes(self) -> None:
        """Before what is missing is held, or what would be made of converted tensors."""
        described = sum(tensor.numel() for tensor in self._model.state_dict().values())
        stored = sum(math.prod(shape) for shapes in self.shards.values() for shape in shapes.values())
        if described > _MOST_MISSING * stored:
            raise UserError(
                f"config.json describes {described:,} weights and the files hold {stored:,}",
                str(self.folder),
                "fetch the model again",
            )

    def _equal(self, name: str, other: str) -> bool:
        a, b = (self._read(n) for n in (name, other))
        return a.shape == b.shape and torch.equal(a, b)

    def _read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        path = next(path for path, shapes in self.shards.items() if name in shapes)
        with safe_open(path, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name).to(self._dtype)
        return found
