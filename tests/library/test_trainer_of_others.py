"""What trainers derived from the Trainer do beside it, as TRL's do: generate their records, keep a reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from flexlora_ds import TorchEngine, adapters, build_optimizer, inject_adapters, start_from_gradient
from flexlora_ds.errors import UserError
from flexlora_ds.integrations.transformers import FlexLoRAMixin
from tests.helpers import tiny
from tests.helpers.plain_trainer import arguments, configuration
from tests.helpers.trainer_worker import fresh_accelerate


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh_accelerate(launched=False):
        yield


def prompts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


class Generating(FlexLoRAMixin, Trainer):  # type: ignore[misc]
    """As GRPOTrainer: a batch is a list of prompts, of which a buffer of records for two micro-steps is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._step, self._buffered_inputs, self._metrics = 0, None, {"train": {"length": []}}
        self.made: list[Any] = []
        super().__init__(*args, data_collator=prompts, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        assert isinstance(inputs, list) and isinstance(inputs[0], dict)
        if self._step % 2 == 0 or self._buffered_inputs is None:
            ids = torch.tensor([row["ids"][:4] for row in inputs])
            more = torch.randint(1, tiny.VOCABULARY, (len(ids), 4))
            whole = torch.cat([ids, more], 1)
            self.made.append(whole)
            self._buffered_inputs = whole.chunk(2)
            self._metrics["train"]["length"].append(whole.shape[1])
        return {"input_ids": self._buffered_inputs[self._step % 2]}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids = inputs["input_ids"]
        return model(input_ids=ids, labels=ids).loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self._step += 1
        return loss


def rows(count: int = 48) -> list[dict[str, Any]]:
    return [{"ids": ids} for ids in tiny.records(count)]


def test_a_trainer_that_generates_its_records_begins_from_their_gradient(tmp_path: Path) -> None:
    config = configuration(init="gradient", init_batches=2, dropout=0.0)
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    trainer: Any = Generating(tiny.tiny_llama(), args, flexlora=config, train_dataset=rows())
    at_first: dict[str, Any] = {}

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            at_first.setdefault("metrics", copy.deepcopy(trainer._metrics))
            at_first.setdefault(
                "P", {n: layer.P.detach().clone() for n, layer in adapters(trainer.model).items()}
            )

    trainer.add_callback(Look())
    trainer.train()
    assert len(trainer.made) == 2 + 4, "once for each of two updates ahead, once for each update"
    assert trainer._step == 8 and at_first["metrics"] == {"train": {"length": [8]}}
    model = tiny.tiny_llama()
    inject_adapters(model, config)
    engine = TorchEngine(model, build_optimizer(model, config, lr=1e-2))
    parts = [part for whole in trainer.made[:2] for part in whole.chunk(2)]
    start_from_gradient(engine, config, lambda: (model(input_ids=part, labels=part).loss for part in parts))
    for name, layer in adapters(model).items():
        assert torch.allclose(layer.P, at_first["P"][name], atol=1e-4), name


class StepAlone(FlexLoRAMixin, Trainer):  # type: ignore[misc]
    """As OnlineDPOTrainer: what the model takes is made in `training_step`."""


def test_batches_that_the_model_takes_nothing_of_have_no_gradient_to_begin_from(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"prompt_ids": torch.tensor([row["ids"][:4] for row in rows])}

    config = configuration(init="gradient")
    trainer = StepAlone(
        tiny.tiny_llama(), arguments(tmp_path), flexlora=config, train_dataset=rows(), data_collator=collate
    )
    with pytest.raises(
        UserError, match=r'nothing that the model takes, .* \(init\); give FlexLoRAConfig\(init="gaussian"\)$'
    ):
        trainer.train()


class WithReference(Trainer):  # type: ignore[misc]
    """As DPOTrainer: the reference is the base, loaded anew, unless one is given."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.ref_model = tiny.tiny_llama() if ref_model is None else ref_model


class Preferring(FlexLoRAMixin, WithReference):
    """As docs/trainer.md makes one."""


def test_a_reference_without_what_the_adapters_have_learnt_is_refused(tmp_path: Path) -> None:
    config, args = configuration(init="gaussian"), arguments(tmp_path)
    more = {"flexlora": config, "train_dataset": rows()}
    learnt = tiny.adapted_llama(config)
    said = r"^the reference would be the base without .*q_proj \(ref_model\); give ref_model=copy.deepcopy\(model\)"
    with pytest.raises(UserError, match=said):
        Preferring(learnt, args=args, **more)
    for given in (copy.deepcopy(learnt), tiny.tiny_llama()):
        assert Preferring(learnt, args=args, ref_model=given, **more).ref_model is given
        assert Preferring(learnt, given, args, **more).ref_model is given
    fresh = tiny.tiny_llama()
    inject_adapters(fresh, config)
    for model in (fresh, tiny.tiny_llama()):
        assert not adapters(Preferring(model, args=args, **more).ref_model)


class SyncRefModelCallback(TrainerCallback):  # type: ignore[misc]
    """TRL's, by its name."""


class Teacher(SyncRefModelCallback):
    """One of those that TRL derives from it."""


@pytest.mark.parametrize("kind", [SyncRefModelCallback, Teacher])
def test_what_mixes_parameters_into_another_model_is_refused(tmp_path: Path, kind: Any) -> None:
    trainer = StepAlone(
        tiny.tiny_llama(), arguments(tmp_path), flexlora=configuration(), train_dataset=rows()
    )
    trainer.add_callback(kind())
    with pytest.raises(
        UserError, match=rf"another model, which has no adapters \({kind.__name__}\); leave it"
    ):
        trainer.train()


@dataclass
class OfTRL(TrainingArguments):  # type: ignore[misc]
    """Two of the arguments that TRL's trainers have."""

    disable_dropout: bool = True
    use_vllm: bool = False


def test_trls_arguments_mean_what_they_say(tmp_path: Path) -> None:
    def trainer_of(**options: Any) -> Any:
        args = OfTRL(str(tmp_path), use_cpu=True, report_to="none", **options)
        return StepAlone(tiny.tiny_llama(), args, flexlora=configuration(dropout=0.1), train_dataset=rows())

    def dropout(**options: Any) -> set[float]:
        return {layer.dropout for layer in adapters(trainer_of(**options).model).values()}

    assert dropout() == {0.0} and dropout(disable_dropout=False) == {0.1}
    with pytest.raises(UserError, match=r"knows none of P, λ and Q \(use_vllm\); leave it out"):
        trainer_of(use_vllm=True)
