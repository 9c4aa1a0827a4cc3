"""Keys of a record or a message beside those that are read: which are refused, because they change what is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexlora_ds.command import one_line
from flexlora_ds.errors import UserError

_MEDIA = "only text is read; leave such records out"
_TOOLS = "calls of tools are not read; leave such records out"
_PREFERENCE = "a preference is not learnt; leave the key out to learn the answer as it stands"
_REASONING = "put what is to be learnt into the content, in the marks that the template has for it"
_ANOTHER_LOSS = "weights are 0 (not in the loss) or 1"

_REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call"), _TOOLS),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _REASONING),
    **dict.fromkeys(("train_detail", "loss_scale", "loss_weight"), _ANOTHER_LOSS),
    "chat_template_kwargs": "one template is used for all records; leave the key out",
}

_GOOD_OR_BAD = ("label", "kto_tag")
_SWITCHES = ("train", "loss")  # of a message: true or false
_MOST_LISTED = 8

_OF_LOSS = ("weight", *_SWITCHES)
_READ = frozenset(
    ("instruction", "input", "output", "answer", "system", "history", "messages", "conversations", *_OF_LOSS)
)
_READ_OF_MESSAGE = frozenset(("role", "content", "from", "value", *_OF_LOSS))


def refuse_changed_meaning(value: Mapping[str, Any], place: str) -> None:
    """Refuse the keys that say something else than 'learn this text', unless they are empty.

    Raises:
        UserError: names the key.
    """
    for key, remedy in _REFUSED.items():
        if value.get(key) not in (None, "", [], {}, False):
            raise UserError(f"{key!r} is given, which cannot be honoured", place, remedy)
    for key in _GOOD_OR_BAD:
        # A classifier's label 0 beside an instruction says nothing of the answer.
        if value.get(key) is False or (value.get(key) == 0 and "instruction" not in value):
            raise UserError(f"{key!r} is false: a bad answer, which would be learnt", place, "leave it out")


def is_learnt(value: Mapping[str, Any], place: str) -> bool:
    """Whether a message is in the loss: `weight` 0 or 1, `train` (or `loss`) true or false; true without them.

    Raises:
        UserError: another value, or two keys that contradict each other.
    """
    said = {key: value[key] for key in _OF_LOSS if value.get(key) is not None}
    for key, given in said.items():
        allowed = isinstance(given, bool) or (key == "weight" and given in (0, 1))
        if not allowed:
            wanted = "0 or 1" if key == "weight" else "true or false"
            raise UserError(f"{key!r} is {one_line(repr(given), 40)}, not {wanted}", place, _ANOTHER_LOSS)
    if len({bool(given) for given in said.values()}) > 1:
        raise UserError(f"{' and '.join(map(repr, said))} contradict each other", place, "leave one out")
    return all(said.values())


def require_learnt(value: Mapping[str, Any], place: str) -> None:
    """Refuse a record that is as a whole out of the loss. Raises UserError."""
    if not is_learnt(value, place):
        raise UserError("the record is not to be learnt: nothing of it is in the loss", place, "leave it out")


class UnreadKeys:
    """The keys that were found and mean nothing here, each with the first record that has it."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}

    def add(self, value: Mapping[str, Any], number: int) -> None:
        """Remember the keys of record `number`, and of its messages, that nothing reads."""
        self._add(value, _READ, number)
        for turn in value.get("messages") or value.get("conversations") or ():
            self._add(turn, _READ_OF_MESSAGE, number)

    def _add(self, value: Mapping[str, Any], read: frozenset[str], number: int) -> None:
        for key in value.keys() - read - _REFUSED.keys():
            self._first.setdefault(key, number)

    def note(self, path: object) -> str | None:
        """One line that names them; None where all keys are read."""
        if not self._first:
            return None
        names = sorted(self._first)
        shown = ", ".join(
            f"{one_line(name, 60)} (record {self._first[name]})" for name in names[:_MOST_LISTED]
        )
        more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
        return f"keys of {path} that are not read: {shown}{more}"
