"""Chat templates of the kinds that are about, and a tiny tokenizer that has one."""

from __future__ import annotations

from typing import Any

from tests.helpers import eval_tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2, Qwen: an end mark, then a line break that nobody need learn."""

TRIMMING = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
"""LLaMA 3: begins with BOS, trims what is said, its end mark is not the tokenizer's EOS."""

BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""No end mark at all."""

MOVING = (
    "{% for m in messages if m['role'] != 'system' %}"
    "{% if loop.last and m['role'] == 'user' and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + ' ' }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Writes the system's words before a question that comes last, as Mistral's does: earlier text changes."""

STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)
"""Refuses system messages, as Gemma's does."""


def make_tokenizer(template: str | None = CHATML, **special: str) -> Any:
    """The tests' byte-level tokenizer with ChatML's marks as tokens of their own."""
    tokenizer = eval_tiny.make_tokenizer(**special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer
