"""Repositories in object stores: whole, checked, and one winner where two publish at once."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import obstore.store
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_repository import deaths, hidden, prepared, tree
from tiny_bundle import golden, make_bundle

from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.lineage.version import canonical_json
from gpuops.signing import keygen, sign
from gpuops_serving import objects as room
from gpuops_serving.client import Client
from gpuops_serving.config import Options
from gpuops_serving.objects import current, fetch_repository, publish_repository, repoint
from gpuops_serving.repository import deploy, served_versions
from gpuops_serving.server import TritonServer

S3 = Path(__file__).parents[1] / "gpuops" / "data" / "object_store.py"


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """An S3-compatible endpoint on loopback."""
    spec = importlib.util.spec_from_file_location("object_store", S3)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["object_store"] = module
    spec.loader.exec_module(module)
    with module.running_s3() as running:
        yield running


@pytest.fixture(params=["memory", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An empty place in each kind of store."""
    if request.param == "memory":
        return obstore.store.MemoryStore()
    if request.param == "file":
        return f"file://{tmp_path / 'store'}"
    return f"{request.getfixturevalue('s3').bucket()}/models/here"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    deploy(make_bundle(tmp_path / "one"), tmp_path / "models")
    return tmp_path / "models"


def opened(place: Any) -> Any:
    return place if not isinstance(place, str) else obstore.store.from_url(place)


def names(place: Any) -> list[str]:
    return sorted(entry["path"] for chunk in obstore.list(opened(place)) for entry in chunk)


def test_what_is_published_is_fetched_byte_for_byte(place: Any, repository: Path, tmp_path: Path) -> None:
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64, gain=0.25), repository)
    deploy(make_bundle(tmp_path / "warm"), repository, name="warm", options=Options("onnxruntime"))
    (repository / "tiny" / "1" / "__pycache__").mkdir(exist_ok=True)
    (repository / "tiny" / ".config.pbtxt-x").write_text("half of a")
    made = publish_repository(repository, place)
    assert (made.number, made.models) == (1, {"tiny": {"1": "1" * 64, "2": "2" * 64}, "warm": {"1": "1" * 64}})
    assert current(place) == made
    assert fetch_repository(place, tmp_path / "fetched") == made
    wanted = {name: content for name, content in tree(repository).items() if "config.pbtxt-" not in name}
    assert tree(tmp_path / "fetched") == wanted
    assert [found.version for found in served_versions(tmp_path / "fetched")] == [1, 2, 1]
    assert hidden(tmp_path / "fetched") == []


def test_a_snapshot_is_a_repository_of_its_own_and_never_changes(repository: Path, tmp_path: Path) -> None:
    place = obstore.store.MemoryStore()
    first = publish_repository(repository, place)
    before = {name: bytes(obstore.get(place, name).bytes()) for name in names(place)}
    prefix = f"snapshots/{first.snapshot}/"
    inside = {name.removeprefix(prefix) for name in before if name.startswith(prefix)}
    assert inside == set(tree(repository))  # what a server that reads object stores is given
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64), repository)
    second = publish_repository(repository, place)
    assert (second.number, second.snapshot != first.snapshot) == (2, True)
    assert {name: bytes(obstore.get(place, name).bytes()) for name in before} == before


def test_publishing_the_same_again_writes_nothing(place: Any, repository: Path) -> None:
    first = publish_repository(repository, place)
    before = names(place)
    assert publish_repository(repository, place, expected=1) == first
    assert names(place) == before


def test_versions_that_are_not_served_are_left_at_home(repository: Path, tmp_path: Path) -> None:
    place = obstore.store.MemoryStore()
    for number in (2, 3):
        deploy(make_bundle(tmp_path / str(number), version_id=f"{number}" * 64), repository)
    made = publish_repository(repository, place)
    assert made.models == {"tiny": {"2": "2" * 64, "3": "3" * 64}}
    assert not [name for name in names(place) if "/tiny/1/" in name]


def test_going_back_is_one_more_publication(place: Any, repository: Path, tmp_path: Path) -> None:
    first = publish_repository(repository, place)
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64), repository)
    publish_repository(repository, place)
    back = repoint(place, 1, expected=2)
    assert (back.number, back.snapshot, back.models) == (3, first.snapshot, first.models)
    assert fetch_repository(place, tmp_path / "fetched") == back
    assert [found.version for found in served_versions(tmp_path / "fetched")] == [1]
    assert fetch_repository(place, tmp_path / "second", number=2).number == 2
    for number in (0, 9):
        with pytest.raises(InputError, match="no publication"):
            repoint(place, number)
    with pytest.raises(InputError, match="at publication 3, not 2"):
        repoint(place, 1, expected=2)


def test_of_two_who_publish_at_once_one_wins_and_the_other_is_told(place: Any, tmp_path: Path) -> None:
    repositories = []
    for number in (1, 2):
        deploy(make_bundle(tmp_path / f"b{number}", version_id=f"{number}" * 64), tmp_path / f"r{number}")
        repositories.append(tmp_path / f"r{number}")
    both = threading.Barrier(2, timeout=60)
    results: dict[int, Any] = {}

    def publish(place_of: int) -> None:
        seen = []

        def say(_: str) -> None:
            if not seen:  # both have looked at the pointer, neither has written one
                seen.append(both.wait())

        try:
            results[place_of] = publish_repository(repositories[place_of], place, say=say)
        except InputError as error:
            results[place_of] = error

    threads = [threading.Thread(target=publish, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [found for found in results.values() if not isinstance(found, Exception)]
    (loser,) = [found for found in results.values() if isinstance(found, Exception)]
    assert "someone else published" in str(loser)
    assert current(place) == winner
    assert winner.number == 1


def test_who_expected_something_else_uploads_nothing(place: Any, repository: Path) -> None:
    with pytest.raises(InputError, match="at publication 0, not 1: fetch it, look, and publish again"):
        publish_repository(repository, place, expected=1)
    assert (names(place) if not isinstance(place, str) or "file" not in place else []) == []
    publish_repository(repository, place, expected=0)


def damage(place: Any, name: str, content: bytes | None) -> None:
    if content is None:
        obstore.delete(opened(place), name)
    else:
        obstore.put(opened(place), name, content)


@pytest.mark.parametrize(
    ("part", "says"), [("model.onnx", "differs from its listing"), ("config.pbtxt", "differs from its listing")]
)
@pytest.mark.parametrize("how", ["flipped", "shorter", "gone"])
def test_an_object_that_is_not_as_it_was_listed_is_refused(
    place: Any, repository: Path, tmp_path: Path, part: str, says: str, how: str
) -> None:
    publish_repository(repository, place)
    (name,) = [name for name in names(place) if name.endswith(part)]
    content = bytearray(obstore.get(opened(place), name).bytes())
    content[len(content) // 2] ^= 1
    damage(place, name, {"flipped": bytes(content), "shorter": bytes(content[:-1]), "gone": None}[how])
    with pytest.raises(IntegrityError, match="is missing: publish" if how == "gone" else says):
        fetch_repository(place, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    assert hidden(tmp_path) == []


def test_a_listing_that_is_not_what_its_name_says_is_refused(repository: Path, tmp_path: Path) -> None:
    place = obstore.store.MemoryStore()
    made = publish_repository(repository, place)
    listing = json.loads(bytes(obstore.get(place, f"listings/{made.snapshot}.json").bytes()))
    listing["files"].popitem()
    damage(place, f"listings/{made.snapshot}.json", canonical_json(listing))
    with pytest.raises(IntegrityError, match=r"listing of snapshot \w+ is missing or changed"):
        fetch_repository(place, tmp_path / "fetched")


@given(st.sampled_from(["../evil", "/etc/evil", "a/../../evil", "", "a/.."]))
def test_a_listing_cannot_write_outside_its_folder(path: str) -> None:
    import hashlib

    text = canonical_json({"schema": 1, "files": {path: {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}}})
    store = obstore.store.MemoryStore()
    snapshot = hashlib.sha256(text).hexdigest()
    obstore.put(store, f"listings/{snapshot}.json", text)
    with pytest.raises(IntegrityError, match="leads elsewhere"):
        room._listing(room._open(store), snapshot)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"schema": 1}', b'{"schema": 1, "number": 7, "snapshot": "x", "models": {}}']
)
def test_a_pointer_that_is_none_is_refused(content: bytes) -> None:
    store = obstore.store.MemoryStore()
    obstore.put(store, "pointers/00000001.json", content)
    with pytest.raises(IntegrityError, match="publication 1 is not one of ours"):
        current(store)
    obstore.put(store, "pointers/00000002.json", b'{"schema": 2}')
    with pytest.raises(InputError, match="of a newer gpuops"):
        current(store)
    obstore.put(store, "pointers/readme.txt", b"")
    obstore.delete(store, ["pointers/00000001.json", "pointers/00000002.json"])
    assert current(store) is None


def test_a_repository_that_is_damaged_at_home_is_not_published(repository: Path) -> None:
    place = obstore.store.MemoryStore()
    (repository / "tiny" / "1" / "model.onnx").write_bytes(b"broken")
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        publish_repository(repository, place)
    assert names(place) == []


def test_only_signed_versions_are_published_or_fetched_where_a_key_is_trusted(repository: Path, tmp_path: Path) -> None:
    place = obstore.store.MemoryStore()
    keygen(tmp_path / "key", tmp_path / "key.pub")
    keys = [tmp_path / "key.pub"]
    publish_repository(repository, place)
    with pytest.raises(IntegrityError, match="not signed"):
        publish_repository(repository, place, keys=keys)
    with pytest.raises(IntegrityError, match="not signed"):
        fetch_repository(place, tmp_path / "fetched", keys=keys)
    sign(tmp_path / "one", tmp_path / "key")
    deploy(tmp_path / "one", repository, keys=keys)
    publish_repository(repository, place, keys=keys)
    fetch_repository(place, tmp_path / "fetched", keys=keys)
    assert served_versions(tmp_path / "fetched", keys=keys)


def test_a_folder_that_is_there_is_replaced_only_on_request(repository: Path, tmp_path: Path) -> None:
    place = obstore.store.MemoryStore()
    publish_repository(repository, place)
    fetch_repository(place, tmp_path / "fetched")
    with pytest.raises(InputError, match="exists"):
        fetch_repository(place, tmp_path / "fetched")
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64), repository)
    publish_repository(repository, place)
    fetch_repository(place, tmp_path / "fetched", overwrite=True)
    assert [found.version for found in served_versions(tmp_path / "fetched")] == [1, 2]


@pytest.mark.parametrize(
    ("store", "kind", "says"),
    [
        ("", InputError, "'' is no object store"),
        ("file://", InputError, "names no folder"),
        ("file:///", InputError, "names no folder"),
        ("file:///proc/gpuops", UnavailableError, "cannot be used"),
    ],
)
def test_a_place_in_which_nothing_can_be_published_is_named(
    repository: Path, store: str, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        publish_repository(repository, store)
    assert "\n" not in str(caught.value)


def test_an_empty_path_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = obstore.store.MemoryStore()
    for call in (lambda: publish_repository("", store), lambda: fetch_repository(store, "", overwrite=True)):
        with pytest.raises(InputError, match="is empty"):
            call()


def test_a_stray_pointer_is_named_with_what_helps(repository: Path) -> None:
    store = obstore.store.MemoryStore()
    publish_repository(repository, store)
    last = {"schema": 1, "number": 99999999, "snapshot": "0" * 64, "models": {}}
    for content in (b"stray", b"[" * 100_000, json.dumps(last).encode()):
        obstore.put(store, "pointers/99999999.json", content)
        with pytest.raises((InputError, IntegrityError), match=r"remove pointers/99999999\.json"):
            publish_repository(repository, store)
    obstore.delete(store, "pointers/99999999.json")
    assert publish_repository(repository, store).number == 1


def test_a_place_that_cannot_be_used_is_named(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="'ftp://x' is no object store"):
        publish_repository(repository, "ftp://x")
    with pytest.raises(InputError, match="nowhere is no folder, so nothing was published there"):
        current(f"file://{tmp_path / 'nowhere'}")
    assert not (tmp_path / "nowhere").exists()  # looking makes no folder
    with pytest.raises(InputError, match="is not a model repository"):
        publish_repository(tmp_path / "nowhere", obstore.store.MemoryStore())
    assert current(obstore.store.MemoryStore()) is None
    with pytest.raises(InputError, match="has no publication"):
        fetch_repository(obstore.store.MemoryStore(), tmp_path / "fetched")
    closed = obstore.store.HTTPStore.from_url("http://127.0.0.1:9/x", retry_config={"max_retries": 0})
    with pytest.raises(UnavailableError, match=r"cannot be used \(.*see its address, your credentials"):
        fetch_repository(closed, tmp_path / "fetched", number=1)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UnavailableError, match=r"gpuops\[data\]"):
        current("memory:///")


def test_importing_it_imports_no_obstore() -> None:
    code = "import sys, gpuops_serving.objects; assert 'obstore' not in sys.modules"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'serving'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "torn", "full"])
def test_a_publication_that_dies_leaves_the_pointer_as_it_was(tmp_path: Path, how: str) -> None:
    folder = prepared(tmp_path / "folder", "upload")
    before = publish_repository(folder / "models", f"file://{folder / 'store'}")
    deploy(folder / "new", folder / "models")
    numbers = deaths(folder, tmp_path / "work", "upload", how)
    assert len(numbers) > 5
    for number in numbers[:-1]:
        place = f"file://{tmp_path / 'work' / str(number) / 'store'}"
        assert current(place) == before
        fetch_repository(place, tmp_path / "fetched", overwrite=True)
        assert [found.version for found in served_versions(tmp_path / "fetched")] == [1]
        after = publish_repository(tmp_path / "work" / str(number) / "models", place)
        assert (after.number, after.models) == (2, {"tiny": {"1": "1" * 64, "2": "2" * 64}})
        fetch_repository(place, tmp_path / "fetched", overwrite=True)


@pytest.mark.slow
def test_a_server_serves_what_was_fetched(s3: Any, repository: Path, tmp_path: Path) -> None:
    place = f"{s3.bucket()}/models"
    publish_repository(repository, place)
    fetch_repository(place, tmp_path / "node" / "models")
    with TritonServer(tmp_path / "node" / "models") as server, Client(server.http_url) as client:
        assert client.version_id("tiny") == "1" * 64
        assert client.answer("tiny", golden().batch(3).inputs).version == "1"
