"""The trainer in plain torch, in the tests' own process: a task's head, an exact resume, what is refused."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from flexlora_ds import (
    adapters,
    inject_adapters,
)
from flexlora_ds.checkpoint.state import set_ranks
from flexlora_ds.errors import UserError
from flexlora_ds.integrations.transformers import FlexLoRAMixin
from flexlora_ds.integrations.transformers.folds import folds_of_rows
from tests.helpers import tiny
from tests.helpers.plain_trainer import (
    STEPS,
    classifier,
    configuration,
    losses,
    sentences,
    told,
    trainer_of,
)
from tests.helpers.trainer_worker import fresh_accelerate


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh_accelerate(launched=False):
        yield


def test_a_tasks_head_trains_beside_the_adapters_and_peft_loads_both(tmp_path: Path) -> None:
    from peft import PeftModel

    model = classifier()
    model.save_pretrained(tmp_path / "base")
    model.config.name_or_path = str(tmp_path / "base")
    before = model.score.weight.detach().clone()
    trainer = trainer_of(model, tmp_path / "out", collate=sentences)
    assert trainer.modules_to_save == ("score",) and not any(n.startswith("score") for n in adapters(model))
    trainer.train()
    assert len(trainer.rank_life.changes) == 2 and len({*trainer.rank_life.changes[-1]["ranks"].values()}) > 1
    assert (model.score.weight - before).abs().max() > 0.01
    loaded = PeftModel.from_pretrained(
        classifier(seed=1).from_pretrained(tmp_path / "base"), tmp_path / "out"
    )
    ids, mask, _ = tiny.collate(tiny.records(6))
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
        found = loaded.eval()(input_ids=ids, attention_mask=mask).logits
    assert (found - expected).abs().max() < 1e-5
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"


@pytest.mark.parametrize(
    ("asked", "saved", "task"),
    [
        (None, ("pre_classifier", "classifier"), "SEQ_CLS"),
        (["classifier"], ("pre_classifier", "classifier"), "SEQ_CLS"),
        ([], (), None),
    ],
)
def test_peft_loads_a_head_of_two_layers_and_an_adapter_without_a_head(
    tmp_path: Path, asked: list[str] | None, saved: tuple[str, ...], task: str | None
) -> None:
    """PEFT takes DistilBERT's pre_classifier for a classifier too, and misses what an adapter of the task lacks."""
    from peft import PeftModel
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    shape = {"vocab_size": tiny.VOCABULARY, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
    model = DistilBertForSequenceClassification(
        DistilBertConfig(**shape, initializer_range=0.3, num_labels=3)
    )
    model.save_pretrained(tmp_path / "base")
    more = {"modules_to_save": asked}
    config = configuration(target_modules=["q_lin", "v_lin"])
    trainer = trainer_of(model, tmp_path / "out", config, sentences, more, max_steps=6)
    assert trainer.modules_to_save == saved
    trainer.train()
    base = DistilBertForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert loaded.peft_config["default"].task_type == task
    ids, mask, _ = tiny.collate(tiny.records(6))
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
        found = loaded.eval()(input_ids=ids, attention_mask=mask).logits
        plain = DistilBertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
        assert (plain(input_ids=ids, attention_mask=mask).logits - expected).abs().max() > 1e-4
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_encoder_with_a_decoder_is_loaded_by_peft_as_what_it_is(tmp_path: Path) -> None:
    from peft import AutoPeftModelForSeq2SeqLM
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {
        "vocab_size": tiny.VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    }
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    model.save_pretrained(tmp_path / "base")
    model.config.name_or_path = str(tmp_path / "base")
    trainer = trainer_of(model, tmp_path / "out", configuration(target_modules=["q", "v"]))
    trainer.train()
    assert {name.partition(".")[0] for name in adapters(model)} == {"encoder", "decoder"}
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    ids, mask, _ = tiny.collate(tiny.records(6))
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask, labels=ids).logits
        assert (loaded(input_ids=ids, attention_mask=mask, labels=ids).logits - expected).abs().max() < 1e-5


def test_a_resume_repeats_every_bit_dropout_included(tmp_path: Path) -> None:
    whole = trainer_of(tiny.tiny_llama(), tmp_path, save_strategy="steps", save_steps=4)
    whole.train()
    again = trainer_of(tiny.tiny_llama(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again) == losses(whole)
    assert told(again) == told(whole)
    for name, p in again.model.named_parameters():
        assert torch.equal(p, whole.model.get_parameter(name)), name
    shutil.rmtree(tmp_path / "checkpoint-8")
    last = trainer_of(tiny.tiny_llama(), tmp_path)
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == STEPS and len(last.rank_life.changes) == 2


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


class NormalisedHead(torch.nn.Module):
    """Of rows [..., width], by their statistics over the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.last = torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.norm(x.flatten(0, -2)).view_as(x))
        return found


def test_the_statistics_of_a_head_come_back_with_a_checkpoint(tmp_path: Path) -> None:
    def fresh(out: Path, **options: Any) -> Any:
        model = classifier()
        torch.manual_seed(1)
        model.score = NormalisedHead(model.config.hidden_size)
        return trainer_of(model, out, collate=sentences, **options)

    seen = iter([1.0, 0.5])
    best = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "s",
    }
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = fresh(tmp_path / "whole", **saving)
    whole.train()
    again = fresh(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in whole.model.named_buffers():
        assert torch.equal(again.model.get_buffer(name), value), name
    more = {"eval_dataset": [{"ids": [1, 2, 3]}] * 2, "compute_metrics": lambda _: {"s": next(seen)}}
    first = fresh(tmp_path / "best", **saving, **best, greater_is_better=True, more=more)
    first.train()
    stopped = fresh(tmp_path / "stopped", max_steps=8)
    stopped.add_callback(StopAt(4))
    stopped.train()
    for name, value in stopped.model.named_buffers():
        assert torch.equal(first.model.get_buffer(name), value), name


def test_a_checkpoint_is_an_adapter_and_exports_as_one(tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    from flexlora_ds.checkpoint.adapter import read_checkpoint_adapter

    model = tiny.tiny_llama()
    trainer = trainer_of(model, tmp_path / "out", save_strategy="steps", save_steps=4)
    trainer.train()
    assert PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "out" / "checkpoint-4")
    state = tmp_path / "out" / "checkpoint-4" / "training_state" / "step_00000004"
    saved = load_file(tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors")
    for name, matrix in read_checkpoint_adapter(state).matrices.items():
        assert torch.equal(saved[f"base_model.model.{name}.lora_A.weight"], matrix.A), name
    lines = (tmp_path / "out" / "ranks.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert "total_rank" in trainer.state.log_history[0]


def test_the_best_checkpoint_comes_back_at_its_own_ranks(tmp_path: Path) -> None:
    """The metric is made to be best at step 4, before the second change; PEFT's reading of what was saved agrees."""
    from peft import PeftModel

    seen = iter([0.0, 1.0, 0.5, 0.4])
    trainer = trainer_of(
        tiny.tiny_llama(),
        tmp_path,
        more={"eval_dataset": [{"ids": [1, 2, 3]}], "compute_metrics": lambda _: {"score": next(seen)}},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert [change["step"] for change in trainer.rank_life.changes] == [3]
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        live = trainer.model.eval()(input_ids=ids).logits
        for folder in (best, tmp_path):
            loaded = PeftModel.from_pretrained(tiny.tiny_llama(), folder)
            assert (loaded.eval()(input_ids=ids).logits - live).abs().max() < 1e-5


def test_a_half_precision_base_has_adapters_in_fp32(tmp_path: Path) -> None:
    model = tiny.tiny_llama("bf16")
    trainer = trainer_of(model, tmp_path, max_steps=3)
    trainer.train()
    layers = list(adapters(model).values())
    assert {p.dtype for layer in layers for p in (layer.P, layer.lam, layer.Q)} == {torch.float32}
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    assert all(layer.lam.abs().max() > 0 for layer in layers)


def test_an_update_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    calls = []

    def broken(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(1)
        loss = outputs.logits.float().pow(2).mean()
        return loss * float("nan") if len(calls) == 3 else loss

    model = tiny.tiny_llama()
    trainer = trainer_of(model, tmp_path, configuration(init="gaussian"), more={"compute_loss_func": broken})
    trainer.train()
    assert trainer.rank_life.engine.skipped_steps == 1
    assert [change["step"] for change in trainer.rank_life.changes] == [4, 5], (
        "due after 3, which was skipped"
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_fp16_on_a_cpu_is_told_to_have_no_effect(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^fp16 has no effect on a CPU: this run computes in fp32$"):
        trainer = trainer_of(tiny.tiny_llama(), tmp_path, max_steps=6, fp16=True)
    trainer.train()
    plain = trainer_of(tiny.tiny_llama(), tmp_path / "plain", max_steps=6)
    plain.train()
    assert losses(trainer) == losses(plain)


def test_an_update_that_accelerates_scaler_skips_counts_as_skipped(tmp_path: Path) -> None:
    """As on a GPU with fp16; step 3, after which ranks are to change, has a gradient that is not finite."""
    calls = []

    def broken(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(1)
        loss = outputs.logits.float().pow(2).mean()
        return loss * 1e38 * 1e38 if len(calls) == 3 else loss

    config, more = configuration(init="gaussian"), {"compute_loss_func": broken}
    trainer = trainer_of(tiny.tiny_llama(), tmp_path, config, more=more)
    accelerator = trainer.accelerator
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**10), True
    accelerator.state._mixed_precision = "fp16"
    trainer.train()
    engine = trainer.rank_life.engine
    assert (engine.skipped_steps, engine.loss_scale()) == (1, 2.0**9)
    assert [change["step"] for change in trainer.rank_life.changes] == [4, 5]
    ages = {float(state["age"].max()) for state in engine.optimizer.state.values()}
    assert max(ages) == trainer.lr_scheduler.last_epoch == STEPS - 1


def test_adapters_that_are_there_are_taken_as_they_are(tmp_path: Path) -> None:
    model = tiny.adapted_llama(configuration())
    before = {name: layer.lam.detach().clone() for name, layer in adapters(model).items()}
    trainer = trainer_of(model, tmp_path)
    assert all(torch.equal(layer.lam, before[name]) for name, layer in adapters(model).items())
    model.lm_head.requires_grad_(True)
    with pytest.raises(UserError, match=r"lm_head.weight is trained and would not be saved"):
        trainer_of(model, tmp_path)
    assert trainer_of(model, tmp_path, more={"modules_to_save": ["lm_head"]}).modules_to_save == ("lm_head",)
    assert trainer.modules_to_save == ()


def test_a_second_trainer_goes_on_from_the_first_ones_adapter(tmp_path: Path) -> None:
    """A penalty of the first is not left behind, and what is saved is what the model computes."""
    from peft import PeftModel

    model, plain = tiny.tiny_llama(), {"init": "gaussian", "dropout": 0.0}
    trainer_of(
        model, tmp_path / "a", configuration(orth_form="norm", orth_weight=3.0, **plain), max_steps=6
    ).train()
    twin = tiny.tiny_llama()
    inject_adapters(twin, configuration(**plain))
    set_ranks(twin, {name: layer.rank for name, layer in adapters(model).items()})
    twin.load_state_dict(model.state_dict())
    for each, out in ((model, "b"), (twin, "c")):
        trainer_of(each, tmp_path / out, configuration(**plain)).train()
    for name, p in model.named_parameters():
        assert torch.equal(p, twin.get_parameter(name)), name
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "b")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert (loaded.eval()(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("init", "late"),
    [
        ("gaussian", True),
        ("gradient", False),
        pytest.param("gaussian", False, marks=pytest.mark.full),
        pytest.param("gradient", True, marks=pytest.mark.full),
    ],
)
def test_a_smaller_batch_size_that_fits_begins_anew(tmp_path: Path, init: str, late: bool) -> None:
    """What a trainer of that size does from the start, whatever was trained before memory ran out."""
    calls = []

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(len(labels))
        if len(labels) > 2 and (not late or len(calls) > 7):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return outputs.logits.float().pow(2).mean()

    config = configuration(init=init, init_batches=2, dropout=0.0, new_direction="gradient")
    given = {"more": {"compute_loss_func": loss}, "train_sampling_strategy": "sequential"}
    tried = trainer_of(tiny.tiny_llama(), tmp_path / "tried", config, auto_find_batch_size=True, **given)
    tried.train()
    assert calls.count(4) == (8 if late else 1) and tried._train_batch_size == 2
    small = trainer_of(tiny.tiny_llama(), tmp_path / "small", config, per_device_train_batch_size=2, **given)
    small.train()
    assert losses(tried)[-STEPS:] == losses(small)
    assert told(tried) == told(small) and len(told(small)) == 2
    for name, p in tried.model.named_parameters():
        assert torch.equal(p, small.model.get_parameter(name)), name


def test_a_run_that_has_ended_is_not_trained_on(tmp_path: Path) -> None:
    """A job that is started again; the Trainer itself would take a ninth step."""
    whole = trainer_of(
        tiny.tiny_llama(), tmp_path, save_strategy="steps", save_steps=4, lr_scheduler_type="constant"
    )
    whole.train()
    again = trainer_of(tiny.tiny_llama(), tmp_path / "again", lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.state.global_step == STEPS and told(again) == told(whole)
    for name, p in again.model.named_parameters():
        assert torch.equal(p, whole.model.get_parameter(name)), name
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / weights).read_bytes()


def test_the_rows_of_padded_and_of_packed_records_are_told_apart() -> None:
    padded = {"input_ids": torch.zeros(3, 2, dtype=torch.long)}
    assert folds_of_rows(padded, 1, "cpu").tolist() == [3, 3, 0, 0, 1, 1]
    packed = {"input_ids": torch.zeros(1, 6), "position_ids": torch.tensor([[0, 1, 0, 0, 1, 2]])}
    assert folds_of_rows(packed, 0, "cpu").tolist() == [0, 0, 1, 2, 2, 2]
    assert folds_of_rows({"pixel_values": torch.zeros(2, 3)}, 0, "cpu") is None


@pytest.mark.parametrize(
    "name",
    ["_save_optimizer_and_scheduler", "_load_from_checkpoint", "_prepare_for_training", "_load_best_model"],
)
def test_the_trainers_private_methods_that_are_replaced_are_there(name: str) -> None:
    """A Trainer that calls other ones would neither save nor resume."""
    from transformers import Trainer

    assert name in vars(Trainer) and name in vars(FlexLoRAMixin)
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == list(
        inspect.signature(getattr(FlexLoRAMixin, name)).parameters
    )
    called = inspect.getsource(Trainer).count(f"self.{name}(")
    assert called >= 1
