"""The chain holds under concurrent writers and kills, and every kind of tampering is found and named."""

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.lineage import ledger as ledger_module
from gpuops.lineage.ledger import GENESIS, Ledger, filesystem_type

ROOT = Path(__file__).resolve().parents[3]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed ledger of five events."""
    file = tmp_path / "ledger.db"
    with Ledger(file) as ledger:
        for step in range(5):
            ledger.append("run-start" if step % 2 else "promote", {"step": step, "who": "Änne"})
    return file


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "opened") as ledger:
        yield ledger


def tamper(path: Path, *statements: str) -> None:
    """Change the file behind the ledger's back."""
    with closing(sqlite3.connect(path)) as db:
        for trigger in ("no_update", "no_delete", "no_replace"):
            db.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            db.execute(statement)
        db.commit()


def fault(path: Path, head: str | None = None) -> str:
    with Ledger(path) as ledger, pytest.raises(IntegrityError) as caught:
        ledger.verify(head)
    return str(caught.value)


def test_events_come_back_in_order_and_the_chain_verifies(path: Path) -> None:
    with Ledger(path) as ledger:
        events = ledger.events()
        assert [event.seq for event in events] == [1, 2, 3, 4, 5]
        assert [event.body["step"] for event in events] == [0, 1, 2, 3, 4]
        assert [event.previous for event in events] == [GENESIS, *(event.hash for event in events[:-1])]
        assert [event.body["step"] for event in ledger.events("run-start")] == [1, 3]
        assert events[0].time_utc.endswith("+00:00")
        assert [event.time_utc for event in events] == sorted(event.time_utc for event in events)
        assert ledger.head() == events[-1].hash
        for event in events:
            assert ledger.verify(event.hash) == 5


def test_an_empty_ledger(tmp_path: Path) -> None:
    with Ledger(tmp_path / "new") as ledger:
        assert (ledger.head(), ledger.events(), ledger.verify(), ledger.verify(GENESIS)) == (GENESIS, [], 0, 0)


def test_append_returns_the_head_and_a_closed_ledger_is_one_file(tmp_path: Path) -> None:
    with Ledger(tmp_path / "new") as ledger:
        assert ledger.append("promote", {"from": None, "to": "v1"}) == ledger.head() != GENESIS
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_readers_do_not_wait_for_writers(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as busy, Ledger(path) as ledger:
        busy.execute("BEGIN IMMEDIATE")
        busy.execute("INSERT INTO events VALUES (6, 't', 'k', '{}', 'p', 'h')")
        assert ledger.verify() == 5
        busy.execute("ROLLBACK")
        assert busy.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(min_size=1, max_size=20), st.dictionaries(st.text(), json_values, max_size=4))
def test_any_body_comes_back_and_verifies(opened: Ledger, kind: str, body: dict[str, Any]) -> None:
    head = opened.append(kind, body)
    last = opened.events(kind)[-1]
    assert (last.kind, last.body, last.hash) == (kind, body, head)
    assert opened.verify(head) == last.seq


@pytest.mark.parametrize(
    "change", ["body = '{\"step\":9}'", "kind = 'x'", "time_utc = '2000'", "hash = 'f00'", "body = x'00ff'"]
)
def test_an_edited_event_is_found_and_named(path: Path, change: str) -> None:
    tamper(path, f"UPDATE events SET {change} WHERE seq = 3")
    assert fault(path).startswith("event 3 ")


def test_an_edit_with_a_recomputed_hash_breaks_the_next_event(path: Path) -> None:
    with Ledger(path) as ledger:
        event = ledger.events()[2]
    forged = ledger_module._hash(3, event.time_utc, event.kind, '{"step":9}', event.previous)
    tamper(path, f"UPDATE events SET body = '{{\"step\":9}}', hash = '{forged}' WHERE seq = 3")
    assert "event 4 ('run-start') does not follow event 3" in fault(path)


def test_deleted_events_are_found(path: Path) -> None:
    tamper(path, "DELETE FROM events WHERE seq = 3")
    assert fault(path).startswith("event 3 is missing")


def test_a_deleted_event_whose_place_was_closed_is_found(path: Path) -> None:
    tamper(path, "DELETE FROM events WHERE seq = 3", "UPDATE events SET seq = seq - 1 WHERE seq > 3")
    assert fault(path).startswith("event 3 ")


def test_an_inserted_event_is_found(path: Path) -> None:
    tamper(path, "INSERT INTO events VALUES (0, 't', 'k', '{}', 'p', 'h')")
    assert fault(path).startswith("event 0 was inserted")


def test_a_cut_tail_is_found_with_the_head_only(path: Path) -> None:
    with Ledger(path) as ledger:
        head = ledger.head()
    tamper(path, "DELETE FROM events WHERE seq > 3")
    with Ledger(path) as ledger:
        assert ledger.verify() == 3
        ledger.append("promote", {})
    assert "the tail was cut" in fault(path, head)


def test_a_body_that_is_no_json_is_not_returned(path: Path) -> None:
    tamper(path, "UPDATE events SET body = '{' WHERE seq = 2")
    with Ledger(path) as ledger, pytest.raises(IntegrityError, match="not JSON"):
        ledger.events()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET body = '{}'",
        "DELETE FROM events WHERE seq = 5",
        "INSERT OR REPLACE INTO events VALUES (2, 't', 'k', '{}', 'p', 'h')",
        "INSERT OR REPLACE INTO events SELECT 6, time_utc, kind, body, previous, hash FROM events WHERE seq = 2",
        "INSERT INTO events VALUES (9, 't', 'k', '{}', 'p', 'h')",
    ],
)
def test_sqlite_refuses_changes(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)


WRITER = """
import sys
from gpuops.lineage.ledger import Ledger
print("ready", flush=True)
sys.stdin.readline()
with Ledger(sys.argv[1]) as ledger:
    for step in range(int(sys.argv[2])):
        print(ledger.append("step", {"writer": sys.argv[3], "step": step}), flush=True)
"""


def writer(path: Path, count: int, name: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(count), name],
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_four_processes_keep_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    processes = [writer(path, 25, str(i)) for i in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once, so that they also race to make the file
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    heads = {head for process in processes for head in process.communicate()[0].split()}
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["shared"]
    with Ledger(path) as ledger:
        assert ledger.verify() == 100
        events = ledger.events()
    assert {event.hash for event in events} == heads
    for i in range(4):
        assert [e.body["step"] for e in events if e.body["writer"] == str(i)] == list(range(25))


def test_a_ledger_made_by_another_in_the_meantime_is_kept(path: Path) -> None:
    ledger_module._create(path)
    with Ledger(path) as ledger:
        assert ledger.verify() == 5


def test_a_killed_writer_leaves_every_event_that_it_was_told_of(tmp_path: Path) -> None:
    path = tmp_path / "killed"
    with writer(path, 1_000_000, "0") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.stdin.write("go\n")
        process.stdin.flush()
        heads = [process.stdout.readline().strip() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        heads += [line.strip() for line in process.stdout if line.endswith("\n")]
    with Ledger(path) as ledger:
        assert ledger.verify(heads[-1]) >= len(heads)
        assert [event.hash for event in ledger.events()][: len(heads)] == heads
        ledger.append("after", {})
    assert [p.name for p in tmp_path.iterdir()] == ["killed"]


def test_threads_may_share_a_ledger(tmp_path: Path) -> None:
    with Ledger(tmp_path / "threads") as ledger:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: ledger.append("step", {"i": i}), range(40)))
        assert ledger.verify() == 40


def test_a_refused_body_appends_nothing(path: Path) -> None:
    with Ledger(path) as ledger:
        for kind, body in [("", {}), ("k", {"x": float("nan")}), ("k", {"x": object()}), ("k", []), ("\ud800", {})]:
            with pytest.raises(InputError):
                ledger.append(kind, body)  # type: ignore[arg-type]
        assert ledger.verify() == 5
        ledger.append("promote", {})


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + bytes(84)])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "other"
    other.write_bytes(content)
    with pytest.raises(InputError, match="not a gpuops ledger"):
        Ledger(other)
    assert other.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_another_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE events (x)")
    before = other.read_bytes()
    with pytest.raises(InputError, match="not a gpuops ledger"):
        Ledger(other)
    assert other.read_bytes() == before


def test_a_folder_and_a_place_without_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a gpuops ledger"):
        Ledger(tmp_path)
    with pytest.raises(InputError, match="make it first"):
        Ledger(tmp_path / "no" / "ledger")


def test_a_newer_schema_is_refused(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(InputError, match="schema 2"):
        Ledger(path)


def test_damaged_pages_are_an_integrity_error(tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    with Ledger(path) as ledger:
        for step in range(200):
            ledger.append("step", {"step": step, "text": "x" * 200})
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 9] = bytes(4096 * 6)
    path.write_bytes(content)
    assert "not to be trusted" in fault(path)


def test_a_closed_ledger_says_so(path: Path) -> None:
    with Ledger(path) as ledger:
        pass
    with pytest.raises(InputError, match="open a Ledger on it again"):
        ledger.head()


def test_a_stuck_writer_is_named_not_waited_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_BUSY_TIMEOUT_S", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as stuck, Ledger(path) as ledger:
        stuck.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match="stuck writer"):
            ledger.append("promote", {})
        stuck.execute("ROLLBACK")
        assert ledger.append("promote", {}) == ledger.head()


MOUNTS = """\
/dev/vda / ext4 rw 0 0
srv:/home /home nfs4 rw 0 0
/dev/vdb /home/local xfs rw 0 0
me@host: /mnt/with\\040blank fuse.sshfs rw 0 0
/dev/vdc /twice ext4 rw 0 0
//win/share /twice cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/x", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/x", "nfs4"),
        ("/homestead/x", "ext4"),
        ("/home/local/x", "xfs"),
        ("/mnt/with blank/x", "fuse.sshfs"),
        ("/twice/x", "cifs"),
    ],
)
def test_filesystem_type(path: str, kind: str) -> None:
    assert filesystem_type(Path(path), MOUNTS) == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "lustre", "gpfs", "ceph", "fuse.sshfs", "9p"])
def test_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nsrv:/ {tmp_path} {kind} rw 0 0\n")
    monkeypatch.setattr(ledger_module, "_MOUNTS", mounts)
    with pytest.raises(InputError, match="local disk"):
        Ledger(tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()
    (tmp_path / "link").symlink_to("/proc")
    mounts.write_text(f"/dev/vda {tmp_path} ext4 rw 0 0\nsrv:/ /proc {kind} rw 0 0\n")
    with pytest.raises(InputError, match="local disk"):
        Ledger(tmp_path / "link" / "ledger")


def test_the_stored_hash_is_the_documented_one(path: Path) -> None:
    import hashlib

    with closing(sqlite3.connect(path)) as db:
        seq, at, kind, body, previous, recorded = db.execute("SELECT * FROM events WHERE seq = 2").fetchone()
    text = json.dumps([previous, seq, at, kind, body], separators=(",", ":"), ensure_ascii=False)
    assert recorded == hashlib.sha256(text.encode()).hexdigest()
