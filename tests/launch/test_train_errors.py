"""What the training command says of bad input: one line on stderr, exit code 2, nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora_ds.files.ownership import MARKER
from launch.run_folder.lock import LOCK_FILE, one_run_in
from tests.helpers import training
from tests.helpers.processes import ROOT, Processes, run_script
from tests.helpers.training import Place

GOOD = {"instruction": "Where?", "input": "", "output": "the correct answer is here", "answer": "here"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("errors"))


@pytest.fixture(scope="module")
def process() -> Iterator[Processes]:
    with Processes(1, timeout=300) as started:
        yield started


@pytest.fixture
def refused(process: Processes, place: Place, tmp_path: Path) -> Callable[..., str]:
    """Runs the command with some options; it must be refused, by a dry run in the same words. Returns the one line."""

    def run(
        stage: int = 2,
        *,
        more: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> str:
        options = {"out": tmp_path / "out", **options}
        arguments = [*place.arguments(stage=stage, **options), *more]
        lines = []
        for dry in ((), ("--dry_run=true",)):
            (result,) = process.run(training.command, [*arguments, *dry], environment)
            lines.append(the_line(result["stderr"], result["stdout"]))
            assert result["code"] == 2, lines
            left = {path.name for path in tmp_path.glob("out/*")}
            assert left <= {LOCK_FILE, MARKER}, "nothing half-written"
        assert lines[0] == lines[1]
        return lines[0]

    return run


def the_line(stderr: str, stdout: str = "") -> str:
    """The one line that stderr holds."""
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert "Traceback" not in stdout and "error" not in stdout.lower(), stdout
    return lines[0]


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("--rnak=4", "rank"),
        ("--learning_rate=1e-4", "lr"),
        ("--adjust-sizes=4", "adjust_size"),
        ("--xyz=1", "--help"),
    ],
)
def test_an_unknown_key_names_the_nearest(refused: Callable[..., str], key: str, meant: str) -> None:
    line = refused(more=(key,))
    assert key.split("=")[0] in line and re.search(rf"{meant}\b", line.split(";")[1])


def test_an_unknown_key_of_a_recipe_names_its_line(refused: Callable[..., str], tmp_path: Path) -> None:
    recipe = write(tmp_path / "mine.yaml", "model: here\nrank: 4\nalhpa: 8\n")
    line = refused(recipe=recipe)
    assert f"{recipe}, line 3" in line and "alhpa" in line and "did you mean alpha?" in line


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("importance", "entropi", "did you mean entropy?"),
        ("rank", "many", "a whole number"),
        ("dropout", 1.5, "below 1"),
        ("lr", -1, "above 0"),
        ("min_rank", 9, "rank"),
        ("lr", "1e300", "at most 1e+30"),
        ("batch_size", 10_000_000, "at most 1,000,000"),
        ("rank", "9" * 400, "a whole number"),
        ("max_steps", "9" * 5_000, "a whole number"),
        ("data", "a\nerror: forged", "no training data at a error: forged (--data"),
    ],
)
def test_a_value_that_is_not_allowed(
    refused: Callable[..., str], option: str, value: Any, words: str
) -> None:
    line = refused(**{option: value})
    assert option in line and words in line


@pytest.mark.parametrize("method", ["flexlora", "lora"])
def test_targets_that_match_nothing_get_a_list_of_what_there_is(
    refused: Callable[..., str], method: str
) -> None:
    line = refused(target_modules="q_proj,query_key_value", method=method)
    assert "'query_key_value'" in line
    assert all(f"{kind}_proj" in line for kind in ("q", "k", "v", "o", "gate", "up", "down"))
    assert "lm_head" not in line


def test_a_precision_that_the_device_lacks(refused: Callable[..., str]) -> None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this device computes fp16")
    assert "choose dtype bf16 or fp32" in refused(dtype="fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU refuses")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernels": "liger"}, "kernels liger needs a GPU (--kernels on the command line)"),
        ({"attention": "flash"}, "attention flash needs a GPU"),
        ({"attention": "varlen"}, "attention varlen needs torch 2.10 or later"),
        ({"compile": "blocks", "stage": 3}, "compile blocks needs ZeRO-0, 1 or 2"),
        ({"method": "lora_ga", "stage": 3}, "method lora_ga needs ZeRO-0, 1 or 2"),
        ({"method": "lora_ga", "rank": 40}, "method lora_ga takes 2 · rank = 80 singular pairs"),
        ({"compile": "blocks", "method": "lora"}, "compile blocks knows FlexLoRA's adapters only"),
        ({"compile": True, "kernels": "liger"}, "kernels liger replaces what compile true would compile"),
    ],
    ids=str,
)
def test_what_cannot_run_here(refused: Callable[..., str], options: dict[str, Any], words: str) -> None:
    assert words in refused(**options)


def test_compile_without_a_compiler(refused: Callable[..., str]) -> None:
    line = refused(compile="pieces", environment={"CXX": "no-such-compiler"})
    assert "compile pieces needs a C++ compiler, and there is no no-such-compiler" in line


def test_packing_for_a_model_with_a_state(refused: Callable[..., str], tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    small = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(small).save_pretrained(tmp_path / "mamba")
    line = refused(model=tmp_path / "mamba", target_modules="in_proj", padding_free=True)
    assert "MambaForCausalLM cannot keep packed examples apart (--padding_free on the command line)" in line


def test_a_rank_above_a_layers_limit(refused: Callable[..., str]) -> None:
    line = refused(rank=17)
    assert "rank 17" in line and "limit 16" in line and "model.layers.0.self_attn.k_proj" in line


@pytest.mark.parametrize("options", [{"adjust_start": 10, "adjust_freeze": 8}, {"adjust_start": 17}])
def test_a_freeze_that_precedes_its_start(refused: Callable[..., str], options: dict[str, int]) -> None:
    line = refused(**options)
    assert "adjust_start" in line and "adjust_freeze" in line and "16" in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_batch_size": 32}, ["train_batch_size", "32", "batch_size", "8"]),
        ({"train_micro_batch_size_per_gpu": 3}, ["train_micro_batch_size_per_gpu", "micro_batch_size"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping", "max_grad_norm"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "dtype"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, ["optimizer.params.lr", "0.005"]),
        ({"optimizer": {"type": "Lion"}}, ["Lion", "AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "lr_schedule"]),
        ({"zero_optimization": {"stage": 4}}, ["stage 4", "0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": "2"}}, ["stage '2'", "without quotation marks"]),
        ({"bf16": {"enabled": "auto", "loss_scale": 0}}, ["DeepSpeed refuses 0", "key bf16.loss_scale"]),
        ({"compile": {"enabled": True}}, ["DeepSpeed refuses true", "key compile.enabled"]),
        ("{\n  // mine\n}", ["line 2", "comment"]),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, list) else "",
)
def test_a_deepspeed_json_that_contradicts(
    refused: Callable[..., str], tmp_path: Path, settings: Any, words: list[str]
) -> None:
    line = refused(ds=write(tmp_path / "mine.json", settings))
    for word in ("mine.json", *words):
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps([GOOD, GOOD, {"instruction": "Where?"}]), ["record 3", "'output'"]),
        (json.dumps([GOOD, "text"]), ["record 2", "str"]),
        (json.dumps([GOOD, {**GOOD, "input": 3}]), ["record 2", "'input'"]),
        (json.dumps(GOOD) + "\n{broken\n", ["record 2", "JSON"]),
        ("[]", ["no records"]),
        ("", ["no records"]),
    ],
)
def test_a_malformed_record_is_named(
    refused: Callable[..., str], tmp_path: Path, text: str, words: list[str]
) -> None:
    line = refused(data=write(tmp_path / "mine.json", text))
    for word in ("mine.json", *words):
        assert word in line


def test_records_that_are_all_too_long(refused: Callable[..., str]) -> None:
    assert "cutoff_len" in refused(cutoff_len=8)


def test_a_batch_of_more_than_all_epochs(refused: Callable[..., str]) -> None:
    line = refused(batch_size=1025)
    assert "batch_size 1,025 is more than 3 epochs of 35 records (--batch_size" in line


def test_a_usual_batch_of_more_than_all_records_is_taken(
    process: Processes, place: Place, tmp_path: Path
) -> None:
    arguments = place.arguments(tmp_path / "out", batch_size=128, micro_batch_size=8, dry_run=True)
    (result,) = process.run(training.command, arguments)
    assert result["code"] == 0, result["stderr"]


def test_a_change_after_every_step_of_a_long_run(refused: Callable[..., str]) -> None:
    line = refused(max_steps=10**12, adjust_interval=1)
    assert "rank changes are more than 100,000 (key adjust_interval; the run has 1,000,000,000,000" in line


def test_an_expression_that_backtracks_without_end(refused: Callable[..., str]) -> None:
    line = refused(target_modules="([a-z._0-9]+)+X")
    assert "not matched within 2 s of computing and 1 GiB: '([a-z._0-9]+)+X' (target_modules)" in line


def test_a_validation_that_leaves_nothing_to_train_on(refused: Callable[..., str]) -> None:
    assert "val_size 40" in refused(val_size=40)


def test_missing_files_are_named(refused: Callable[..., str], tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert f"{nowhere}" in (line := refused(data=nowhere)) and "data_prep" in line
    assert f"model folder {nowhere} does not exist" in refused(model=nowhere)
    assert f"{nowhere}" in refused(ds=nowhere)
    assert f"{nowhere}" in refused(recipe=nowhere)


def test_a_folder_without_a_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(model=tmp_path / "empty")


def test_a_hub_model_without_network(refused: Callable[..., str]) -> None:
    line = refused(model="meta-llama/Meta-Llama-3-8B-of-nobody")
    for word in ("meta-llama/Meta-Llama-3-8B-of-nobody", "hf download", "licence", "HF_TOKEN"):
        assert word in line


@pytest.mark.parametrize("batch", [{"batch_size": 9, "micro_batch_size": 2}])
def test_a_batch_that_cannot_be_cut(refused: Callable[..., str], batch: dict[str, int]) -> None:
    line = refused(**batch)
    assert "9" in line and "micro_batch_size 2" in line


def test_resume_none_keeps_a_used_folder(process: Processes, place: Place, tmp_path: Path) -> None:
    kept = write(tmp_path / "mine.txt", "mine")
    lines = []
    for dry in (False, True):
        (result,) = process.run(training.command, place.arguments(tmp_path, resume="none", dry_run=dry))
        lines.append(the_line(result["stderr"]))
        assert result["code"] == 2 and str(tmp_path) in lines[-1]
        assert list(tmp_path.iterdir()) == [kept]
    assert lines[0] == lines[1]


def test_a_folder_that_another_run_holds(process: Processes, place: Place, tmp_path: Path) -> None:
    lines = []
    with one_run_in(tmp_path):
        for dry in (False, True):
            (result,) = process.run(training.command, place.arguments(tmp_path, dry_run=dry))
            assert result["code"] == 1
            lines.append(the_line(result["stderr"]))
    assert lines[0] == lines[1] and f"process {os.getpid()} on" in lines[0]


def test_another_run_is_refused_by_its_dry_run_too(process: Processes, place: Place, tmp_path: Path) -> None:
    arguments = place.arguments(tmp_path, max_steps=1, adjust_size=0)
    assert process.run(training.command, arguments)[0]["code"] == 0
    for changed, said in (("--seed=1", "seed is 42 in it"), ("--batch_size=4", "batch_size is 8 in it")):
        lines = []
        for dry in ("--dry_run=false", "--dry_run=true"):
            (result,) = process.run(training.command, [*arguments, changed, dry])
            assert result["code"] == 1
            lines.append(the_line(result["stderr"]))
        assert lines[0] == lines[1] and said in lines[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    assert "cannot write to the run folder" in refused()


def test_a_checkpoint_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"no checkpoint at {tmp_path}/nowhere (--resume on the" in refused(resume=tmp_path / "nowhere")
    assert "resume is empty (--resume on the command line); give auto, none" in refused(resume="")
    (tmp_path / "best").mkdir()
    line = refused(resume=tmp_path / "best")
    assert f"not a checkpoint: {tmp_path}/best (--resume on the" in line and "; give a folder like" in line


@pytest.mark.parametrize("below", ["", "runs/one"])
def test_a_run_folder_that_cannot_be_made(refused: Callable[..., str], tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    line = refused(out=tmp_path / "file" / below)
    assert line.startswith("error: cannot write to the run folder: ") and line.endswith("choose another out")


STOPPED_AT_AN_IMPORT = """
import os, runpy, signal, sys

module = sys.argv.pop(1)

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
sys.meta_path.insert(0, Stop())
runpy.run_path("launch/train.py", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["launch.options.command_line", "yaml", "torch", "launch.loop.session"])
@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_while_the_run_is_being_imported_is_one_line(module: str, rank: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", STOPPED_AT_AN_IMPORT, module]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 130
    said = "error: interrupted; training had not begun, start again\n"
    assert ended.stderr == ("" if rank else said)


@pytest.mark.parametrize("form", [("--debug", "true"), ("--debug=true",)])
def test_the_traceback_is_shown_on_request(
    process: Processes, place: Place, tmp_path: Path, form: tuple[str, ...]
) -> None:
    (result,) = process.run(training.command, [*place.arguments(tmp_path / "out", rank=99), *form])
    assert result["code"] != 0 and "Traceback" in result["stderr"]


def test_the_traceback_is_shown_where_the_recipe_says_so(
    process: Processes, place: Place, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "mine.yaml", f"model: {place.model}\nrank: 99\ndebug: true\n")
    given = place.arguments(tmp_path / "out", rank=None, model=None, recipe=recipe)
    (result,) = process.run(training.command, given)
    assert result["code"] != 0 and "Traceback" in result["stderr"]
    (result,) = process.run(training.command, [*given, "--debug=false"])
    assert result["code"] == 2 and "rank 99" in the_line(result["stderr"])


def test_debug_false_shows_none(refused: Callable[..., str]) -> None:
    assert "limit" in refused(rank=99, more=("--debug", "false"))


def test_a_calendar_without_a_change_is_a_warning(process: Processes, place: Place, tmp_path: Path) -> None:
    options = {"max_steps": 3, "adjust_start": 1, "adjust_freeze": 1, "adjust_interval": 5, "warmup_steps": 1}
    (result,) = process.run(training.command, place.arguments(tmp_path / "out", **options))
    assert result["code"] == 0, result["stderr"]
    warnings = [line for line in result["stderr"].splitlines() if "warning" in line]
    assert len(warnings) == 1 and "no rank change" in warnings[0]
    assert len(training.losses(tmp_path / "out")) == 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rank_changes"] == 0
    assert any("no rank change" in text for text in summary["warnings"])


@pytest.mark.parametrize("seed", [2**63 - 1, pytest.param(18_281_975_792_576_859, marks=pytest.mark.full)])
@pytest.mark.parametrize("method", ["flexlora", pytest.param("lora", marks=pytest.mark.full)])
def test_the_largest_seed_trains(
    process: Processes, place: Place, tmp_path: Path, method: str, seed: int
) -> None:
    arguments = place.arguments(tmp_path / "out", seed=seed, method=method, max_steps=1, adjust_size=0)
    (result,) = process.run(training.command, arguments)
    assert result["code"] == 0, result["stderr"]


def test_other_processes_leave_quietly(process: Processes, place: Place, tmp_path: Path) -> None:
    arguments = place.arguments(tmp_path / "out", rank=17)
    (result,) = process.run(training.command, arguments, {"RANK": "1", "WORLD_SIZE": "2"})
    assert result == {"code": 2, "stdout": "", "stderr": ""}


def test_all_leave_where_process_0_alone_sees_the_fault(place: Place, tmp_path: Path) -> None:
    """The run folder cannot be made: only the process that writes to it can tell."""
    in_the_way = write(tmp_path / "file", "no folder")
    arguments = ["launch/train.py", *place.arguments(in_the_way / "out", stage=3)]
    first, second = run_script(arguments, 2, timeout=300)
    # Either may have come first to the data, which one tokenises for both.
    said = [line for line in first.stderr.splitlines() if not line.startswith("waiting for ")]
    assert first.returncode == 2 and f"{in_the_way}" in the_line("\n".join(said))
    assert second.returncode == 2 and second.stderr == ""


GATED = r"meta-llama/Meta-Llama-3-8B .*hf download .*licence.*HF_TOKEN"
NO_DATA = r"data/commonsense_170k\.json.*python -m data_prep --out data"


def test_the_command_alone_says_what_is_missing(tmp_path: Path) -> None:
    """`deepspeed launch/train.py --ds ds_configs/zero2.json` without network; the launcher adds lines of its own."""
    port = 20_000 + os.getpid() % 20_000
    launcher = ["-m", "deepspeed.launcher.runner", f"--master_port={port}"]
    command = [*launcher, "launch/train.py", "--ds", "ds_configs/zero2.json"]
    (result,) = run_script(command, 1, timeout=300, env={"HF_HOME": str(tmp_path / "cache")})
    said = (result.stdout + result.stderr).splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1
    assert re.search(GATED if (ROOT / "data" / "commonsense_170k.json").exists() else NO_DATA, errors[0])
    assert not [line for line in said if "Traceback" in line]


def test_the_default_recipes_model_is_gated(process: Processes, place: Place, tmp_path: Path) -> None:
    arguments = ["--ds=ds_configs/zero2.json", f"--data={place.data}", f"--out={tmp_path / 'out'}"]
    (result,) = process.run(training.command, arguments, {"HF_HOME": str(tmp_path / "cache")})
    assert result["code"] == 2 and re.search(GATED, the_line(result["stderr"]))
