"""What happened, provably: an append-only list of events in one sqlite3 file, each chained to the one before.

    hash = sha256(canonical JSON of [previous hash, seq, time, kind, body text])

A changed, inserted or missing event breaks the chain at that event. A tail that was cut leaves a shorter chain that
is whole, so the last hash (the head) is kept elsewhere too (Git, the model repository) and given to `verify`.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.lineage.version import canonical_json, digest

GENESIS = "0" * 64
"""Head of an empty ledger."""

_APPLICATION_ID = 0x67704C67  # "gpLg", in the file's header: tells a ledger from any other sqlite3 file
_SCHEMA = 1
_HEADER_BYTES = 100
_BUSY_TIMEOUT_S = 60.0
_MOUNTS = Path("/proc/mounts")

_NETWORK = (
    {"9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "pvfs2"}
    | {"smb3", "smbfs", "virtiofs", "wekafs"}
    | {
        "blobfuse2",
        "ceph-fuse",
        "davfs",
        "gcsfuse",
        "glusterfs",
        "goofys",
        "hdfs",
        "juicefs",
        "rclone",
        "s3fs",
        "sshfs",
    }
)
"""File systems shared with other hosts, where sqlite3's locks and shared memory do not hold."""

_CREATE = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA};
PRAGMA journal_mode = WAL;
CREATE TABLE events (
  seq INTEGER PRIMARY KEY, time_utc TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,
  previous TEXT NOT NULL, hash TEXT NOT NULL UNIQUE
);
CREATE TRIGGER no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END;
-- INSERT OR REPLACE deletes without firing no_delete.
CREATE TRIGGER no_replace BEFORE INSERT ON events
  WHEN NEW.seq <> COALESCE((SELECT max(seq) FROM events), 0) + 1 OR EXISTS (SELECT 1 FROM events WHERE hash = NEW.hash)
  BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END;
"""


@dataclass(frozen=True, slots=True)
class Event:
    """One event, as it was appended."""

    seq: int
    """Position in the ledger, from 1."""
    time_utc: str
    """When it was appended by the writer's clock, ISO 8601 in UTC with microseconds."""
    kind: str
    """What kind of event, such as "run-start" or "promote"."""
    body: dict[str, Any]
    """What happened, as JSON."""
    previous: str
    """Hash of the event before, `GENESIS` for the first."""
    hash: str
    """Hash of this event; the head if it is the last."""


class Ledger:
    """An open ledger; a new one is made if nothing is at `path`.

    Several processes and threads may append at once. After `close`, and after the last of several writers, the ledger
    is one file; after a kill the next `Ledger` on it finds every event whose `append` returned.

    Args:
        path: The ledger's file, on a disk of this machine.

    Raises:
        InputError: the path is on a network file system, in no folder, or holds something else.
        UnavailableError: the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _refuse_network(self.path)
        if not self.path.exists():
            _create(self.path)
        _check_header(self.path)
        self._lock = threading.Lock()
        with self._sqlite_errors():
            # sqlite3 commits by itself (isolation_level None), so that every transaction here is one we wrote.
            self._db = sqlite3.connect(
                self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA synchronous = FULL")  # an event that was acknowledged survives a power cut

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; sqlite3 folds the write-ahead log into it when the last writer leaves."""
        with self._lock:
            self._db.close()

    def append(self, kind: str, body: Mapping[str, Any]) -> str:
        """Add an event durably and return its hash, the new head.

        Raises:
            InputError: `kind` is empty or `body` is not JSON.
            UnavailableError: the file cannot be written (disk full, read-only, locked for a minute).
        """
        if not kind or not isinstance(kind, str):
            raise InputError(f"an event needs a kind in words, such as 'run-start', not {kind!r}")
        if not isinstance(body, Mapping):
            raise InputError(f"the body of a {kind!r} event is a {type(body).__name__}: give a mapping")
        text = canonical_json(body).decode()
        with self._lock, self._sqlite_errors(), self._transaction():
            row = self._db.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
            last, previous = row or (0, GENESIS)
            time_utc = datetime.now(UTC).isoformat(timespec="microseconds")
            event = (last + 1, time_utc, kind, text, previous)
            head = _hash(*event)
            self._db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", (*event, head))
        return head

    def events(self, kind: str | None = None) -> list[Event]:
        """Events in order, of one kind or all. They are not verified: call `verify` before relying on them."""
        with self._lock, self._sqlite_errors():
            rows = self._db.execute(
                "SELECT * FROM events WHERE ?1 IS NULL OR kind = ?1 ORDER BY seq", (kind,)
            ).fetchall()
        try:
            return [Event(seq, at, kind_, json.loads(body), *chain) for seq, at, kind_, body, *chain in rows]
        except ValueError:
            raise IntegrityError(f"{self.path} holds an event that is not JSON: `verify` names it") from None

    def head(self) -> str:
        """Hash of the last event, `GENESIS` if there is none. Keep it elsewhere."""
        with self._lock, self._sqlite_errors():
            row = self._db.execute("SELECT hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
        return str(row[0]) if row else GENESIS

    def verify(self, head: str | None = None) -> int:
        """Recompute the whole chain and return its number of events.

        Args:
            head: A head kept elsewhere; it must be in the chain (more events may have followed).

        Raises:
            IntegrityError: names the first event that is broken, or says that the tail was cut or rewritten.
        """
        advice = f"{self.path} is not to be trusted; restore a copy that verifies"
        previous, count = GENESIS, 0
        found = head in (None, GENESIS)
        try:
            with self._lock:
                for seq, time_utc, kind, body, prior, recorded in self._db.execute("SELECT * FROM events ORDER BY seq"):
                    if seq != count + 1:
                        fault = f"event {count + 1} is missing" if seq > count else f"event {seq} was inserted"
                        raise IntegrityError(f"{fault}: {advice}")
                    if recorded != _hash(seq, time_utc, kind, body, prior):
                        raise IntegrityError(f"event {seq} ({kind!r}) was changed: {advice}")
                    if prior != previous:
                        raise IntegrityError(f"event {seq} ({kind!r}) does not follow event {seq - 1}: {advice}")
                    previous, count = recorded, seq
                    found = found or recorded == head
        except (sqlite3.Error, InputError) as error:
            raise IntegrityError(f"event {count + 1} cannot be read ({error}): {advice}") from None
        if not found:
            raise IntegrityError(
                f"none of the {count} events has the head {head}: the tail was cut or rewritten; {advice}"
            )
        return count

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Take the write lock before reading the last event, so that no other process appends in between."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError as error:  # only a closed ledger gets here
            raise InputError(f"{self.path} cannot be used ({error}): open a Ledger on it again") from None
        except sqlite3.Error as error:
            raise UnavailableError(
                f"{self.path}: {error}: look for a full disk, a read-only folder, a damaged file or a stuck writer"
            ) from None


def ledger_path() -> Path:
    """Where commands keep the ledger: `$GPUOPS_LEDGER`, or `ledger.sqlite` in the current folder."""
    return Path(os.environ.get("GPUOPS_LEDGER", "ledger.sqlite"))


def filesystem_type(path: Path, mounts: str) -> str | None:
    """Type of the file system that holds `path`, from the text of /proc/mounts; None if no mount covers it."""
    best, answer = -1, None
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Blanks in a mount point are written \040. Of two mounts on one point the later one is seen.
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, answer = len(point.parts), fields[2]
    return answer


def _refuse_network(path: Path) -> None:
    if not _MOUNTS.exists():  # not Linux
        return
    kind = filesystem_type(path.resolve(), _MOUNTS.read_text(errors="surrogateescape"))
    if kind is not None and kind.removeprefix("fuse.") in _NETWORK:
        raise InputError(f"{path} is on a network file system ({kind}), where a ledger breaks: put it on a local disk")


def _create(path: Path) -> None:
    """Make an empty ledger that appears whole, whoever else makes it at the same time."""
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder: make it first, or name another place for the ledger")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            draft = Path(folder) / "ledger"
            with closing(sqlite3.connect(draft, isolation_level=None)) as db:
                db.executescript(_CREATE)
            try:
                os.link(draft, path)  # a rename would replace a ledger that another process has just made
            except FileExistsError:
                return
    except (OSError, sqlite3.Error) as error:
        raise UnavailableError(f"no ledger can be made at {path} ({error}): name a folder you may write to") from None


def _check_header(path: Path) -> None:
    """Read the sqlite3 header ourselves: opening a foreign database in WAL mode could change it."""
    problem = "is not a gpuops ledger: name another file (a new one is made where there is none)"
    try:
        with path.open("rb") as stream:
            header = stream.read(_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path} {problem} ({error.strerror})") from None
    if not header.startswith(b"SQLite format 3\0") or int.from_bytes(header[68:72], "big") != _APPLICATION_ID:
        raise InputError(f"{path} {problem}")
    schema = int.from_bytes(header[60:64], "big")
    if schema != _SCHEMA:
        raise InputError(f"{path} has ledger schema {schema}, this gpuops reads {_SCHEMA}: use the gpuops that made it")


def _hash(seq: int, time_utc: str, kind: str, body: str, previous: str) -> str:
    """Hash of an event; `body` enters as the text that is stored, so nothing in it can change unseen."""
    return digest([previous, seq, time_utc, kind, body])
