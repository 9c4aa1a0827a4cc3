"""The dry run's page and its memory estimate, against counts made another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
from launch.data.batch_layout import batch_layout
from launch.options.train_options import TrainOptions
from launch.planning.memory_estimate import (
    GIB,
    MemoryEstimate,
    MemorySetting,
    ModelShape,
    estimate_memory,
    layer_bytes_per_token,
)
from launch.planning.page import DryRunPage, group_modules, mark_loss, render_plan
from launch.planning.parameters import parameters_of

LLAMA3_8B = ModelShape(8_030_261_248, 32, 4096, 14336, 1024, 128_256)
KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SHAPES = {f"model.layers.{layer}.{kind}": shape for layer in range(32) for kind, shape in KINDS.items()}


def estimate(**changes: Any) -> MemoryEstimate:
    setting = {"dtype": "bf16", "processes": 1, "stage": 2} | changes
    tokens = setting.pop("tokens", 4096)
    return estimate_memory(LLAMA3_8B, MemorySetting(**setting), 14_156_800, tokens)


def plan(**changes: Any) -> DryRunPage:
    options = TrainOptions(model="meta-llama/Meta-Llama-3-8B", **changes.pop("options", {}))
    values: dict[str, Any] = {
        "options": options,
        "shapes": SHAPES,
        "base_parameters": LLAMA3_8B.base_parameters,
        "records": "170,300 records and 120 held out",
        "total_steps": 31_931,
        "layout": batch_layout(options, 2),
        "memory": estimate(),
        "trained": int(parameters_of(options.method).of_rank(SHAPES, options.rank)),
        "example": [("Question\n", False), ("the", True), (" answer", True)],
    }
    return DryRunPage(**(values | changes))


@pytest.mark.parametrize(("rank", "millions"), [(8, 14.2), (12, 21.2), (32, 56.6)])
def test_trainable_parameters_are_the_papers(rank: int, millions: float) -> None:
    assert round(parameters_of("flexlora").of_rank(SHAPES, rank) / 1e6, 1) == pytest.approx(
        millions, abs=0.051
    )
    assert parameters_of("lora").of_rank(SHAPES, rank) == 1_769_472 * rank
    assert parameters_of("flexlora").of_rank(SHAPES, rank) == 1_769_472 * rank + 160 * rank


def test_trainable_parameters_are_those_of_a_real_adapter() -> None:
    model = small_llama("fp32")
    inject_adapters(model, FlexLoRAConfig(rank=3))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in adapters(model).items()}
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters_of("flexlora").of_rank(shapes, 3) == counted


def test_modules_are_grouped_by_pattern_and_shape() -> None:
    groups = group_modules(SHAPES | {"model.layers.32.mlp.up_proj": (8, 4096), "head2.proj": (2, 3)})
    assert [(group.pattern, group.count) for group in groups] == [
        *((f"model.layers.*.{kind}", 32) for kind in KINDS),
        ("model.layers.*.mlp.up_proj", 1),
        ("head2.proj", 1),
    ]


def test_page_shows_everything_on_one_page() -> None:
    page = render_plan(plan(notes=["3 records longer than 256 tokens were dropped"], memory_limit=80 * GIB))
    for part in (
        "32 × model.layers.*.self_attn.q_proj  4,096 × 4,096, 8,193 parameters a rank",
        "160 layers, rank 8: 14,157,056 trainable parameters",
        "batch 16 = micro-batch 8 × accumulation 1 × processes 2",
        "21 changes, at most 63 of 1,280 directions",
        "10 × at most 4: steps 6,000 to 15,000",
        "1 × at most 0: step 26,000",
        "3 records longer than 256 tokens were dropped",
        "80.00 GiB  available: fits",
        "3 tokens, 2 of them in the loss",
        "| ⟦the answer⟧",
    ):
        assert part in page, page
    assert len(page.splitlines()) <= 60
    assert max(map(len, page.splitlines())) <= 120


def test_page_of_a_run_that_does_not_fit_or_never_changes() -> None:
    tight = render_plan(plan(memory_limit=GIB))
    assert "DOES NOT FIT" in tight
    assert "and so on, down to 5 at step 26,000" in render_plan(plan(options={"adjust_size": 40}))
    assert "no rank changes" in render_plan(plan(options={"adjust_size": 0}))
    lora = render_plan(plan(options={"method": "lora"}))
    assert "none: ranks are fixed with method lora" in lora
    assert "14,155,776 trainable parameters" in lora


def test_a_long_example_is_shortened_in_the_middle() -> None:
    page = render_plan(plan(example=[("word " * 1000, False), ("yes", True)]))
    assert "[…]" in page
    assert "⟦yes⟧" in page


def test_loss_marks_enclose_every_stretch() -> None:
    assert mark_loss([("a", True), ("b", True), ("c", False), ("d", True)]) == "⟦ab⟧c⟦d⟧"
    assert mark_loss([("a", False)]) == "a"


def test_weights_and_state_are_counted_by_hand() -> None:
    base, trainable = LLAMA3_8B.base_parameters, 14_156_800
    alone = estimate()
    assert alone.weights == 2 * base
    assert alone.adapter == 2 * 2 * trainable
    assert alone.optimizer == 4 * 4 * trainable
    assert estimate(stage=0, dtype="fp32").optimizer == 4 * 3 * trainable
    assert estimate(optimizer_states=5).optimizer == 4 * 6 * trainable


def test_zero_divides_what_its_stage_divides() -> None:
    by_stage = [estimate(stage=stage, processes=4) for stage in range(4)]
    one = estimate(stage=0)
    assert [e.optimizer / one.optimizer for e in by_stage] == [1, 0.25, 0.25, 0.25]
    assert [e.adapter / one.adapter for e in by_stage] == [1, 1, 0.625, 0.25]
    assert [e.weights / one.weights for e in by_stage] == [1, 1, 1, 0.25]
    assert [e.gathered > 0 for e in by_stage] == [False, False, False, True]


def test_offloading_moves_to_the_host() -> None:
    plain, moved = estimate(stage=3), estimate(stage=3, offload_optimizer=True, offload_param=True)
    assert moved.weights == moved.optimizer == 0
    assert moved.host == plain.weights + plain.optimizer
    assert plain.host == 0


def test_setting_reads_a_deepspeed_configuration() -> None:
    written = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": "auto"}
    setting = MemorySetting.from_ds_config(written, "bf16", 2, gradient_checkpointing=True)
    assert (setting.stage, setting.offload_optimizer, setting.offload_param) == (2, True, False)
    assert MemorySetting.from_ds_config({}, "fp32", 1).stage == 0


def test_8b_agrees_with_counted_figures() -> None:
    """Counted elsewhere: 16 GB of weights, 8.5 to 15 GB of activations at 2,048 tokens, 6.3 GB of loss."""
    assert estimate().weights / 1e9 == pytest.approx(16.1, abs=0.1)
    assert 8.5e9 < estimate(tokens=2048).activations < 15e9
    assert estimate(tokens=4096).logits / 1e9 == pytest.approx(6.3, abs=0.1)
    assert estimate(tokens=4096, gradient_checkpointing=True).activations < 2.2e9


def small_llama(dtype: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation="sdpa",
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "dropout"), [("flexlora", 0.0), ("flexlora", 0.05), ("lora", 0.05)])
def test_activations_are_what_autograd_saves(dtype: str, method: str, dropout: float) -> None:
    """The bytes of all tensors saved for a real backward pass, each storage once, parameters left out."""
    model: Any = small_llama(dtype).train()
    targets = FlexLoRAConfig().target_modules
    inputs = 0
    if method == "flexlora":
        inject_adapters(model, FlexLoRAConfig(rank=4, dropout=dropout))
    else:
        inputs = sum(m.in_features for n, m in model.named_modules() if n.endswith(targets))
        lora = LoraConfig(r=4, lora_dropout=dropout, target_modules=list(targets))
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive: list[torch.Tensor] = []
    saved: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            alive.append(tensor)
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 64, (4, 48))
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(input_ids=tokens)
    shape = ModelShape.from_config(model.config, sum(p.numel() for p in model.parameters()))
    setting = MemorySetting(dtype, processes=1)
    expected = estimate_memory(shape, setting, 0, tokens.numel(), dropped_inputs=inputs).activations
    assert sum(saved.values()) == pytest.approx(expected, rel=0.15)


def test_below_fp32_the_norms_keep_the_stream_in_fp32_unless_they_are_ligers() -> None:
    elements = layer_bytes_per_token(LLAMA3_8B, "fp32") // 4
    assert layer_bytes_per_token(LLAMA3_8B, "bf16") == 2 * elements + 2 * 2 * 4096
    assert layer_bytes_per_token(LLAMA3_8B, "bf16", fused_kernels=True) == 2 * (elements - 14336)


def test_compiled_layers_keep_what_a_card_was_seen_to_keep() -> None:
    """Peaks of the 8B shape on an H200 (docs/gpu.md): 29.45 GB at 4,096 tokens a step, 21.21 GB at 1,570."""
    kept = 32 * layer_bytes_per_token(LLAMA3_8B, "bf16", compiled=True)
    assert kept == pytest.approx((29.45e9 - 21.21e9) / (4096 - 1570), rel=0.02)


def test_the_buffer_of_gradients_is_as_large_as_the_json_says() -> None:
    def bucket(stage: int, **zero: Any) -> float:
        settings = {"zero_optimization": {"stage": stage, **zero}}
        setting = MemorySetting.from_ds_config(settings, "bf16", 2)
        return estimate_memory(LLAMA3_8B, setting, 1, 1).buckets

    assert bucket(0) == 0
    assert bucket(2) == 2 * 500_000_000, "DeepSpeed's own"
    assert bucket(1, reduce_bucket_size=1000) == 4 * 1000
    assert bucket(3, reduce_bucket_size="auto") == 2 * 4096**2


def test_the_first_update_makes_the_states() -> None:
    assert estimate().states == 4 * 3 * 14_156_800
    assert estimate(offload_optimizer=True).states == 0


def test_memory_estimate_drives_the_auto_micro_batch() -> None:
    options = TrainOptions()

    def needed(micro: int) -> float:
        return estimate(tokens=micro * options.cutoff_len).total

    sizes = [batch_layout(options, 1, needed, limit * GIB).micro_batch_size for limit in (139, 40, 24, 8)]
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    assert not batch_layout(options, 1, needed, 8 * GIB).fits
