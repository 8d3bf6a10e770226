"""A read-only Zarr store made of others: stores under names, and arrays stacked along a new first axis.

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
_V3, _V2, _V2_ATTRIBUTES = "zarr.json", ".zarray", ".zattrs"


@dataclass(frozen=True, slots=True)
class Stack:
    """Arrays of one form as one array, whose record i is the whole of the i-th."""

    paths: tuple[str, ...]
    """Where they are."""
    dim: str
    """Name of the new first dimension."""


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

    def key(self, rest: str) -> str | None:
        """Key of the part that holds a chunk of the stack; None if there is none."""
        number, _, own = rest.removeprefix(self.prefix).partition(self.separator)
        if not rest.startswith(self.prefix) or not number.isdecimal() or int(number) >= len(self.paths):
            return None
        return f"{self.paths[int(number)]}/{self.prefix}{own}"


class View(Store):
    """Stores under names, and stacks of their arrays."""

    def __init__(self, members: Mapping[str, Store], stacks: Mapping[str, Stack] | None = None) -> None:
        """Look at the parts of the stacks.

        Args:
            members: stores by name, which their keys begin with; a single one may have the name "".
            stacks: stacks by path, which hides what a member has there.

        Raises:
            InputError: the parts of a stack are not there or differ in shape, dtype, chunks or codecs.
        """
        super().__init__(read_only=True)
        self._is_open = True
        assert "" not in members or len(members) == 1, "a store without a name is the only one"
        self._members = dict(members)
        self._made = MemoryStore({} if "" in members else {_V3: _encoded(_GROUP)})
        """Metadata that no member has."""
        self._stacks: dict[str, _Stacked] = {}
        for path, stack in (stacks or {}).items():
            self._stacks[path] = sync(self._look_at(path, stack))

    @property
    def local(self) -> bool:
        """Whether all keys are files of this machine."""
        return all(isinstance(m, LocalStore) or (isinstance(m, View) and m.local) for m in self._members.values())

    def local_path(self, key: str) -> Path | None:
        """File of a key; None where there is none."""
        if (found := self._locate(key)) is None:
            return None
        member, own = found
        if isinstance(member, LocalStore):
            return Path(member.root) / own
        return member.local_path(own) if isinstance(member, View) else None

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
        """See Store; keys of the parts of a stack are listed where they are."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """See Store."""
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
        return isinstance(other, View) and (self._members, self._stacks) == (other._members, other._stacks)

    __hash__ = None  # type: ignore[assignment]

    def _locate(self, key: str) -> tuple[Store, str] | None:
        """The store that holds a key, and its key there."""
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
        if name in self._members:
            return self._members[name], own
        return (self._made, key) if key == _V3 else None

    async def _look_at(self, where: str, stack: Stack) -> _Stacked:
        """Make the metadata of a stack from that of its parts."""
        if not stack.paths:
            raise InputError("a stack needs at least one array")
        first, *others = await asyncio.gather(*(self._documents(path) for path in stack.paths))
        for path, other in zip(stack.paths[1:], others, strict=True):
            for what in sorted(_form(first).keys() | _form(other).keys(), key=lambda k: (k not in _FIRST, k)):
                ours, theirs = _form(first).get(what), _form(other).get(what)
                if ours != theirs:
                    raise InputError(
                        f"{stack.paths[0]} and {path} cannot be stacked: their {what} is {ours} and {theirs}: open "
                        "them one by one"
                    )
        documents, prefix, separator = _stacked(first, len(stack.paths), stack.dim, stack.paths[0])
        for key, document in documents.items():
            await self._made.set(f"{where}/{key}", _encoded(document))
        return _Stacked(stack.paths, prefix, separator, frozenset(documents))

    async def _documents(self, path: str) -> dict[str, dict[str, Any]]:
        """An array's metadata documents, by key behind its path."""
        names = (_V3, _V2, _V2_ATTRIBUTES)
        places = [self._member(f"{path}/{name}") for name in names]
        found = await asyncio.gather(*(store.get(key, _PROTOTYPE) for store, key in filter(None, places)))
        documents = {name: json.loads(data.to_bytes()) for name, data in zip(names, found, strict=False) if data}
        if _V2 not in documents and documents.get(_V3, {}).get("node_type") != "array":
            raise InputError(f"there is no array {path!r} to stack")
        return documents if _V3 not in documents else {_V3: documents[_V3]}


def _encoded(document: Mapping[str, Any]) -> Buffer:
    return _PROTOTYPE.buffer.from_bytes(json.dumps(document).encode())


def _form(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What parts of a stack must have in common."""
    document = documents.get(_V3) or documents[_V2]
    return {key: value for key, value in document.items() if key not in ("attributes", "dimension_names")}


def _stacked(
    documents: Mapping[str, dict[str, Any]], count: int, dim: str, path: str
) -> tuple[dict[str, dict[str, Any]], str, str]:
    """Metadata of `count` arrays like one, what their chunk keys begin with, and what separates the numbers."""
    if _V3 not in documents:
        array, attributes = documents[_V2], documents.get(_V2_ATTRIBUTES, {})
        made = array | {"shape": [count, *array["shape"]], "chunks": [1, *array["chunks"]]}
        if "_ARRAY_DIMENSIONS" in attributes:
            attributes = attributes | {"_ARRAY_DIMENSIONS": [dim, *attributes["_ARRAY_DIMENSIONS"]]}
        return {_V2: made, _V2_ATTRIBUTES: attributes}, "", str(array.get("dimension_separator", "."))
    array = documents[_V3]
    codecs = [_with_axis(codec, path) for codec in array["codecs"]]
    grid = array["chunk_grid"]["configuration"]
    names = array.get("dimension_names") or [None] * len(array["shape"])
    made = array | {
        "shape": [count, *array["shape"]],
        "chunk_grid": {"name": "regular", "configuration": grid | {"chunk_shape": [1, *grid["chunk_shape"]]}},
        "codecs": codecs,
        "dimension_names": [dim, *names],
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
