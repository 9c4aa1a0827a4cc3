"""The ways to ask a model for its answer, named and versioned: an accuracy means nothing without its protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace

ANSWER_PREFIX = "the correct answer is "
"""What every training answer starts with (LLM-Adapters' Commonsense170K)."""

MAX_NEW_TOKENS = 32
"""As in LLM-Adapters' commonsense_evaluate.py."""


@dataclass(frozen=True)
class Protocol:
    """`version` rises with every change that can change a prediction; `beams` is 0 without generation."""

    name: str
    version: int
    beams: int
    summary: str

    @property
    def label(self) -> str:
        """Its name in results and tables, e.g. `generate v1`."""
        return f"{self.name} v{self.version}"

    @property
    def generates(self) -> bool:
        """Whether an answer is read from a text that the model writes."""
        return self.beams > 0


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "generate",
            1,
            1,
            f"greedy, at most {MAX_NEW_TOKENS} new tokens, ends at the first readable answer or end token; "
            "unanswered counts as wrong",
        ),
        Protocol(
            "generate-beam4",
            1,
            4,
            f"beam search of width 4, at most {MAX_NEW_TOKENS} new tokens: the reference's settings, "
            "with the attention mask that it leaves out",
        ),
        Protocol(
            "score",
            1,
            0,
            f"of the item's own answers, the '{ANSWER_PREFIX}<answer>' of highest log-likelihood",
        ),
    )
}

_CHAT_REVISIONS = 1
"""Changes of chats' prompts alone: since the first, what a template writes before an answer belongs to the prompt."""


def protocol_of(name: str, *, chats: bool) -> Protocol:
    """The protocol of this name, in its version for questions through a chat template, or for others only."""
    protocol = PROTOCOLS[name]
    return replace(protocol, version=protocol.version + _CHAT_REVISIONS) if chats else protocol
