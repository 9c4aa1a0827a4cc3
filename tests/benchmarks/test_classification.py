"""The comparison on sentences runs each setting once, and begins where its name says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.classification import __main__ as command
from benchmarks.classification import run as training
from benchmarks.classification.rows import Batch, read_sentences, training_batches
from benchmarks.classification.settings import SETTINGS, Setting
from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters, start_from_gradient
from flexlora_ds.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", *(f"word{k}" for k in range(20))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder, and rows whose label one word tells."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("classification")
    torch.manual_seed(0)
    size = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    BertForSequenceClassification(size).save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    rng = random.Random(1)
    (folder / "sst2").mkdir()
    for name, count in (("train", 80), ("validation", 16)):
        rows = [{"sentence": sentence(rng, k % 2), "label": k % 2} for k in range(count)]
        (folder / "sst2" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sentence(rng: random.Random, label: int) -> str:
    words = [("bad", "good")[label], *rng.choices(WORDS[6:], k=rng.randint(1, 8))]
    rng.shuffle(words)
    return " ".join(words)


def tokenizer_of(place: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place / "model")


def adapted(place: Path) -> tuple[Any, FlexLoRAConfig, list[Batch]]:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=2).eval()
    config = training.configuration(training.Plan("", "", rank=2), seed=1)
    inject_adapters(model, config)
    for p in training.head_of(model):
        p.requires_grad_(True)
    sentences = read_sentences(place / "sst2" / "train.jsonl", tokenizer_of(place))
    return model, config, training_batches(sentences, 8, 4, seed=1)


def test_settings_are_run_once_and_compared(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--model={place}/model", f"--data={place}", f"--out={tmp_path}", "--seeds=1", "--rank=2"]
    words += [
        "--jobs=64",
        "--steps=4",
        "--head_steps=2",
        "--batch_size=8",
        "--settings=gaussian;gradient;LoRA",
    ]
    monkeypatch.setattr("sys.argv", ["classification", *words])
    monkeypatch.setattr(command, "ProcessPoolExecutor", _InThisProcess)
    assert command.main() == 0
    first = capsys.readouterr().out
    assert first.count(": done") == 3
    assert command.main() == 0
    second = capsys.readouterr().out
    assert "done" not in second and first.endswith(second)
    rows = {row.split("|")[1].strip(): row for row in second.splitlines()[2:]}
    assert list(rows) == ["gaussian", "gradient", "LoRA"]
    assert "(" not in rows["gaussian"] and rows["gradient"].count("(") == 12
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*-1.json"))]
    assert len({run["losses"][0] for run in runs}) == 1, "no start changes the first output"
    assert len({run["losses"][-1] for run in runs}) == 3
    monkeypatch.setattr("sys.argv", ["classification", *words, "--steps=9"])
    assert command.main() == 2, "runs of other options are not mixed in"


class _InThisProcess:
    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> _InThisProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *values: Any) -> Any:
        found = function(*values)
        return type("Done", (), {"result": lambda self: found})()


def test_a_model_without_an_engine_gets_the_pairs_of_its_gradient(place: Path) -> None:
    """Against ∂L/∂W of torch's own backward; a head that trains gets no gradient."""
    from transformers import AutoModelForSequenceClassification

    model, config, batches = adapted(place)
    plain = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=2).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        before = model(input_ids=batches[0].ids, attention_mask=batches[0].mask).logits
    found = start_from_gradient(model, config, lambda: training._mean_losses(model, batches))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in training.head_of(model)), "the head trains on"
    with torch.no_grad():
        assert torch.equal(before, model(input_ids=batches[0].ids, attention_mask=batches[0].mask).logits)
    sum(training._mean_losses(plain, batches)).backward()  # type: ignore[union-attr]
    led = 0
    for name, layer in adapters(model).items():
        left, sigma, right = torch.linalg.svd(plain.get_submodule(name).weight.grad)
        assert found.sigma[name] == pytest.approx(sigma[:2].tolist(), rel=0.02)
        if sigma[0] >= 1.5 * sigma[1]:
            led += 1
            assert abs(layer.P[:, 0] @ left[:, 0]) > 0.98 and abs(layer.Q[0] @ right[0]) > 0.98
    assert led >= 3


@pytest.mark.parametrize("name", ["gradient P", "gradient Q", "LoRA, gradient"])
def test_a_setting_takes_the_factors_that_its_name_says(place: Path, name: str) -> None:
    model, config, batches = adapted(place)
    drawn = {n: (layer.P.clone(), layer.Q.clone()) for n, layer in adapters(model).items()}
    training.begin(model, config, SETTINGS[name], batches)
    for n, layer in adapters(model).items():
        assert torch.equal(layer.P, drawn[n][0]) == (name == "gradient Q")
        assert torch.equal(layer.Q, drawn[n][1]) == (name == "gradient P")
        assert layer.lam.requires_grad != SETTINGS[name].lora


def test_lora_begins_without_effect(place: Path) -> None:
    model, config, batches = adapted(place)
    training.begin(model, config, Setting(lora=True), batches)
    for layer in adapters(model).values():
        assert not layer.P.any() and layer.Q.abs().max() <= layer.in_features**-0.5 and (layer.lam == 1).all()


def test_batches_hold_every_row_once_before_any_twice(place: Path) -> None:
    sentences = read_sentences(place / "sst2" / "train.jsonl", tokenizer_of(place))
    batches = training_batches(sentences, 8, 10, seed=3)
    seen = sorted(
        tuple(row[mask.bool()].tolist()) for b in batches for row, mask in zip(b.ids, b.mask, strict=True)
    )
    assert seen == sorted(tuple(ids) for ids, _ in sentences)


def test_a_row_without_a_label_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"sentence": "good", "label": 1}\n{"sentence": "bad"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, row 2"):
        read_sentences(tmp_path / "rows.jsonl", tokenizer_of(place))
