"""What a rollout keeps on disk while it runs: a lock that keeps others out, and how far it has come."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops_serving.repository import write_text


@dataclass(frozen=True, slots=True)
class State:
    """How far a rollout has come."""

    id: str
    """Random; tells its event in the ledger from others."""
    version_id: str
    """Version id of its bundle."""
    number: int
    """Version number on trial."""
    config: str | None
    """The model's configuration before; None if this is its first version."""
    stage: str
    """"trial": the model's name is untouched; "promoting": it may not be; "promoted" or "rejected": the verdict."""
    reasons: tuple[str, ...] = ()
    """What speaks against the version."""
    verdict: dict[str, Any] | None = None
    """The comparison, as JSON."""


class StateFile:
    """The state of one model's rollout, in REPOSITORY/.rollout-<model>.json; Triton takes folders only for models.

    Args:
        repository: Model repository.
        model: Model name.
    """

    def __init__(self, repository: Path, model: str) -> None:
        self._repository, self._model = repository, model
        self.path = repository / f".rollout-{model}.json"

    def read(self) -> State | None:
        """What an interrupted rollout left; None if there is none."""
        try:
            document = json.loads(self.path.read_text())
            return State(**{**document, "reasons": tuple(document["reasons"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise IntegrityError(f"{self.path} is not a rollout's state ({error}): remove it") from error

    def write(self, state: State) -> State:
        """Replace the state in one step, and return it."""
        write_text(self.path, json.dumps(asdict(state)) + "\n")
        return state

    def remove(self) -> None:
        """Forget the state, and what a kill left of writing it or the model's configuration."""
        model = self._repository / self._model
        for left in (*self._repository.glob(f".{self.path.name}-*"), *model.glob(".config.pbtxt-*")):
            left.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other rollouts of the model out; that ends with the process at the latest.

        Raises:
            InputError: no such folder here, or another rollout is under way.
            UnavailableError: the repository cannot be written.
        """
        if not self._repository.is_dir():
            raise InputError(f"{self._repository} is no folder here: name the model repository that the server reads")
        path = self.path.with_suffix(".lock")
        while True:
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise UnavailableError(
                    f"{path} cannot be written ({error.strerror}), so no rollout can begin: get leave to write there"
                ) from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise InputError(f"another rollout of {self._model!r} is under way: wait until it has ended") from None
            if os.fstat(lock).st_nlink:
                break
            os.close(lock)  # the one before removed it between our two calls
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(lock)
