"""Keys of a record or a message beside those that are read: which are refused, because they change what is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexlora_ds.errors import UserError
from flexlora_ds.terminal.command import one_line

_MEDIA = "only text is read; leave such records out"
_TOOLS = "calls of tools are not read; leave such records out"
_PREFERENCE = "a preference is not learnt; leave the key out to learn the answer as it stands"
_REASONING = "put what is to be learnt into the content, in the marks that the template has for it"
_ANOTHER_LOSS = "weights are 0 (not in the loss) or 1"

_REFUSED_OF_RECORD = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call"), _TOOLS),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    "reasoning_content": _REASONING,
    **dict.fromkeys(("train_detail", "loss_scale", "loss_weight", "loss_mask"), _ANOTHER_LOSS),
    "chat_template_kwargs": "one template is used for all records; leave the key out",
}
_REFUSED_OF_MESSAGE = {
    **_REFUSED_OF_RECORD,
    # Of a record these are notes on how it was made.
    **dict.fromkeys(("reasoning", "thinking"), _REASONING),
}

_GOOD_OR_BAD = ("label", "kto_tag")
_SAYS_NOTHING = ("", "[]", "{}", "null", "none")  # as text, in some data sets
_SWITCHES = ("train", "loss")  # of a message: true or false
_MOST_LISTED = 8

_OF_LOSS = ("weight", *_SWITCHES)
_READ = frozenset(
    ("instruction", "input", "output", "answer", "system", "history", "messages", "conversations", *_OF_LOSS)
)
_READ_OF_MESSAGE = frozenset(("role", "content", "from", "value", *_OF_LOSS))


def is_given(said: Any) -> bool:
    """Whether the value of a key says anything: not null, NaN or false, nor empty, as such or as text."""
    if isinstance(said, str):
        return said.strip().lower() not in _SAYS_NOTHING
    if isinstance(said, list):
        return any(map(is_given, said))
    return bool(said) and said == said  # NaN, as some tools write null, is not equal to itself


def refuse_changed_meaning(value: Mapping[str, Any], place: str, *, of_message: bool = False) -> None:
    """Refuse the keys that say something else than 'learn this text', unless they say nothing.

    Raises:
        UserError: names the key.
    """
    for key, remedy in (_REFUSED_OF_MESSAGE if of_message else _REFUSED_OF_RECORD).items():
        if is_given(value.get(key)):
            raise UserError(f"{key!r} is given, which cannot be honoured", place, remedy)


def refuse_bad_answer(value: Mapping[str, Any], place: str) -> None:
    """Refuse a record or a message that says of itself that its answer is a bad one.

    Raises:
        UserError: names the key.
    """
    # Of a record of an instruction, or of a message, 0 may be the number of a class.
    has_turns = "messages" in value or "conversations" in value
    for key in _GOOD_OR_BAD:
        said = value.get(key)
        if said is False or (said == 0 and has_turns) or (key == "kto_tag" and said in ("false", "False")):
            raise UserError(
                f"{key!r} is false: a bad answer, which would be learnt", place, "leave the record out"
            )


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


def _is_measured(loss: Any) -> bool:
    """Whether the `loss` of a record is one that somebody measured."""
    return isinstance(loss, float) and loss not in (0, 1)


def require_learnt(value: Mapping[str, Any], place: str) -> None:
    """Refuse a record that is as a whole out of the loss. Raises UserError."""
    said = {key: given for key, given in value.items() if key != "loss" or not _is_measured(given)}
    if not is_learnt(said, place):
        raise UserError("the record is not to be learnt: nothing of it is in the loss", place, "leave it out")


class UnreadKeys:
    """The keys that were found and mean nothing here, each with the first record that has it."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}

    def add(self, value: Mapping[str, Any], number: int) -> None:
        """Remember the keys of record `number`, and of its messages, that nothing reads."""
        self._add(value, _READ, _REFUSED_OF_RECORD, number)
        if _is_measured(value.get("loss")):
            self._first.setdefault("loss", number)
        for turn in value.get("messages") or value.get("conversations") or ():
            self._add(turn, _READ_OF_MESSAGE, _REFUSED_OF_MESSAGE, number)

    def _add(
        self, value: Mapping[str, Any], read: frozenset[str], refused: Mapping[str, str], number: int
    ) -> None:
        for key in value.keys() - read - refused.keys():
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
