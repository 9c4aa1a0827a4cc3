"""What the report's page is made of: histories, tables of layers and changes, spectra, costs; all bounded."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.loop.finish import frozen_parameters
from launch.report.build import build_report
from launch.report.change_table import MOST_CHANGES, MOST_NAMES, change_rows
from launch.report.cost import cost_table, flops_of
from launch.report.history import MOST_CELLS, evenly, history_of
from launch.report.layer_table import layer_table
from launch.report.page import MOST_WARNINGS, page
from launch.report.run_data import RunData, read_run
from launch.report.spectrum_sample import HEIGHT, SAMPLE, sample_spectra
from tests.helpers.report_runs import NAMES, Page, rank_change, write_run

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    return read_run(write_run(tmp_path / "run").path)


def huge(run: RunData, changes: int, layers: int = 32, moved: int = 64) -> RunData:
    """A run of so many changes; its matrices have long names, and each change moves many."""
    names = [f"base_model.model.model.layers.{i}.block.{kind}" for i in range(layers) for kind in KINDS]
    names.append("base_model.model.lm_head")
    draw = random.Random(0)
    rows = [
        rank_change(10 * number, {name: draw.randrange(1, 65) for name in names})
        | {"importance": {name: draw.random() for name in names}}
        | {"pruned": draw.sample(names, moved), "expanded": draw.sample(names, moved)}
        | {"prune_age": [10] * moved, "warnings": [f"warning {number}"], "newborn": {}}
        for number in range(1, changes + 1)
    ]
    spectra = {name: [draw.gauss(0, 1) for _ in range(64)] for name in names}
    return replace(run, changes=rows, spectra=spectra, births=[], worth={})


def test_a_history_has_ranks_and_the_scores_before_each_change(run: RunData) -> None:
    history = history_of(run)
    assert history is not None and history.note == "" and history.uniform_rank is None
    assert list(history.kinds) == ["q_proj", "down_proj"]
    first = history.kinds["q_proj"][0]
    assert (first.name, first.label) == (NAMES[0], "0")
    assert (first.ranks, first.scores) == ([4, 3, 2, 1], [None, 0.5, 0.5, 0.5])


def test_scores_that_are_not_finite_are_no_numbers_of_the_page(run: RunData) -> None:
    odd = dict(zip(NAMES, (math.nan, math.inf, None, 1 / 3, 1e308, 0), strict=True))
    history = history_of(replace(run, changes=[row | {"importance": odd} for row in run.changes]))
    assert history is not None
    assert {m.name: m.scores[1] for m in history.matrices} == dict(
        zip(NAMES, (None, None, None, 0.333, 1e308, 0), strict=True)
    )
    json.dumps(history.to_json(), allow_nan=False)


@pytest.mark.parametrize("most", [2, 3, 7, 100])
def test_values_are_left_out_evenly(most: int) -> None:
    kept = evenly(range(100), most)
    assert len(kept) == most and kept[0] == 0 and kept[-1] == 99
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1


def test_of_a_long_run_the_history_keeps_the_last_ranks_and_says_what_it_left_out(run: RunData) -> None:
    long = huge(run, changes=400, moved=1)
    history = history_of(long)
    assert history is not None
    cells = sum(len(matrix.ranks) for matrix in history.matrices)
    assert cells <= MOST_CELLS < 401 * 225
    assert history.steps[0] == 0 and history.steps[-1] == 4000 and len(history.steps) == MOST_CELLS // 225
    assert history.note == "266 of 401 steps"
    assert {m.name: m.ranks[-1] for m in history.matrices} == long.changes[-1]["ranks"]


def test_a_page_of_225_matrices_and_100_changes_stays_small(run: RunData) -> None:
    text = page(huge(run, changes=100), {})
    assert len(text.encode()) < 1_000_000
    shown = Page(text)
    assert shown.data is not None and len(shown.data["steps"]) == 101
    assert shown.text.count("warning ") == MOST_WARNINGS - 1  # and one of the run itself
    assert f"and {101 - MOST_WARNINGS} more" in shown.text


@pytest.mark.full
def test_a_report_of_225_matrices_and_100_changes_is_below_3_mb(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    run = huge(read_run(folder.path), changes=100)
    folder.rank_changes.path.write_text("".join(json.dumps(row) + "\n" for row in run.changes))
    folder.write_spectra(dict(run.spectra))
    assert build_report(folder.path).stat().st_size < 3_000_000


def test_the_table_of_layers_has_every_matrix_once(run: RunData) -> None:
    history = history_of(huge(run, changes=3))
    assert history is not None
    table = layer_table(history)
    assert table.kinds == list(KINDS) and list(table.rows) == [str(i) for i in range(32)]
    cells = [cell for row in table.rows.values() for cell in row if cell is not None] + table.others
    matrices = list(history.matrices)
    assert {cell.place for cell in cells} == set(range(225)) and len(cells) == 225
    assert all(
        (cell.name, cell.rank) == (matrices[cell.place].name, matrices[cell.place].ranks[-1])
        for cell in cells
    )
    assert [cell.name for cell in table.others] == ["base_model.model.lm_head"]
    assert all(0 <= cell.height <= 1 for cell in cells)


def test_a_layer_without_a_matrix_of_a_kind_has_a_gap(run: RunData) -> None:
    names = ["layers.0.q", "layers.1.q", "layers.1.up", "layers.10.up"]
    spectra: Mapping[str, list[float]] = {name: [1.0] * (2 + i) for i, name in enumerate(names)}
    history = history_of(replace(run, changes=[], spectra=spectra))
    assert history is not None
    rows = layer_table(history).rows
    assert {label: [cell and cell.rank for cell in row] for label, row in rows.items()} == {
        "0": [2, None],
        "1": [3, 4],
        "10": [None, 5],
    }


def test_equal_ranks_are_one_sentence(run: RunData) -> None:
    plain = replace(run, changes=[], births=[], worth={}, spectra=dict.fromkeys(NAMES, [1.0] * 8))
    shown = Page(page(plain, {})).text
    assert "All 6 matrices have rank 8, from the start to the end." in shown
    assert "Ranks over layers" not in shown and "No rank was changed." in shown
    bare = Page(page(replace(plain, spectra={}), {}))
    assert "Ranks over" not in bare.text and "Singular" not in bare.text and bare.data is None


def test_ten_spectra_have_the_entropy_of_their_energies(run: RunData) -> None:
    wide = huge(run, changes=1)
    sample = sample_spectra(wide)
    assert len({one.name for one in sample}) == SAMPLE and sample == sample_spectra(wide)
    for one in sample:
        energies = [value**2 for value in wide.spectra[one.name]]
        shares = [energy / sum(energies) for energy in energies]
        entropy = -sum(share * math.log(share) for share in shares) / math.log(len(shares))
        assert float(one.entropy) == pytest.approx(entropy, abs=1e-3)
        assert float(one.strength) == pytest.approx(math.sqrt(sum(energies)), rel=0.01)
        heights = [bar.height for bar in one.bars]
        assert heights == sorted(heights, reverse=True) and len(heights) == one.rank
    assert max(one.bars[0].height for one in sample) == HEIGHT


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1e308, 1e308], [0.0, 0.0], [-0.5], []])
def test_odd_spectra_are_shown_or_left_out(run: RunData, values: list[float]) -> None:
    odd = replace(run, changes=[], spectra={"layers.0.q": values, "layers.1.q": [1.0, 2.0]})
    names = [one.name for one in sample_spectra(odd)]
    assert ("layers.0.q" in names) == (values != [] and not any(map(math.isnan, values)))
    Page(page(odd, {}))


def test_a_change_of_many_matrices_names_layers_by_module(run: RunData) -> None:
    rows = change_rows(huge(run, changes=2 * MOST_CHANGES))
    assert len(rows) == MOST_CHANGES and rows[-1]["step"] == f"{20 * MOST_CHANGES:,}"
    cell = rows[0]["pruned"]
    assert sum(len(layers.split(", ")) for layers in cell["kinds"].values()) == MOST_NAMES
    assert cell["more"] == 64 - MOST_NAMES and set(cell["kinds"]) <= {*KINDS, "base_model.model.lm_head"}
    assert rows[0]["numbers"]["age of pruned"] == "10 × 64"


def test_costs_stand_beside_those_of_other_runs(run: RunData) -> None:
    lora = replace(run, options={"method": "lora"}, changes=[], summary={"wall_seconds": 7200.0, "tokens": 5})
    table = cost_table([run, lora])
    assert table["method"] == ["flexlora", "lora"]
    assert table["training time"] == ["1:20", "2:00:00"]
    assert table["of it in rank changes"] == ["0.75 s (0.9%)", "–"]
    assert table["tokens"] == ["4,000", "5"]
    assert "FLOPs" not in table


def test_flops_are_those_that_torch_counts() -> None:
    """A frozen layer between trained ones: 2 operations a weight forward, 2 back; a trained one 2 more."""
    from torch.utils.flop_counter import FlopCounterMode

    rows, frozen, trained = 5, torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False)
    frozen.requires_grad_(False)
    x = torch.ones(rows, 8, requires_grad=True)  # as behind a layer with an adapter
    with FlopCounterMode(display=False) as counter:
        trained(frozen(x)).sum().backward()
    summary: dict[str, Any] = {"tokens": rows, "frozen_params": 128, "trainable_params": {"mean": 64.0}}
    run = RunData("a", {}, summary, [], [], [], {})
    assert flops_of(run) == counter.get_total_flops()
    assert flops_of(replace(run, summary=summary | {"frozen_params": None})) is None


def test_frozen_weights_are_all_but_embeddings_head_and_trained_ones() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    per_layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert frozen_parameters(model) == 2 * per_layer - 16 * 32 + 16
