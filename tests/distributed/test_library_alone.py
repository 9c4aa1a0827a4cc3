"""The library in one's own script, without `launch`: the example of the Python interface, and a task's head."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import rank_worker as worker
from tests.helpers import tiny
from tests.helpers.processes import Processes, rank_environments

SCRIPT = """
import sys
sys.modules["launch"] = None  # whoever imports it fails

from flexlora_ds import prepare_extensions

prepare_extensions()  # before DeepSpeed begins communication

import deepspeed, torch
from transformers import AutoModelForCausalLM
from flexlora_ds import FlexLoRAConfig, RankController, build_optimizer, inject_adapters, save_adapter

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
config = FlexLoRAConfig(rank=4, adjust_start=1, adjust_freeze=1, adjust_interval=2, target_modules=["q_proj", "v_proj"])
inject_adapters(model, config)
optimizer = build_optimizer(model, config, lr=3e-4)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=sys.argv[2])
controller = RankController(engine, config, total_steps=6)
for step in range(1, 7):
    ids = torch.randint(0, 90, (2, 8), generator=torch.manual_seed(step))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    change = controller.after_step(step)
    if change is not None:
        print("ranks of step", step, sorted(set(change.ranks.values())))
save_adapter(engine, sys.argv[3], config, base_model=sys.argv[1])
"""


def test_the_example_runs_without_launch(tmp_path: Path) -> None:
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    ds = tiny.ds_config(2, batch=2)
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    (tmp_path / "train.py").write_text(SCRIPT)
    arguments = [str(tmp_path / name) for name in ("train.py", "base", "ds.json", "adapter")]
    (environment,) = rank_environments(1, {"PYTHONPATH": str(Path.cwd())})
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ranks of step" in done.stdout

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    ranks = {m.shape[0] for n, m in loaded.named_parameters() if n.endswith("lora_A.default.weight")}
    assert len(ranks) > 1, "each matrix at its own rank"


class Classifier(nn.Module):
    """A base with a head of its own."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base, self.head = base, nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.base(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return self.head(hidden[:, -1].to(self.head.weight.dtype))


def train_a_head(case: dict[str, Any]) -> dict[str, Any]:
    """In each process: losses, ranks, and how far the head moved, with the head in a group of its own."""
    import deepspeed

    from flexlora_ds import RankController, build_optimizer, inject_adapters
    from flexlora_ds.partitions import MASTER, live_shards

    rank, world = tiny.start()
    config = worker.configuration(target_modules=("q_proj", "v_proj"), adjust_start=1, adjust_interval=3)
    base: Any = tiny.tiny_llama()
    torch.manual_seed(3)
    model = Classifier(base, base.config.hidden_size)
    inject_adapters(model, config)
    model.head.requires_grad_(True)
    before = model.head.weight.detach().clone()
    optimizer = build_optimizer(
        model, config, lr=5e-3, extra_groups=[{"params": model.head.parameters(), "lr": 1e-2}]
    )
    ds = tiny.ds_config(case["stage"], world=world)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
    controller = RankController(engine, config, total_steps=30)
    ids = torch.randint(0, 90, (8, 6), generator=torch.Generator().manual_seed(5))
    labels = torch.arange(8) % 3
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    losses, changes = [], 0
    for step in range(1, 21):
        loss = nn.functional.cross_entropy(engine(ids[mine]).float(), labels[mine])
        engine.backward(loss)
        engine.step()
        changes += controller.after_step(step) is not None
        losses.append(loss.item())
    masters = dict(live_shards(engine).read(list(engine.module.head.parameters()), MASTER))
    moved = (masters[engine.module.head.weight].cpu() - before).abs().max().item()
    return {
        "losses": losses,
        "changes": changes,
        "moved": moved,
        "lrs": [g["lr"] for g in optimizer.param_groups],
    }


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_head_trains_beside_adapters_whose_ranks_change(two_processes: Processes, stage: int) -> None:
    for result in two_processes.run(train_a_head, {"stage": stage}):
        assert result["changes"] > 1 and result["moved"] > 0.01
        assert result["losses"][-1] < result["losses"][0] / 2
        assert result["lrs"][0] == 5e-3 and result["lrs"][-1] == 1e-2
