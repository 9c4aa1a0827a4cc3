"""Who may import whom: arrows run downwards only, and heavy libraries stay out where they are not needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("flexlora_ds", "data_prep", "launch", "eval")
ALLOWED = {
    "flexlora_ds": {"flexlora_ds"},
    "data_prep": {"data_prep"},
    "launch": {"launch", "data_prep", "flexlora_ds"},
    "eval": {"eval", "data_prep", "flexlora_ds"},
}
PURE = {
    f"flexlora_ds.{name}": {"flexlora_ds.config", "flexlora_ds.errors"}
    for name in ("importance", "schedule", "allocation", "orthogonality")
}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth of it, but not for type checking alone."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


GRAPH = {module_name(path): imports(path) for package in OURS for path in (ROOT / package).rglob("*.py")}


@pytest.mark.parametrize("package", OURS)
def test_packages_import_downwards_only(package: str) -> None:
    for module, imported in GRAPH.items():
        if module.split(".")[0] == package:
            used = {name.split(".")[0] for name in imported} & set(OURS)
            assert used <= ALLOWED[package], module


def test_the_pure_modules_import_nothing_of_ours() -> None:
    for module, allowed in PURE.items():
        assert {name for name in GRAPH[module] if name.split(".")[0] in OURS} <= allowed, module


def test_there_is_no_cycle() -> None:
    known = set(GRAPH)
    edges = {module: {name for name in imported if name in known} for module, imported in GRAPH.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in sorted(edges[module] - {module}):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(known):
        visit(module, ())


def test_only_the_partitions_touch_deepspeeds_internals() -> None:
    for module, imported in GRAPH.items():
        if any(name.startswith("deepspeed.runtime") for name in imported):
            assert module.startswith("flexlora_ds.partitions"), module


@pytest.mark.parametrize(
    ("blocked", "code"),
    [
        (
            "deepspeed",
            "import flexlora_ds; from flexlora_ds import FlexLoRAConfig, inject_adapters, adapters",
        ),
        ("deepspeed", "import flexlora_ds.export, flexlora_ds.base_model.loading, eval.__main__"),
        ("torch", "import data_prep.build, data_prep.prompt, data_prep.records, data_prep.__main__"),
        ("torch", "import flexlora_ds, launch.options.train_options, flexlora_ds.config"),
    ],
)
def test_imports_without(blocked: str, code: str) -> None:
    program = f"import sys; sys.modules[{blocked!r}] = None\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load"}
ATTACKS = {"library/test_checkpoint.py", "distributed/test_damage.py"}
"""The tests that make a pickle to prove that it is refused."""


@pytest.mark.parametrize("folder", [*OURS, "benchmarks", "tests"])
def test_nothing_unpickles(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.relative_to(ROOT / folder).as_posix() in ATTACKS:
            continue
        tree = ast.parse(path.read_text())
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        named = {
            f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names
        }
        found = (imports(path) | used | named) & UNPICKLERS
        assert not found, f"{path} uses {found}"
        allowed = [k for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg == "trust_remote_code"]
        assert all(ast.unparse(k.value) == "False" for k in allowed), path
