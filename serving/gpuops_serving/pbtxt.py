"""Where things stand in a config.pbtxt: protobuf's own parser forgets lines, and stops at the first unknown field.

`read` takes text that protobuf has parsed (unknown fields allowed) and returns its fields with their places, in their
order. Lists of messages, `input [ { ... }, { ... } ]`, become one field each, as if they were written one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<sign>[{}<>\[\]:,;])
      | (?P<word>[^\s{}<>\[\]:,;\#"']+)""",
    re.VERBOSE | re.DOTALL,
)
_CLOSING = {"{": "}", "<": ">"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field as it is written."""

    name: str
    """Its name."""
    line: int
    """Line of its name, or of its value in a list of messages; counted from 1."""
    column: int
    """Column there, counted from 1."""
    value: str
    """A single value as it is written, strings without their quotes; empty for a message or a list."""
    fields: tuple[Field, ...] = ()
    """What is in a message."""

    @property
    def place(self) -> str:
        """`line:column`."""
        return f"{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    string: bool
    line: int
    column: int


def read(text: str) -> tuple[Field, ...]:
    """The fields of a text.

    Raises:
        ValueError: it is not in protobuf's text format.
    """
    return tuple(_Reader(list(_tokens(text))).fields(""))


def find(fields: Sequence[Field], *path: str | int) -> Field | None:
    """The field at a path of names, each followed by which one of that name it is (the first if left out), or None.

    `find(fields, "input", 1, "dims")` is the second input's `dims`. If the path leads beyond what is written, its last
    field that is there is found.
    """
    found: Field | None = None
    steps = list(path)
    while steps:
        name = steps.pop(0)
        place = int(steps.pop(0)) if steps and isinstance(steps[0], int) else 0
        named = [field for field in fields if field.name == name]
        if place >= len(named):
            return found
        found = named[place]
        fields = found.fields
    return found


def unknown(fields: Sequence[Field], descriptor: Any) -> Iterator[tuple[str, Field]]:
    """(full name, field) of each field that a message's descriptor does not have, or not as a message."""
    for field in fields:
        known = descriptor.fields_by_name.get(field.name)
        if known is None:
            yield f"{descriptor.full_name}.{field.name}", field
        elif known.message_type is not None:
            yield from unknown(field.fields, known.message_type)


def present(fields: Sequence[Field], descriptor: Any) -> Iterator[tuple[str, Field]]:
    """(full name, field) of each field that a message's descriptor has."""
    for field in fields:
        known = descriptor.fields_by_name.get(field.name)
        if known is not None:
            yield f"{descriptor.full_name}.{field.name}", field
            if known.message_type is not None:
                yield from present(field.fields, known.message_type)


def _tokens(text: str) -> Iterator[_Token]:
    place, line, begin = 0, 1, 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ValueError(f"line {line}: a string without its end")
        if found.lastgroup != "skip":
            yield _Token(found[0], found.lastgroup == "string", line, place - begin + 1)
        if breaks := found[0].count("\n"):
            line += breaks
            begin = place + found[0].rindex("\n") + 1
        place = found.end()


class _Reader:
    """Descends through the tokens."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens, self.place = tokens, 0

    def next(self) -> _Token:
        if self.place >= len(self.tokens):
            raise ValueError("the text ends within a field")
        self.place += 1
        return self.tokens[self.place - 1]

    def peek(self) -> str:
        """The next token's text, empty at the end; of a string only its quote, which no sign is."""
        if self.place >= len(self.tokens):
            return ""
        token = self.tokens[self.place]
        return '"' if token.string else token.text

    def fields(self, closing: str) -> Iterator[Field]:
        while self.peek() != closing:
            yield from self.field()
        if closing:
            self.next()

    def field(self) -> Iterator[Field]:
        name = self.next()
        if name.string or name.text in _CLOSING or name.text in "}>[]:,;":
            raise ValueError(f"line {name.line}: {name.text!r} is no field")
        if self.peek() == ":":
            self.next()
        if self.peek() == "[":
            self.next()
            yield from self.items(name)
        else:
            yield self.value(name, name)
        while self.peek() in (",", ";"):
            self.next()

    def items(self, name: _Token) -> Iterator[Field]:
        """A list: one field for each message in it, or a single one for its plain values."""
        messages = 0
        while self.peek() != "]":
            if self.peek() in _CLOSING:
                messages += 1
                yield self.value(name, self.tokens[self.place])
            else:
                self.next()
            if self.peek() == ",":
                self.next()
        self.next()
        if not messages:
            yield Field(name.text, name.line, name.column, "")

    def value(self, name: _Token, at: _Token) -> Field:
        token = self.next()
        if not token.string and (closing := _CLOSING.get(token.text)):
            return Field(name.text, at.line, at.column, "", tuple(self.fields(closing)))
        if not token.string and token.text in "}>[]:,;":
            raise ValueError(f"line {token.line}: {name.text!r} has no value")
        text = token.text[1:-1] if token.string else token.text
        while token.string and self.peek() == '"':  # strings side by side are one
            text += self.next().text[1:-1]
        return Field(name.text, at.line, at.column, text)
