"""`--dry_run true` on real input: one page, true to what the run would do, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.prompt import evaluation_prompt
from data_prep.records import load_records
from flexlora_ds.base_model.loading import load_skeleton
from launch import train
from launch.data.encoding import Encoding, tokenise
from launch.data.examples import split
from launch.model.skeleton import read_skeleton
from launch.planning.dry_run import decoded_pieces
from tests.helpers import training
from tests.helpers.processes import ROOT, run_script
from tests.helpers.training import Place
from tests.helpers.zoo import write_model

Page = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("dry_run"))


@pytest.fixture
def page(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Page:
    """What the command prints under some options; its exit code must be 0 and its stderr empty."""
    monkeypatch.chdir(ROOT)

    def render(processes: int = 1, **options: Any) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        code = train.main(place.arguments(tmp_path / "out", dry_run="true", **options))
        printed = capfd.readouterr()
        assert (code, printed.err) == (0, "")
        assert not (tmp_path / "out").exists(), "a dry run leaves nothing behind"
        return printed.out

    return render


def test_the_page_is_one_page(page: Page) -> None:
    text = page()
    assert len(text.splitlines()) < 70 and max(map(len, text.splitlines())) < 400
    for heading in ("Run", "Adapted layers", "Memory", "Rank changes", "One example"):
        assert re.search(rf"^{heading}", text, re.MULTILINE), heading


def test_layers_and_parameters_are_those_of_the_model(page: Page, place: Place) -> None:
    text = page()
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(place.model).parameters())
    trainable = 4 * 2 * sum((64 + 1, 48 + 1, 48 + 1, 96 + 1, 96 + 1))
    assert f"10 layers, rank 4: {trainable:,} trainable parameters" in text
    assert f"of {base + trainable:,}" in text
    for kind, shape in (("q_proj", "32 × 32"), ("k_proj", "16 × 32"), ("up_proj", "64 × 32")):
        assert re.search(rf"2 × model\.layers\.\*\.\S*{kind}  {shape}", text), kind
    assert "o_proj" not in text and "lm_head" not in text


def test_steps_batches_and_calendar(page: Page) -> None:
    text = page(processes=2)
    assert "35 records and 5 held out, of" in text and "16 steps" in text and "warning" not in text
    assert "warning: warmup_steps 16 is not below the run's 16 steps" in page(warmup_steps=16)
    assert "batch 8 = micro-batch 4 × accumulation 1 × processes 2" in text
    assert "3 changes, at most 9 of 40 directions" in text
    assert "3 × at most 3: steps 5 to 11" in text
    epochs = page(max_steps=None, epochs=2, micro_batch_size=2)
    assert "8 steps" in epochs, "70 records in batches of 8; what does not fill one is left"
    assert "batch 8 = micro-batch 2 × accumulation 4 × processes 1" in epochs


def test_what_has_no_effect_is_said_as_in_the_run(page: Page) -> None:
    text = page(method="lora", importance="growth", eval_items=3)
    assert re.search(
        r"^  no effect: .*importance.* \(method lora\); eval_items \(eval_every 0\)$", text, re.M
    )
    assert "importance" not in page()


def test_what_is_doubtful_of_an_adapter_is_said(
    page: Page, place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that goes on from another base's name, and whose configuration scales a layer that it has not."""
    config = LoraConfig(r=2, target_modules=["q_proj"], alpha_pattern={"v_proj": 9})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(place.model), config)
    model.peft_config["default"].base_model_name_or_path = "some/base"
    model.save_pretrained(tmp_path / "adapter")
    capfd.readouterr()
    said = [
        line.strip() for line in page(init_adapter=tmp_path / "adapter").splitlines() if "warning" in line
    ]
    assert len(said) == 2
    assert said[0].startswith("warning: alpha_pattern 'v_proj' matches none of 2 adapted layers")
    assert said[1].startswith("warning: init_adapter was trained on some/base")


def test_no_changes_are_announced_where_there_are_none(page: Page) -> None:
    assert "ranks are fixed with method lora" in page(method="lora")
    assert "at most" not in page(adjust_size=0)
    assert "at most 0" not in page(adjust_interval=12) and "no rank change" in page(adjust_interval=12)


def test_the_example_is_decoded_with_its_loss_marked(page: Page, place: Place) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    records = load_records(place.data)
    kept, _ = tokenise(records, tokenizer, Encoding("alpaca", 200, train_on_inputs=False))
    first = split(kept, 5, 42)[0][0]
    record = records[first.record_id]
    text = page()
    shown = "\n".join(line[4:] for line in text.splitlines() if line.startswith("  |"))
    assert (
        f"{len(first.input_ids)} tokens, {sum(label != -100 for label in first.labels)} of them in the loss"
        in text
    )
    marked = shown[shown.index("⟦") + 1 : shown.index("⟧")]
    assert marked == record["output"] + tokenizer.eos_token
    before = shown[: shown.index("⟦")]
    whole = evaluation_prompt(record, "alpaca")
    assert "".join(before.split()).endswith("".join(whole.split())[-60:])


def test_inputs_in_the_loss_are_marked(page: Page) -> None:
    text = page(train_on_inputs="true", prompt="llm_adapters")
    shown = next(line for line in text.splitlines() if line.startswith("  |"))
    assert "⟦" in shown
    count = re.search(r"(\d+) tokens, (\d+) of them in the loss", text)
    assert count and count[1] == count[2]


def test_records_left_out_are_counted(page: Page) -> None:
    assert re.search(r"dropped \d+ of 40 records longer than cutoff_len 78", page(cutoff_len=78))


def test_the_memory_estimate_follows_the_options(page: Page) -> None:
    def total(text: str) -> float:
        found = re.search(r"([\d.]+) GiB  in all", text)
        assert found
        return float(found[1])

    assert total(page(cutoff_len=200)) < total(page(cutoff_len=200_000))
    assert "Memory of a process (estimate)" in page(stage=3, processes=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": "query"}, "matches no linear layer"),
        ({"rank": 17}, "limit 16"),
        ({"adjust_start": 10, "adjust_freeze": 8}, "freeze"),
        ({"data": "nowhere.json"}, "nowhere.json"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"ds": "nowhere.json"}, "nowhere.json"),
        ({"batch_size": 9, "micro_batch_size": 2}, "batch_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_stop_the_run_stops_the_dry_run(
    place: Place,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(ROOT)
    assert train.main(place.arguments(tmp_path / "out", dry_run="true", **options)) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert words in printed.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 10**12}, "config.json makes it (420, 1000000000000)"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is above 2,000"),
        ({"vocab_size": 421}, "but config.json makes it (421, 32)"),
        ({"vocab_size": "many"}, "describes no model"),
        ({}, "holds an adapter beside the model"),
    ],
)
def test_a_base_that_would_stop_the_run_stops_the_dry_run_with_the_same_line(
    place: Place,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(ROOT)
    base = Path(shutil.copytree(place.model, tmp_path / "base"))
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | changes))
    if not changes:
        (base / "adapter_config.json").write_text("{}")
    said = []
    for dry_run in ("true", "false"):
        assert train.main(place.arguments(tmp_path / "out", model=base, dry_run=dry_run)) == 2
        said.append(capfd.readouterr().err)
    assert said[0] == said[1] and words in said[0] and said[0].count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world_size", [2])
def test_of_several_processes_one_prints(place: Place, tmp_path: Path, world_size: int) -> None:
    arguments = place.arguments(tmp_path / "out", dry_run="true")
    first, *others = run_script(["launch/train.py", *arguments], world_size, timeout=300)
    assert first.returncode == 0 and "processes 2" in first.stdout and first.stderr == ""
    assert [(other.returncode, other.stdout, other.stderr) for other in others] == [(0, "", "")]


class WordTokenizer:
    """Decodes as sentencepiece does: a word begins with a space, which the first word of a text loses."""

    pieces = (b" is", b" ice", b" cold", b"\xce", b"\xbb")

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace").removeprefix(" ")


def test_spaces_and_split_characters_survive_the_decoding() -> None:
    tokenizer: Any = WordTokenizer()
    assert list(decoded_pieces([0, 1, 2, 3, 4], tokenizer)) == ["is", " ice", " cold", "", "λ"]
    assert list(decoded_pieces([0, 3], tokenizer)) == ["is", "\ufffd"], (
        "what is not a character is shown as such"
    )


def test_stacked_experts_without_an_adapter_are_said(
    page: Page, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = write_model(tmp_path / "base", "mixtral")
    capfd.readouterr()
    shown = page(model=base, target_modules="all-linear")
    assert "all-linear leaves out the stacked experts (down_proj, gate_up_proj)" in shown
    assert "stacked experts" not in page(model=base, target_modules="q_proj")
    assert "stacked experts" not in page(target_modules="all-linear")


def test_stacked_experts_are_counted_whatever_their_layer_is_called(tmp_path: Path) -> None:
    """JetMoe's stand partly under `mlp`."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2}
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    base = write_model(tmp_path / "base", "jetmoe", **sizes, **narrow)
    model = load_skeleton(base)
    stacked = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    share = stacked / sum(p.numel() for p in model.parameters())
    (remark,) = read_skeleton(str(base), ("all-linear",)).remarks
    assert f"{share:.0%} of the base's weights get no adapter" in remark
