"""Find a tritonserver, and make its Python backend run our interpreter without changing the installed server."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from gpuops.errors import UnavailableError

PIP_COMMAND = "pip install --no-deps --target {} nvidia-pytriton==0.7.0"
"""How to get tritonserver 2.51. Without --no-deps the wheel would put numpy below 2."""

_WHEEL_BINARY = Path("pytriton/tritonserver/bin/tritonserver")
_STUB = "triton_python_backend_stub"


def find_tritonserver(explicit: Path | None = None) -> Path:
    """Return the tritonserver binary to run.

    Looked for in `explicit`, $GPUOPS_TRITONSERVER, PATH, `.triton/` in the current folder and beside the source
    checkout, and the user cache. The first two may be the binary or a folder that the wheel was unpacked in; if one is
    given, it alone counts.

    Raises:
        UnavailableError: there is none; the message lists the places and the command that gets one.
    """
    for place, given in (("--tritonserver", explicit), ("$GPUOPS_TRITONSERVER", os.environ.get("GPUOPS_TRITONSERVER"))):
        if given:
            binary = next((p for p in (Path(given), Path(given) / _WHEEL_BINARY) if _executable(p)), None)
            if binary is None:
                raise UnavailableError(f"{place} is {given}, which is no tritonserver: {_how_to_get()}")
            return binary.absolute()
    if on_path := shutil.which("tritonserver"):
        return Path(on_path)
    folders = [Path.cwd() / ".triton", Path(__file__).parents[2] / ".triton", _user_cache()]
    for folder in folders:
        if _executable(folder / _WHEEL_BINARY):
            return folder / _WHEEL_BINARY
    places = ", ".join(["--tritonserver", "$GPUOPS_TRITONSERVER", "PATH", *map(str, dict.fromkeys(folders))])
    raise UnavailableError(f"no tritonserver in {places}: {_how_to_get()}")


def environment_for(binary: Path) -> dict[str, str]:
    """Environment in which a server's stubs run this interpreter, with its packages.

    Raises:
        UnavailableError: this interpreter has no `python3` beside it, or no shared libpython.
    """
    interpreter = Path(sys.executable).parent  # of the virtual environment, so not resolved
    if not (interpreter / "python3").exists():
        raise UnavailableError(f"no python3 in {interpreter}, so a server would run another: use a virtual environment")
    home = _home(binary)
    libraries = [str(p) for p in (home.parents[1] / "nvidia_pytriton.libs", home / "lib") if p.is_dir()]
    libraries.append(str(_libpython_folder()))
    if inherited := os.environ.get("LD_LIBRARY_PATH"):
        libraries.append(inherited)
    return {
        **os.environ,
        "PATH": f"{interpreter}:{os.environ.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": ":".join(libraries),
    }


def lay_out_backends(binary: Path, folder: Path) -> Path:
    """Link the server's Python backend, with the stub for this interpreter, into `folder`; return its `backends`.

    The stub must lie beside the backend. Linking it in a folder of our own leaves the installed server as it is, so
    interpreters of several versions can use it at the same time.

    Raises:
        UnavailableError: the server has no Python backend, or no stub for this interpreter.
    """
    home = _home(binary)
    backend = home / "backends" / "python"
    if not backend.is_dir():
        raise UnavailableError(f"{binary} has no Python backend in {backend}: {_how_to_get()}")
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = home / "python_backend_stubs"  # the wheel's, one a version; a container has a single one beside the backend
    stub = stubs / minor / _STUB if stubs.is_dir() else backend / _STUB
    if not stub.is_file():
        raise UnavailableError(f"{binary} has no stub for Python {minor} in {stubs}: use one of {_names(stubs)}")
    private = folder / "backends" / "python"
    private.mkdir(parents=True)
    for file in backend.iterdir():
        if file.is_file() and file.name != _STUB:
            (private / file.name).symlink_to(file)
    (private / _STUB).symlink_to(stub)
    return private.parent


def _home(binary: Path) -> Path:
    return binary.resolve().parents[1]


def _names(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "the versions it has"


def _libpython_folder() -> Path:
    """Folder of the shared libpython that a stub of this version loads."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    libdir, multiarch = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("MULTIARCH") or ""
    # LIBDIR is where the interpreter was built to be; a relocated one (uv, conda) has it under its prefix.
    for folder in (Path(libdir), Path(libdir) / multiarch, Path(sys.base_prefix) / "lib"):
        if (folder / name).is_file():
            return folder
    raise UnavailableError(
        f"{sys.executable} has no shared {name}, which Triton's Python backend loads: install it (Debian: apt-get "
        f"install {name.removesuffix('.so.1.0')}; pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install)"
    )


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuops" / "triton"


def _how_to_get() -> str:
    return f"get one with `{PIP_COMMAND.format(_user_cache())}`"
