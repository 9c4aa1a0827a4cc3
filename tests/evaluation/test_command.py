"""`python -m eval` from the outside: its files, its table, its errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tasks import TASKS
from eval.__main__ import main
from eval.model.loading import resolve_prompt
from eval.options import default_out
from flexlora_ds.terminal.counted import counted
from tests.helpers import eval_tiny

_WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None
from eval.__main__ import main
code = main(sys.argv[1:])
assert not [name for name in sys.modules if name.startswith("deepspeed.")]
sys.exit(code)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `adapter/` and `data/` with all eight tasks."""
    place = tmp_path_factory.mktemp("eval")
    eval_tiny.save_base_and_adapter(place / "model", place / "adapter")
    (place / "adapter" / "prompt.json").write_text('{"prompt": "llm_adapters"}')
    eval_tiny.write_data(place / "data", 5)
    return place


def arguments(place: Path, out: Path | str, *more: str) -> list[str]:
    return ["--model", f"{place}/model", "--data", f"{place}/data", "--out", str(out), *more]


def results(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text())
    return loaded


def lines(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions" / f"{task}.jsonl").read_text().splitlines()]


def test_files_and_table_without_deepspeed(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        _WITHOUT_DEEPSPEED,
        *arguments(place, out, "--adapter", f"{place}/adapter"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = results(out)
    wanted = {"model", "adapter", "mode", "tasks", "average", "settings", "seconds", "versions"}
    assert wanted <= set(summary)
    assert list(summary["tasks"]) == list(TASKS)
    assert summary["settings"]["prompt"] == "llm_adapters"
    assert summary["average"] == pytest.approx(sum(t["accuracy"] for t in summary["tasks"].values()) / 8)
    for task, figures in summary["tasks"].items():
        predictions = lines(out, task)
        assert [p["index"] for p in predictions] == list(range(5))
        assert {"prompt_hash", "output", "prediction", "answer", "correct"} <= set(predictions[0])
        assert figures["total"] == 5
        assert figures["correct"] == sum(p["prediction"] == p["answer"] for p in predictions)
        assert figures["unanswered"] == sum(p["prediction"] is None for p in predictions)
        assert figures["accuracy"] == figures["correct"] / 5
    table = (out / "table.md").read_text()
    assert table in done.stdout
    assert "generate v1" in table and "llm_adapters" in table and "chance" in table
    assert {path.name for path in out.glob("[!.]*")} == {
        "predictions",
        "results.json",
        "settings.json",
        "table.md",
    }
    assert {path.stem for path in (out / "predictions").iterdir()} == set(TASKS)
    assert "items/s" in done.stderr


def test_merged_adapter_scores_alike(place: Path, tmp_path: Path) -> None:
    adapter = ["--adapter", f"{place}/adapter", "--mode", "score"]
    assert main(arguments(place, tmp_path / "a", *adapter)) == 0
    assert main(arguments(place, tmp_path / "b", *adapter, "--merge", "true")) == 0
    assert main(arguments(place, tmp_path / "base", "--mode", "score", "--prompt", "llm_adapters")) == 0
    found = [[p["prediction"] for t in TASKS for p in lines(tmp_path / out, t)] for out in ("a", "b", "base")]
    assert found[0] == found[1] != found[2]


def test_score_always_answers_with_one_of_the_choices(place: Path, tmp_path: Path) -> None:
    assert main(arguments(place, tmp_path / "out", "--mode", "score", "--tasks", "openbookqa")) == 0
    assert results(tmp_path / "out")["tasks"]["openbookqa"]["unanswered"] == 0
    records = json.loads((place / "data" / "openbookqa" / "test.json").read_text())
    for line, record in zip(lines(tmp_path / "out", "openbookqa"), records, strict=True):
        assert line["prediction"] in TASKS["openbookqa"].answers(record)


def test_limit_and_batch_size(place: Path, tmp_path: Path) -> None:
    options = ["--limit", "2", "--batch_size", "1", "--tasks", "piqa,boolq"]
    assert main(arguments(place, tmp_path / "out", *options)) == 0
    assert {name: t["total"] for name, t in results(tmp_path / "out")["tasks"].items()} == {
        "boolq": 2,
        "piqa": 2,
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_is_said_by_one_process(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: Any, team: Any) -> None:
        team.started = True
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.run.evaluate", interrupted)
    monkeypatch.setenv("RANK", str(rank))
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert main(["--model", "m", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == ("" if rank else "error: interrupted; start again\n")


def test_an_interrupted_run_continues(place: Path, tmp_path: Path) -> None:
    """Finished items are kept as they are; truncated lines and missing items are computed again."""
    out, options = tmp_path / "out", ["--tasks", "boolq,piqa"]
    assert main(arguments(place, out, *options)) == 0
    whole = [lines(out, task) for task in ("boolq", "piqa")]
    file = out / "predictions" / "boolq.jsonl"
    kept, moved, torn = file.read_text().splitlines(keepends=True)[:3]
    marked = json.loads(kept) | {"output": "kept from before"}
    file.write_text(json.dumps(marked) + "\n")
    log = json.dumps({"task": "boolq", **json.loads(moved), "output": "from a log"}) + "\n" + torn[:20]
    (out / "predictions" / "journal-1.jsonl").write_text(log)
    (out / "results.json").unlink()
    assert main(arguments(place, out, *options)) == 0
    again = lines(out, "boolq")
    for line in [*again, *whole[0]]:
        line.pop("margin")  # rounding depends on the batch
    assert [p["output"] for p in again[:2]] == ["kept from before", "from a log"]
    assert again[2:] == whole[0][2:]
    assert lines(out, "piqa") == whole[1]
    assert results(out)["tasks"]["boolq"]["total"] == 5
    assert not list((out / "predictions").glob("journal-*"))


@pytest.mark.complaint("LLM-Adapters 38", "LLM-Adapters 26", "LoRA-Pro 3")
def test_results_of_other_settings_are_not_mixed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(place, out, "--tasks", "boolq")) == 0
    before = (out / "predictions" / "boolq.jsonl").read_bytes()
    for option in (["--mode", "score"], ["--prompt", "llm_adapters"], ["--limit", "2"], ["--dtype", "bf16"]):
        assert main(arguments(place, out, "--tasks", "boolq", *option)) == 2
        assert "results of other settings" in capsys.readouterr().err
    assert (out / "predictions" / "boolq.jsonl").read_bytes() == before
    assert main(arguments(place, out, "--tasks", "boolq", "--batch_size", "2")) == 0  # changes no prediction


def test_an_item_longer_than_the_context_is_unanswered(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    data = json.loads((place / "data" / "boolq" / "test.json").read_text())
    tokenizer = eval_tiny.make_tokenizer()
    from data_prep.prompt import evaluation_prompt

    lengths = [len(tokenizer(evaluation_prompt(r, "alpaca"))["input_ids"]) for r in data]
    context = sorted(lengths)[2] + 8
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": context}))
    for mode in ("generate", "score"):
        out = tmp_path / mode
        options = [
            "--model",
            f"{tmp_path}/model",
            "--data",
            f"{place}/data",
            "--tasks",
            "boolq",
            "--out",
            f"{out}",
        ]
        assert main([*options, "--mode", mode]) == 0
        noted = [line["index"] for line in lines(out, "boolq") if "note" in line]
        assert noted == [i for i, length in enumerate(lengths) if length > context - 5] and noted
        figures = results(out)["tasks"]["boolq"]
        assert (figures["total"], figures["too_long"]) == (5, len(noted))
        assert figures["unanswered"] >= len(noted)
        assert (
            f"{counted(len(noted), 'item')} longer than the model's context of {context} tokens"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (
            ["--tasks", "bolq"],
            2,
            "unknown task 'bolq' (--tasks); did you mean boolq? the tasks are boolq, piqa",
        ),
        (["--task", "boolq"], 2, "unknown option '--task' (command line); did you mean --tasks?"),
        (["--batch_size", "0"], 2, "batch_size '0'"),
        (["--mode", "guess"], 2, "generate-beam4"),
        (
            ["--attention", "flash"],
            2,
            "has no attention flash (--attention); choose auto or one of eager, flash",
        ),
        pytest.param(
            ["--attention", "flash_attention_2"],
            2,
            "attention flash_attention_2 needs a GPU and the package flash-attn (--attention); install",
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="what a machine without a GPU refuses"
            ),
        ),
        (["--merge"], 2, "nothing to merge without an adapter"),
        (["--adapter", "/no/adapter"], 2, "no adapter folder /no/adapter (--adapter)"),
        (["--model", "/no/model"], 2, "/no/model"),
        (["--data", "/no/data"], 2, "no test.json for boolq, piqa"),
        (["--debug", "maybe"], 2, "neither true nor false"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], code: int, words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, tmp_path / "out", *options)) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--modl", "m"], "unknown option '--modl' (command line); did you mean --model?"), ([], "(--model)")],
)
def test_a_misspelt_or_missing_model(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    assert words in capsys.readouterr().err


def test_a_data_folder_without_one_of_the_tasks(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = eval_tiny.write_data(tmp_path / "data", 2, ("boolq", "piqa"))
    assert main(arguments(place, tmp_path / "out", "--data", f"{data}", "--tasks", "boolq,openbookqa")) == 2
    error = capsys.readouterr().err
    assert "no test.json for openbookqa" in error and "--tasks boolq" in error


def test_an_adapter_of_another_base(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(place / "model")
    config = model.config
    config.hidden_size, config.num_hidden_layers = 48, 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    eval_tiny.make_tokenizer().save_pretrained(tmp_path / "other")
    options = ["--model", f"{tmp_path}/other", "--adapter", f"{place}/adapter"]
    assert main(arguments(place, tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not fit" in error and "size mismatch" in error and "q_proj" in error


def test_a_base_of_the_same_shapes_and_other_weights_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eval_tiny.make_model(seed=9).save_pretrained(tmp_path / "other")
    eval_tiny.make_tokenizer().save_pretrained(tmp_path / "other")
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    for named in (f"{place}/model", "a/b", 5, f"{place}", "x" * 5_000):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": named}))
        for model in ("other", "model"):
            options = ["--model", f"{tmp_path if model == 'other' else place}/{model}", "--tasks", "boolq"]
            out = tmp_path / f"out-{str(named).replace('/', '')[-20:]}-{model}"
            options += ["--adapter", f"{tmp_path}/adapter", "--mode", "score"]
            code, error = main(arguments(place, out, *options)), capsys.readouterr().err
            assert code == 0 or (named == 5 and error.count("\n") == 1)
            said = (
                f"the adapter was trained on {place}/model, whose weights are not those of {tmp_path}/other"
            )
            assert (said in error) == (model == "other" and named == f"{place}/model")


def test_the_recorded_prompt_is_used_and_another_warned_of(place: Path, tmp_path: Path) -> None:
    adapter = str(place / "adapter")
    assert resolve_prompt("auto", adapter) == ("llm_adapters", None)
    assert resolve_prompt("auto", None) == ("alpaca", None)
    style, warning = resolve_prompt("alpaca", adapter)
    assert style == "alpaca" and warning is not None and "llm_adapters" in warning
    (tmp_path / "prompt.json").write_text("{}")
    with pytest.raises(ValueError, match="names no known prompt style"):
        resolve_prompt("auto", str(tmp_path))


def test_default_out_names_model_adapter_and_mode() -> None:
    assert default_out("meta-llama/Meta-Llama-3-8B", None, "score") == Path("runs/eval/Meta-Llama-3-8B-score")
    assert default_out("a/b.Q4_1.gguf", "runs/demo/adapter", "generate") == Path(
        "runs/eval/b.Q4_1+demo-generate"
    )


@pytest.mark.parametrize(
    "edit",
    [
        lambda line: {**line, "index": 9999},
        lambda line: {**line, "prompt_hash": "0" * 16},
        lambda line: {**line, "answer": "false" if line["answer"] == "true" else "true"},
    ],
)
def test_a_prediction_of_no_item_is_not_counted_and_its_item_is_asked_again(
    place: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Settings and data are the same; only the file of predictions was edited."""
    out, options = tmp_path / "out", ["--tasks", "boolq", "--mode", "score", "--batch_size", "1"]
    assert main(arguments(place, out, *options)) == 0
    tasks, whole = results(out)["tasks"], lines(out, "boolq")
    edited = [edit(line) for line in whole]
    (out / "predictions" / "boolq.jsonl").write_text("".join(json.dumps(line) + "\n" for line in edited))
    assert main(arguments(place, out, *options)) == 0
    assert results(out)["tasks"] == tasks and lines(out, "boolq") == whole


@pytest.mark.parametrize("name", ["results.json", "table.md", "settings.json"])
def test_what_no_evaluation_wrote_is_not_written_over(
    place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    assert main(arguments(place, tmp_path / "out", "--tasks", "boolq", "--mode", "score")) == 2
    assert f"holds a {name} that no evaluation wrote (--out)" in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_text() == '{"mine": 1}'


def test_a_first_evaluation_does_not_say_that_it_continues(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Items that do not fit the context are recorded before the first batch."""
    shutil.copytree(place / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 60}))
    options = ["--tasks", "boolq", "--mode", "score", "--model", f"{tmp_path}/model"]
    assert main(arguments(place, tmp_path / "out", *options)) == 0
    error = capsys.readouterr().err
    assert "longer than the model's context" in error and "continuing" not in error


@pytest.mark.parametrize(
    ("choices", "fault"),
    [
        (["True", "False"], "'True' would be read as none"),
        (["true", "untrue"], "'untrue' would be read as 'true'"),
    ],
)
def test_a_choice_that_cannot_be_read_from_a_text_is_scored_only(
    place: Path, tmp_path: Path, choices: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {
        "instruction": f"So?\n\nAnswer format: {'/'.join(choices)}",
        "output": "x",
        "answer": choices[1],
    }
    (tmp_path / "data" / "boolq").mkdir(parents=True)
    (tmp_path / "data" / "boolq" / "test.json").write_text(json.dumps([record]))
    options = ["--tasks", "boolq", "--data", f"{tmp_path}/data"]
    for mode in ("generate", "generate-beam4"):
        assert main(arguments(place, tmp_path / mode, *options, "--mode", mode)) == 2
        error = capsys.readouterr().err
        assert fault in error and "(boolq/test.json, record 1); ask by score" in error
    assert main(arguments(place, tmp_path / "score", *options, "--mode", "score")) == 0


def test_a_record_without_its_choices_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "boolq").mkdir()
    path = tmp_path / "boolq" / "test.json"
    path.write_text(json.dumps([{"instruction": "So?", "output": "x", "answer": "true"}]))
    assert main(arguments(place, tmp_path / "out", "--tasks", "boolq", "--data", str(tmp_path))) == 2
    error = capsys.readouterr().err
    assert f"({path}, record 1); end its instruction with that line" in error
