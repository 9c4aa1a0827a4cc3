"""An environment in which only the packages that the project declares can be imported, and those that these need."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.processes import ROOT

PROJECT = "flexlora-ds"
ALWAYS = {"pip", "setuptools", "pkg_resources", "_distutils_hack"}
"""What a new virtual environment holds, or torch asks for from Python 3.12 on."""
SITE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset({hidden!r})


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)


sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def bare_environment(folder: Path) -> dict[str, str]:
    """What to add to a process's environment; Python reads a module in `folder` when it starts, in its children too."""
    hidden = sorted(undeclared_modules())
    folder.joinpath("sitecustomize.py").write_text(SITE.format(hidden=hidden), encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def undeclared_modules() -> set[str]:
    """Top-level modules of installed packages that no declared dependency leads to."""
    declared = _closure()
    ours = {path.name for path in ROOT.iterdir()}
    found = {
        module
        for module, packages in packages_distributions().items()
        if not any(canonicalize_name(package) in declared for package in packages)
    }
    return found - ours - ALWAYS - _inside_setuptools()


def _inside_setuptools() -> set[str]:
    """Modules that setuptools brings along: once it is imported they look like installed packages."""
    spec = find_spec("setuptools")
    folders = [Path(place) / "_vendor" for place in spec.submodule_search_locations or ()] if spec else []
    return {path.name.partition(".")[0] for folder in folders if folder.is_dir() for path in folder.iterdir()}


def _closure() -> set[str]:
    """The project and all that it requires, extras left out."""
    found: set[tuple[str, str]] = set()
    todo = [(PROJECT, "")]
    while todo:
        package = todo.pop()
        if package not in found:
            found.add(package)
            todo += _required(*package)
    return {name for name, _ in found}


def _required(name: str, extra: str) -> Iterator[tuple[str, str]]:
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return
    for line in lines:
        asked = Requirement(line)
        if asked.marker is None or asked.marker.evaluate({"extra": extra}):
            yield from ((canonicalize_name(asked.name), each) for each in ("", *asked.extras))
