"""A recipe's YAML as flat `key: value` lines: each value a word, a number, or a list of these.

Whatever YAML can do beyond that is refused where it stands: tags, nesting, and so aliases that multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from flexlora_ds.errors import UserError

_PLAIN = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp"))
_TEXT = _PLAIN[0]
_NO_FORM = "a recipe holds 'key: value' lines"


@dataclass(frozen=True)
class Entry:
    """One line of a recipe."""

    key: str
    place: str
    node: yaml.Node

    def value(self) -> Any:
        """The word, number or list. Raises UserError where it is something else."""
        if isinstance(self.node, yaml.SequenceNode) and self.node.tag.endswith(":seq"):
            return [_scalar(item, self) for item in self.node.value]
        return _scalar(self.node, self)


def read_entries(text: str, origin: str) -> list[Entry]:
    """The entries of a recipe in order, repeated keys included; `origin` names the file in messages.

    Raises:
        UserError: not YAML, or no mapping of texts; the message says where.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a version of YAML of thousands of digits
        raise UserError(_fault(error, origin)) from error
    except RecursionError:
        raise UserError("the recipe is nested too deeply", origin, "write 'key: value' lines") from None
    return list(_entries(root, origin)) if root is not None else []


def _entries(root: yaml.Node, origin: str) -> Iterator[Entry]:
    if not isinstance(root, yaml.MappingNode):
        raise UserError(_NO_FORM, origin, "this one has another form")
    for key, value in root.value:
        place = f"{origin}, line {_line(key)}"
        if key.tag not in (_TEXT, "tag:yaml.org,2002:merge"):
            raise UserError(_NO_FORM, place, "this one has another form")
        yield Entry(key.value, place, value)


def _scalar(node: yaml.Node, entry: Entry) -> Any:
    key, place = entry.key, entry.place
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{key} holds a nested value", place, "write one value, or a list of values")
    if node.tag not in _PLAIN:
        raise UserError(f"{key} has the YAML tag {node.tag}", place, "write the value without a tag")
    if node.tag.endswith(":timestamp"):  # a folder may be called 2026-01-31
        return node.value
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, LookupError):  # thousands of digits, or a tag that the text does not fit
        return node.value


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _fault(error: yaml.YAMLError | ValueError, origin: str) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or "it cannot be parsed"
    return f"not valid YAML: {problem} ({origin}{line}); correct it"
