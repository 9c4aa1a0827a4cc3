"""Every shipped recipe loads, and the paper's stand on the paper's side of each open point."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flexlora_ds.schedule import due_steps
from launch.data.batch_layout import batch_layout
from launch.data.batches import total_steps
from launch.options.train_options import TrainOptions, parse_options

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SHIPPED = {
    "llama3_8b_r8",
    "llama3_8b_r32",
    "llama3_8b_r8_8gpu",
    "llama3_8b_growth",
    "paper_llama3_8b_r8",
    "paper_llama3_8b_r12",
    "paper_llama3_8b_r32",
    "smollm2_135m",
}
COMMONSENSE_RECORDS = 170_420 - 120
PAPER_SIDE = {
    "init_std": 0.02,
    "lambda_lr": 1.0,
    "new_direction_std": 1.0,
    "orth_form": "norm",
    "orth_weight": 0.1,
    "weight_decay": 0.0,
    "schedule": "cubic",
    "budget": "ranks",
    "grace": 0,
    "rank_one": "expand",
    "min_rank": 1,
    "spectrum": "lambda",
    "adjust_size": 4,
    "adjust_start": 5000,
    "adjust_freeze": 5000,
    "adjust_interval": 1000,
    "alpha": 16.0,
    "dropout": 0.05,
    "lr": 3e-4,
    "lr_schedule": "linear",
    "warmup_steps": 100,
    "batch_size": 16,
    "epochs": 3.0,
    "cutoff_len": 256,
    "train_on_inputs": True,
    "prompt": "llm_adapters",
}


def load(name: str) -> TrainOptions:
    return parse_options(["--recipe", name])


def test_the_recipes_of_the_design_are_there() -> None:
    assert set(NAMES) >= SHIPPED


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_valid_and_explains_itself(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    opening = text.split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert "launch/train.py" in opening or "make" in opening
    options = load(name)
    assert options.recipe == f"launch/recipes/{name}.yaml"
    assert set(yaml.safe_load(text)) <= set(options.places)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_recipe_writes_to_a_folder_of_its_name(name: str) -> None:
    assert load(name).out == f"runs/{name}"


@pytest.mark.parametrize("rank", [8, 12, 32])
def test_paper_recipes_take_the_paper_side(rank: int) -> None:
    options = load(f"paper_llama3_8b_r{rank}")
    assert options.rank == rank
    assert {key: getattr(options, key) for key in PAPER_SIDE} == PAPER_SIDE
    steps = total_steps(COMMONSENSE_RECORDS, options.epochs, options.batch_size)
    assert len(due_steps(steps, options.to_flexlora_config())) == 21


def test_the_main_recipe_changes_ranks_as_often_as_the_paper() -> None:
    options = load("llama3_8b_r8")
    steps = total_steps(COMMONSENSE_RECORDS, options.epochs, options.batch_size)
    assert abs(len(due_steps(steps, options.to_flexlora_config())) - 21) <= 1


def test_the_growth_recipe_is_the_main_run_but_for_the_gradient() -> None:
    main, growth = load("llama3_8b_r8"), load("llama3_8b_growth")
    values = growth.to_dict()
    apart = {key for key, value in main.to_dict().items() if value != values[key]}
    assert apart == {"recipe", "out", "init", "new_direction", "importance", "budget", "adjust_size"}
    assert (growth.init, growth.new_direction, growth.importance) == ("gradient", "gradient", "growth")


def test_the_8_gpu_recipe_is_the_same_run_cut_finer() -> None:
    one, eight = load("llama3_8b_r8"), load("llama3_8b_r8_8gpu")
    assert batch_layout(eight, 8).accumulation_steps == 1
    for key in ("batch_size", "lr", "rank", "alpha", "epochs", "adjust_size"):
        assert getattr(one, key) == getattr(eight, key)
