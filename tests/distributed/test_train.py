"""Whole runs of the training command: what they leave behind, that it is right, and the same however divided.

Runs are shared between the checks: `alone` is one process at stage 0, `two` are two processes at stage 3, both started
as a launcher would; `again` repeats the first from its own options.yaml.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.records import load_records
from flexlora_ds import export
from launch.data.encoding import Encoding, tokenise
from launch.data.examples import IGNORED, Example, arrange
from launch.options.train_options import TrainOptions
from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import CHANGES, STEPS, Place, read_lines
from tests.helpers.training_logits import IDS, TRAINING_LOGITS, with_logits

METRICS = {
    *("step", "epoch", "loss", "orth", "lr", "grad_norm", "tokens", "tokens_per_s", "step_s", "peak_mem_gb"),
    *("total_rank", "skipped"),
}
RANKS = {
    *("step", "adjust_size", "importance", "score_margin", "pruned", "expanded", "prune_age", "ranks"),
    *("total_rank", "trainable_params", "loss_before", "loss_after", "spectrum_error", "seconds"),
}
SUMMARY = {
    *("state", "steps", "final_loss", "wall_seconds", "tokens", "tokens_per_s", "peak_mem_gb"),
    *("trainable_params", "rank_changes", "versions"),
}
MATRICES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (*(f"self_attn.{kind}_proj" for kind in "qkv"), "mlp.up_proj", "mlp.down_proj")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def one() -> Iterator[Processes]:
    with Processes(1, timeout=600) as processes:
        yield processes


@pytest.fixture(scope="module")
def alone(place: Place) -> Path:
    """One process, stage 0, four micro-steps an update."""
    place.train(place.root / "alone", 1, 0, micro_batch_size=2)
    return place.root / "alone"


@pytest.fixture(scope="module")
def two(place: Place) -> Path:
    """Two processes, stage 3, one micro-step an update."""
    out = place.root / "two"
    with Processes(2, timeout=600) as processes:
        results = processes.run(with_logits, place.arguments(out, 3))
    assert [result["code"] for result in results] == [0, 0], results[0]["stderr"]
    assert results[1]["stdout"].count("adapter:") == 0 and "step" not in results[1]["stderr"]
    return out


def in_process(one: Processes, arguments: list[str]) -> None:
    (result,) = one.run(with_logits, arguments)
    assert result["code"] == 0, result["stderr"]


@pytest.fixture(scope="module")
def again(place: Place, alone: Path, one: Processes) -> Path:
    """What `alone` was, from the options that it wrote down."""
    in_process(one, ["--recipe", str(alone / "options.yaml"), "--out", str(place.root / "again")])
    return place.root / "again"


@pytest.fixture(scope="module")
def stage_2(place: Place, one: Processes) -> Path:
    in_process(one, place.arguments(place.root / "stage_2", 2))
    return place.root / "stage_2"


@pytest.fixture(scope="module")
def lora(place: Place, one: Processes) -> Path:
    in_process(one, place.arguments(place.root / "lora", 2, method="lora"))
    return place.root / "lora"


@pytest.fixture(scope="module")
def base(place: Place) -> Any:
    """The untouched base."""
    return AutoModelForCausalLM.from_pretrained(place.model).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits
    return result


def adapted(place: Place, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.model), adapter)


def error(actual: Tensor, expected: Tensor) -> float:
    """max |Δ| / max |expected|"""
    return float((actual - expected).abs().max() / expected.abs().max())


def changes(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / "ranks.jsonl")


# What a run leaves behind


def test_every_file_is_there(alone: Path) -> None:
    for name in (
        "options.yaml",
        "metrics.jsonl",
        "ranks.jsonl",
        "validation.jsonl",
        "directions.json",
        "summary.json",
    ):
        assert (alone / name).is_file(), name
    assert (alone / "adapter" / "adapter_config.json").is_file()
    assert (alone / "adapter" / "adapter_model.safetensors").is_file()
    for name in ("loss.png", "rank_heatmap.png", "singular_values.png"):
        assert (alone / "report" / name).read_bytes().startswith(b"\x89PNG"), name
    page = (alone / "report" / "index.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("data:image/png") == 4


def test_metrics(alone: Path) -> None:
    rows = read_lines(alone / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(set(row) >= METRICS for row in rows)
    assert all(math.isfinite(row[key]) for row in rows for key in METRICS)
    assert [row["epoch"] for row in rows] == pytest.approx([step * 8 / 35 for step in range(1, STEPS + 1)])
    assert all(row["total_rank"] == 4 * len(MATRICES) and row["skipped"] is False for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["step_s"] > 0 and row["peak_mem_gb"] > 0 for row in rows)
    assert all(later["tokens"] > earlier["tokens"] for earlier, later in itertools.pairwise(rows))
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"], "it learns"
    warm_up, fall = [1 / 4, 2 / 4, 3 / 4], [1 - done / 13 for done in range(13)]
    assert [row["lr"] for row in rows] == pytest.approx([5e-3 * part for part in (*warm_up, *fall)])


def test_rank_changes(alone: Path) -> None:
    rows = changes(alone)
    assert [row["step"] for row in rows] == CHANGES
    ranks = dict.fromkeys(MATRICES, 4)
    shapes = {"q_proj": 64, "k_proj": 48, "v_proj": 48, "up_proj": 96, "down_proj": 96}
    for row in rows:
        assert set(row) >= RANKS
        assert list(row["importance"]) == list(row["ranks"]) == MATRICES
        assert row["adjust_size"] == 3 and row["score_margin"] >= 0
        assert len(row["pruned"]) == len(row["expanded"]) == len(row["prune_age"]) == 3
        assert not set(row["pruned"]) & set(row["expanded"])
        scores = row["importance"]
        assert max(scores[n] for n in row["pruned"]) <= min(scores[n] for n in row["expanded"])
        assert all(0 < age <= row["step"] for age in row["prune_age"])
        ranks = {n: r - (n in row["pruned"]) + (n in row["expanded"]) for n, r in ranks.items()}
        assert row["ranks"] == ranks
        assert row["total_rank"] == sum(ranks.values()) == 4 * len(MATRICES)
        counted = sum(r * (shapes[n.rsplit(".", 1)[1]] + 1) for n, r in ranks.items())
        assert row["trainable_params"] == counted
        assert row["loss_before"] != row["loss_after"], "a prune changes the function"
        assert row["spectrum_error"] >= 0 and row["seconds"] > 0
    assert len(set(rows[-1]["ranks"].values())) > 2


def test_validation(alone: Path) -> None:
    rows = read_lines(alone / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, *CHANGES, STEPS], "once each: the ends and every change"
    after = {row["step"]: row["loss"] for row in rows}
    assert all(after[row["step"]] == row["loss_after"] for row in changes(alone))


def test_summary(alone: Path) -> None:
    summary = json.loads((alone / "summary.json").read_text())
    metrics, rows = read_lines(alone / "metrics.jsonl"), changes(alone)
    assert set(summary) >= SUMMARY
    assert summary["state"] == "finished" and summary["steps"] == STEPS
    assert summary["final_loss"] == metrics[-1]["loss"] and summary["tokens"] == metrics[-1]["tokens"]
    assert summary["wall_seconds"] > 0 and summary["peak_mem_gb"] > 0
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["wall_seconds"])
    assert summary["rank_changes"] == len(CHANGES)
    at_steps = [4 * sum((64, 48, 48, 96, 96, 5)) * 2, *(row["trainable_params"] for row in rows)]
    lasted = [b - a for a, b in zip([0, *CHANGES], [*CHANGES, STEPS], strict=True)]
    mean = sum(n * steps for n, steps in zip(at_steps, lasted, strict=True)) / STEPS
    assert summary["trainable_params"] == {"final": at_steps[-1], "mean": pytest.approx(mean)}
    # What is installed need not name the build, such as +cu130.
    assert summary["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_the_summary_counts_the_frozen_weights_that_work_on_every_token(
    alone: Path, two: Path, lora: Path, base: Any
) -> None:
    """Whole at stage 3 too, where each process holds a part; under PEFT's wrapper too."""
    frozen = sum(
        p.numel() for name, p in base.named_parameters() if "embed" not in name and "head" not in name
    )
    found = [json.loads((run / "summary.json").read_text())["frozen_params"] for run in (alone, two, lora)]
    assert found == [frozen] * 3 and frozen > 0


def test_options_hold_every_option(alone: Path) -> None:
    written = yaml.safe_load((alone / "options.yaml").read_text())
    for key, value in training.SMALL.items():
        assert written[key] == value, key
    assert set(written) >= {"model", "data", "out", "ds", "method", "seed", "importance", "save_every"}


def test_the_adapters_ranks_are_those_of_the_last_change(place: Place, alone: Path) -> None:
    ranks = changes(alone)[-1]["ranks"]
    tensors = load_file(alone / "adapter" / "adapter_model.safetensors")
    names = {
        re.sub(r"^base_model\.model\.(.*)\.lora_A\.weight$", r"\1", k): k for k in tensors if "lora_A" in k
    }
    assert {name: len(tensors[key]) for name, key in names.items()} == ranks
    config = json.loads((alone / "adapter" / "adapter_config.json").read_text())
    others = {name: rank for name, rank in ranks.items() if rank != config["r"]}
    for name, rank in ranks.items():
        found = {value for pattern, value in config["rank_pattern"].items() if re.match(f"{pattern}$", name)}
        assert found == ({rank} if name in others else set())
    loaded = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in adapted(place, alone / "adapter").named_modules()
        if hasattr(module, "lora_A")
    }
    assert loaded == ranks
    spectra = json.loads((alone / "spectra.json").read_text())
    assert {name: len(values) for name, values in spectra.items()} == ranks


# What it computed


def examples(place: Place, part: str) -> list[Example]:
    options = TrainOptions(model="", **{"prompt": "alpaca", "seed": 42})
    cutoff = training.SMALL["cutoff_len"]
    how = Encoding(options.prompt, cutoff, train_on_inputs=False)
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    found, dropped = tokenise(load_records(place.data), tokenizer, how)
    val_size = training.SMALL["val_size"]
    data = arrange(found, dropped, cutoff_len=cutoff, val_size=val_size, seed=options.seed)
    return list(getattr(data, part))


def plain_loss(model: Any, rows: list[Example]) -> float:
    """Σ token losses / targets, record by record, without padding, in fp32."""
    total, targets = 0.0, 0
    for row in rows:
        labels = torch.tensor(row.labels)
        with torch.no_grad():
            scores = model.eval()(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        total += float(
            torch.nn.functional.cross_entropy(scores, labels[1:], ignore_index=IGNORED, reduction="sum")
        )
        targets += int((labels[1:] != IGNORED).sum())
    return total / targets


def test_the_losses_are_the_models(place: Place, alone: Path, base: Any) -> None:
    """The first validation sees the base itself, the last one what PEFT loads."""
    held_out = examples(place, "validation")
    first, *_, last = (row["loss"] for row in read_lines(alone / "validation.jsonl"))
    assert first == pytest.approx(plain_loss(base, held_out), rel=1e-5)
    assert last == pytest.approx(plain_loss(adapted(place, alone / "adapter"), held_out), rel=1e-5)
    assert last < first


def test_the_first_steps_loss_is_the_bases_on_eight_records(place: Place, alone: Path, base: Any) -> None:
    """λ is 0, so dropout has nothing to drop yet."""
    from launch.data.order import DataOrder

    rows = examples(place, "train")
    batch = [rows[i] for i in DataOrder(len(rows), 8, 42).indices(1)]
    assert len({len(row.input_ids) for row in batch}) > 4, "of unequal length"
    metrics = read_lines(alone / "metrics.jsonl")[0]
    assert metrics["loss"] == pytest.approx(plain_loss(base, batch), rel=1e-5)
    assert metrics["tokens"] == sum(len(row.input_ids) for row in batch)


def test_the_same_run_again_is_bit_identical(alone: Path, again: Path) -> None:
    """In another process and from its own options.yaml."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (alone / "adapter" / name).read_bytes()
    for key in METRICS - {"tokens_per_s", "step_s", "peak_mem_gb"}:
        first, second = ([row[key] for row in read_lines(run / "metrics.jsonl")] for run in (alone, again))
        assert first == second, key
    for key in RANKS - {"seconds"}:
        assert [row[key] for row in changes(alone)] == [row[key] for row in changes(again)], key
    assert (again / "validation.jsonl").read_text() == (alone / "validation.jsonl").read_text()


def assert_equal_runs(run: Path, reference: Path) -> None:
    assert training.ranks(run) == training.ranks(reference)
    assert training.relative(training.losses(run), training.losses(reference)) <= 1e-5
    validation = ([row["loss"] for row in read_lines(r / "validation.jsonl")] for r in (run, reference))
    assert training.relative(*validation) <= 1e-5
    rows, expected = (read_lines(r / "metrics.jsonl") for r in (run, reference))
    for key in ("orth", "grad_norm"):
        assert training.relative([row[key] for row in rows], [row[key] for row in expected]) <= 1e-4, key
    for key in ("step", "tokens", "lr", "epoch", "total_rank"):
        assert [row[key] for row in rows] == [row[key] for row in expected], key


def test_processes_and_stages_change_nothing(alone: Path, two: Path, stage_2: Path) -> None:
    """Dropout on, records of unequal length, another accumulation: losses within 1e-5, the same ranks."""
    assert_equal_runs(two, alone)
    assert_equal_runs(stage_2, alone)


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_every_stage_and_number_of_processes(
    place: Place, alone: Path, tmp_path: Path, stage: int, world_size: int
) -> None:
    results = place.train(tmp_path / "run", world_size, stage, micro_batch_size=4 // world_size)
    assert_equal_runs(tmp_path / "run", alone)
    assert all(result.stderr == "" for result in results[1:])


def test_dropout_and_seed_matter(place: Place, alone: Path, one: Processes, tmp_path: Path) -> None:
    """Controls: without them the equalities above would be about nothing."""
    calendar = {"max_steps": 3, "adjust_size": 0}
    for options in ({"dropout": 0.0}, {"seed": 43}):
        run = tmp_path / next(iter(options))
        in_process(one, place.arguments(run, 0, **calendar, **options))
        assert training.relative(training.losses(run), training.losses(alone)[:3]) > 1e-4


# What it saved


@pytest.mark.parametrize("name", ["two", "stage_2"])
def test_the_adapter_gives_the_training_models_logits(
    place: Place, base: Any, name: str, request: pytest.FixtureRequest
) -> None:
    """`PeftModel.from_pretrained` on the untouched base, in fp32, without dropout."""
    run = request.getfixturevalue(name)
    spectra = json.loads((run / "spectra.json").read_text())
    assert len({len(values) for values in spectra.values()}) > 2, "ranks that differ"
    assert all(value != 0 for values in spectra.values() for value in values), "non-zero λ"
    expected = load_file(run / TRAINING_LOGITS)["logits"]
    assert error(logits(base), expected) > 1e-2
    assert error(logits(adapted(place, run / "adapter")), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["peft", "peft-uniform", "merged"])
def test_the_exports_give_the_training_models_logits(
    place: Place, stage_2: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "export"
    assert export.main(["--run", str(stage_2), "--to", kind, "--out", str(out)]) == 0, capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(out) if kind == "merged" else adapted(place, out)
    assert error(logits(model), load_file(stage_2 / TRAINING_LOGITS)["logits"]) <= 1e-5


# PEFT's LoRA in the same loop


def test_lora_runs_in_the_same_loop(place: Place, lora: Path, alone: Path, base: Any) -> None:
    rows, reference = read_lines(lora / "metrics.jsonl"), read_lines(alone / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["loss"] == pytest.approx(reference[0]["loss"], rel=1e-5), (
        "B is 0: the base, on the same batch"
    )
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in reference]
    assert [row["lr"] for row in rows] == [row["lr"] for row in reference]
    assert all(row["orth"] is None and row["total_rank"] == 40 for row in rows)
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert not (lora / "ranks.jsonl").exists() or not changes(lora)
    summary = json.loads((lora / "summary.json").read_text())
    parameters = 4 * sum((64, 48, 48, 96, 96)) * 2
    assert summary["trainable_params"] == {"final": parameters, "mean": parameters}
    assert summary["state"] == "finished" and summary["rank_changes"] == 0


def test_loras_adapter_loads_with_peft(place: Place, lora: Path, base: Any) -> None:
    expected = load_file(lora / TRAINING_LOGITS)["logits"]
    assert error(logits(base), expected) > 1e-2
    assert error(logits(adapted(place, lora / "adapter")), expected) <= 1e-5
    held_out = examples(place, "validation")
    last = read_lines(lora / "validation.jsonl")[-1]
    assert last["step"] == STEPS
    assert last["loss"] == pytest.approx(plain_loss(adapted(place, lora / "adapter"), held_out), rel=1e-5)


# Options of the loop


def test_without_records_held_out(place: Place, one: Processes, tmp_path: Path) -> None:
    in_process(one, place.arguments(tmp_path / "run", val_size=0, max_steps=10))
    assert not (tmp_path / "run" / "validation.jsonl").exists()
    assert [row["loss_before"] for row in changes(tmp_path / "run")] == [None]


@pytest.mark.parametrize(("val_every", "expected"), [(4, [0, 4, 5, 8, 10]), (0, [])])
def test_validation_when_asked(
    place: Place, one: Processes, tmp_path: Path, val_every: int, expected: list[int]
) -> None:
    """Every so many steps, each step once; 0 is none."""
    in_process(one, place.arguments(tmp_path / "run", val_every=val_every, max_steps=10))
    path = tmp_path / "run" / "validation.jsonl"
    assert [row["step"] for row in (read_lines(path) if path.exists() else [])] == expected


def test_a_checkpoint_exports_like_its_run(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one, from two processes at stage 3, after rank changes; damaged, it is refused and nothing written."""
    newest = two / "checkpoints" / (two / "checkpoints" / "latest").read_text().strip()
    out = tmp_path / "exported"
    assert export.main(["--checkpoint", str(newest), "--to", "peft", "--out", str(out)]) == 0
    written, of_run = (json.loads((f / "adapter_config.json").read_text()) for f in (out, two / "adapter"))
    for config in (written, of_run):
        config["target_modules"].sort()
    assert written == of_run
    assert (out / "prompt.json").read_text() == (two / "adapter" / "prompt.json").read_text()
    trained = load_file(two / "adapter" / "adapter_model.safetensors")
    exported = load_file(out / "adapter_model.safetensors")
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[key], exported[key]) for key in trained)

    damaged = tmp_path / newest.name
    shutil.copytree(newest, damaged)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert export.main(["--checkpoint", str(damaged), "--to", "peft", "--out", str(tmp_path / "no")]) == 1
    assert shard.name in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert export.main(["--checkpoint", str(two), "--to", "peft", "--out", str(tmp_path / "no")]) == 2
    assert "give a folder like checkpoints/step_" in capsys.readouterr().err
