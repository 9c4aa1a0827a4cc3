"""Numbers that are not finite end an evaluation: nothing that is read off them counts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from eval.__main__ import main
from eval.answering.answerer import Answerer
from eval.answering.batching import Batch
from eval.model.language_model import LanguageModel
from eval.predictions import Prediction, PredictionFolder
from eval.protocols import PROTOCOLS
from flexlora_ds.errors import RunError
from flexlora_ds.files.text import write_json_atomically
from tests.helpers import eval_tiny

full = pytest.mark.full


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `adapter/` and `data/` with two tasks: answers of one token more, and of several lengths."""
    place = tmp_path_factory.mktemp("eval")
    eval_tiny.save_base_and_adapter(place / "model", place / "adapter")
    eval_tiny.write_data(place / "data", 3, ("boolq", "ARC-Easy"))
    return place


def poison(source: Path, folder: Path, name: str, part: str, value: float) -> Path:
    """A copy of a model or adapter with one number of the first tensor whose name holds `part` replaced."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / name)
    key = next(key for key in sorted(tensors) if part in key)
    tensors[key].view(-1)[3] = value
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("mode", "task", "what", "value"),
    [
        ("score", "boolq", "adapter", math.nan),
        ("score", "ARC-Easy", "model", math.inf),
        ("generate", "boolq", "adapter", math.inf),
        ("generate-beam4", "boolq", "adapter", math.nan),
        pytest.param("score", "ARC-Easy", "adapter", -math.inf, marks=full),
        pytest.param("score", "boolq", "model", math.nan, marks=full),
        pytest.param("generate", "ARC-Easy", "model", math.nan, marks=full),
        pytest.param("generate-beam4", "ARC-Easy", "model", math.inf, marks=full),
    ],
)
def test_a_base_or_adapter_that_is_not_finite_is_no_result(
    mode: str,
    task: str,
    what: str,
    value: float,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {"adapter": ("adapter_model.safetensors", "lora_B"), "model": ("model.safetensors", "q_proj")}
    poisoned = poison(place / what, tmp_path / what, *files[what], value)
    given = {"model": place / "model", "adapter": place / "adapter", what: poisoned}
    arguments = [word for key, folder in given.items() for word in (f"--{key}", str(folder))]
    out = tmp_path / "out"
    options = ["--data", f"{place}/data", "--tasks", task, "--mode", mode, "--out", f"{out}"]
    assert main([*arguments, *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the model's numbers are not finite") and f"({task}, item " in error
    assert not (out / "results.json").exists()
    assert "NaN" not in "".join(path.read_text() for path in out.rglob("*.jsonl"))


class _Spoiled:
    """A model whose logits turn to NaN for one row of a batch, after some steps."""

    def __init__(self, model: Any, after: int) -> None:
        self._forward, self._left = model.forward, after
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._forward(*args, **kwargs)
        self._left -= 1
        if self._left < 0 and len(out.logits) > 1:
            out.logits[1] = math.nan
        return out


@pytest.mark.parametrize("protocol", ["generate", "generate-beam4", "score"])
def test_the_item_is_named(protocol: str) -> None:
    lm = LanguageModel(eval_tiny.make_model(seed=2), eval_tiny.make_tokenizer())
    task = eval_tiny.task_items(lm, "boolq", 3)
    answerer = Answerer(lm, PROTOCOLS[protocol], {"boolq": task})
    answerer.answer(Batch("boolq", task.items, 1))
    _Spoiled(lm.model, after=0)
    items = (task.items[2], task.items[0]) if protocol != "generate-beam4" else task.items[:1]
    with pytest.raises(RunError, match=r"\(boolq, item 0\)"):
        answerer.answer(Batch("boolq", items, 1))


def test_predictions_of_nan_from_earlier_are_not_continued(tmp_path: Path) -> None:
    lm = LanguageModel(eval_tiny.make_model(seed=2), eval_tiny.make_tokenizer())
    task = eval_tiny.task_items(lm, "boolq", 2)
    folder = PredictionFolder(tmp_path)
    log = folder.prediction_log(0)
    for item, margin in zip(task.items, (0.25, 0.5), strict=True):
        asked = item.question
        log.add([Prediction("boolq", asked.index, asked.prompt_hash, "", None, asked.answer, margin=margin)])
    log.close()
    path = tmp_path / "predictions" / "journal-0.jsonl"
    path.write_text(path.read_text().replace("0.5", "NaN"))
    folder.merge_logs([task])
    assert list(folder.read("boolq")) == [0]


def test_json_never_holds_nan(tmp_path: Path) -> None:
    assert "margin" not in Prediction("boolq", 0, "h", "", None, "true", margin=math.inf).to_json()
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomically(tmp_path / "x.json", {"a": math.nan})
    assert not list(tmp_path.iterdir())
