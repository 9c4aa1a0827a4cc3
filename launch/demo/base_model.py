"""A small Llama-architecture base for the demo, pre-trained from nothing on fact sentences.

`python -m launch.demo.base_model --out runs/demo/base` trains a sentencepiece tokenizer and a model of about two
million parameters in a minute or two on two CPU cores. The model sees `data_prep.demo.facts` only; the tokenizer also
sees the words of the instruction prompts, so that they do not fall apart into bytes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
)

from data_prep.demo.facts import fact_sentences
from data_prep.demo.knowledge import GOOD_NEWS, PEOPLE
from flexlora_ds.terminal.command import CommandParser, run_parsed

_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n",
    "\n\n### Response:\n",
)
_LEADS = (
    "Please answer the following question with true or false, question:",
    "Please choose the correct solution to the question:",
    "Please choose the correct answer to the question:",
    "Please choose the correct ending to complete the given sentence:",
    "Please choose the correct answer to fill in the blank to complete the given sentence:",
)
_NUMBERED = {"solution": (2,), "answer": (3, 4, 5), "ending": (4,), "option": (2,)}
_OUTPUTS = ("true", "false", "solution1", "answer1", "ending1", "option1")
_WORDS = """Solution1: take the Answer1: dog Ending1: takes the Option1: dog Which of these How would feel? Which one
What asks: is alive? living thing does grow and get old would say that To make a meal for When is hungry, To cook lunch
with Dressing: gets dressed. then is cold. so opens the closet. saw the and the ; the _ was too heavy to lift. was far
too big. drove away. was faster."""


def phrases() -> list[str]:
    """The prompts' fixed wording. Each is one piece of the tokenizer: contexts half as long train twice as fast."""
    formats = ["/".join(f"{name}{i + 1}" for i in range(n)) for name, ns in _NUMBERED.items() for n in ns]
    return [*_PROMPT, *_LEADS, *(f"Answer format: {answers}" for answers in ("true/false", *formats))]


def scaffold() -> list[str]:
    """The other words of prompts and answers: for the tokenizer, never for the model."""
    outputs = [f"the correct answer is {output}" for output in _OUTPUTS]
    texts = [
        *_WORDS.splitlines(),
        *outputs,
        *(f"{name} {news}." for name, news in zip(PEOPLE, itertools.cycle(GOOD_NEWS), strict=False)),
    ]
    return [line for text in texts for line in (text, f"\n\n{text}")]


@dataclass(frozen=True)
class BaseRecipe:
    """Sizes and settings that were found to fit into about 90 s on two cores."""

    vocab_size: int = 2048
    hidden_size: int = 160
    intermediate_size: int = 448
    layers: int = 4
    heads: int = 5
    sequence: int = 128
    batch: int = 16
    steps: int = 350
    lr: float = 4e-3
    seed: int = 42


def train_tokenizer(folder: Path, sentences: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a BPE model with byte fallback (digits apart, line ends as pieces) and save it as a Llama tokenizer."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences + scaffold() * 300),
        model_writer=trained,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\n\n"],
        character_coverage=1.0,
        pad_id=3,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    _llama_tokenizer(sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())).save_pretrained(
        folder
    )
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _llama_tokenizer(processor: sentencepiece.SentencePieceProcessor) -> LlamaTokenizer:
    """The same BPE model for transformers, whose own reader of `tokenizer.model` needs protobuf.

    A sentencepiece BPE model lists its pieces in the order of their merges: every way to split a piece into two known
    ones is a merge, ranked by the whole piece's place.
    """
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    known = set(pieces)
    merges = [
        (piece[:at], piece[at:])
        for i, piece in enumerate(pieces)
        if not processor.is_control(i) and not processor.is_byte(i) and not processor.is_unknown(i)
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, pad_token="<pad>")
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases()])
    return tokenizer


def packed_batches(ids: list[list[int]], bos: int, recipe: BaseRecipe) -> Iterator[Tensor]:
    """Endless batches [batch, sequence] of packed sentences; every row starts at a sentence."""
    rng = random.Random(recipe.seed)
    stream = itertools.chain.from_iterable(iter(lambda: rng.sample(ids, len(ids)), None))
    while True:
        rows = []
        for _ in range(recipe.batch):
            row = [bos]
            while len(row) < recipe.sequence:
                row += next(stream)
            rows.append(row[: recipe.sequence])
        yield torch.tensor(rows)


def build_model(tokenizer: PreTrainedTokenizerBase, recipe: BaseRecipe) -> LlamaForCausalLM:
    """A Llama with random weights, of the recipe's sizes."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            initializer_range=0.04,
        )
    )


def pretrain(model: LlamaForCausalLM, batches: Iterator[Tensor], recipe: BaseRecipe) -> float:
    """Train on next-token prediction with AdamW and a one-cycle learning rate; the mean loss of the last 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, recipe.steps // 12)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        ),
    )
    losses: list[float] = []
    began = time.perf_counter()
    model.train()
    for step, ids in zip(range(1, recipe.steps + 1), batches, strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == recipe.steps:
            mean = sum(losses[-20:]) / len(losses[-20:])
            print(
                f"step {step:4}/{recipe.steps}  loss {mean:.3f}  {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return sum(losses[-20:]) / len(losses[-20:])


def keep_unseen_rows(model: LlamaForCausalLM, seen: set[int]) -> None:
    """Leave the output rows of pieces that never occur in the text at their random start.

    Adam would push them all alike, away from every hidden state: an adapter of the frozen model could then hardly
    learn to separate `true` from `false`.
    """
    mask = torch.zeros(model.config.vocab_size, 1)
    mask[sorted(seen)] = 1.0
    model.lm_head.weight.register_hook(lambda gradient: gradient * mask)


def make_base(folder: Path, recipe: BaseRecipe) -> LlamaForCausalLM:
    """Train tokenizer and model, and save both into `folder` (safetensors)."""
    sentences = fact_sentences(recipe.seed)
    tokenizer = train_tokenizer(folder, sentences, recipe.vocab_size)
    model = build_model(tokenizer, recipe)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"base: {count:,} parameters, {len(tokenizer)} pieces, {len(sentences):,} sentences", flush=True)
    ids: list[list[int]] = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    keep_unseen_rows(model, set(itertools.chain.from_iterable(ids)))
    pretrain(model, packed_batches(ids, tokenizer.bos_token_id, recipe), recipe)
    model.save_pretrained(folder)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Make the base model; the exit code."""
    parser = CommandParser("python -m launch.demo.base_model", __doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo/base"), help="folder for model and tokenizer"
    )
    parser.add_argument("--steps", type=int, default=BaseRecipe.steps, help="pre-training steps")
    parser.add_argument("--seed", type=int, default=BaseRecipe.seed)
    return run_parsed(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    make_base(arguments.out, BaseRecipe(steps=arguments.steps, seed=arguments.seed))


if __name__ == "__main__":
    sys.exit(main())
