"""What a model's folder holds, looked at before anything of it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from flexlora_ds.base_model.source import ModelSource, fetch
from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import read_json_object
from flexlora_ds.terminal.plain_text import python_command

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONVERTER = (
    "import sys; from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained(sys.argv[1], trust_remote_code=False).save_pretrained(sys.argv[1])"
)
"""Reads the pickle by torch's restricted loader."""
_MOST = {
    re.compile(r"(^|_)(?<!per_)(layers?|blocks?|depths?|stages?)$"): 2_000,
    re.compile(r"^(n|num)_(\w+_)?experts$"): 20_000,
}
"""Of the modules that a key counts: with more, a model takes minutes to build.

A size of one (`block_size`, `shared_expert_intermediate_size`) is no count. Doge names 16,384 experts: rows of a table.
"""

Shapes = dict[str, tuple[int, ...]]


def model_folder(source: ModelSource, what: str) -> Path:
    """The folder with the files of `what` ("model" or "tokenizer"), fetched if it is not local, its configuration read.

    Raises:
        UserError: it holds an adapter beside the model, or a configuration that is none. What huggingface_hub raises;
            call it inside `one_line_errors`.
    """
    folder = fetch(source, what)
    config = folder / "config.json"
    if source.gguf_file is not None or config.is_file():
        _require_model_alone(source.name, folder)
    if source.gguf_file is None and config.is_file():
        _require_sane(read_json_object(config, "fetch the model again"), config)
    return folder


def stored_shapes(name: str, folder: Path) -> dict[Path, Shapes]:
    """The tensors' shapes by name by weight file, in the order they are read; opening a file checks its length.

    Args:
        name: the model's, for messages.

    Raises:
        UserError: no safetensors, or an index that cannot be followed. What safetensors raises for a damaged file.
    """
    from safetensors import safe_open

    found = {}
    for path in weight_files(name, folder):
        with safe_open(path, framework="pt") as file:
            found[path] = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return found


def weight_files(name: str, folder: Path) -> list[Path]:
    """The safetensors files that hold a model, as transformers chooses them; all of them inside its folder.

    Raises:
        UserError: there are none, only pickled ones, or an index that names none or leads out of the folder.
    """
    chosen = _named_in_config(folder) or next(
        (folder / file for file in (_SINGLE, _INDEX) if (folder / file).is_file()), None
    )
    if chosen is None:
        raise _without_safetensors(name, folder)
    return _indexed(chosen) if chosen.name.endswith(".index.json") else [chosen]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of any kind, and not a configuration alone."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "*.bin"))


def _named_in_config(folder: Path) -> Path | None:
    """The file that config.json names itself, which is read before any other."""
    config = folder / "config.json"
    named = read_json_object(config).get("transformers_weights") if config.is_file() else None
    if named is None:
        return None
    _require_inside(named, config, (".safetensors", ".safetensors.index.json"))
    return folder / str(named)


def _indexed(index: Path) -> list[Path]:
    again = "fetch the model again"
    content = read_json_object(index, again)
    for key in ("weight_map", "metadata"):
        if not isinstance(content.get(key), dict):
            raise UserError(f"no object {key!r}", str(index), again)
    names = list(content["weight_map"].values())
    for name in names:
        _require_inside(name, index, (".safetensors",))
    found = [index.parent / name for name in sorted(set(names))]
    missing = [file.name for file in found if not file.is_file()]
    if missing or not found:
        raise UserError(
            f"it names {missing[0] if missing else 'no file'}, which is not there", str(index), again
        )
    return found


def _require_inside(name: Any, place: Path, endings: tuple[str, ...]) -> None:
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("/")
    if path.is_absolute() or ".." in path.parts or not path.name.endswith(endings):
        raise UserError(
            f"it names the weight file {str(name)[:200]!r}, and only safetensors inside the model's folder are read",
            str(place),
            "fetch the model again, or name another",
        )


def _without_safetensors(name: str, folder: Path) -> UserError:
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled:
        return UserError(
            f"model {name} has pickled weights, which are never read: only safetensors are",
            pickled[0],
            f"convert them once: {python_command(_CONVERTER, folder)}",
        )
    return UserError(
        f"model {name} has no {_SINGLE} and no {_INDEX}", str(folder), "fetch it again, or name one that has"
    )


def _require_model_alone(name: str, folder: Path) -> None:
    """Refuse an adapter beside the model: transformers would attach it in some of the ways of loading, unasked."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"the folder of model {name} holds an adapter beside the model",
            str(folder / "adapter_config.json"),
            "move adapter_config.json and the adapter's weights to a folder of their own: evaluation takes it as "
            "--adapter, and python -m flexlora_ds.export --run RUN --to merged makes one model of a run's adapter and "
            "its base",
        )


def _require_sane(config: dict[str, Any], path: Path) -> None:
    for key, value in _numbers(config):
        for counts, most in _MOST.items():
            if value > most and counts.search(key):
                raise UserError(
                    f"{key} is above {most:,}, more than any model has", str(path), "fetch the model again"
                )


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number in a configuration that has a key, however deep its object stands."""
    objects = [config]
    while objects:
        for key, value in objects.pop().items():
            if isinstance(value, dict):
                objects.append(value)
            elif isinstance(value, (int, float)):
                yield key, value
