"""When a recording is made on a GPU: beside the recordings there are, the largest step so far must still fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from launch.model.cuda_graphs import CudaGraphs

GB = 10**9


@pytest.mark.parametrize(
    ("highest", "taken", "need", "free", "room"),
    [
        (20, 0, 5, 50, True),
        (20, 12, 5, 40, True),
        (70, 0, 5, 50, True),
        (70, 5, 5, 50, False),  # a longer length may take all of its memory anew
        (90, 0, 5, 50, False),
        (20, 0, 5, 4, True),  # once the allocator has given back what it holds
        (20, 0, 5, 1, False),
    ],
)
def test_a_recording_leaves_room_for_the_largest_step(
    monkeypatch: pytest.MonkeyPatch, highest: int, taken: int, need: int, free: int, room: bool
) -> None:
    left = [free * GB]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: highest * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    properties = SimpleNamespace(total_memory=85 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (left[0], 85 * GB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.__setitem__(0, left[0] + 2 * GB))
    graphs = CudaGraphs(torch.device("cuda", 0))
    graphs.taken = taken * GB
    assert graphs.has_room(need * GB) is room
