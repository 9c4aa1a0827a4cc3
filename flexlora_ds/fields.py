"""What an option says on its own field: type, range, heading, and whether a resumed run may change it.

    rank: Annotated[int, Bounds(least=1), ADAPTER, OnResume.MUST_MATCH] = 8

The string below a field is its help text. Checks, messages and help texts are made from these, for
Python values and for text from recipes and command lines.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flexlora_ds.home import at_home

M = TypeVar("M")


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers; `above` and `below` exclude their ends, `least` and `most` include them."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether a number is inside (NaN never does)."""
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        low = (("of at least", self.least), ("above", self.above))
        high = (("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {_shown_end(end)}" for word, end in low + high if math.isfinite(end))


@dataclass(frozen=True)
class IsPath:
    """Of a text: it is a path, in which a leading `~` means the home directory, as in a shell."""


def _shown_end(end: float) -> str:
    return f"{end:,}" if isinstance(end, int) else f"{end:g}"


class OnResume(Enum):
    """Whether an option of a resumed run may differ from its checkpoint's."""

    MUST_MATCH = "the saved state, or its position in the data, would mean something else"
    IS_SAID = "it may differ, and the log says so"
    MAY_CHANGE = "where and how the run is computed; a model or data is compared by content"


@dataclass(frozen=True)
class Group:
    """A heading of help texts."""

    title: str


@dataclass(frozen=True)
class OptionSpec:
    """One option as parsers and help texts see it."""

    name: str
    kind: Any
    """The resolved annotation, `Bounds` included."""
    default: Any
    group: Group
    on_resume: OnResume
    owner: type
    """The class that declares it."""


def option_specs(options_class: type) -> tuple[OptionSpec, ...]:
    """The options of a dataclass: its fields that have a `Group`, in order."""
    if options_class not in _SPECS:
        _SPECS[options_class] = tuple(_specs_of(options_class))
    return _SPECS[options_class]


_SPECS: dict[type, tuple[OptionSpec, ...]] = {}


def _specs_of(options_class: type) -> Iterator[OptionSpec]:
    kinds = get_type_hints(options_class, include_extras=True)
    for field in dataclasses.fields(options_class):
        kind = kinds[field.name]
        group = _mark(kind, Group)
        if group is not None:
            owner = next(c for c in options_class.__mro__ if field.name in inspect.get_annotations(c))
            yield OptionSpec(
                field.name, kind, field.default, group, _mark(kind, OnResume) or OnResume.IS_SAID, owner
            )


def convert(value: object, kind: Any, *, text: bool) -> Any:
    """A value as the annotated type: whole numbers become floats, and lists tuples.

    Args:
        text: values may be words of YAML or of a command line, such as `8` for a number.

    Raises:
        ValueError: the value is none of the kinds allowed, or out of bounds (the message says which).
    """
    for member in _members(kind):
        plain, bounds = _bounded(member)
        converted = _as_member(value, plain, text)
        if converted is _MISFIT:
            continue
        if bounds is not None and isinstance(converted, (int, float)) and not bounds.holds(converted):
            raise ValueError("is out of range")
        return at_home(str(converted)) if _mark(member, IsPath) is not None else converted
    if isinstance(value, str) and not _is_text(value):
        raise ValueError("holds a character that no text file holds")
    raise ValueError("is not allowed")


def describe_kind(kind: Any, *, text: bool = True) -> str:
    """The values that an annotation allows, in words; a choice in quotes where it is no text but a Python value."""
    words: list[str] = []
    for member in _members(kind):
        plain, bounds = _bounded(member)
        if get_origin(plain) is Literal:
            words += [word if text else repr(word) for word in get_args(plain)]
        elif known := _names_of(plain):
            words.append(f"names of {', '.join(known)}, separated by commas")
        else:
            words.append(f"{_KIND_WORDS[plain]} {bounds or ''}".rstrip())
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def choices(kind: Any) -> tuple[str, ...]:
    """The words that an annotation allows."""
    plain = [_bounded(member)[0] for member in _members(kind)]
    words = (get_args(member) if get_origin(member) is Literal else _names_of(member) for member in plain)
    return tuple(word for group in words for word in group)


def _names_of(kind: Any) -> tuple[str, ...]:
    """The names that a list of chosen names may hold; empty for any other kind."""
    inner = get_args(kind)[0] if get_origin(kind) is tuple else None
    return get_args(inner) if get_origin(inner) is Literal else ()


def remedy(value: object, kind: Any, *, text: bool) -> str:
    """What to give instead of a value that `convert` refused; names the nearest word of a choice."""
    close = difflib.get_close_matches(_text(value).lower(), choices(kind), n=1, cutoff=0.5)
    hint = f"did you mean {close[0] if text else repr(close[0])}? " if close else ""
    return f"{hint}give {describe_kind(kind, text=text)}"


def show(value: object) -> str:
    """A value as one would type it after `--key`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else _text(value)


def quote(value: object, *, text: bool) -> str:
    """A value for a message, as typed or as Python writes it; of a long one the beginning and the end."""
    whole = show(value) if text else _text(value, repr)
    half = _LONGEST_QUOTE // 2
    return whole if len(whole) <= _LONGEST_QUOTE else f"{whole[:half]} … {whole[-half:]}"


def _text(value: object, write: Callable[[object], str] = str) -> str:
    """A value in words, also where Python cannot write it."""
    try:
        return write(value)
    except ValueError:
        return "a number of thousands of digits"
    except RecursionError:
        return "a value nested too deeply"


def nearest(word: str, known: Iterable[str], foreign: Mapping[str, str] | None = None) -> str | None:
    """The known key that a misspelt one most likely means; `foreign` says what others call our keys."""
    plain = word.replace("-", "_").lower()
    names = list(known)
    meant = (foreign or {}).get(plain)
    close = [meant] if meant in names else difflib.get_close_matches(plain, names, n=1, cutoff=0.5)
    return close[0] if close else None


_MISFIT = object()
_LONGEST_QUOTE = 200
"""Characters of a refused value in a message."""
_LARGEST_FLOAT = 3.4e38
"""Of what fp32 holds; NaN is not below it."""
_WORD_SIZE = Bounds(least=-(2**63), below=2**63)
"""The whole numbers that torch, numpy and files hold."""
_KIND_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[str, ...]: "names separated by commas",
    type(None): "none",
}


def _mark(kind: Any, of: type[M]) -> M | None:
    """The mark of a class that an annotation carries."""
    marks = kind.__metadata__ if get_origin(kind) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, of)), None)


def _members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, in order; anything else stands alone."""
    plain = kind.__origin__ if get_origin(kind) is Annotated else kind
    return get_args(plain) if get_origin(plain) in (Union, types.UnionType) else (kind,)


def _bounded(member: Any) -> tuple[Any, Bounds | None]:
    """The type under an `Annotated`, and the bounds it carries."""
    return (member.__origin__ if get_origin(member) is Annotated else member), _mark(member, Bounds)


def _as_member(value: object, kind: Any, text: bool) -> object:
    """The value as one non-union type, or `_MISFIT`."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else _MISFIT
    if kind is type(None):
        return None if value is None or (text and value == "none") else _MISFIT
    if kind is bool:
        return _as_bool(value, text)
    if kind in (int, float):
        return _as_number(value, kind, text)
    if kind is str:
        return value if isinstance(value, str) and _is_text(value) else _MISFIT
    names, known = _as_names(value, text), _names_of(kind)
    return _MISFIT if known and names is not _MISFIT and not set(names) <= set(known) else names


def _as_bool(value: object, text: bool) -> object:
    if text and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), _MISFIT)
    return value if isinstance(value, bool) else _MISFIT


def _as_number(value: object, kind: type[int] | type[float], text: bool) -> object:
    """YAML reads `3e-4`, which has no point, as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str) if text else (int, float)):
        return _MISFIT
    if kind is int and isinstance(value, float):
        return _MISFIT
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return _MISFIT
    fits = _WORD_SIZE.holds(number) if kind is int else abs(number) <= _LARGEST_FLOAT
    return number if fits else _MISFIT


def _as_names(value: object, text: bool) -> Any:
    """Names separated by commas in a text; in Python a single string is one name."""
    entries = (value.split(",") if text else [value]) if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
        return _MISFIT
    names = tuple(entry.strip() for entry in entries)
    return names if names and all(name and _is_text(name) for name in names) else _MISFIT


def _is_text(value: str) -> bool:
    """Whether files and file names can hold it: no null character, no half of a surrogate pair."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)
