"""A view of stores against the stores themselves: zarr and our reader see the same numbers through it."""

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from gpuops.data.census import Census, count_chunks
from gpuops.data.reading.shard import ShardIndexes, layout
from gpuops.data.reading.transport import Files, open_transport
from gpuops.data.view import Stack, View
from gpuops.errors import InputError

PROTOTYPE = default_buffer_prototype()


def numbers(shape: tuple[int, ...], seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.uint16)


def decoded(array: Any, transport: Any) -> Any:
    """A whole array, chunk by chunk, the way that the reader goes."""
    place = layout(array)
    grid = [-(-size // chunk) for size, chunk in zip(array.shape, place.chunk, strict=True)]
    chunks = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, array.ndim)
    whole = np.zeros([n * c for n, c in zip(grid, place.chunk, strict=True)], array.dtype)
    spans = list(ShardIndexes(place, transport).find(chunks.astype(np.int64)))
    for chunk, data in zip(chunks.tolist(), transport.fetch(spans), strict=True):
        out = np.empty(place.chunk, array.dtype)
        place.decode(memoryview(data).cast("B"), out)
        whole[tuple(slice(i * c, (i + 1) * c) for i, c in zip(chunk, place.chunk, strict=True))] = out
    return whole[tuple(map(slice, array.shape))]


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `create_array` for parts of a stack: Zarr v2 and v3, shards or none, every spelling of keys."""
    ndim = draw(st.integers(1, 3))
    chunks = tuple(draw(st.integers(1, 4)) for _ in range(ndim))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(ndim))
    separator = draw(st.sampled_from("./"))
    if draw(st.booleans()):
        key = {"name": "v2", "separator": separator}
        return {"shape": shape, "chunks": chunks, "zarr_format": 2, "chunk_key_encoding": key}
    key = {"name": draw(st.sampled_from(["default", "v2"])), "separator": separator}
    times = draw(st.one_of(st.none(), st.integers(1, 3)))
    shards = None if times is None else tuple(times * c for c in chunks)
    return {"shape": shape, "chunks": chunks, "shards": shards, "zarr_format": 3, "chunk_key_encoding": key}


@settings(max_examples=40, deadline=None)
@given(arrays(), st.integers(1, 12), st.booleans())
def test_a_stack_is_its_parts(
    tmp_path_factory: pytest.TempPathFactory, form: dict[str, Any], count: int, shadow: bool
) -> None:
    folder = tmp_path_factory.mktemp("stack")
    paths = tuple(f"well/{i}" for i in range(count))
    for seed, path in enumerate(paths):
        part = zarr.create_array(
            folder, name=path, dtype="uint16", config={"write_empty_chunks": True}, fill_value=0, **form
        )
        part[...] = numbers(form["shape"], seed)
    where = paths[0] if shadow else "all"
    view = View({"": LocalStore(folder, read_only=True)}, {where: Stack(paths, "image")})
    stacked = zarr.open_array(view, path=where, mode="r")
    expected = np.stack([numbers(form["shape"], seed) for seed in range(count)])
    np.testing.assert_array_equal(stacked[...], expected)
    assert stacked.chunks == (1, *form["chunks"])
    transport = open_transport(view)
    assert isinstance(transport, Files)
    with closing(transport):
        np.testing.assert_array_equal(decoded(stacked, transport), expected)
    # The keys that it lists are those of its metadata and of its chunks, a row of them too.
    at = stacked.metadata.encode_chunk_key
    grid = [-(-s // c) for s, c in zip(stacked.shape, stacked.shards or stacked.chunks, strict=True)]
    chunks = {f"{where}/{at(place)}" for place in np.ndindex(*grid)}
    keys = listed(view.list_prefix(f"{where}/"))
    assert {key for key in keys if not key.endswith((".json", ".zarray", ".zattrs"))} == chunks
    row = f"{where}/{at((0,) * stacked.ndim).removesuffix('0')}"
    assert listed(view.list_prefix(row)) == {key for key in chunks if key.startswith(row)}
    assert count_chunks(stacked).absent == 0


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_stack_takes_the_place_of_an_axis_of_one(zarr_format: Any) -> None:
    store = MemoryStore()
    for seed in range(3):
        array = zarr.create_array(
            store, name=str(seed), shape=(1, 4, 5), chunks=(1, 2, 5), dtype="uint16", zarr_format=zarr_format
        )
        array[...] = numbers((1, 4, 5), seed)
    view = View({"": store}, {"all": Stack(("2", "0", "1"), "image", instead=True)})
    stacked = zarr.open_array(view, path="all", mode="r")
    np.testing.assert_array_equal(stacked[...], np.concatenate([numbers((1, 4, 5), seed) for seed in (2, 0, 1)]))
    assert count_chunks(stacked) == Census(6, 0, None)


def test_values_beside_members_hide_theirs(tmp_path: Path) -> None:
    zarr.create_array(tmp_path, name="x", data=numbers((4,), 0))
    store = LocalStore(tmp_path, read_only=True)
    inner = View({"": store}, beside={"x/c/0": b"ours", "y": b"more"})
    for view, lead in ((inner, ""), (View({"in": inner}), "in/")):
        assert view.local
        with closing(open_transport(view)) as transport:
            assert isinstance(transport, Files)
            assert [bytes(b) for b in transport.fetch([(f"{lead}x/c/0", 1, 3), (f"{lead}y", -2, None)])] == [
                b"ur",
                b"re",
            ]
        assert {f"{lead}x/c/0", f"{lead}x/zarr.json", f"{lead}y"} <= listed(view.list())
        assert asyncio.run(view.exists(f"{lead}y"))


def listed(keys: Any) -> set[str]:
    async def collected() -> list[str]:
        return [key async for key in keys]

    found = asyncio.run(collected())
    assert len(found) == len(set(found))
    return set(found)


def members(folder: Path) -> dict[str, Store]:
    """A v2 store on disk, a v3 store in memory, and an Icechunk repository."""
    import icechunk

    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(folder / "ice")))
    session = repository.writable_session("main")
    stores: dict[str, tuple[Store, Any]] = {
        "disk": (LocalStore(folder / "disk"), 2),
        "memory": (MemoryStore(), 3),
        "ice": (session.store, 3),
    }
    for seed, (store, zarr_format) in enumerate(stores.values()):
        root = zarr.open_group(store, mode="a", zarr_format=zarr_format)
        root.create_array("deep/x", data=numbers((4, 5), seed), chunks=(2, 5))
    session.commit("numbers")
    return {name: store for name, (store, _) in stores.items()}


def test_stores_under_names(tmp_path: Path) -> None:
    stores = members(tmp_path)
    view = View(stores)
    assert not view.local
    for seed, name in enumerate(stores):
        array = zarr.open_array(view, path=f"{name}/deep/x", mode="r")
        np.testing.assert_array_equal(array[...], numbers((4, 5), seed))
        with closing(open_transport(view)) as transport:
            np.testing.assert_array_equal(decoded(array, transport), numbers((4, 5), seed))
    assert isinstance(zarr.open_group(view, mode="r")["memory"], zarr.Group)

    every = listed(view.list())
    assert {f"{name}/{key}" for name, s in stores.items() for key in listed(s.list())} == every
    assert {k for k in every if k.startswith("disk/deep")} == listed(view.list_prefix("disk/deep"))
    assert listed(view.list_dir("")) == {"disk", "memory", "ice", "zarr.json"}
    assert listed(view.list_dir("memory/deep")) == {"x", "zarr.json"}


def test_ranges_go_to_each_member_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = members(tmp_path)
    calls: list[int] = []
    kind = type(stores["ice"])
    plain = kind.get_partial_values

    async def counted(self: Any, prototype: Any, key_ranges: Any) -> Any:
        calls.append(len(key_ranges := list(key_ranges)))
        return await plain(self, prototype, key_ranges)

    monkeypatch.setattr(kind, "get_partial_values", counted)
    keys = ["ice/deep/x/c/1/0", "memory/deep/x/c/0/0", "ice/deep/x/c/0/0", "zarr.json"]
    with closing(open_transport(View(stores))) as transport:
        got = transport.fetch([(key, 0, 2) for key in keys])
    for key, data in zip(keys[:3], got, strict=False):
        name, _, own = key.partition("/")
        alone = asyncio.run(stores[name].get(own, PROTOTYPE, RangeByteRequest(0, 2)))
        assert alone is not None
        assert bytes(data) == alone.to_bytes()
    assert calls == [2]


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    stores = members(tmp_path)
    view = View({"": stores["disk"]}, {"all": Stack(("deep/x",), "image")})
    for key in ("all/zarr.json", "all/1.0.0", "all/x.0.0", "all", "nowhere", "deep/x/9.9"):
        assert asyncio.run(view.get(key, PROTOTYPE)) is None
        assert not asyncio.run(view.exists(key))
    assert asyncio.run(view.exists("all/0.0.0"))
    assert view.local_path("all/0.1.0") == tmp_path / "disk" / "deep/x/1.0"
    assert view.local_path("all/.zarray") is None
    with pytest.raises(PermissionError, match="read-only"):
        asyncio.run(view.delete("all/0.0.0"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (4, 6)}, r"their shape is \[4, 5\] and \[4, 6\]"),
        ({"dtype": "uint8"}, "their data_type is uint16 and uint8"),
        ({"chunks": (1, 5)}, "their chunk_grid"),
        ({"compressors": None}, "their codecs"),
        ({"fill_value": 1}, "their fill_value is 0 and 1"),
        (None, "no array 'b' to stack with others: restore it"),
    ],
)
def test_parts_that_differ_are_named(changes: dict[str, Any] | None, words: str) -> None:
    store = MemoryStore()
    form: dict[str, Any] = {"shape": (4, 5), "dtype": "uint16", "chunks": (2, 5), "fill_value": 0}
    zarr.create_array(store, name="a", **form)
    if changes is not None:
        zarr.create_array(store, name="b", **(form | changes))
    with pytest.raises(InputError, match=words):
        View({"": store}, {"all": Stack(("a", "b"), "image")})
