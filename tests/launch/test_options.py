"""Options: recipe and command line -> one validated object, and the texts made from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.fields import OnResume, option_specs
from flexlora_ds.schedule import resolve_calendar
from launch.data.batch_layout import batch_layout
from launch.options.debug import debug_wanted
from launch.options.help import field_lines, help_text, options_markdown
from launch.options.train_options import (
    DEFAULT_RECIPE,
    GROUPS,
    SPECS,
    Method,
    TrainOptions,
    by_group,
    parse_options,
)
from launch.options.without_effect import idle_line

ROOT = Path(__file__).resolve().parents[2]

CONTRACT = {
    "data": "data/commonsense_170k.json",
    "method": "flexlora",
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.05,
    "target_modules": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "importance": "entropy",
    "direction": "both",
    "new_direction": "zero_impact",
    "new_moment": "own_age",
    "schedule": "cubic",
    "adjust_size": 4,
    "adjust_start": "auto",
    "adjust_freeze": "auto",
    "adjust_interval": "auto",
    "budget": "ranks",
    "grace": 0,
    "rank_one": "neutral",
    "min_rank": 1,
    "spectrum": "lambda",
    "orth_form": "decoupled",
    "init_std": "unit",
    "lambda_lr": "auto",
    "epochs": 3,
    "max_steps": None,
    "batch_size": 16,
    "micro_batch_size": "auto",
    "lr": 3e-4,
    "lr_schedule": "linear",
    "warmup_steps": 100,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "cutoff_len": 256,
    "train_on_inputs": False,
    "val_size": 120,
    "prompt": "alpaca",
    "dtype": "auto",
    "attention": "auto",
    "gradient_checkpointing": "auto",
    "padding_free": "auto",
    "log_every": 10,
    "val_every": "auto",
    "save_every": 1000,
    "keep_checkpoints": 2,
    "resume": "auto",
}
"""Keys and defaults as the project's contract lists them, written down again on purpose."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("# my run\nmodel: some/model\nrank: 6\nlr: 1e-4\ntarget_modules: [q_proj, v_proj]\n")
    return path


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_options(argv)
    return str(caught.value)


def test_defaults_are_those_of_the_contract() -> None:
    options = TrainOptions()
    assert {key: getattr(options, key) for key in CONTRACT} == CONTRACT


def test_defaults_agree_with_the_library() -> None:
    assert TrainOptions().to_flexlora_config() == FlexLoRAConfig()


def test_the_method_declares_its_options_for_both() -> None:
    own = {spec.name for spec in SPECS if spec.owner is TrainOptions}
    inherited = {spec.name for spec in option_specs(FlexLoRAConfig)}
    assert not own & inherited and own | inherited == {spec.name for spec in SPECS}
    lines, library = field_lines(TrainOptions), field_lines(FlexLoRAConfig)
    assert all(lines[name] == library[name] for name in inherited)


@pytest.mark.parametrize("key", ["adjust_start", "adjust_freeze", "adjust_interval"])
def test_the_shares_of_the_calendar_in_help_are_those_that_auto_takes(key: str) -> None:
    calendar = resolve_calendar(10**6, FlexLoRAConfig())
    taken = getattr(calendar, key.removeprefix("adjust_")) / 10**6
    assert f"auto is {100 * taken:.2f} % of the run" in field_lines(FlexLoRAConfig)[key]


def test_what_a_resumed_run_may_change_stands_on_the_field() -> None:
    on_resume = {spec.name: spec.on_resume for spec in SPECS}
    assert on_resume["rank"] is on_resume["seed"] is on_resume["cutoff_len"] is OnResume.MUST_MATCH
    assert on_resume["dtype"] is on_resume["model"] is on_resume["max_steps"] is OnResume.MAY_CHANGE
    assert on_resume["lr"] is on_resume["dropout"] is on_resume["adjust_size"] is OnResume.IS_SAID


def test_the_page_on_checkpoints_names_what_must_match() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    named = page.partition("is another:")[2].partition("may change freely")[0]
    bound = {spec.name for spec in SPECS if spec.on_resume is OnResume.MUST_MATCH}
    assert bound <= {name for name in bound if f"`{name}`" in named}


def test_without_a_recipe_the_main_job_runs() -> None:
    options = parse_options(["--ds", "ds_configs/zero2.json"])
    assert options.model == "meta-llama/Meta-Llama-3-8B"
    assert options.out == "runs/llama3_8b_r8"


def test_command_line_wins_over_recipe_over_default(recipe: Path) -> None:
    options = parse_options(["--recipe", str(recipe), "--rank=5", "--local_rank=1", "--local-rank", "1"])
    assert (options.rank, options.lr, options.alpha) == (5, 1e-4, 16.0)
    assert options.target_modules == ("q_proj", "v_proj")
    assert options.out == "runs/mine"


def test_text_is_converted_to_every_kind(recipe: Path) -> None:
    words = "--max_steps none --lambda_lr 4 --init_std=0.02 --dry_run true --target_modules q_proj,o_proj"
    options = parse_options(
        ["--recipe", str(recipe), *words.split(), "--adjust_start", "7", "--resume", "none"]
    )
    assert options.max_steps is None
    assert (options.lambda_lr, options.init_std, options.adjust_start) == (4.0, 0.02, 7)
    assert options.dry_run is True
    assert options.target_modules == ("q_proj", "o_proj")
    assert options.resume == "none"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--rnk", "4"], ["--rnk", "did you mean rank?"]),
        (["--learning_rate", "1"], ["did you mean lr?"]),
        (["--zzzz", "1"], ["--zzzz", "--help"]),
        (["--rank", "0"], ["rank 0", "--rank on the command line", "at least 1"]),
        (["--rank", "four"], ["rank four", "a whole number"]),
        (["--rank", "4.0"], ["rank 4.0"]),
        (["--lr", "nan"], ["lr nan"]),
        (["--dropout", "1"], ["dropout 1", "below 1"]),
        (["--importance", "entropi"], ["did you mean entropy?"]),
        (["--dry_run"], ["--dry_run has no value"]),
        (["--dry_run", "1"], ["true or false"]),
        (["--rank", "--lr", "1"], ["--rank has no value"]),
        (["rank", "4"], ["'rank' belongs to no key"]),
        (["--max_rank", "3"], ["max_rank 3 is below rank 8", "--max_rank on the command line"]),
        (["--recipe", "llama3_8b_r9"], ["llama3_8b_r9", "llama3_8b_r8"]),
        (["--target_modules", "q_proj,,v_proj"], ["target_modules"]),
        (["--target_modules", "q_(proj"], ["regular expression", "--target_modules on the command line"]),
    ],
)
def test_bad_command_lines_are_named_with_what_to_do(argv: list[str], parts: list[str]) -> None:
    message = refused(*argv)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: m\nrnk: 4\n", ["'rnk'", "line 2", "did you mean rank?"]),
        ("model: m\nrank: -1\n", ["rank -1", "line 2"]),
        ("model: m\nrank: 8\nrank: 9\n", ["rank stands twice", "line 3"]),
        ("model: m\nrank: [8\n", ["not valid YAML", "line"]),
        ("%YAML " + "9" * 5_000 + "\n---\nrank: 8\n", ["not valid YAML"]),
        ("- model\n", ["key: value"]),
        ("1: model\n", ["key: value"]),
        ("recipe: other.yaml\nmodel: m\n", ["unknown key 'recipe'"]),
        ("rank: 8\n", ["no model"]),
        ("model: m\nrank: true\n", ["rank true"]),
        ("model: m\ndry_run: 3\n", ["dry_run 3", "true or false"]),
        ("model: m\nmin_rank: 9\n", ["min_rank 9 is above rank 8", "line 2"]),
        ("model: !!python/object:os.system x\n", ["YAML tag", "os.system", "line 1"]),
        ("model: m\nrank: !!binary aGk=\n", ["rank has the YAML tag", "line 2", "without a tag"]),
        ("rank: &a [1, 2]\nalpha: &b [*a, *a]\nmodel: [*b, *b]\n", ["alpha holds a nested value"]),
        ("model: &a [*a]\n", ["model holds a nested value"]),
        ("model: {a: 1}\n", ["model holds a nested value", "line 1"]),
        ("model: " + "[" * 5_000, ["nested too deeply"]),
        ("<<: {rank: 4}\n", ["unknown key '<<'"]),
        ("? [a]\n: 1\n", ["key: value"]),
        ("rank: 1" + "0" * 5_000, ["rank 1000", "is not allowed", "a whole number", "line 1"]),
        ('model: "\\ud800"\n', ["model", "holds a character that no text file holds", "line 1"]),
        ('model: "a\\0b"\n', ["model", "holds a character that no text file holds"]),
    ],
)
def test_bad_recipes_are_named_with_file_and_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refused("--recipe", str(path))
    assert "bad.yaml" in message
    assert all(part in message for part in parts), message


def test_a_date_is_the_name_that_it_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: 2026-01-31\ndata: 2026-13-45\nrank: &r 4\nmin_rank: *r\n")
    options = parse_options(["--recipe", str(path)])
    assert (options.model, options.data, options.rank, options.min_rank) == ("2026-01-31", "2026-13-45", 4, 4)


def test_what_is_no_recipe_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("/dev/zero", str(tmp_path / "pipe.yaml"), str(tmp_path), "a\0b"):
        assert "no recipe file" in refused("--recipe", name)
        assert not debug_wanted(["--recipe", name], DEFAULT_RECIPE)
    large = tmp_path / "large.yaml"
    large.write_text("#" * (2 << 20))
    assert "longer than 1 MiB" in refused("--recipe", str(large))


def test_debug_is_found_in_a_recipe_with_other_faults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rnk: 4\ndebug: true\n")
    assert debug_wanted(["--recipe", str(path)], DEFAULT_RECIPE)
    path.write_text("debug: " + "[" * 5_000)
    assert not debug_wanted(["--recipe", str(path)], DEFAULT_RECIPE)


def test_an_unreadable_recipe_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model: caf\xe9\n")
    assert "latin.yaml" in refused("--recipe", str(path))


KIND_SAMPLES = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 64),
        "lr": st.floats(1e-8, 1.0),
        "dropout": st.floats(0, 0.9),
        "target_modules": st.sampled_from([("all-linear",), ("q_proj", "v_proj"), (r".*\.[kv]_proj",)]),
        "lambda_lr": st.one_of(st.just("auto"), st.floats(0.1, 100)),
        "orth_weight": st.one_of(st.none(), st.floats(0, 0.5)),
        "max_steps": st.one_of(st.none(), st.integers(1, 10**6)),
        "gradient_checkpointing": st.sampled_from([True, False, "auto"]),
        "resume": st.sampled_from(["auto", "none", "null", "yes", "runs/a: b/#1", "3e-4"]),
        "model": st.text(
            st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30
        ),
        "seed": st.integers(0, 2**62),
    }
)


@given(KIND_SAMPLES)
@settings(max_examples=100, deadline=None)
def test_yaml_round_trip_repeats_the_run(values: dict[str, object]) -> None:
    options = TrainOptions(**values)  # type: ignore[arg-type]
    assert TrainOptions.from_yaml(options.to_yaml()) == options


def test_a_written_options_file_is_a_recipe(tmp_path: Path, recipe: Path) -> None:
    first = parse_options(["--recipe", str(recipe), "--seed", "7", "--warmup_steps", "0"])
    saved = tmp_path / "options.yaml"
    saved.write_text(first.to_yaml())
    again = parse_options(["--recipe", str(saved)])
    assert again == first
    assert again.out == "runs/mine"


PATHS = ("model", "data", "out", "ds", "peft_config", "init_adapter", "eval_data", "resume")


@pytest.mark.parametrize("written", ["recipe", "command line"])
def test_the_home_directory_stands_for_its_sign_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """No shell expands it in a recipe or behind a sign; a folder named `~` would be made in its place."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "".join(f"{key}: ~/{key}\n" for key in PATHS)
    (tmp_path / "mine.yaml").write_text(text if written == "recipe" else "")
    words = [] if written == "recipe" else [f"--{key}=~/{key}" for key in PATHS]
    options = parse_options(["--recipe=~/mine.yaml", *words])
    assert [getattr(options, key) for key in PATHS] == [f"{tmp_path}/{key}" for key in PATHS]
    assert TrainOptions.from_yaml(options.to_yaml()) == options


def test_every_option_has_a_help_line_and_a_group() -> None:
    lines = field_lines(TrainOptions)
    assert [group for group, specs in by_group() if specs] == list(GROUPS)
    assert {spec.name for spec in SPECS} == {spec.name for spec in option_specs(TrainOptions)}
    page = help_text()
    for spec in SPECS:
        assert lines[spec.name].endswith(".")
        assert f"--{spec.name} (default " in page


def test_docs_page_is_in_step() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == options_markdown(), "run: python -m launch.options.help > docs/options.md"


def test_help_exits_0_and_needs_no_torch() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['--rank', '0', '--help']; "
        "runpy.run_path('launch/train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--adjust_size (default 4)" in done.stdout


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_auto_micro_batch_is_the_share_of_a_process(processes: int) -> None:
    layout = batch_layout(TrainOptions(), processes)
    assert layout.micro_batch_size == 16 // processes
    assert layout.batch_size == 16


def test_auto_micro_batch_is_halved_until_it_fits() -> None:
    assert batch_layout(TrainOptions(), 2, lambda micro: micro * 10.0, 25.0).micro_batch_size == 2
    odd = batch_layout(TrainOptions(batch_size=18), 2, lambda micro: micro * 10.0, 45.0)
    assert (odd.micro_batch_size, odd.accumulation_steps, odd.fits) == (3, 3, True)
    hopeless = batch_layout(TrainOptions(), 1, lambda micro: 100.0, 25.0)
    assert (hopeless.micro_batch_size, hopeless.fits) == (1, False)


@given(st.integers(1, 300), st.integers(1, 16), st.floats(1, 400))
@settings(deadline=None)
def test_every_layout_multiplies_to_the_batch(batch_size: int, processes: int, limit: float) -> None:
    options = TrainOptions(batch_size=batch_size)
    if batch_size % processes:
        with pytest.raises(UserError, match="does not divide"):
            batch_layout(options, processes)
        return
    layout = batch_layout(options, processes, float, limit)
    assert layout.batch_size == batch_size
    assert layout.micro_batch_size <= limit


def test_a_micro_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="give auto or one of 1, 2, 4, 8"):
        batch_layout(TrainOptions(micro_batch_size=3), 2)


def test_every_method_of_the_option_can_be_built() -> None:
    from launch.engine.methods.registry import METHODS

    assert set(METHODS) == set(get_args(Method))


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("--method lora --rank 4 --adjust_size 3 --seed 1", "adjust_size (method lora)"),
        ("--method lora --importance growth", "importance (method lora)"),
        ("--method dora --min_rank 99 --max_rank 2", "min_rank, max_rank (method dora)"),
        ("--method rslora --orth_weight 7 --init gradient", "orth_weight, init (method rslora)"),
        ("--method adalora --adjust_start 3 --adjust_size 0", "adjust_size (method adalora)"),
        ("--method lora_ga --init_batches 3 --peft_config f.json", "peft_config (method lora_ga)"),
        ("--method full --rank 4 --dropout 0 --weight_decay 1", "rank, dropout (method full)"),
        ("--method peft --peft_config f.json --target_modules q_proj --alpha 2", "alpha (method peft)"),
        (
            "--eval_items 3 --peft_config f.json --lambda_lr 2",
            "peft_config (method flexlora); eval_items (eval_every 0)",
        ),
        ("--eval_items 3 --eval_every 2", None),
        ("--adjust_size 0 --orth_weight 0 --direction prune --grace 2", "direction, grace (adjust_size 0)"),
        ("--method lora --adjust_size 0 --schedule linear", "adjust_size, schedule (method lora)"),
        ("--init gaussian --init_batches 2", "init_batches (init gaussian)"),
        ("--init_adapter some/where --init gradient", "init (init_adapter)"),
        (
            "--match_params lora:8 --rank 4 --max_steps 5 --epochs 2",
            "rank (match_params); epochs (max_steps)",
        ),
    ],
)
def test_options_of_the_command_line_without_effect_are_known(words: str, idle: str | None) -> None:
    """And the shipped recipe's are not among them."""
    options = parse_options(["--model", "m", *words.split()])
    assert idle_line(options) == (idle and f"no effect: {idle}")


@pytest.mark.parametrize("method", [name for name in get_args(Method) if name != "flexlora"])
def test_what_a_method_does_not_look_at_contradicts_nothing(method: str) -> None:
    """Each value is allowed by itself; together FlexLoRA refuses them."""
    given = {"importance": "growth", "min_rank": 12, "max_rank": 3, "orth_weight": 3.0}
    options = TrainOptions(model="m", method=method, **given)  # type: ignore[arg-type]
    assert options.to_flexlora_config().min_rank == 1, "the defaults stand for them"
    with pytest.raises(UserError, match="min_rank 12 is above rank 8"):
        TrainOptions(model="m", **given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="importance grow is not allowed"):
        TrainOptions(model="m", method=method, importance="grow")  # type: ignore[arg-type]
