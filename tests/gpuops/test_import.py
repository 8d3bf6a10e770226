import subprocess
import sys

import pytest

import gpuops


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_gpuops_imports_nothing_else() -> None:
    assert loaded_by("import gpuops") == {"gpuops"}


def test_serving_client_needs_no_training_stack() -> None:
    heavy = {"torch", "lightning", "zarr", "dask", "xarray", "triton", "gpuops_kernels"}
    assert not heavy & loaded_by("import gpuops_serving; gpuops_serving.Client; gpuops_serving.deploy")


def test_the_core_is_numpy_only() -> None:
    modules = (
        "gpuops.spec, gpuops.bundle, gpuops.drift, gpuops.energy.meter, gpuops.lineage.ledger, gpuops.preprocess.steps"
    )
    assert not {"torch", "lightning", "zarr", "dask", "triton"} & loaded_by(f"import {modules}")


@pytest.mark.parametrize("name", [name for name in gpuops.__all__ if name != "__version__"])
def test_every_public_name_loads(name: str) -> None:
    assert callable(getattr(gpuops, name))


def test_export_can_be_called_after_its_package_was_imported() -> None:
    import gpuops.export.formats

    assert callable(gpuops.export)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gpuops.nothing  # type: ignore[attr-defined]
