"""The report on small folders whose overlaps, duplicates, lengths and balance are known beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.prompt import training_text
from data_prep.records import Record
from data_prep.report.__main__ import main, measure_folder
from data_prep.report.measure import count_words, normalised, token_counter


def record(instruction: str, answer: str) -> Record:
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


TRAIN = [
    record("Is ice cold?", "true"),
    record("Is ice cold?", "true"),  # a duplicate
    record("Is ice cold?", "false"),  # a conflict
    record("Is “fire” hot?", "true"),
]
TEST = [
    record("Is ice cold?", "true"),  # exact
    record("is  FIRE hot", "true"),  # normalised only
    record("Is glass soft? " + "word " * 300, "false"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "boolq").mkdir(parents=True)
    (folder / "boolq/train.json").write_text(json.dumps(TRAIN))
    (folder / "boolq/test.json").write_text(json.dumps(TEST))
    return folder


def test_normalised() -> None:
    assert normalised("  Is “Fire”\n\nhot?") == normalised("is fire hot") == "is fire hot"
    assert normalised("ﬁre²") == "fire2" and normalised("Straße") == normalised("STRASSE")
    assert normalised("ice cold") != normalised("icecold")


def test_the_measures(data: Path) -> None:
    measures = measure_folder(data, count_words, "alpaca")
    train, test = (measures[f"boolq/{kind}.json"].summary(256) for kind in ("train", "test"))
    assert (train["records"], train["duplicates"], train["conflicts"]) == (4, 1, 1)
    assert (train["overlap"], train["overlap_normalised"]) == (None, None)
    assert train["answers"] == {"true": 3, "false": 1} and train["over_cutoff"] == 0
    assert (test["records"], test["duplicates"], test["conflicts"]) == (3, 0, 0)
    assert (test["overlap"], test["overlap_normalised"]) == (1, 2)
    words = sorted(len("".join(training_text(item, "alpaca")).split()) for item in TEST)
    assert test["length_max"] == words[2] > 256 and test["length_median"] == words[1]
    assert test["length_mean"] == round(sum(words) / 3, 1) and test["over_cutoff"] == 1


def test_overlap_with_a_corpus_of_other_tasks(data: Path) -> None:
    (data / "commonsense_170k.json").write_text(json.dumps([TEST[2]]))
    measures = measure_folder(data, count_words, "alpaca")
    assert measures["boolq/test.json"].overlap == 2
    assert list(measures) == ["boolq/test.json", "boolq/train.json", "commonsense_170k.json"]


def test_the_command_writes_the_report_and_changes_no_data(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in data.rglob("*.json")}
    out = data.parent / "report"
    assert main(["--data", str(data), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| boolq/test.json"))
    assert [cell.strip() for cell in row.split("|")[2:7]] == ["3", "0", "0", "1", "2"]
    assert row in (out / "report.md").read_text()
    document = json.loads((out / "report.json").read_text())
    assert document["settings"]["unit"] == "words"
    assert document["files"]["boolq/test.json"]["overlap_normalised"] == 2
    for name in ("lengths", "answers", "overlaps"):
        assert (out / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {path: path.read_bytes() for path in data.rglob("*.json")} == before


def test_lengths_in_tokens(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    characters = {chr(code): code for code in range(32, 127)} | {"?": 0}
    model = tokenizers.models.BPE(vocab=characters, merges=[], unk_token="?")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="?")
    fast.save_pretrained(tmp_path / "tokenizer")
    assert token_counter(str(tmp_path / "tokenizer"))(["abc", "a b"]) == [3, 3]  # one token per character
    arguments = ["--data", str(data), "--tokenizer", str(tmp_path / "tokenizer"), "--prompt", "llm_adapters"]
    assert main(arguments) == 0
    report = json.loads((data / "report/report.json").read_text())
    characters_of_longest = max(len("".join(training_text(item, "llm_adapters"))) for item in TEST)
    assert report["settings"]["unit"] == "tokens"
    assert report["files"]["boolq/test.json"]["length_max"] == characters_of_longest


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ("empty", "holds no <task>/train.json"),
        ("record", "test.json, record 2"),
        ("folder", "no such folder"),
    ],
)
def test_bad_input_is_one_line(
    data: Path, capsys: pytest.CaptureFixture[str], break_it: str, message: str
) -> None:
    if break_it == "record":
        (data / "boolq/test.json").write_text(json.dumps([TEST[0], {"instruction": 3}]))
    elif break_it == "empty":
        for path in data.rglob("*.json"):
            path.unlink()
    assert main(["--data", str(data if break_it != "folder" else data / "no")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and message in lines[-1]
    assert not (data / "report").exists()


def test_a_tokenizer_that_is_not_there(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    assert main(["--data", str(data), "--tokenizer", str(tmp_path / "nothing")]) == 2
    assert "tokenizer cannot be loaded" in capsys.readouterr().err
    for name in ("no", "no.gguf"):
        assert main(["--data", str(data), "--tokenizer", str(tmp_path / name)]) == 2
        assert f"error: no tokenizer is there ({tmp_path}/{name}); give a hub id" in capsys.readouterr().err
