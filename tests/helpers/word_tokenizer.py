"""A tokenizer of six words."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_tokenizer(folder: Path, **special: str) -> None:
    """Write it to a folder; `special` names its special tokens."""
    words = {"!": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "<pad>": 5}
    core = Tokenizer(models.WordLevel(words, unk_token="!"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
