"""What the trainer refuses, in one line, before an adapter looks like a success."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora_ds import (
    RankController,
    TorchEngine,
    adapters,
    build_optimizer,
    save_adapter,
    start_from_adapter,
)
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.integrations.transformers import FlexLoRATrainer
from tests.helpers import tiny
from tests.helpers.plain_trainer import (
    arguments,
    configuration,
    trainer_of,
)
from tests.helpers.trainer_worker import fresh_accelerate


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh_accelerate(launched=False):
        yield


def few(count: int) -> list[dict[str, Any]]:
    return [{"ids": ids} for ids in tiny.records(count)]


class Dry(torch.utils.data.IterableDataset[Any]):
    """A stream that ends before its first record."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


NO_STEP: list[tuple[Any, dict[str, Any], str]] = [
    (
        few(24),
        {"max_steps": 0},
        r"the run has no step \(max_steps 0, num_train_epochs 3\); give at least one",
    ),
    (few(24), {"max_steps": -1, "num_train_epochs": 0}, "the run has no step"),
    ([], {}, "there is no record to train on"),
    ([], {"max_steps": -1}, "there is no record to train on"),
    (few(3), {"dataloader_drop_last": True}, "the records do not fill one batch .*dataloader_drop_last"),
    (few(3), {"max_steps": -1, "dataloader_drop_last": True}, "the records do not fill one batch"),
    (Dry(), {}, "no step was taken, for the data gave no batch"),
    (Dry(), {"save_strategy": "epoch"}, "no step was taken"),
]


@pytest.mark.parametrize(("rows", "options", "said"), NO_STEP)
def test_a_run_without_a_step_leaves_no_adapter(
    tmp_path: Path, rows: Any, options: dict[str, Any], said: str
) -> None:
    """The Trainer itself warns of some, and trains one step of none where it is asked for none."""
    alone = {"accelerator_config": {"dispatch_batches": False}}
    more = {"train_dataset": rows}
    config = configuration(adjust_size=0)
    trainer = trainer_of(tiny.tiny_llama(), tmp_path, config, more=more, **alone, **options)
    with pytest.raises(UserError, match=said) as refusal:
        trainer.train()
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError):
        trainer.save_model()
    assert not list(tmp_path.rglob("adapter_*"))


def test_a_run_whose_updates_were_all_skipped_leaves_no_adapter(tmp_path: Path) -> None:
    def broken(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.float().mean() * float("inf")

    config = configuration(init="gaussian")
    trainer = trainer_of(tiny.tiny_llama(), tmp_path, config, more={"compute_loss_func": broken}, max_steps=6)
    with pytest.raises(RunError, match=r"every update was skipped, so nothing was learnt \(6 steps\)"):
        trainer.train()
    assert not list(tmp_path.rglob("adapter_*"))


def test_adapters_of_another_scale_are_refused_before_they_train_or_are_saved(tmp_path: Path) -> None:
    """Their ΔW would be saved by the scale of a configuration that it was not computed with."""
    made, other = configuration(), configuration(rank=6, alpha=32)
    model: Any = tiny.adapted_llama(made)
    said = r"the adapters were made with alpha / rank 4, and this configuration has 5.33333 \(model.layers.0"
    with pytest.raises(UserError, match=said):
        trainer_of(model, tmp_path, other)
    engine = TorchEngine(model, build_optimizer(model, made, lr=1e-3))
    with pytest.raises(UserError, match=said):
        RankController(engine, other, 8)
    with pytest.raises(UserError, match=said):
        save_adapter(engine, tmp_path / "adapter", other, base_model="base")
    save_adapter(engine, tmp_path / "adapter", made, base_model="base")
    with pytest.raises(UserError, match=said):
        start_from_adapter(model, other, tmp_path / "adapter")
    same = configuration(rank=6, alpha=24, dropout=0.3)
    trainer_of(model, tmp_path, same)
    trainer_of(
        tiny.adapted_llama(configuration(rank=3, alpha=0.3)), tmp_path, configuration(rank=1, alpha=0.1)
    )
    assert {layer.dropout for layer in adapters(model).values()} == {0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {
                "save_only_model": True,
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "save_strategy": "steps",
            },
            "(save_only_model); leave it out, or load_best_model_at_end",
        ),
        ({"optim": "adafactor"}, "adafactor is not ours (optim)"),
        ({"torch_compile": True}, "compiled code holds the ranks fast (torch_compile)"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "(lr_scheduler_type); choose",
        ),
    ],
)
def test_what_ranks_cannot_follow_is_refused_in_one_line(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    more = {"eval_dataset": [{"ids": [1, 2]}]}
    with pytest.raises(UserError) as refusal:
        trainer_of(tiny.tiny_llama(), tmp_path, more=more, **options)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_adapters_optimizers_and_model_makers_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(tiny.tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="the model carries an adapter of PEFT's already"):
        trainer_of(peft, tmp_path)
    model = tiny.tiny_llama()
    with pytest.raises(UserError, match=r"a SGD keeps no age per element \(optimizers\)"):
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        trainer_of(model, tmp_path, more={"optimizers": (sgd, None)})
    with pytest.raises(UserError, match="a model made anew for every run loses its adapters"):
        FlexLoRATrainer(
            args=arguments(tmp_path), flexlora=configuration(), model_init=lambda: tiny.tiny_llama()
        )
    with pytest.raises(
        UserError, match=r"modules_to_save: 'hat' is no module; at its top the model has model"
    ):
        trainer_of(tiny.tiny_llama(), tmp_path, more={"modules_to_save": ["hat"]})


def test_saving_before_training_and_training_twice_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tiny.tiny_llama(), tmp_path, configuration(adjust_size=0), max_steps=1)
    with pytest.raises(UserError, match="nothing has been trained yet"):
        trainer.save_model()
    trainer.train()
    with pytest.raises(UserError, match="this trainer has trained already"):
        trainer.train()


def test_a_resume_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer_of(tiny.tiny_llama(), tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.raises(UserError, match="seed is 42 in the checkpoint and 7 here"):
        trainer_of(tiny.tiny_llama(), tmp_path, configuration(seed=7)).train(checkpoint)
    with pytest.raises(UserError, match="the checkpoint is of a run of 8 steps, this one has 9"):
        trainer_of(tiny.tiny_llama(), tmp_path, max_steps=9).train(checkpoint)
    with pytest.raises(RunError, match="the checkpoint holds no training state of FlexLoRA's"):
        trainer_of(tiny.tiny_llama(), tmp_path).train(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="there is no checkpoint to resume from"):
        trainer_of(tiny.tiny_llama(), tmp_path / "empty").train(resume_from_checkpoint=True)


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    model: Any = tiny.tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UserError, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        trainer_of(model, tmp_path, more={"modules_to_save": ["lm_head"]})
