"""Every command of README and docs: its program, its files, its options; and what can run here is run."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.learning.settings import named
from eval.options import parse_options as parse_eval_options
from launch.options.train_options import parse_options
from tests.helpers.markdown import Command, commands, commands_in_sentences, pages
from tests.helpers.processes import ROOT
from tests.helpers.raw_rows import write_raw
from tests.helpers.training import make_place

FLAGS = {
    "deepspeed": {"--num_gpus", "--module"},
    "torchrun": {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"},
    "sbatch": {"--nodes", "--gpus-per-node", "--signal"},
}
"""What the launchers of the pages are given for themselves."""
SCRIPTS = {"launch/slurm/train.sbatch": "launch/train.py", "launch/slurm/eval.sbatch": "eval"}
OTHERS = {"pytest", "source", "lm_eval", ".venv/bin/pip", "make", "cp"}
PLACEHOLDERS = re.compile(r"[…\[\]|]|\b(NAME|FILE|DIR|RUN|KEY|VALUE|ADAPTER)\b")


def ours(command: Command) -> tuple[str, list[str]]:
    """The program of ours that a command starts, `launch/train.py` or a module, and the words that it gets."""
    words = list(command.words)
    launcher = words.pop(0)
    while words:
        word = words.pop(0)
        if word in ("-m", "--module"):
            return words[0], words[1:]
        if word in SCRIPTS:
            return SCRIPTS[word], words
        if word.endswith(".py"):
            return word, words
        if word.startswith("--"):
            flag, equals, _ = word.partition("=")
            assert flag in FLAGS[launcher], f"{command}: {flag} is no option of {launcher} that we know"
            if not equals:
                words.pop(0)
        else:
            assert PLACEHOLDERS.search(word) or word in ("launcher", "flags]"), f"{command}: {word}"
    raise AssertionError(f"{command}: starts nothing of ours")


@functools.cache
def help_of(program: str) -> str:
    """What `--help` of a program of ours prints; in this process, which has imported torch already."""
    printed = io.StringIO()
    state = patch.object(sys, "argv", [program, "--help"]), patch.object(sys, "path", [*sys.path])
    with state[0], state[1], patch.dict(os.environ), contextlib.redirect_stdout(printed):
        with pytest.raises(SystemExit) as leaving:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
        assert not leaving.value.code
    return printed.getvalue()


def options_of(words: list[str]) -> list[str]:
    """The option names among words, without brackets of optional parts."""
    names = (re.match(r"\[?(--[A-Za-z][\w-]*)", word) for word in words)
    return [name[1] for name in names if name and name[1] not in ("--KEY", "--help")]


def of_ours(found: list[Command]) -> list[Command]:
    others = ("signal", "sglang.launch_server")
    return [c for c in found if c.words[0] not in OTHERS and not any(text in c.text for text in others)]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("command", of_ours(commands() + commands_in_sentences()), ids=str)
def test_a_command_names_options_that_its_program_has(command: Command) -> None:
    program, words = ours(command)
    if "launch.options.help" in program or program.startswith("tools.sentence"):
        assert not options_of(words)  # they have none
        return
    text = help_of(program)
    if program in (
        "benchmarks.learning",
        "benchmarks.same_loss",
        "benchmarks.sizes",
    ):  # which pass a run's options on
        text += help_of("launch/train.py")
    for option in options_of(words):
        assert re.search(rf"{option}\b", text), f"{command}: {program} has no {option}"


@pytest.mark.parametrize("command", of_ours(commands()), ids=str)
def test_a_command_of_a_block_passes_its_parser(command: Command) -> None:
    program, words = ours(command)
    if PLACEHOLDERS.search(" ".join(words)):
        words = [
            "launch/recipes/llama3_8b_r8.yaml" if word == "runs/NAME/options.yaml" else word for word in words
        ]
        words = words[: next((i for i, word in enumerate(words) if word.startswith("[")), len(words))]
    if program == "launch/train.py":
        options = parse_options(words)
        assert (ROOT / options.ds).is_file() and (ROOT / options.recipe).is_file()
    elif program == "eval" and "sciq" not in command.text and "…" not in command.text:
        parse_eval_options(words)


@pytest.mark.parametrize("command", commands() + commands_in_sentences(), ids=str)
def test_a_command_of_another_program_names_what_is_there(command: Command) -> None:
    program, *words = command.words
    if program == "make":
        targets = re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[0] in targets
        words = words[1:]
    if program in ("make", "pytest"):
        for word in words:
            path = word.removeprefix("ARGS=")
            assert not path.startswith("tests/") or (ROOT / path).exists()
        if "-k" in words:
            files = [ROOT / word for word in words if word.endswith(".py")]
            assert any(words[words.index("-k") + 1] in file.read_text() for file in files)
    if program == ".venv/bin/pip":
        extra = re.fullmatch(r"\.\[([a-z-]+)\]", words[-1])
        assert extra and f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
    if program == "lm_eval":
        assert (ROOT / words[words.index("--include_path") + 1]).is_dir()


def test_settings_that_a_page_compares_are_there() -> None:
    found = [s for page in pages() for s in re.findall(r"--settings\s+(\w[\w,.-]*)", page.read_text())]
    assert found and all(map(named, found))


RUN = (
    "python -m data_prep --demo --out data/demo",
    "python -m data_prep --out data --source raw",
    "python -m data_prep.report --data data",
    "python -m data_prep --source DIR --tasks openbookqa,ARC-Easy,ARC-Challenge,winogrande --out data/real",
    "python launch/train.py --ds ds_configs/zero2.json --recipe smollm2_135m --model SmolLM2-135M-Instruct.Q4_1.gguf "
    "--data data/real/commonsense_170k.json --batch_size 2 --adjust_size 8 --adjust_interval 6 --grace 4 --val_every 0 "
    "--out runs/SmolLM2-135M",
    "python -m launch.report runs/SmolLM2-135M",
    "cp runs/SmolLM2-135M/report/rank_heatmap.png docs/images/ranks.png",
    "python -m launch.options.help > docs/options.md",
)
"""The blocks' commands that run in seconds, in an order in which each finds what it needs."""
RUN_LONG = (
    "deepspeed --num_gpus 8 launch/train.py --ds ds_configs/zero2.json --recipe llama3_8b_r8_8gpu --dry_run true",
    "deepspeed --num_gpus 8 launch/train.py --ds ds_configs/zero2.json --recipe llama3_8b_r8_8gpu",
    "python -m eval --model meta-llama/Meta-Llama-3-8B --adapter runs/llama3_8b_r8_8gpu/adapter",
    "sbatch --nodes 2 --gpus-per-node 8 launch/slurm/train.sbatch --ds ds_configs/zero3.json --out runs/mine",
    "sbatch --nodes 1 --gpus-per-node 8 launch/slurm/eval.sbatch --model meta-llama/Meta-Llama-3-8B "
    "--adapter runs/mine/adapter",
    "deepspeed launch/train.py --recipe runs/NAME/options.yaml --out runs/AGAIN",
)
"""The same after the former; what a launcher or a cluster would start is started as one process."""
SMALL = {
    "max_steps": 12,
    "rank": 4,
    "adjust_start": 2,
    "adjust_freeze": 3,
    "adjust_interval": 2,
    "batch_size": 2,
    "micro_batch_size": 1,
    "val_size": 2,
    "warmup_steps": 1,
    "cutoff_len": 400,
    "dtype": "fp32",
}
"""What a training of the pages gets here, behind its own options."""


NOT_RUN = {
    r"torchrun --nnodes 2 ": "needs two hosts; distributed/test_two_hosts.py makes them",
    r"make ": "installs, or takes minutes: the suite itself, and the demo's own tests",
    r"source |.venv/bin/pip ": "changes the environment",
    r"python -m data_prep --out data$|python -m data_prep --tasks sciq": "needs the hub",
    r"python -m eval --tasks sciq|torchrun .* -m eval": "an example with words to fill in",
    r"(PROCESSES_PER_NODE=2 )?sbatch ": "needs a cluster; what it starts is run",
    r"python -m eval --model .* runs/llama3_8b_r8/adapter": "another run of what is run",
    r"python -m data_prep --source DIR .*boolq": "another selection of what is run",
    r"deepspeed .* --track|python -m launch.trackers ": "needs their libraries; tests/launch/test_trackers.py has them",
    r"python -m eval.compare": "needs evaluations; tests/evaluation/test_compare.py runs it",
    r"python -m benchmarks|OMP_NUM_THREADS=. python -m benchmarks": "takes long; tests/benchmarks run it, made small",
    r"lm_eval ": "needs lm-evaluation-harness; tests/evaluation/test_lm_eval.py reads its task files",
    r"FLEXLORA_FULL=1 pytest": "a test of `make test-full`",
    r"python -m flexlora_ds.export --run RUN": "needs a run; tests/library/test_export.py has one",
    r".*[\[…]": "a form, not a command",
}
"""Why the blocks' other commands are not run here; their options are checked all the same."""


def test_every_command_of_a_block_is_run_or_says_why_not() -> None:
    for command in commands():
        runs = any(command.text.startswith(text) for text in RUN + RUN_LONG)
        assert runs or any(re.match(pattern, command.text) for pattern in NOT_RUN), command


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like a clone, with raw rows and a tiny model, in which commands may write."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("data_prep", "ds_configs", "eval", "flexlora_ds", "launch", "tools"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", folder / "docs")
    write_raw(folder / "raw")
    make_place(folder / "tiny")
    yield folder


def run_here(text: str, folder: Path) -> None:
    """Run a command of a block in `folder`, with what is there for what is not."""
    found = [command for command in commands() if command.text.startswith(text)]
    command = min(found, key=lambda command: len(command.text))  # itself, rather than it with more options
    if command.words[0] == "cp":
        shutil.copy(*(folder / word for word in command.words[1:]))
        return
    program, words = ours(command)
    start = [program] if program.endswith(".py") else ["-m", program]
    replaced = {"meta-llama/Meta-Llama-3-8B": "tiny/model", "SmolLM2-135M-Instruct.Q4_1.gguf": "tiny/model"}
    replaced |= {"DIR": "raw", "runs/NAME/options.yaml": "runs/SmolLM2-135M/options.yaml"}
    words = [replaced.get(word, word) for word in words]
    if program == "launch/train.py":
        given = [] if "SmolLM2" in text else ["--model=tiny/model", "--data=tiny/records.json"]
        words += [*given, *(f"--{key}={value}" for key, value in SMALL.items())]
    if program == "eval":
        words += ["--limit=2", "--dtype=fp32"]
    output = folder / text.partition(" > ")[2] if " > " in text else None
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    result = subprocess.run(
        [sys.executable, *start, *words],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    if output is not None:
        output.write_text(result.stdout)


@pytest.mark.parametrize("text", RUN)
def test_a_command_that_takes_seconds_runs(text: str, sandbox: Path) -> None:
    run_here(text, sandbox)


def test_the_picture_and_the_page_of_options_are_what_the_commands_make(sandbox: Path) -> None:
    assert (sandbox / "docs/options.md").read_text() == (ROOT / "docs/options.md").read_text()
    for picture in (ROOT / "docs/images/ranks.png", sandbox / "docs/images/ranks.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size <= 200_000


@pytest.mark.full
@pytest.mark.parametrize("text", RUN_LONG)
def test_a_command_that_takes_longer_runs(text: str, sandbox: Path) -> None:
    run_here(text, sandbox)
