#!/usr/bin/env bash
# Everything that needs a GPU, one part at a time. Needs no network.
#
#   benchmarks/gpu.sh demo     the demo (`make demo`), then every test marked gpu
#   benchmarks/gpu.sh loader   the loader from disk to a training step, each stage against its own ceiling
#   benchmarks/gpu.sh kernels  the kernels: their tests on the GPU, then each against a copy and torch.compile
#   benchmarks/gpu.sh energy   the meter: the counter's step, the meter against it, overhead, joules a sample; the demo's
#   benchmarks/gpu.sh serving  the embedded server with AOTInductor and our kernels, joules a request at 1, 8 and 64
#
# From the environment:
#   PYTHON   interpreter that has torch, triton and lightning; they are used as they are (default: python3)
#   WHEELS   folder with wheels of what it lacks, nvidia_pytriton among them (default: none)
#   VENV     environment that is made on top of it (default: .venv)
#   OUT      folder that the results are copied to as well (default: none)
#
# Writes benchmarks/results/<name of the GPU>/, for the demo demo.json: its summary, the tests' counts
# and the versions; for the loader gpu-loader.json and, on that machine's processor, loader.json; for the kernels
# kernels.json; for the meter energy-gpu.json; for the server gpu-serving.json (that part was not run on a GPU yet).
# Where compute-sanitizer is installed, the kernels' tests run once more under it.
# Exits with 1 if there is no GPU, a test failed or none ran, with 2 if it does not know what it was asked for.
set -euo pipefail
fail() { echo "gpu.sh: $1" >&2; exit "${2:-1}"; }

[ $# -eq 1 ] || fail "which part? benchmarks/gpu.sh demo (--help says more)" 2
case $1 in
  -h|--help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  demo|loader|kernels|energy|serving) part=$1 ;;
  *) fail "there is no part $1: benchmarks/gpu.sh demo (--help says more)" 2 ;;
esac
nvidia-smi --list-gpus >/dev/null 2>&1 \
  || fail "no GPU here: nvidia-smi is missing or lists none; run this on a GPU machine"
OUT=${OUT:+$(mkdir -p "$OUT" && realpath "$OUT")}  # before the cd: it may be relative
WHEELS=${WHEELS:+$(realpath "$WHEELS")}
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}

if [ "$part" = loader ]; then
  make setup "PYTHON=${PYTHON:-python3}" SYSTEM_SITE=1 "WHEELS=${WHEELS:-}"
  "$VENV/bin/python" benchmarks/gpu_loader.py
  "$VENV/bin/python" benchmarks/bench_loader.py --quick
  if [ -n "$OUT" ]; then cp benchmarks/results/*/{gpu-loader,loader}.json "$OUT/"; fi
  exit 0
fi

if [ "$part" = energy ]; then
  make setup "PYTHON=${PYTHON:-python3}" SYSTEM_SITE=1 "WHEELS=${WHEELS:-}"
  "$VENV/bin/python" benchmarks/gpu_energy.py
  # The demo's joules a sample and step shares are in its run.json; needs the wheels of `make demo`.
  "$VENV/bin/gpuops" demo --out out/energy-demo
  "$VENV/bin/python" benchmarks/gpu_loader.py  # our loader's stall beside a DataLoader's
  if [ -n "$OUT" ]; then
    cp benchmarks/results/*/energy-gpu.json benchmarks/results/*/gpu-loader.json out/energy-demo/run/run.json "$OUT/"
  fi
  exit 0
fi

if [ "$part" = serving ]; then
  make setup "PYTHON=${PYTHON:-python3}" SYSTEM_SITE=1 "WHEELS=${WHEELS:-}"
  "$VENV/bin/python" benchmarks/gpu_serving.py
  if [ -n "$OUT" ]; then cp benchmarks/results/*/gpu-serving.json "$OUT/"; fi
  exit 0
fi

if [ "$part" = kernels ]; then
  make setup "PYTHON=${PYTHON:-python3}" SYSTEM_SITE=1 "WHEELS=${WHEELS:-}"
  mapfile -t files < <(grep -lE 'mark\.gpu' tests/kernels/test_*.py)
  export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
  "$VENV/bin/python" -m pytest -q -m gpu "${files[@]}"
  if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --error-exitcode 9 "$VENV/bin/python" -m pytest -q -m gpu -k "float64 or slices" "${files[@]}"
  else
    echo "compute-sanitizer is not installed here, and was not run"
  fi
  "$VENV/bin/python" benchmarks/bench_kernels.py
  if [ -n "$OUT" ]; then cp benchmarks/results/*/kernels.json "$OUT/"; fi
  exit 0
fi

make demo "PYTHON=${PYTHON:-python3}" SYSTEM_SITE=1 "WHEELS=${WHEELS:-}"
"$VENV/bin/python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' \
  || fail "torch sees no CUDA device"

# Only the files with such tests, so that what the others import need not be here; and without pytest plugins, because
# those that the interpreter happens to have are none of ours.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests)
failed=0
PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$VENV/bin/python" -m pytest -q -m gpu --junitxml="$scratch/gpu.xml" "${files[@]}" \
  || failed=$?

PYTHONPATH=benchmarks "$VENV/bin/python" - "$scratch/gpu.xml" out/demo/summary.json "$scratch/demo.json" \
  <<'PY' || failed=$?
import json, pathlib, shutil, socket, subprocess, sys
from xml.etree import ElementTree

import harness

report, summary, out = map(pathlib.Path, sys.argv[1:])
counts = {key: 0 for key in ("tests", "failures", "errors", "skipped")}
for suite in ElementTree.parse(report).iter("testsuite"):
    counts = {key: counts[key] + int(suite.get(key, 0)) for key in counts}
driver = subprocess.run(
    ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True
).stdout.splitlines()[0]
packages = ("torch", "triton", "lightning", "numpy", "zarr", "icechunk", "onnxruntime")
document = {
    "bench": "demo",
    "command": "benchmarks/gpu.sh demo",
    "machine": harness.machine(),
    "versions": {**harness.versions(packages), "driver": driver},
    "gpu_tests": counts,
    # Where ranks differ, the meter's reasons begin with the host's name, which is nobody's business here.
    "summary": json.loads(summary.read_text().replace(f"{socket.gethostname()}: ", "")),
}
out.write_text(json.dumps(document, indent=1) + "\n")
result = harness.RESULTS / harness.device() / "demo.json"
result.parent.mkdir(parents=True, exist_ok=True)
shutil.copyfile(out, result)
ran = counts["tests"] - counts["skipped"]
print(f"{ran} gpu tests ran, {counts['skipped']} skipped; written to {result}")
raise SystemExit(0 if ran else 1)
PY
if [ -n "$OUT" ]; then
  cp "$scratch/demo.json" out/demo/summary.json out/demo/report.html "$OUT/"
fi
[ "$failed" -eq 0 ] || fail "the gpu tests failed, or none ran: see above"
