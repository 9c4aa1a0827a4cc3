"""Whether tracebacks are wanted, found out even where other options are wrong."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import yaml

from flexlora_ds.command import debug_asked
from flexlora_ds.errors import UserError
from launch.options.sources import find_recipe


def debug_wanted(arguments: Sequence[str], default_recipe: str) -> bool:
    """Whether the command line or else the recipe says `debug: true`."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    if "--debug" in words:
        return debug_asked(arguments)
    given = dict(itertools.pairwise(words))
    with contextlib.suppress(UserError, OSError, ValueError, yaml.YAMLError):
        text = find_recipe(given.get("--recipe", default_recipe)).read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
        return isinstance(recipe, dict) and recipe.get("debug") in (True, "true")
    return False
