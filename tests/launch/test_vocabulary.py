"""A tokenizer that knows more tokens than its model: found before training, with the token and the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora_ds.base_model.loading import load_tokenizer
from flexlora_ds.base_model.vocabulary import Vocabulary
from flexlora_ds.errors import UserError
from launch.data.prepare import load_tokenizer_of, prepare_data
from launch.data.vocabulary import length_doubt
from launch.options.train_options import parse_options
from launch.planning.settle import settle
from tests.helpers import eval_tiny, training
from tests.helpers.processes import ROOT, Processes
from tests.helpers.training import Place
from tests.helpers.zoo import make_model

ROWS = 419
"""As many as the tokenizer has tokens before any is added."""
ADDED = "thingamajig"
MODEL = Vocabulary(ROWS, ROWS)


def write_base(folder: Path, *, pad: str | None = None, words: tuple[str, ...] = (), **special: str) -> Path:
    """The tiny Llama, its tokenizer with tokens added behind the last row of the embedding."""
    eval_tiny.make_model(seed=4, vocabulary=ROWS).save_pretrained(folder)
    tokenizer = eval_tiny.make_tokenizer(**special)
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(ROOT)
    place = training.make_place(tmp_path, records=12)
    records = json.loads(place.data.read_text())
    records[7]["output"] += f" {ADDED}"
    records[9]["instruction"] += f" {ADDED}"
    place.data.write_text(json.dumps(records))
    return place


def data_error(place: Place, **options: Any) -> str:
    """What preparing the data says, before a weight is loaded: the base's are removed."""
    asked = parse_options(place.arguments("unused", val_size=2, **options))
    (Path(asked.model) / "model.safetensors").unlink()
    settled = settle(asked, 1)
    with pytest.raises(UserError) as caught:
        prepare_data(settled.options, load_tokenizer_of(asked), settled.skeleton.vocabulary)
    return str(caught.value)


def test_an_added_word_is_named_with_its_record(place: Place) -> None:
    message = data_error(place, model=write_base(place.root / "more", words=(ADDED,)))
    assert f"turns {ADDED!r} into the id 419" in message
    assert "embedding has 419 rows" in message and "records.json, record 8)" in message
    assert message.endswith("resize the model's embedding and save it")


def test_a_record_that_is_dropped_is_not_looked_at(place: Place) -> None:
    records = json.loads(place.data.read_text())
    records[7]["instruction"] = "long " * 400
    place.data.write_text(json.dumps(records))
    message = data_error(place, model=write_base(place.root / "more", words=(ADDED,)))
    assert "record 10)" in message


def test_an_end_token_without_a_row_is_in_the_first_record(place: Place) -> None:
    message = data_error(place, model=write_base(place.root / "more", eos_token="<|im_end|>"))
    assert "'<|im_end|>' into the id 419" in message and "record 1)" in message


def test_a_target_without_a_logit_is_found(place: Place) -> None:
    """A head with fewer rows than the embedding; the prompt's tokens need no logit."""
    asked = parse_options(
        place.arguments("unused", val_size=2, model=write_base(place.root / "more", words=(ADDED,)))
    )
    tokenizer = load_tokenizer_of(asked)
    with pytest.raises(UserError, match=r"head has 419 logits \(.*record 8\)"):
        prepare_data(asked, tokenizer, Vocabulary(ROWS + 1, ROWS))
    prepare_data(asked, tokenizer, Vocabulary(ROWS + 1, ROWS + 1))


@pytest.mark.parametrize(
    ("special", "expected"), [({"pad": "[PAD]"}, 1), ({}, 1), ({"unk_token": "<s>", "pad": "<s>"}, 0)]
)
def test_a_padding_id_is_one_that_the_model_has(
    tmp_path: Path, special: dict[str, str], expected: int
) -> None:
    tokenizer = load_tokenizer(write_base(tmp_path / "base", **special))
    assert MODEL.padding_id(tokenizer) == expected


def test_an_added_padding_token_trains_as_without_it(place: Place, one_process: Processes) -> None:
    found = []
    for pad in (None, "[PAD]"):
        base = write_base(place.root / f"base{pad}", pad=pad)
        out = place.root / f"run{pad}"
        asked = place.arguments(out, model=base, padding_free=False, max_steps=2, adjust_size=0, val_size=2)
        (result,) = one_process.run("tests.helpers.training:command", asked)
        assert result["code"] == 0, result["stderr"]
        found.append(training.losses(out))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("kind", "size"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings"), ("bert", None)]
)
def test_a_record_longer_than_learnt_positions_is_named(place: Place, kind: str, size: str | None) -> None:
    """It would end a run in an IndexError, on a GPU in an assertion of the device. One that just fits trains."""
    bert = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
    changes = {size: 80} if size else {**bert, "max_position_embeddings": 80, "is_decoder": True}
    model = make_model(kind, vocab_size=430, **changes)
    assert Vocabulary.of(model).positions == 80
    model.save_pretrained(place.root / kind)
    eval_tiny.make_tokenizer().save_pretrained(place.root / kind)
    asked = place.arguments("unused", val_size=2, model=place.root / kind, target_modules="all-linear")
    settled = settle(parse_options(asked), 1)
    tokenizer = load_tokenizer_of(settled.options)
    data = prepare_data(settled.options, tokenizer)
    lengths = {
        int(record): int(length)
        for part in (data.train, data.validation)
        for record, length in zip(part.record_ids, part.lengths, strict=True)
    }
    record, length = next((i, lengths[i]) for i in sorted(lengths) if lengths[i] > 80)
    words = rf"{length} tokens where the model has learnt 80 positions .*records.json, record {record + 1}\)"
    with pytest.raises(UserError, match=rf"{words}; set cutoff_len to 80 at most"):
        prepare_data(settled.options, tokenizer, settled.skeleton.vocabulary)
    prepare_data(settled.options.replace(cutoff_len=80), tokenizer, settled.skeleton.vocabulary)
    rows = torch.zeros(1, 80, dtype=torch.long)
    model(input_ids=rows)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.zeros(1, 81, dtype=torch.long))


@pytest.mark.parametrize("patches", [4, 784])
def test_the_positions_of_an_images_patches_limit_no_text(patches: int) -> None:
    """Fewer than the text's, and more."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    eye = CLIPVisionConfig(**shape, image_size=2 * round(patches**0.5), patch_size=2)
    text = LlamaConfig(**shape, vocab_size=420, max_position_embeddings=64)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=eye, text_config=text))
    assert Vocabulary.of(model).positions is None


def test_the_vocabulary_is_that_of_the_models_two_ends() -> None:
    assert Vocabulary.of(make_model("mistral", max_position_embeddings=64)).positions is None
    assert Vocabulary.of(make_model("gpt_neox")) == Vocabulary(420, 420, context=512)
    assert Vocabulary.of(make_model("qwen2", vocab_size=500)) == Vocabulary(500, 500, context=512)


def test_records_longer_than_a_computed_context_are_a_warning(place: Place) -> None:
    """Rotary positions have no end, but the base was trained up to `max_position_embeddings`."""
    model = make_model("llama", vocab_size=430, max_position_embeddings=80)
    model.save_pretrained(place.root / "short")
    eval_tiny.make_tokenizer().save_pretrained(place.root / "short")
    settled = settle(parse_options(place.arguments("unused", val_size=2, model=place.root / "short")), 1)
    tokenizer, vocabulary = load_tokenizer_of(settled.options), settled.skeleton.vocabulary
    assert (vocabulary.positions, vocabulary.context) == (None, 80)
    data = prepare_data(settled.options, tokenizer, vocabulary)
    lengths = {
        int(record): int(length)
        for part in (data.train, data.validation)
        for record, length in zip(part.record_ids, part.lengths, strict=True)
    }
    longer = [i for i in sorted(lengths) if lengths[i] > 80]
    assert length_doubt(data, vocabulary, "DATA") == (
        f"{len(longer)} records longer than the model's context of 80 tokens, first DATA, record {longer[0] + 1}, of "
        f"{lengths[longer[0]]}: positions that its weights do not know; cutoff_len 80 drops them"
    )
    shorter = prepare_data(settled.options.replace(cutoff_len=80), tokenizer, vocabulary)
    assert length_doubt(shorter, vocabulary, "DATA") is None
