"""What the evaluation's tests share: a tiny model, tokenizer and data, and the slow way to ask."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import torch

from data_prep.prompt import evaluation_prompt
from data_prep.records import Record
from data_prep.tasks import TASKS
from eval.items import Question, TaskItems, tokenise
from eval.model.language_model import LanguageModel

_WORDS = [
    "the",
    "moon",
    "sun",
    "river",
    "stone",
    "bread",
    "wolf",
    "rain",
    "iron",
    "leaf",
    "salt",
    "wind",
    "fire",
]


def make_record(task: str, rng: random.Random) -> Record:
    """A question without sense and of any length; ARC items have 3, 4 or 5 choices."""

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(low, high)))

    if task == "boolq":
        choices = ["true", "false"]
    elif task in ("piqa", "winogrande"):
        choices = [f"{'solution' if task == 'piqa' else 'option'}{i}" for i in (1, 2)]
    elif task == "hellaswag":
        choices = [f"ending{i}" for i in range(1, 5)]
    else:
        choices = [f"answer{i}" for i in range(1, rng.choice((3, 4, 5)) + 1)]
    listed = " ".join(f"{choice.capitalize()}: {words(1, 3)}" for choice in choices)
    answer = rng.choice(choices)
    return {
        "instruction": f"{words(2, 14)}?\n\n{listed}\n\nAnswer format: {'/'.join(choices)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def write_data(folder: Path, count: int, tasks: tuple[str, ...] = tuple(TASKS), seed: int = 0) -> Path:
    """`<folder>/<task>/test.json` with `count` records each."""
    rng = random.Random(seed)
    for task in tasks:
        path = folder / task / "test.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([make_record(task, rng) for _ in range(count)], indent=4))
    return folder


def make_questions(task: str, count: int, seed: int = 0, style: str = "alpaca") -> list[Question]:
    """Questions as `load_questions` gives them."""
    rng = random.Random(f"{task}{seed}")
    records = [make_record(task, rng) for _ in range(count)]
    return [
        Question(task, i, evaluation_prompt(r, style), tuple(TASKS[task].answers(r)), r["answer"])
        for i, r in enumerate(records)
    ]


def make_tokenizer(split_digits: bool = True, **special: str) -> Any:
    """A byte-level BPE tokenizer; without `split_digits`, `answer1` may be one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(1)
    records = [make_record(task, rng) for task in TASKS for _ in range(20)]
    texts = [evaluation_prompt(r, "alpaca") + r["output"] for r in records]
    tokenizer = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", **special}
    )


def make_model(kind: str = "llama", vocabulary: int = 420, context: int = 512, seed: int = 0) -> Any:
    """A random model whose logits are far apart: a Llama, or a Mistral with a sliding window."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=64)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def save_base_and_adapter(base: Path, adapter: Path, **config: Any) -> None:
    """Write a model with its tokenizer, and a LoRA for it whose weights are not zero; `config`: more of PEFT's."""
    from peft import LoraConfig, get_peft_model

    model = make_model(seed=4)
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **config)
    get_peft_model(model, lora).save_pretrained(adapter)


def teach(model: Any, tokenizer: Any, questions: list[Question], steps: int = 60) -> None:
    """Train the model to answer in the usual form, though not rightly; a third of it in another form."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    rng = random.Random(2)
    for _ in range(steps):
        loss = torch.zeros(())
        for question in rng.sample(questions, 8):
            form = "The answer: " if question.index % 3 == 0 else "the correct answer is "
            prompt = tokenizer(question.prompt)["input_ids"]
            answer = tokenizer(form + question.answer, add_special_tokens=False)["input_ids"] + [1]
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def one_by_one(lm: LanguageModel, questions: list[Question]) -> list[tuple[str, str | None]]:
    """The reference: transformers' greedy `generate`, one unpadded prompt at a time, the published parsing.

    Text and prediction (None: no match) of each question.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=1, pad_token_id=1)
    answers = []
    for question in questions:
        ids = torch.tensor([lm.tokenizer(question.prompt)["input_ids"]])
        whole = lm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )[0]
        text = lm.tokenizer.decode(whole, skip_special_tokens=True).split("### Response:")[-1].strip()
        found = re.findall(TASKS[question.task].pattern, text)
        answers.append((text, found[0] if found else None))
    return answers


def task_items(lm: LanguageModel, task: str, count: int, style: str = "alpaca") -> TaskItems:
    """Tokenised questions of one task."""
    return tokenise(task, make_questions(task, count, style=style), lm.tokenizer)
