#!/usr/bin/env bash
# Says in one line what is missing before anything is installed. usage: check_prerequisites.sh PYTHON
set -eu
python=${1:?usage: check_prerequisites.sh PYTHON}
fail() { echo "gpuops: missing $1" >&2; exit 1; }
command -v git >/dev/null || fail "git: apt-get install git"
command -v g++ >/dev/null || fail "g++: apt-get install g++"
command -v "$python" >/dev/null || fail "$python: apt-get install python3 python3-venv (3.11 or newer), or make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer: $python is older; make PYTHON=..."
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "venv: apt-get install python3-venv"
"$python" - <<'PY' || exit 1
import pathlib, sys, sysconfig
name = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
headers = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
libdir = pathlib.Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
places = (libdir, libdir / (sysconfig.get_config_var("MULTIARCH") or ""), pathlib.Path(sys.base_prefix, "lib"))
if not headers.is_file():
    sys.exit(f"gpuops: missing Python headers ({headers}): apt-get install python3-dev")
if not any((place / f"{name}.so.1.0").is_file() for place in places):
    sys.exit(f"gpuops: missing a shared {name}: apt-get install {name} (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)")
PY
