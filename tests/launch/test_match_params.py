"""`match_params`: the rank that it picks, against counts of real adapters and budgets drawn by PEFT itself."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.adalora import RankAllocator

from flexlora_ds import FlexLoRAConfig, inject_adapters
from flexlora_ds.allocation import plan_ranks
from flexlora_ds.errors import UserError
from flexlora_ds.schedule import adjustment_size, due_steps
from launch.options.parameter_match import ParameterMatch
from launch.options.train_options import Method, TrainOptions
from launch.planning.match_params import match_over, match_params
from launch.planning.parameters import parameters_of
from tests.helpers.tiny import tiny_llama

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
WITH_RANK = sorted({*get_args(Method)} - {"peft", "full"})


def shapes_of(model: Any) -> dict[str, tuple[int, int]]:
    layers = ((name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS)
    return {name: (module.out_features, module.in_features) for name, module in layers}


SHAPES = shapes_of(tiny_llama())


def match(shapes: dict[str, tuple[int, int]] = SHAPES, **options: Any) -> ParameterMatch:
    found = match_params(TrainOptions(model="m", **options), shapes)
    assert found is not None
    return found


def counted(method: str, rank: int) -> int:
    """The trained parameters of a real adapter."""
    model: Any = tiny_llama()
    if method == "flexlora":
        inject_adapters(model, FlexLoRAConfig(rank=rank))
    else:
        config = LoraConfig(r=rank, target_modules=TARGETS, use_dora=method == "dora")
        model = get_peft_model(model, config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["flexlora", "lora", "dora", "pissa"])
def test_no_other_rank_comes_nearer(method: str) -> None:
    target = counted("lora", 8)
    found = match(method=method, match_params="lora:8")
    assert (found.wanted, found.expected) == (target, counted(method, found.rank))
    for rank in (found.rank - 1, found.rank + 1):
        assert abs(counted(method, rank) - target) >= abs(found.expected - target)
    assert match(method=method, match_params=str(target)).rank == found.rank
    said = f"{found.expected:,.0f} trainable parameters for {target:,} ({found.expected / target - 1:+.2%})"
    assert said in found.line()


def test_the_mean_of_adaloras_budget_is_that_of_pefts_own_schedule() -> None:
    calendar = {"max_steps": 100, "adjust_start": 17, "adjust_freeze": 20, "adjust_interval": 6}
    found = match(method="adalora", match_params="lora:8", **calendar)
    config = AdaLoraConfig(
        init_r=-(-3 * found.rank // 2), target_r=found.rank, total_step=100, tinit=17, tfinal=20, deltaT=6
    )
    allocator = RankAllocator(SimpleNamespace(named_parameters=list), config, "default")
    allocator.init_bgt, allocator.target_bgt = config.init_r * len(SHAPES), config.target_r * len(SHAPES)
    kept, budgets = allocator.init_bgt, []
    for step in range(1, 101):
        budgets.append(kept)  # of this step; a mask holds from the next
        budget, drawn = allocator.budget_schedule(step)
        kept = budget if drawn or step == 80 else kept
    mean = sum(budgets) / 100 * parameters_of("adalora").of_rank(SHAPES, 1) / len(SHAPES)
    assert found.expected == pytest.approx(mean)
    assert found.rank < 8 and found.varies
    assert "the mean over the run" in found.line()


@pytest.mark.parametrize(("direction", "sign"), [("prune", 1), ("expand", -1)])
def test_what_only_prunes_begins_higher_and_what_only_expands_lower(direction: str, sign: int) -> None:
    calendar = {"adjust_size": 8, "adjust_start": 0, "adjust_freeze": 0, "adjust_interval": 10}
    asked = {"match_params": "lora:8", "max_steps": 100, "schedule": "constant", **calendar}
    found = match(direction=direction, **asked)
    # Changes of 8 directions after steps 10 to 90: at rank r, 10 r less or more 8 · (1 + … + 9) / 10 on the mean.
    mean = (10 * found.rank - sign * 8 * 45 / 10) / 10
    assert found.expected == pytest.approx(parameters_of("flexlora").of_rank(SHAPES, 1) * mean)
    assert sign * (found.rank - 8) > 0


SCORES = {
    "drawn": lambda shape, rng: rng.random(),
    "narrow first": lambda shape, rng: sum(shape),
    "wide first": lambda shape, rng: -sum(shape),
}
"""Who loses first; the last gains first."""


def simulated(found: ParameterMatch, scores: str, seed: int, **options: Any) -> float:
    """The mean over a run whose changes are planned by the controller's own `plan_ranks`."""
    config = TrainOptions(model="m", **{**options, "rank": found.rank}).to_flexlora_config()
    steps, rng = options["max_steps"], random.Random(seed)
    ranks, due, total = dict.fromkeys(SHAPES, found.rank), set(due_steps(steps, config)), 0.0
    limit = sum(ranks[name] * sum(SHAPES[name]) for name in SHAPES)
    for step in range(1, steps + 1):
        total += parameters_of("flexlora").of_ranks(SHAPES, ranks)
        if step in due:
            given = {name: SCORES[scores](shape, rng) for name, shape in SHAPES.items()}
            size = adjustment_size(step, steps, config)
            plan = plan_ranks(given, ranks, size, config, SHAPES, limit=limit)
            for name in plan.pruned:
                ranks[name] -= 1
            for name in plan.expanded:
                ranks[name] += 1
    return total / steps


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(
    "options",
    [
        {"direction": "prune"},
        {"direction": "prune", "adjust_size": 9, "min_rank": 2},
        {"direction": "expand"},
        {"direction": "expand", "adjust_size": 9, "rank": 4, "max_rank": 7},
        {"direction": "expand", "budget": "params"},
        {"direction": "both"},
        {"direction": "both", "budget": "params"},
    ],
    ids=str,
)
def test_a_run_stays_within_the_span_that_is_said(options: dict[str, Any], scores: str) -> None:
    """The extremes are reached where matrices are chosen by their width."""
    calendar = {"adjust_start": 1, "adjust_freeze": 2, "adjust_interval": 2, "schedule": "linear"}
    given = {"max_steps": 24, "adjust_size": 3, **calendar, **options}
    found = match(match_params="lora:6", **given)
    assert found.low is not None and found.high is not None
    assert found.low <= found.expected <= found.high
    reached = [simulated(found, scores, seed, **given) for seed in range(5 if scores == "drawn" else 1)]
    assert all(found.low - 1e-6 <= mean <= found.high + 1e-6 for mean in reached), (reached, found)
    if scores != "drawn" and given["adjust_size"] == 3 and given["direction"] != "both":
        assert min(abs(reached[0] - found.low), abs(reached[0] - found.high)) < 1e-6
    if given["direction"] == "expand" and given.get("budget") == "params":
        assert not found.varies and found.expected == reached[0], "there is nothing to spend"


def test_adaloras_span_is_that_of_masking_the_widest_or_the_narrowest() -> None:
    """Two matrices: of 3 + 3 directions two are masked after step 6 of ten."""
    shapes = {"wide": (40, 60), "narrow": (4, 5)}
    calendar = {"max_steps": 10, "adjust_start": 4, "adjust_freeze": 2, "adjust_interval": 2}
    found = match(shapes, method="adalora", match_params="300", **calendar)
    assert found.rank == 2
    whole = 3 * (101 + 10)
    for end, cost in ((found.low, 101), (found.high, 10)):
        assert end == pytest.approx(whole - 0.4 * 2 * cost)


def test_the_line_says_why_a_count_is_not_met() -> None:
    """A whole rank is a step of 17 % at rank 6, and the matrices differ in width."""
    given = {"max_steps": 40, "adjust_start": 4, "adjust_freeze": 4, "adjust_interval": 1}
    found = match(method="adalora", match_params="lora:4", **given)
    assert found.low is not None and found.high is not None
    said = found.line()
    apart = [f"{count / found.wanted - 1:+.2%}" for count in (found.expected, found.low, found.high)]
    assert f"for {found.wanted:,} ({apart[0]}), {apart[1]} to {apart[2]} by which matrices" in said
    assert said.endswith("; no whole rank comes nearer")
    near = match(match_params="lora:8", max_steps=40, adjust_size=0)
    assert near.line().endswith(f"({near.expected / near.wanted - 1:+.2%})"), "nothing varies, and it is near"


def test_a_run_of_another_length_than_thought_of_is_counted_anew() -> None:
    """Without max_steps the calendar is thought of at the paper's length, which has more changes than a short run."""
    options = TrainOptions(model="m", match_params="lora:6", direction="prune", adjust_size=8)
    thought = match_params(options, SHAPES)
    assert thought is not None
    options = options.replace(rank=thought.rank)
    told = match_over(thought, options, SHAPES, 60)
    known = match(match_params="lora:6", direction="prune", adjust_size=8, max_steps=60)
    assert (told.rank, told.nearer) == (thought.rank, known.rank) and known.rank < thought.rank
    assert told.expected > thought.expected
    assert told.line().endswith(f"; rank {known.rank} comes nearer over this run: give max_steps")
    assert match_over(known, options.replace(rank=known.rank), SHAPES, 60) == known


@pytest.mark.parametrize("method", WITH_RANK)
def test_every_method_with_a_rank_has_one_that_matches_itself(method: str) -> None:
    found = match(method=method, match_params="lora:6")
    assert abs(found.expected / found.wanted - 1) < 0.2
    assert match(method=method, match_params=str(int(found.expected))).rank == found.rank


REFUSED = [
    ({"method": "full"}, "method full has no rank to choose"),
    ({"method": "peft", "peft_config": "x.json"}, "method peft has no rank to choose"),
    ({"match_params": "lora"}, "match_params lora .*give lora:RANK, or a number of parameters"),
    ({"match_params": "lora:0"}, "match_params lora:0"),
    (
        {"match_params": "100"},
        r"method flexlora trains [\d,]+ parameters at rank 1 and [\d,]+ at rank 16; .* 100",
    ),
    ({"match_params": "lora:64", "method": "pissa"}, r"at rank 16; match_params asks for"),
    ({"method": "adalora", "adjust_start": 5}, "needs the run's length, for adjust_start is a number"),
    ({"init_adapter": "some/adapter"}, "the ranks are those of init_adapter"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said[:40] for _, said in REFUSED])
def test_what_cannot_be_matched_is_said_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        match(**{"match_params": "lora:8", **options})
    assert "\n" not in str(refusal.value)
