"""A read-only Zarr store made of others: stores under names, stacks of their arrays, small arrays beside them.

Nothing is copied: keys are translated, and the metadata of a stacked array is made from that of its parts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from gpuops.errors import InputError

_PROTOTYPE = default_buffer_prototype()
_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_FIRST = ("shape", "data_type", "dtype")
"""What is compared before the rest, which follows from it."""
_V3, _V2, _V2_ATTRIBUTES = _METADATA = "zarr.json", ".zarray", ".zattrs"


@dataclass(frozen=True, slots=True)
class Stack:
    """Arrays of one form as one array, whose record i is the whole of the i-th."""

    paths: tuple[str, ...]
    """Where they are."""
    dim: str
    """Name of the first dimension."""
    instead: bool = False
    """Whether it takes the place of the arrays' own first axis, of length 1, instead of lying before it."""


@dataclass(frozen=True, slots=True)
class _Stacked:
    """A stack whose parts were looked at."""

    paths: tuple[str, ...]
    """Where its parts are."""
    prefix: str
    """What chunk keys begin with behind the path: "c/" or "c." in Zarr v3 as a rule, "" in v2."""
    separator: str
    """What lies between the numbers of a chunk key."""
    documents: frozenset[str]
    """Keys of its metadata behind the path."""
    instead: bool
    """See Stack."""

    def chunks(self, number: int) -> str:
        """What the keys of a part's chunks begin with."""
        own = f"0{self.separator}" if self.instead else ""
        return f"{self.paths[number]}/{self.prefix}{own}"

    def key(self, rest: str) -> str | None:
        """Key of the part that holds a chunk of the stack; None if there is none."""
        number, _, own = rest.removeprefix(self.prefix).partition(self.separator)
        if not rest.startswith(self.prefix) or not number.isdecimal() or int(number) >= len(self.paths):
            return None
        return self.chunks(int(number)) + own


class View(Store):
    """Stores under names, stacks of their arrays, and values beside them."""

    def __init__(
        self,
        members: Mapping[str, Store],
        stacks: Mapping[str, Stack] | None = None,
        beside: Mapping[str, bytes] | None = None,
    ) -> None:
        """Look at the parts of the stacks.

        Args:
            members: stores by name, which their keys begin with; a single one may have the name "".
            stacks: stacks by path, which hides what a member has there.
            beside: values by key that hide those of a member, for small arrays that no member has.

        Raises:
            InputError: the parts of a stack are not there or differ in shape, dtype, chunks or codecs.
        """
        super().__init__(read_only=True)
        self._is_open = True
        assert "" not in members or len(members) == 1, "a store without a name is the only one"
        self._members = dict(members)
        self._beside = dict(beside or {})
        if "" not in members:
            self._beside.setdefault(_V3, json.dumps(_GROUP).encode())
        self._made = MemoryStore({key: _PROTOTYPE.buffer.from_bytes(value) for key, value in self._beside.items()})
        """What no member has: the values beside them, and metadata of stacks."""
        self._stacks: dict[str, _Stacked] = {}
        for path, stack in (stacks or {}).items():
            self._stacks[path] = sync(self._look_at(path, stack))

    @property
    def members(self) -> Mapping[str, Store]:
        """The stores by name."""
        return self._members

    @property
    def local(self) -> bool:
        """Whether the keys of all members are files of this machine."""
        return all(isinstance(m, LocalStore) or (isinstance(m, View) and m.local) for m in self._members.values())

    def local_path(self, key: str) -> Path | None:
        """File of a key; None where there is none."""
        if (found := self._locate(key)) is None:
            return None
        member, own = found
        if isinstance(member, LocalStore):
            return Path(member.root) / own
        return member.local_path(own) if isinstance(member, View) else None

    def beside(self, key: str) -> bytes | None:
        """The value of a key that lies beside the members, of this view or of one that is a member; else None."""
        if key in self._beside:
            return self._beside[key]
        member, own = self._locate(key) or (None, "")
        return member.beside(own) if isinstance(member, View) else None

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See Store."""
        found = self._locate(key)
        return None if found is None else await found[0].get(found[1], prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """See Store; one call to each member."""
        wanted = list(key_ranges)
        answers: list[Buffer | None] = [None] * len(wanted)
        by_member: dict[int, tuple[Store, list[int], list[tuple[str, ByteRequest | None]]]] = {}
        for place, (key, byte_range) in enumerate(wanted):
            if (found := self._locate(key)) is not None:
                member, own = found
                _, places, ranges = by_member.setdefault(id(member), (member, [], []))
                places.append(place)
                ranges.append((own, byte_range))
        got = await asyncio.gather(*(m.get_partial_values(prototype, ranges) for m, _, ranges in by_member.values()))
        for (_, places, _), buffers in zip(by_member.values(), got, strict=True):
            for place, buffer in zip(places, buffers, strict=True):
                answers[place] = buffer
        return answers

    async def exists(self, key: str) -> bool:
        """See Store."""
        found = self._locate(key)
        return found is not None and await found[0].exists(found[1])

    async def list(self) -> AsyncIterator[str]:
        """See Store; keys of the parts of a stack are listed where they are, too."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """See Store."""
        for key in self._beside:
            if key.startswith(prefix) and (key != _V3 or "" in self._members):
                yield key
        for path, stacked in self._stacks.items():
            for shown in (f"{path}/{document}" for document in stacked.documents):
                if shown.startswith(prefix):
                    yield shown
            for number in range(len(stacked.paths)):
                shown, at = f"{path}/{stacked.prefix}{number}{stacked.separator}", stacked.chunks(number)
                if shown.startswith(prefix) or prefix.startswith(shown):
                    async for key in self._members_keys(at[: at.rindex("/") + 1]):
                        if key.startswith(at + prefix[len(shown) :]) and key.rpartition("/")[2] not in _METADATA:
                            yield shown + key[len(at) :]
        async for key in self._members_keys(prefix):
            if key not in self._beside and not any(key.startswith(f"{path}/") for path in self._stacks):
                yield key

    async def _members_keys(self, prefix: str) -> AsyncIterator[str]:
        for name, member in self._members.items():
            lead = f"{name}/" if name else ""
            if prefix.startswith(lead) or lead.startswith(prefix):
                async for key in member.list_prefix(prefix.removeprefix(lead) if prefix.startswith(lead) else ""):
                    yield lead + key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """See Store."""
        if "" in self._members:
            async for key in self._members[""].list_dir(prefix):
                yield key
        elif not prefix.strip("/"):
            for name in (*self._members, _V3):
                yield name
        else:
            name, _, own = prefix.strip("/").partition("/")
            if name in self._members:
                async for key in self._members[name].list_dir(own):
                    yield key

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    async def set(self, key: str, value: Buffer) -> NoReturn:
        """Refused: a view is for reading."""
        raise PermissionError(f"{key}: a view of other stores is read-only")

    async def delete(self, key: str) -> NoReturn:
        """Refused: a view is for reading."""
        raise PermissionError(f"{key}: a view of other stores is read-only")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, View):
            return NotImplemented
        parts = ((view._members, view._stacks, view._beside) for view in (self, other))
        return next(parts) == next(parts)

    __hash__ = None  # type: ignore[assignment]

    def _locate(self, key: str) -> tuple[Store, str] | None:
        """The store that holds a key, and its key there."""
        if key in self._beside:
            return self._made, key
        for path, stacked in self._stacks.items():
            if key.startswith(path) and key[len(path) : len(path) + 1] == "/":
                rest = key[len(path) + 1 :]
                if rest in stacked.documents:
                    return self._made, key
                own = stacked.key(rest)
                return None if own is None else self._member(own)
        return self._member(key)

    def _member(self, key: str) -> tuple[Store, str] | None:
        if "" in self._members:
            return self._members[""], key
        name, _, own = key.partition("/")
        return (self._members[name], own) if name in self._members else None

    async def _look_at(self, where: str, stack: Stack) -> _Stacked:
        """Make the metadata of a stack from that of its parts."""
        if not stack.paths:
            raise InputError("a stack needs at least one array")
        first = await self._documents(stack.paths[0], _METADATA)
        form = (_V3 if _V3 in first else _V2,)
        others = await asyncio.gather(*(self._documents(path, form) for path in stack.paths[1:]))
        for path, other in zip(stack.paths[1:], others, strict=True):
            for what in sorted(_form(first).keys() | _form(other).keys(), key=lambda k: (k not in _FIRST, k)):
                ours, theirs = _form(first).get(what), _form(other).get(what)
                if ours != theirs:
                    raise InputError(
                        f"{stack.paths[0]} and {path} cannot be stacked: their {what} is {ours} and {theirs}: open "
                        "them one by one"
                    )
        documents, prefix, separator = _stacked(first, stack)
        for key, document in documents.items():
            await self._made.set(f"{where}/{key}", _encoded(document))
        return _Stacked(stack.paths, prefix, separator, frozenset(documents), stack.instead)

    async def _documents(self, path: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Those of an array's metadata documents that are there, by key behind its path."""
        places = [self._member(f"{path}/{name}") for name in names]
        found = await asyncio.gather(*(store.get(key, _PROTOTYPE) for store, key in filter(None, places)))
        documents = {name: json.loads(data.to_bytes()) for name, data in zip(names, found, strict=False) if data}
        if _V2 not in documents and documents.get(_V3, {}).get("node_type") != "array":
            raise InputError(f"there is no array {path!r} to stack with others: restore it, or open them one by one")
        return documents if _V3 not in documents else {_V3: documents[_V3]}


def _encoded(document: Mapping[str, Any]) -> Buffer:
    return _PROTOTYPE.buffer.from_bytes(json.dumps(document).encode())


def _form(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What parts of a stack must have in common."""
    document = documents.get(_V3) or documents[_V2]
    return {key: value for key, value in document.items() if key not in ("attributes", "dimension_names")}


def _stacked(documents: Mapping[str, dict[str, Any]], stack: Stack) -> tuple[dict[str, dict[str, Any]], str, str]:
    """Metadata of a stack of arrays like one, what chunk keys begin with, and what separates their numbers."""
    count, dim, path, own = len(stack.paths), stack.dim, stack.paths[0], 1 if stack.instead else 0
    if _V3 not in documents:
        array, attributes = documents[_V2], documents.get(_V2_ATTRIBUTES, {})
        made = array | {"shape": [count, *array["shape"][own:]], "chunks": [1, *array["chunks"][own:]]}
        if "_ARRAY_DIMENSIONS" in attributes:
            attributes = attributes | {"_ARRAY_DIMENSIONS": [dim, *attributes["_ARRAY_DIMENSIONS"][own:]]}
        return {_V2: made, _V2_ATTRIBUTES: attributes}, "", str(array.get("dimension_separator", "."))
    array = documents[_V3]
    codecs = [codec if stack.instead else _with_axis(codec, path) for codec in array["codecs"]]
    grid = array["chunk_grid"]["configuration"]
    names = array.get("dimension_names") or [None] * len(array["shape"])
    made = array | {
        "shape": [count, *array["shape"][own:]],
        "chunk_grid": {"name": "regular", "configuration": grid | {"chunk_shape": [1, *grid["chunk_shape"][own:]]}},
        "codecs": codecs,
        "dimension_names": [dim, *names[own:]],
    }
    encoding = array["chunk_key_encoding"]
    plain = encoding["name"] == "v2"
    separator = encoding.get("configuration", {}).get("separator", "." if plain else "/")
    return {_V3: made}, "" if plain else f"c{separator}", separator


def _with_axis(codec: dict[str, Any], path: str) -> dict[str, Any]:
    """A codec of an array with one more axis in front."""
    if codec["name"] == "transpose":
        raise InputError(f"{path} is stored transposed, which cannot be stacked: re-ingest it")
    if codec["name"] != "sharding_indexed":
        return codec
    told = codec["configuration"]
    inner = [_with_axis(nested, path) for nested in told["codecs"]]
    return codec | {"configuration": told | {"chunk_shape": [1, *told["chunk_shape"]], "codecs": inner}}
