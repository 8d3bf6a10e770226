"""Tasks on local threads, or on a `distributed` cluster by its address."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from gpuops.errors import UnavailableError

THREADS = "threads"
"""Name of the local scheduler."""
_CONNECT_S = 30
_AHEAD = 2
"""Tasks in flight for each thread of a cluster: one at work, the rest on their way."""

T = TypeVar("T")
R = TypeVar("R")


def run_all(job: Callable[[T], R], tasks: Sequence[T], done: Callable[[R], None], scheduler: str) -> None:
    """Carry out every task; `done` is called in this thread with each result as it comes.

    Args:
        job: callable that carries out one task; picklable if the scheduler is a cluster.
        tasks: what to do.
        done: told of each result.
        scheduler: "threads" (as many as Dask's `num_workers`, else the cores), or the address of a cluster.

    Raises:
        UnavailableError: no cluster answers at the address.
    """
    if scheduler == THREADS:
        _on_threads(job, tasks, done)
    else:
        _on_cluster(job, tasks, done, scheduler)


def _on_threads(job: Callable[[T], R], tasks: Sequence[T], done: Callable[[R], None]) -> None:
    import dask.config
    import dask.system
    from dask.base import compute
    from dask.callbacks import Callback
    from dask.delayed import delayed

    at_work = _AtWork()

    def carry_out(number: int) -> tuple[str, R]:
        with at_work.one():
            return "done", job(tasks[number])

    class Reporter(Callback):
        def _posttask(self, key: Any, result: Any, dsk: Any, state: Any, worker_id: Any) -> None:
            if isinstance(result, tuple) and len(result) == 2 and result[0] == "done":
                done(result[1])

    # A pool of its own, because Dask's lasts as long as the process and its threads could keep that from ending.
    threads = dask.config.get("num_workers", None) or dask.system.CPU_COUNT
    try:
        with ThreadPoolExecutor(threads, "gpuops-ingest") as pool, Reporter():  # type: ignore[no-untyped-call]
            compute(*(delayed(carry_out)(number) for number in range(len(tasks))), scheduler="threads", pool=pool)
    finally:
        at_work.stop()


def _on_cluster(job: Callable[[T], R], tasks: Sequence[T], done: Callable[[R], None], address: str) -> None:
    from distributed import Client, as_completed, wait

    try:
        client: Any = Client(address, timeout=_CONNECT_S, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as error:
        raise UnavailableError(
            f"no Dask cluster answers at {address} ({error}): start one, or mend --scheduler"
        ) from error
    with client, client.as_current():
        threads = sum(client.nthreads().values())
        shared = client.scatter(job, broadcast=True)
        waiting = iter(tasks)

        def submit(task: T) -> Any:
            return client.submit(_call, shared, task, pure=False)

        flying = {submit(task) for _, task in zip(range(max(1, threads) * _AHEAD), waiting, strict=False)}
        try:
            completed: Any = as_completed(flying)  # type: ignore[no-untyped-call]
            for future in completed:
                result = future.result()
                flying.discard(future)
                for task in waiting:
                    following = submit(task)
                    flying.add(following)
                    completed.add(following)
                    break
                done(result)
        finally:
            wait(list(flying))  # type: ignore[no-untyped-call]  # their directory may be removed next


def _call(job: Callable[[T], R], task: T) -> R:
    return job(task)


class _AtWork:
    """Tasks that are running. The first failure or signal ends Dask's call, but not the tasks beside it.

    A thread pool's own waiting is not enough: a signal that arrives while it starts a thread makes it forget that one.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._running = 0
        self._stopped = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count the task in the block; refuse it after `stop`."""
        with self._change:
            if self._stopped:
                raise RuntimeError("the ingest has ended")
            self._running += 1
        try:
            yield
        finally:
            with self._change:
                self._running -= 1
                self._change.notify_all()

    def stop(self) -> None:
        """Return once no task runs and none will start, so that their directory can be removed."""
        with self._change:
            self._stopped = True
            self._change.wait_for(lambda: self._running == 0)
