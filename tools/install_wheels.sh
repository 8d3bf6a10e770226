#!/usr/bin/env bash
# Puts gpuops and the wheels of a folder into an environment that uses its interpreter's own packages.
# usage: install_wheels.sh PYTHON VENV WHEELS
set -euo pipefail
python=$1 venv=$2 wheels=$3
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
shopt -s nullglob
if [ -n "$wheels" ]; then
  found=()
  for wheel in "$wheels"/*.whl; do
    case $wheel in */nvidia_pytriton-*) ;; *) found+=("$wheel") ;; esac  # the server: tools/get_tritonserver.sh
  done
  if [ ${#found[@]} -gt 0 ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$site" --upgrade "${found[@]}"
  fi
fi
# The interpreter may itself live in an environment, which --system-site-packages does not see: name its packages.
theirs=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
printf '%s\n' "$PWD" "$PWD/kernels" "$PWD/serving" "$theirs" > "$site/gpuops.pth"
printf '#!%s\nfrom gpuops.cli import main\nmain()\n' "$PWD/$venv/bin/python" > "$venv/bin/gpuops"
chmod +x "$venv/bin/gpuops"
