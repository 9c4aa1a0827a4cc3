"""Records -> examples: ids of the prompt and the answer, the mask, the longest length, the validation split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data_prep.prompt import evaluation_prompt, training_text
from data_prep.records import Record
from eval.items import Question
from eval.items import tokenise as tokenise_questions
from flexlora_ds.errors import UserError
from launch.data import encoding
from launch.data.encoding import Encoding, tokenise
from launch.data.examples import IGNORED, Examples, TokenisedData, arrange, split

BOS, EOS = 1, 2


def make_tokenizer(template: str = "<s> $A", eos: str | None = "</s>") -> Any:
    """A word-level tokenizer that, like LLaMA3's, joins the last space of a run to the word that follows."""
    pieces = ["<unk>", "<s>", "</s>", "the", " the", "correct", " correct", "answer", " answer", "is", " is"]
    pieces += [f"{space}answer{n}" for n in range(1, 4) for space in ("", " ")]
    pieces += [" " * n for n in range(1, 20)] + ["\n", "#", ":", "."]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    pattern = Regex(r" ?[A-Za-z0-9]+| +(?= [A-Za-z0-9])| +|\n|[^A-Za-z0-9 \n]")
    core.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token=eos)


def make_record(words: int = 3, answer: str = "answer1", given: str = "") -> Record:
    output = f"the correct answer is {answer}"
    return {
        "instruction": " ".join(["the"] * words),
        "input": given,
        "output": output,
        "answer": answer,
    }


def prepare(
    records: list[Record],
    prompt: str = "alpaca",
    cutoff_len: int = 256,
    train_on_inputs: bool = False,
    val_size: int = 0,
    seed: int = 42,
) -> TokenisedData:
    examples, dropped = tokenise(records, make_tokenizer(), Encoding(prompt, cutoff_len, train_on_inputs))
    return arrange(examples, dropped, cutoff_len=cutoff_len, val_size=val_size, seed=seed)


@pytest.mark.parametrize("given", ["", "the correct"])
def test_alpaca_is_the_evaluation_prompt_then_the_answer_then_the_end(given: str) -> None:
    tokenizer, record = make_tokenizer(), make_record(given=given)
    (example,) = prepare([record]).train
    prompt = tokenizer(evaluation_prompt(record, "alpaca"))["input_ids"]
    answer = tokenizer("the correct answer is answer1", add_special_tokens=False)["input_ids"]
    assert prompt[0] == BOS
    assert example.input_ids == [*prompt, *answer, EOS]
    assert example.labels == [IGNORED] * len(prompt) + [*answer, EOS]


def test_llm_adapters_is_the_published_string_tokenised_as_a_whole() -> None:
    tokenizer, record = make_tokenizer(), make_record()
    (example,) = prepare([record], prompt="llm_adapters").train
    prompt, answer = training_text(record, "llm_adapters")
    whole = tokenizer(prompt + answer)["input_ids"]
    masked = len(tokenizer(prompt)["input_ids"])
    assert example.input_ids == [*whole, EOS]
    assert example.labels == [IGNORED] * masked + [*whole, EOS][masked:]
    # The reference's subtlety, which this tokenizer shows: prompt and whole differ in the last masked token.
    assert tokenizer(prompt)["input_ids"][-1] != whole[masked - 1]
    assert tokenizer.convert_ids_to_tokens(example.input_ids[masked]) == " the"


@pytest.mark.parametrize("prompt", ["alpaca", "llm_adapters"])
def test_train_on_inputs_learns_every_token(prompt: str) -> None:
    examples = prepare([make_record()], prompt=prompt, train_on_inputs=True).train
    assert examples[0].labels == examples[0].input_ids
    assert examples.target_counts.tolist() == [len(examples[0].input_ids) - 1]


@pytest.mark.parametrize("prompt", ["alpaca", "llm_adapters"])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_a_tokenizers_own_end_token_comes_once_and_last(template: str, prompt: str) -> None:
    examples, _ = tokenise([make_record()], make_tokenizer(template), Encoding(prompt, 99, False))
    ids = examples[0].input_ids
    assert ids.count(EOS) == 1 and ids[-1] == EOS
    assert ids.count(BOS) == int("<s>" in template)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("given", ["", "the correct"])
def test_training_reads_the_prompt_that_evaluation_asks_with(template: str, given: str) -> None:
    """Whatever the tokenizer adds by itself: nothing, a BOS, an EOS, both."""
    tokenizer = make_tokenizer(template)
    record = make_record(given=given)
    record["instruction"] += " Answer format: answer1/answer2"
    examples, _ = tokenise([record], tokenizer, Encoding("alpaca", 99, False))
    question = Question(
        "ARC-Easy", 0, evaluation_prompt(record, "alpaca"), ("answer1", "answer2"), record["answer"]
    )
    (item,) = tokenise_questions("ARC-Easy", [question], tokenizer).items
    assert EOS not in item.prompt and item.prompt.count(BOS) == int("<s>" in template)
    assert tuple(examples[0].input_ids) == (*item.prompt, *item.candidates[0], EOS)
    learnt = [token for token in examples[0].labels if token != IGNORED]
    assert tuple(learnt) == (*item.candidates[0], EOS)


@pytest.mark.parametrize("prompt", ["alpaca", "llm_adapters"])
def test_a_record_over_the_cutoff_is_dropped_never_truncated(prompt: str) -> None:
    records = [make_record(words) for words in (5, 9, 6, 7)]
    limit = len(prepare([records[2]], prompt=prompt).train[0].input_ids)
    data = prepare(records, prompt=prompt, cutoff_len=limit)
    assert data.dropped == (1, 3)
    assert data.train.record_ids.tolist() == [0, 2]
    assert [len(example.input_ids) for example in data.train] == [limit - 1, limit]
    assert all(example.input_ids[-1] == EOS for example in data.train)
    assert data.dropped_line() == (
        f"dropped 2 of 4 records longer than cutoff_len {limit} (an answer is never shortened): records 2, 4"
    )


def test_nothing_dropped_says_nothing() -> None:
    assert prepare([make_record()]).dropped_line() is None


def test_counts_agree_with_the_labels_of_the_examples() -> None:
    records = [make_record(words) for words in range(1, 9)]
    for inputs in (False, True):
        examples = prepare(records, train_on_inputs=inputs).train
        for index, example in enumerate(examples):
            assert examples.lengths[index] == len(example.input_ids) == len(example.labels)
            assert examples.target_counts[index] == sum(label != IGNORED for label in example.labels[1:])


def test_the_split_is_seeded_disjoint_and_complete() -> None:
    records = [make_record(words % 7 + 1) for words in range(60)]
    data = prepare(records, val_size=20)
    train, validation = data.train.record_ids.tolist(), data.validation.record_ids.tolist()
    assert len(validation) == 20
    assert sorted(train + validation) == list(range(60))
    assert validation == prepare(records, val_size=20).validation.record_ids.tolist()
    assert validation != prepare(records, val_size=20, seed=43).validation.record_ids.tolist()
    whole = prepare(records).train
    assert [data.validation[i] for i in range(20)] == [whole[number] for number in validation]


def test_a_slice_keeps_the_examples() -> None:
    examples = prepare([make_record(words) for words in range(1, 6)]).train
    assert isinstance(examples[1:3], Examples)
    assert list(examples[1:3]) == [examples[1], examples[2]]
    with pytest.raises(IndexError):
        examples[5]


def test_more_records_than_one_chunk_keep_their_numbers() -> None:
    records = [make_record(index % 5 + 1, f"answer{index % 3 + 1}") for index in range(4100)]
    examples = prepare(records).train
    assert examples.record_ids.tolist() == list(range(4100))
    for index in (0, 4095, 4096, 4099):
        assert examples[index].input_ids == prepare([records[index]]).train[0].input_ids
    assert np.array_equal(examples.lengths[:5], examples.lengths[4095:4100])


def test_nothing_to_train_on_is_the_users_error() -> None:
    records = [make_record() for _ in range(4)]
    with pytest.raises(UserError, match="no records"):
        prepare([])
    with pytest.raises(UserError, match=r"not one of 4 records fits into 8 tokens.*raise cutoff_len"):
        prepare(records, cutoff_len=8)
    with pytest.raises(UserError, match=r"val_size 4 .*4 usable records.*choose 0 to 3"):
        prepare(records, val_size=4)
    with pytest.raises(UserError, match=r"val_size 4 .* 1 usable record \(val_size\); choose 0$"):
        prepare(records[:1], val_size=4)
    with pytest.raises(UserError, match="val_size"):
        split(prepare(records).train, -1, 0)
    with pytest.raises(UserError, match="end-of-sequence"):
        tokenise(records, make_tokenizer(eos=None), Encoding("alpaca", 9, False))


@pytest.mark.parametrize("style", ["alpaca", "llm_adapters"])
def test_long_records_are_tokenised_a_few_at_a_time(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [make_record(words) for words in (3, 30, 1, 2, 500, 1)]
    how = Encoding(style, 9_999, train_on_inputs=False)
    wanted, _ = tokenise(records, make_tokenizer(), how)
    monkeypatch.setattr(encoding, "_CHUNK_CHARACTERS", 100)
    asked: list[int] = []
    found, _ = tokenise(records, make_tokenizer(), how, asked.append)
    assert list(found) == list(wanted)
    assert asked[-1] == 6 and len(asked) > 3
