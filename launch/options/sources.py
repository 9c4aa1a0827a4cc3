"""Where option values come from: a recipe and the command line, each value with the place it was given."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora_ds.errors import UserError
from flexlora_ds.fields import nearest
from flexlora_ds.files.reading import MIB, read_text
from flexlora_ds.home import at_home
from launch.options.yaml_text import read_entries

RECIPES = Path(__file__).parents[1] / "recipes"
LAUNCHER_FLAGS = ("local_rank", "local-rank")
"""What DeepSpeed's and torch's launchers append for every process; the environment says the same."""


FOREIGN_KEYS: Mapping[str, str] = {
    "base_model": "model",
    "bf16": "dtype",
    "data_path": "data",
    "deepspeed": "ds",
    "deepspeed_config": "ds",
    "fp16": "dtype",
    "gradient_accumulation_steps": "batch_size",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "lora_target_modules": "target_modules",
    "lr_scheduler_type": "lr_schedule",
    "model_name_or_path": "model",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "micro_batch_size",
    "r": "rank",
    "resume_from_checkpoint": "resume",
    "train_batch_size": "batch_size",
    "train_sampling_strategy": "group_by_length",
    "val_set_size": "val_size",
}
"""What other trainers call our keys: hints only, never accepted in their place."""


@dataclass(frozen=True)
class Given:
    """Values as they were given, by key, and the place of each for error messages."""

    values: Mapping[str, Any]
    places: Mapping[str, str]


def read_arguments(argv: Sequence[str], known: Collection[str]) -> Given:
    """The `--key value` and `--key=value` pairs of a command line; of a repeated key the last one counts.

    Raises:
        UserError: an unknown key, a key without a value, or a word that belongs to no key.
    """
    values: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} belongs to no key", "command line", "write --key value")
        key, equals, value = word[2:].partition("=")
        if key not in known and key not in LAUNCHER_FLAGS:
            raise UserError(f"unknown key --{key}", "command line", f"{_meant(key, known)}")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{key} has no value", "command line", f"write --{key} VALUE")
            value = words.pop(0)
        values[key] = value
    for flag in LAUNCHER_FLAGS:
        values.pop(flag, None)
    return Given(values, {key: f"--{key} on the command line" for key in values})


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by the bare name of a shipped one.

    Raises:
        UserError: there is no such file.
    """
    name = at_home(name)
    shipped = RECIPES / f"{Path(name).stem}.yaml"
    is_shipped_name = name == shipped.stem or Path(name) == Path("launch", "recipes", shipped.name)
    for path in (Path(name), shipped):
        if path.is_file() and (path != shipped or is_shipped_name):
            return path
    stems = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise UserError(f"no recipe file {name}", "--recipe", f"give a YAML file or one of {', '.join(stems)}")


def read_recipe(path: Path, known: Collection[str]) -> Given:
    """The key-value pairs of a recipe file.

    Raises:
        UserError: the file cannot be read, is no flat YAML mapping, or has an unknown or repeated key.
    """
    return read_yaml(recipe_text(path), str(path), known)


def recipe_text(path: Path) -> str:
    """The text of a recipe file. Raises UserError where it cannot be read."""
    return read_text(path, "give a YAML file of at most 1 MiB", limit=MIB)


def read_yaml(text: str, origin: str, known: Collection[str]) -> Given:
    """As `read_recipe`, from the text of the file; `origin` names it in messages."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for entry in read_entries(text, origin):
        key, place = entry.key, entry.place
        if key not in known:
            raise UserError(f"unknown key {key!r}", place, _meant(key, known))
        if key in places:
            raise UserError(f"key {key} stands twice", place, "remove one of them")
        values[key], places[key] = entry.value(), place
    return Given(values, places)


def _meant(key: str, known: Collection[str]) -> str:
    close = nearest(key, known, FOREIGN_KEYS)
    return f"did you mean {close}?" if close else "--help lists all keys"
