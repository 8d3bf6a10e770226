#!/usr/bin/env bash
# Unpacks the real tritonserver out of the nvidia-pytriton wheel, without its dependencies (they pin numpy below 2).
# usage: get_tritonserver.sh PYTHON VENV TARGET WHEELS
set -euo pipefail
python=$1 venv=$2 target=$3 wheels=$4
pip=("$venv/bin/python" -m pip)
"${pip[@]}" --version >/dev/null 2>&1 || pip=("$python" -m pip)
from=(nvidia-pytriton==0.7.0)
if [ -n "$wheels" ]; then
  from=("$wheels"/nvidia_pytriton-0.7.0-*.whl)
  [ -f "${from[0]}" ] || { echo "gpuops: no nvidia_pytriton-0.7.0 wheel in $wheels; the demo needs it" >&2; exit 1; }
  from=(--no-index "${from[@]}")
fi
rm -rf "$target.partial"
"${pip[@]}" install -q --no-deps --target "$target.partial" "${from[@]}"
rm -rf "$target" && mv "$target.partial" "$target"
touch "$target/pytriton/tritonserver/bin/tritonserver"
