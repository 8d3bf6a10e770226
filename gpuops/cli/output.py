"""How commands talk: JSON alone on stdout where it is asked for, words and bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

errors = Console(stderr=True)


def print_json(document: Any) -> None:
    """Print a JSON document alone on stdout."""
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def fields(values: Mapping[str, Any]) -> None:
    """Print name and value, one a line."""
    width = max(map(len, values))
    for name, value in values.items():
        sys.stdout.write(f"{name:<{width}}  {_shown(value)}\n")


def _shown(value: Any) -> str:
    """A number with separators or four digits, a table in one line, anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def say(message: str) -> None:
    """Say what is being done, on stderr."""
    errors.print(message, highlight=False, soft_wrap=True)


@contextmanager
def bytes_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes, bytes a second and time left; yields a function of (done, total) bytes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def progress(title: str) -> Iterator[Callable[[float, float], None]]:
    """A bar with the count and the time left, drawn once it is used; yields a function of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(title, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=round(done), total=round(total), visible=True)
