"""Zarr in, a metered Triton endpoint out.

Importing this package imports nothing else; each public name is loaded when it is first used (PEP 562).
"""

TYPE_CHECKING = False  # type checkers take this name for true; typing itself would be an import

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gpuops.data.datamodule import ZarrDataModule as ZarrDataModule
    from gpuops.data.join import open as open
    from gpuops.data.writing.ingest import ingest as ingest
    from gpuops.export import export as export
    from gpuops.export.formats import load_bundle as load_bundle
    from gpuops.preprocess.steps import Preprocess as Preprocess
    from gpuops.training.checkpoint import RecoveryCheckpoint as RecoveryCheckpoint
    from gpuops.training.checkpoint import newest_checkpoint as newest_checkpoint
    from gpuops.training.energy import EnergyCallback as EnergyCallback
    from gpuops.training.lineage import LineageCallback as LineageCallback
    from gpuops.training.preemption import PreemptionCallback as PreemptionCallback
    from gpuops.training.steps import StepTimesCallback as StepTimesCallback

_HOME = {
    "EnergyCallback": "gpuops.training.energy",
    "LineageCallback": "gpuops.training.lineage",
    "PreemptionCallback": "gpuops.training.preemption",
    "Preprocess": "gpuops.preprocess.steps",
    "RecoveryCheckpoint": "gpuops.training.checkpoint",
    "StepTimesCallback": "gpuops.training.steps",
    "ZarrDataModule": "gpuops.data.datamodule",
    "export": "gpuops.export",
    "ingest": "gpuops.data.writing.ingest",
    "load_bundle": "gpuops.export.formats",
    "newest_checkpoint": "gpuops.training.checkpoint",
    "open": "gpuops.data.join",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'gpuops' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
