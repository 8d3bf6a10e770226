"""One self-contained HTML page of a run: what it learned, what it was made of, what it cost, how it is served."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuops.report.page import write_report as write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> object:
    if name != "write_report":
        raise AttributeError(f"module 'gpuops.report' has no attribute {name!r}")
    from gpuops.report.page import write_report

    return write_report
