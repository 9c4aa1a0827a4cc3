"""Who may import whom: arrows run downwards only, and heavy libraries stay out where they are not needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("flexlora_ds", "data_prep", "launch", "eval")
ALLOWED = {
    "flexlora_ds": {"flexlora_ds"},
    "data_prep": {"data_prep", "flexlora_ds"},
    "launch": {"launch", "eval", "data_prep", "flexlora_ds"},
    "eval": {"eval", "data_prep", "flexlora_ds"},
}
PURE = {
    f"flexlora_ds.{name}": {"flexlora_ds.config", "flexlora_ds.errors"}
    for name in ("importance", "schedule", "allocation", "orthogonality")
}


FLOORS = {
    "launch": (
        ("train", "demo"),
        ("planning", "loop"),
        ("engine",),
        ("model", "trackers"),
        ("report",),
        ("data",),
        ("run_folder",),
        ("options", "distributed"),
        ("command", "progress"),
    ),
    "flexlora_ds": (
        ("integrations",),
        ("controller", "export", "adapter_start"),
        ("rank_changes", "exports"),
        ("peft_reading",),
        (
            "checkpoint",
            "base_model",
            "directions",
            "gradient",
            "saving",
            "worth",
        ),
        ("adapter", "partitions", "peft_format"),
        (
            "importance",
            "schedule",
            "allocation",
            "orthogonality",
            "optimizer",
            "dropout",
            "extensions",
        ),
        ("config", "seeds", "files", "devices", "agreement"),
        ("terminal", "fields", "patterns", "launcher"),
        ("errors", "rounding", "orientation", "home"),
    ),
}
"""From the top: a room imports from the floors below its own, and from itself."""
UPWARD: set[tuple[str, str]] = set()
"""The imports that still run upwards. This list only ever becomes shorter."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}


def imports(path: Path, *, types: bool = False) -> set[str]:
    """Full names of the modules that a file imports, at any depth of it; with `types`, those for type checking too."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found


GRAPH = {module: imports(path) for module, path in FILES.items()}
WITH_TYPES = {module: imports(path, types=True) for module, path in FILES.items()}


@pytest.mark.parametrize("package", OURS)
def test_packages_import_downwards_only(package: str) -> None:
    for module, imported in WITH_TYPES.items():
        if module.split(".")[0] == package:
            used = {name.split(".")[0] for name in imported} & set(OURS)
            assert used <= ALLOWED[package], module


def test_a_run_uses_the_evaluation_by_one_door() -> None:
    """`eval.live`, from the room of the loop; a model is not evaluated in two ways."""
    used = {
        (module.split(".")[1], name)
        for module, imported in WITH_TYPES.items()
        for name in imported
        if module.startswith("launch.") and name.split(".")[0] == "eval"
    }
    assert used == {("loop", "eval.live")}


def rooms(package: str) -> set[tuple[str, str, str, str]]:
    """What a package's rooms import from each other: module, its room, the module imported, its room."""
    found = set()
    for module, imported in WITH_TYPES.items():
        for name in imported & set(FILES) - {package}:
            if module.startswith(f"{package}.") and name.startswith(f"{package}."):
                found.add((module, module.split(".")[1], name, name.split(".")[1]))
    return {edge for edge in found if edge[1] != edge[3]}


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_from_the_floors_below(package: str) -> None:
    floors = {room: depth for depth, floor in enumerate(FLOORS[package]) for room in floor}
    here = {name.split(".")[1] for name in FILES if name.startswith(f"{package}.")}
    assert here == set(floors), "a room without a floor, or a floor without its room"
    upward = {(module, name) for module, mine, name, other in rooms(package) if floors[mine] >= floors[other]}
    assert upward == {edge for edge in UPWARD if edge[0].startswith(f"{package}.")}


def test_the_pure_modules_import_nothing_of_ours() -> None:
    for module, allowed in PURE.items():
        assert {name for name in WITH_TYPES[module] if name.split(".")[0] in OURS} <= allowed, module


def test_there_is_no_cycle() -> None:
    edges = {
        module: {name for name in imported & set(FILES) if (module, name) not in UPWARD}
        for module, imported in WITH_TYPES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in sorted(edges[module] - {module}):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(FILES):
        visit(module, ())


def test_no_test_imports_another() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        others = {name for name in imports(path) if name.startswith("tests.") and ".test_" in name}
        assert not others, f"{path}: what it shares with {others} belongs in tests/helpers"


@pytest.mark.complaint("LoRA-Pro 12")
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
        (
            "deepspeed",
            "from flexlora_ds import RankController, TorchEngine, save_adapter, start_from_gradient",
        ),
        ("deepspeed", "import flexlora_ds.integrations.transformers"),
        ("deepspeed", "import flexlora_ds.export, flexlora_ds.base_model.loading, eval.__main__"),
        ("torch", "import data_prep.build, data_prep.prompt, data_prep.records, data_prep.__main__"),
        ("torch", "import eval.__main__, eval.options"),
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


@pytest.mark.parametrize("package", OURS)
def test_code_that_comes_with_a_model_is_never_let_in(package: str) -> None:
    """Where it is not said, transformers asks on the terminal."""
    for module, path in FILES.items():
        if not module.startswith(package):
            continue
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if re.match(r"Auto\w+\.from_(pretrained|config)$", ast.unparse(call.func)):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert said.get("trust_remote_code") == "False", f"{path}, line {call.lineno}"


def test_every_third_party_package_is_declared() -> None:
    """What the packages and the benchmarks import stands in pyproject.toml, as a dependency or as an extra."""
    project = (ROOT / "pyproject.toml").read_text().split("[tool.setuptools", 1)[0]
    declared = {
        name.replace("-", "_").lower()
        for name in re.findall(r'^ *(?:[\w-]+ = \[)?"([\w-]+)[><=]', project, re.M)
    }
    names = {"yaml": "pyyaml", "PIL": "pillow", "lm_eval": "lm_eval"}
    given = {"triton"}  # torch brings it where it can run
    served = {"vllm"}  # a server, beside which the evaluation runs
    files = [*FILES.values(), *(ROOT / "benchmarks").rglob("*.py")]
    tops = {name.partition(".")[0] for path in files for name in imports(path, types=True)}
    foreign = tops - set(sys.stdlib_module_names) - {*OURS, "benchmarks", "tests"}
    assert {names.get(name, name).lower() for name in foreign} - given - served <= declared
