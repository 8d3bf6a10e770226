"""Interrupted ingests: the last commit reads whole at every moment, and a rerun takes up what was finished."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from series_room import independent, series

import gpuops as go
from gpuops.data.writing import ingest as ingest_module
from gpuops.data.writing.staging import Root, Staging
from gpuops.errors import InputError, IntegrityError

ARGUMENTS: dict[str, Any] = {"shard_records": 2, "codec": "zstd"}


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, error: type[BaseException] = OSError) -> None:
    """The next ingest ends with an error in its nth shard."""
    write, count = ingest_module._write_shard, itertools.count()

    def failing(*arguments: Any) -> Any:
        if next(count) == after:
            raise error("no space left on device")
        return write(*arguments)

    monkeypatch.setattr(ingest_module, "_write_shard", failing)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Shards that are written from now on."""
    write, seen = ingest_module.write_shard, []

    def noted(block: Any, array: Any, shard: int, first: int, last: int) -> Any:
        seen.append((block.name, shard))
        return write(block, array, shard, first, last)

    monkeypatch.setattr(ingest_module, "_write_shard", noted)
    return seen


def run(case: str, folder: Path, format: str) -> Any:
    store = folder / "store"
    if case == "append":
        return go.ingest(series(11, 40), url=store, append=True)
    return go.ingest(series(), url=store, format=format, overwrite=case == "overwrite", **ARGUMENTS)


def prepare(case: str, folder: Path, format: str) -> str | None:
    """Fingerprint of what is there before."""
    if case == "new":
        return None
    return str(go.ingest(series(0, 11), url=folder / "store", format=format, **ARGUMENTS).fingerprint)


@pytest.mark.parametrize("format", ["icechunk", "zarr"])
@pytest.mark.parametrize("case", ["new", "append", "overwrite"])
def test_a_rerun_writes_only_what_was_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, format: str
) -> None:
    before = prepare(case, tmp_path, format)
    with monkeypatch.context() as patch:
        interrupted(patch, 12)
        with pytest.raises(OSError, match="no space"):
            run(case, tmp_path, format)
    if before is None:
        assert not (tmp_path / "store").exists()
    else:
        assert go.open(tmp_path / "store").fingerprint == before
        xr.testing.assert_equal(independent(tmp_path / "store"), series(0, 11))
    (staged,) = tmp_path.glob(".store.ingest-*")
    finished = {path.stem for path in staged.glob("journal/*.pickle")}
    assert finished
    seen = watched(monkeypatch)
    source = run(case, tmp_path, format)
    every = 40 if case != "append" else 2 * len(range(11 // 2, 20))
    assert len(seen) == every - len(finished)
    assert source.fingerprint == go.ingest(series(), url=tmp_path / "whole", format=format, **ARGUMENTS).fingerprint
    xr.testing.assert_equal(independent(tmp_path / "store"), series())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "whole"]


def test_a_finished_shard_that_is_damaged_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupted(patch, 12)
        with pytest.raises(OSError, match="no space"):
            run("new", tmp_path, "zarr")
    (staged,) = tmp_path.glob(".store.ingest-*")
    journal = sorted(path.stem for path in staged.glob("journal/*.pickle"))
    block, shard = journal[0].split("-")
    damaged = staged / "store" / ("temperature", "rain")[int(block)] / "c" / shard
    (chunk,) = [path for path in damaged.rglob("*") if path.is_file()]
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    seen = watched(monkeypatch)
    source = run("new", tmp_path, "zarr")
    assert len(seen) == 40 - len(journal) + 1
    assert (("temperature", "rain")[int(block)], int(shard)) in seen
    xr.testing.assert_equal(independent(tmp_path / "store"), series())
    assert source.weak is False


@pytest.mark.parametrize("format", ["icechunk", "zarr"])
def test_a_shard_that_gets_lost_on_the_way_to_the_commit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    merged = Staging.merged

    def losing(self: Staging, root: Root, forks: list[bytes | None]) -> Any:
        if root.path is not None:
            (Path(root.path) / "rain" / "c" / "7" / "0").unlink()
        return merged(self, root, forks[:-1])

    monkeypatch.setattr(Staging, "merged", losing)
    with pytest.raises(IntegrityError, match=r"shard (rain|temperature)/c/\d+/0.* is missing"):
        run("new", tmp_path, format)
    assert list(tmp_path.iterdir()) == []


def test_another_recipe_does_not_take_up_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupted(patch, 12)
        with pytest.raises(OSError, match="no space"):
            run("new", tmp_path, "icechunk")
    seen = watched(monkeypatch)
    go.ingest(series() + 1, url=tmp_path / "store", **ARGUMENTS)
    assert len(seen) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["store"], "what nobody takes up is removed"


def test_two_processes_do_not_share_a_working_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ingest_module._write_shard
    messages: list[str] = []

    def again(*arguments: Any) -> Any:
        if not messages:
            messages.append("")
            with pytest.raises(InputError) as error:
                run("new", tmp_path, "icechunk")
            messages[0] = str(error.value)
        return write(*arguments)

    monkeypatch.setattr(ingest_module, "_write_shard", again)
    run("new", tmp_path, "icechunk")
    assert "another process ingests the same" in messages[0]
    xr.testing.assert_equal(independent(tmp_path / "store"), series())


ZYGOTE = """
import os, select, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import dask.array, dask.config, distributed, icechunk, xarray, zarr
import gpuops.data.writing.ingest, gpuops.data.source
import test_ingest_kills as kills

def child(case, folder, format):
    # Forked before any thread or event loop was started; the parent only ever forks.
    with dask.config.set(num_workers=2):
        kills.run(case, Path(folder), format)

for line in sys.stdin:
    case, folder, format, delay = line.split()
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child(case, folder, format)
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(status)
    descriptor = os.pidfd_open(pid)
    if float(delay) >= 0 and not select.select([descriptor], [], [], float(delay))[0]:
        os.kill(pid, 9)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(descriptor)
    print(code, time.monotonic() - begin, flush=True)
"""


class Zygote:
    """A process that has imported everything and started nothing: it forks an ingest and kills it after a delay."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", ZYGOTE, str(Path(__file__).parent)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
        )

    def run(self, case: str, folder: Path, format: str, delay_s: float = -1) -> tuple[int, float]:
        """(exit code, seconds); -9 if it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{case} {folder} {format} {delay_s}\n")
        self.process.stdin.flush()
        code, seconds = self.process.stdout.readline().split()
        return int(code), float(seconds)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.mark.slow
def test_killed_at_50_random_points(tmp_path: Path) -> None:
    cases = list(itertools.product(["new", "append", "overwrite"], ["icechunk", "zarr"]))
    whole = {f: go.ingest(series(), url=tmp_path / f, format=f, **ARGUMENTS).fingerprint for f in ("icechunk", "zarr")}
    generator, zygote = random.Random(11), Zygote()
    killed = resumed = 0
    try:
        seconds = {}
        for number, (case, format) in enumerate(cases):
            folder = tmp_path / f"clean{number}"
            folder.mkdir()
            prepare(case, folder, format)
            code, seconds[case, format] = zygote.run(case, folder, format)
            assert code == 0
        for number in itertools.count():
            if killed == 50:
                break
            assert number < 200, f"only {killed} of {number} ingests were still running when they were to be killed"
            case, format = cases[number % len(cases)]
            folder = tmp_path / str(number)
            folder.mkdir()
            store = folder / "store"
            before = prepare(case, folder, format)
            code, _ = zygote.run(case, folder, format, generator.uniform(0, seconds[case, format]))
            killed += code == -9
            now = None
            if store.exists():
                now = go.open(store).fingerprint
                assert now in (before, whole[format]), "something that nobody committed"
                xr.testing.assert_equal(independent(store), series() if now == whole[format] else series(0, 11))
            else:
                replaced = folder / ".store.replaced"
                assert before is None or go.open(replaced).fingerprint == before
            left = [path for path in folder.glob(".store.ingest-*") if not path.name.endswith("-gone")]
            resumed += any(list(path.glob("journal/*.pickle")) for path in left)
            if left or now != whole[format]:
                code, _ = zygote.run(case, folder, format)
                assert code == 0, f"the rerun of {case} in {format} failed"
            assert go.open(store).fingerprint == whole[format]
            xr.testing.assert_equal(independent(store), series())
    finally:
        zygote.close()
    assert killed == 50
    assert resumed > 10
