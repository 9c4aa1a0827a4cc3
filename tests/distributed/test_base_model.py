"""Loading under ZeRO-3: the partitions hold what was saved, in little memory, and train the same."""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexlora_ds.base_model.loading import load_causal_lm
from flexlora_ds.errors import UserError
from tests.helpers.processes import Processes
from tests.helpers.tiny import (
    DTYPES,
    ds_config,
    global_batch,
    make_engine,
    records,
    start,
    tiny_llama,
    train_step,
)

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def save_llama(folder: Path, shard: str, **changes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 97, "hidden_size": 27, "intermediate_size": 45, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder, max_shard_size=shard)
    return folder


def compare_with_whole(folder: str, dtype: str, gguf: bool = False) -> dict[str, Any]:
    """In each process: load partitioned and whole, and list what differs."""
    import deepspeed

    _, world = start()
    whole = load_causal_lm(folder, dtype=DTYPES[dtype])
    model = load_causal_lm(folder, dtype=DTYPES[dtype], zero3=ds_config(3, dtype, world))
    names = [name for name, _ in model.named_parameters()]
    differing = [] if names == [name for name, _ in whole.named_parameters()] else ["names"]
    for (name, expected), parameter in zip(whole.named_parameters(), model.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            if parameter.dtype != expected.dtype or not torch.equal(parameter, expected):
                differing.append(name)
    for name, buffer in whole.named_buffers():
        found = model.get_buffer(name)
        if found.dtype != buffer.dtype or not torch.equal(found, buffer):
            differing.append(name)
    return {
        "differing": differing,
        "held": sum(p.numel() for p in model.parameters()),
        "partition": sum(p.ds_tensor.numel() for p in model.parameters()),
        "whole": sum(p.numel() for p in whole.parameters()),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "training": model.training,
    }


@pytest.mark.parametrize(
    ("dtype", "tied", "changes"),
    [
        ("fp32", False, {}),
        ("bf16", True, {}),
        ("bf16", False, {"rope_parameters": YARN, "attention_bias": True}),
    ],
)
def test_partitions_hold_what_was_saved(
    two_processes: Processes, tmp_path: Path, dtype: str, tied: bool, changes: dict[str, Any]
) -> None:
    folder = save_llama(tmp_path, "6KB", tie_word_embeddings=tied, **changes)
    assert len(list(folder.glob("*.safetensors"))) > 3
    for found in two_processes.run(compare_with_whole, str(folder), dtype):
        assert found["differing"] == []
        assert found["held"] == 0 and found["tied"] == tied and not found["training"]
        assert found["partition"] < 0.51 * found["whole"]


def test_what_cannot_be_read_shard_by_shard_is_partitioned_all_the_same(
    two_processes: Processes, tmp_path: Path
) -> None:
    """A GGUF file, and a checkpoint of the bare transformer, whose names transformers completes."""
    from tests.helpers.tiny_gguf import write_gguf

    gguf = write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    bare = save_llama(tmp_path / "bare", "1MB", tie_word_embeddings=True)
    weights = {k.removeprefix("model."): v for k, v in load_file(bare / "model.safetensors").items()}
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    for path in (gguf, bare):
        for found in two_processes.run(compare_with_whole, str(path), "fp32"):
            assert found["differing"] == [] and found["held"] == 0


def train_partitioned(folder: str, stage: int, partitioned: bool) -> dict[str, Any]:
    """Losses of 16 steps with 2 rank changes, the changes, and whether the base is untouched."""
    import deepspeed

    from flexlora_ds import FlexLoRAConfig, RankController, adapters, inject_adapters

    _, world = start()
    ds = ds_config(stage, "fp32", world, gas=2)
    config = FlexLoRAConfig(
        rank=4, dropout=0.0, adjust_size=3, adjust_start=3, adjust_freeze=3, adjust_interval=4
    )
    model = load_causal_lm(folder, dtype=torch.float32, attention="eager", zero3=ds if partitioned else None)
    inject_adapters(model, config)
    rng = torch.Generator().manual_seed(5)
    for layer in adapters(model).values():
        layer.lam.data.copy_(0.3 * torch.randn(layer.rank, generator=rng))
    engine = make_engine(model, config, ds)
    controller = RankController(engine, config, total_steps=16)
    losses, changes = [], []
    for step in range(1, 17):
        losses.append(train_step(engine, global_batch(step, 8, records(64))))
        change = controller.after_step(step)
        if change is not None:
            changes.append([list(change.pruned), list(change.expanded)])
    original = load_causal_lm(folder, dtype=torch.float32)
    frozen = {n.replace(".base.", "."): p for n, p in engine.module.named_parameters() if not p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(frozen.values()), enabled=stage == 3):
        untouched = all(torch.equal(p, original.get_parameter(n)) for n, p in frozen.items())
    engine.destroy()
    return {"losses": losses, "changes": changes, "untouched": untouched}


def test_adapters_train_on_a_partitioned_base_as_on_a_whole_one(
    two_processes: Processes, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    plain = two_processes.run(train_partitioned, str(tmp_path), 0, False)[0]
    partitioned = two_processes.run(train_partitioned, str(tmp_path), 3, True)[0]
    assert partitioned["untouched"]
    assert partitioned["changes"] == plain["changes"] and any(pruned for pruned, _ in plain["changes"])
    assert partitioned["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert len({round(loss, 4) for loss in plain["losses"]}) > 10


def peak_memory(folder: str, warm_up: str) -> dict[str, float]:
    """MiB that loading `folder` under ZeRO-3 takes at its peak, and this process's partition."""
    _, world = start()
    ds = ds_config(3, "fp32", world)
    load_causal_lm(warm_up, dtype=torch.float32, zero3=ds)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = load_causal_lm(folder, dtype=torch.float32, zero3=ds)
    partition = sum(p.ds_tensor.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {"peak": _resident("VmHWM") - before, "partition": partition}


def _resident(field: str) -> float:
    """MiB, from /proc/self/status; writing 5 to clear_refs resets the high-water mark (proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("layers", [4, pytest.param(16, marks=pytest.mark.full)])
def test_peak_host_memory_is_the_partition_a_shard_and_the_largest_tensor(
    tmp_path: Path, layers: int
) -> None:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 9000, "num_hidden_layers": layers}
    save_llama(tmp_path / "big", "40MB", **sizes, **heads)
    save_llama(tmp_path / "small", "1MB")
    shard = max(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")) / 2**20
    whole = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")) / 2**20
    largest = 9000 * 1024 * 4 / 2**20
    # glibc otherwise keeps freed blocks of a few MiB, which is not what is measured here
    with Processes(2) as processes:
        results = processes.run(peak_memory, str(tmp_path / "big"), str(tmp_path / "small"))
    for found in results:
        assert found["peak"] <= found["partition"] + shard + largest + 4
        assert found["peak"] < 0.95 * whole or layers == 4


def loading_error(folder: str, dtype: str, configured: str) -> str:
    _, world = start()
    with pytest.raises(UserError) as caught:
        load_causal_lm(folder, dtype=DTYPES[dtype], zero3=ds_config(3, configured, world))
    return str(caught.value)


def test_bad_checkpoints_are_one_line_on_every_process(two_processes: Processes, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "dtype", "6KB")
    for message in two_processes.run(loading_error, str(folder), "fp32", "bf16"):
        assert "`dtype` is torch.float32" in message and "enables bf16" in message
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": 44}))
    for message in two_processes.run(loading_error, str(folder), "fp32", "fp32"):
        assert "config.json makes it (44, 27)" in message or "config.json makes it (27, 44)" in message
    folder = save_llama(tmp_path / "cut", "6KB")
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-10])
    for message in two_processes.run(loading_error, str(folder), "fp32", "fp32"):
        assert "damaged" in message and "\n" not in message
    shard.unlink()
    for message in two_processes.run(loading_error, str(folder), "fp32", "fp32"):
        assert "\n" not in message
