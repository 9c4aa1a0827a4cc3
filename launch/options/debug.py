"""Whether tracebacks are wanted, found out even where other options are wrong."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

from flexlora_ds.errors import UserError
from flexlora_ds.terminal.command import debug_asked
from launch.options.sources import find_recipe, recipe_text
from launch.options.yaml_text import read_entries


def debug_wanted(arguments: Sequence[str], default_recipe: str) -> bool:
    """Whether the command line or else the recipe says `debug: true`."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    if "--debug" in words:
        return debug_asked(arguments)
    given = dict(itertools.pairwise(words))
    with contextlib.suppress(UserError, OSError):
        path = find_recipe(given.get("--recipe", default_recipe))
        entries = read_entries(recipe_text(path), str(path))
        return any(entry.key == "debug" and entry.value() in (True, "true") for entry in entries)
    return False
