"""The seeded dropout mask: unbiased, uncorrelated, and the same however a batch is cut."""

from __future__ import annotations

import pytest
import torch

from flexlora_ds.dropout.mask import dropped, keep_mask, name_key, split_rate

ROWS, FEATURES = 4000, 500


def keys(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_every_row_and_every_feature_is_dropped_as_often_as_asked(p: float) -> None:
    kept = keep_mask(keys(), name_key("q_proj"), FEATURES, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / (ROWS * FEATURES) ** 0.5
    for axis, count in ((0, ROWS), (1, FEATURES)):
        deviations = (kept.mean(axis) - (1 - p)) / (sigma / count**0.5)
        assert deviations.abs().max() < 5
        assert 0.85 < deviations.std() < 1.15


@pytest.mark.parametrize("p", [0.0001, 0.0039, 0.0041, 0.499, 0.501, 0.997, 0.9999])
def test_a_rate_between_two_bytes_is_kept_too(p: float) -> None:
    kept = keep_mask(keys(), name_key("q_proj"), FEATURES, p).double()
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / (ROWS * FEATURES)) ** 0.5 + 1 / 65536


def test_neighbours_are_independent() -> None:
    kept = keep_mask(keys(), name_key("q_proj"), FEATURES, 0.5).double() - 0.5
    bound = 5 * 0.25 / (ROWS * FEATURES) ** 0.5
    for distance in (1, 2, 3, 4, 8, 64):
        assert abs((kept[:, distance:] * kept[:, :-distance]).mean()) < bound
    assert abs((kept[1:] * kept[:-1]).mean()) < bound
    other = keep_mask(keys(), name_key("k_proj"), FEATURES, 0.5).double() - 0.5
    assert abs((kept * other).mean()) < bound


def test_consecutive_keys_are_as_good_as_random_ones() -> None:
    kept = keep_mask(torch.arange(ROWS), 0, FEATURES, 0.5).double() - 0.5
    assert abs((kept[1:] * kept[:-1]).mean()) < 5 * 0.25 / (ROWS * FEATURES) ** 0.5


def test_a_row_does_not_depend_on_the_others() -> None:
    all_rows = keep_mask(keys(), name_key("v_proj"), 33, 0.3)
    some = torch.tensor([5, 999, 3])
    assert torch.equal(keep_mask(keys()[some], name_key("v_proj"), 33, 0.3), all_rows[some])


@pytest.mark.parametrize("p", [0.001, 0.05, 0.4999, 0.5, 0.999])
@pytest.mark.parametrize("features", [1, 6, 33])
def test_the_form_of_single_elements_drops_the_same(p: float, features: int) -> None:
    values = torch.randn(300, features, generator=torch.Generator().manual_seed(1))
    expected = values * keep_mask(keys(300), name_key("up_proj"), features, p, values.dtype)
    key = torch.tensor([name_key("up_proj")])
    assert torch.equal(dropped(values, keys(300), key, *split_rate(p)), expected)


def test_the_mask_is_pinned() -> None:
    """Runs must repeat across versions: these bits are part of the checkpoint's meaning."""
    kept = keep_mask(torch.tensor([1, -7, 2**40]), name_key("model.layers.0.self_attn.q_proj"), 12, 0.5)
    assert ["".join(map(str, row)) for row in kept.int().tolist()] == PINNED


PINNED = ["101011101000", "011100001010", "111001100001"]
