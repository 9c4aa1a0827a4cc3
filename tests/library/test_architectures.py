"""Architectures beside the decoder of text: which layers `all-linear` adapts, and that PEFT loads what is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from flexlora_ds import (
    RankController,
    TorchEngine,
    adapters,
    build_optimizer,
    inject_adapters,
    save_adapter,
    start_from_gradient,
)
from flexlora_ds.adapter.peft_names import MAMBA, READ_BY_KERNELS, STACKED
from tests.helpers.own_loop import config

IDS = torch.randint(2, 60, (4, 9), generator=torch.Generator().manual_seed(0))


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


WORDS = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


WIDE = {"initializer_range": 0.3}


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 1,
    }
    return T5ForConditionalGeneration(T5Config(**shape, **WORDS))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = ("layers", 2), ("attention_heads", 2), ("ffn_dim", 32)
    shape = {f"{side}_{name}": count for side in ("encoder", "decoder") for name, count in sides}
    return BartForConditionalGeneration(
        BartConfig(
            d_model=16, max_position_embeddings=32, decoder_start_token_id=1, init_std=0.3, **shape, **WORDS
        )
    )


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sight = {**NARROW, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config={**NARROW, **WORDS}, vision_config=sight, projection_dim=8))


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    shape = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    return SwinForImageClassification(SwinConfig(**shape, **WIDE, window_size=2, num_labels=3))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**NARROW, **WIDE, image_size=16, patch_size=8, num_labels=3))


INPUTS: dict[Callable[[], nn.Module], dict[str, Any]] = {
    t5: {"input_ids": IDS, "labels": IDS[:, :5].contiguous()},
    bart: {"input_ids": IDS, "labels": IDS[:, :5].contiguous()},
    clip: {"input_ids": IDS, "pixel_values": IMAGES, "return_loss": True},
    swin: {"pixel_values": IMAGES, "labels": torch.tensor([0, 1, 2, 0])},
    vit: {"pixel_values": IMAGES, "labels": torch.tensor([0, 1, 2, 0])},
}


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: str(make.__name__))
def test_all_linear_layers_but_the_head_are_adapted_begin_with_the_gradient_and_learn(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Both the encoder and the decoder; gradients beside autograd's own of the dense weights."""
    torch.manual_seed(0)
    model, inputs = make(), INPUTS[make]
    base = copy.deepcopy(model).eval()
    dense = copy.deepcopy(model).eval()
    dense(**inputs).loss.backward()
    gradients = {name: m.weight.grad for name, m in dense.named_modules() if isinstance(m, nn.Linear)}
    settings = config(init="gradient", importance="growth", new_direction="gradient")
    head = ("classifier",) if hasattr(model, "classifier") else ()
    names = inject_adapters(model, settings, modules_to_save=head)
    assert set(gradients) - set(names) <= {"lm_head", *head}
    model.eval()  # without dropout, as the dense model
    start = start_from_gradient(model, settings, lambda: [model(**inputs).loss])
    assert not start.gaussian
    for name, sigma in start.sigma.items():
        expected = torch.linalg.svdvals(gradients[name])[:2]
        assert sigma[0] == pytest.approx(float(expected[0]), rel=0.02), name
    heads = [{"params": model.get_submodule(name).parameters()} for name in head]
    engine = TorchEngine(model, build_optimizer(model, settings, lr=1e-2, extra_groups=heads))
    controller = RankController(engine, settings, 6)
    for step in range(1, 6):
        engine.backward(engine(**inputs).loss)
        engine.step()
        controller.after_step(step)
    assert all(bool(layer.lam.any()) for layer in adapters(model).values()), "every matrix has learnt"
    save_adapter(engine, tmp_path, settings, base_model="", task_type=None, modules_to_save=head)
    with torch.no_grad():
        expected = model(**inputs).loss
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert float(loaded(**inputs).loss) == pytest.approx(float(expected), rel=1e-5)


def deepseek() -> nn.Module:
    """Its first layer is dense, and its second has a shared expert beside the stacked ones."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    latent = {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    first = {"first_k_dense_replace": 1, "moe_intermediate_size": 16}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**NARROW, **WORDS, **experts, **latent, **first, **WIDE))


def mamba() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 8,
        "head_dim": 8,
        "num_heads": 4,
        "n_groups": 1,
    }
    return Mamba2ForCausalLM(Mamba2Config(**shape, **WORDS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [deepseek, mamba], ids=lambda make: str(make.__name__))
def test_layers_whose_adapter_peft_would_lose_are_left_out(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    base = copy.deepcopy(model).eval()
    names = inject_adapters(model, config())
    assert names and not {name.rpartition(".")[2] for name in names} & {
        "down_proj",
        "up_proj",
        "gate_proj",
        "out_proj",
    }
    for layer in adapters(model).values():
        layer.lam.data.fill_(1.0)
    engine = TorchEngine(model.eval(), build_optimizer(model, config(), lr=1e-2))
    save_adapter(engine, tmp_path, config(), base_model="")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert (base(input_ids=IDS).logits - expected).abs().max() > 0.01
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_names_that_peft_loses_are_those_of_its_own_tables() -> None:
    import inspect

    from peft.tuners import tuners_utils
    from peft.utils import transformers_weight_conversion as conversion

    theirs = {kind: frozenset(names) for kind, names in conversion._MOE_TARGET_MODULE_MAPPING.items()}
    assert theirs == STACKED
    source = inspect.getsource(tuners_utils._check_lora_target_modules_mamba)
    assert all(f'"{name}"' in source for name in (*MAMBA, *READ_BY_KERNELS))
