#!/usr/bin/env bash
# Runs pytest as two processes at a time, as many tests wait for servers and processes rather than compute.
# usage: test_halves.sh PYTEST [ARGUMENT ...]     the first half: tests/serving and tests/kernels; the second: all others
set -u
cd "$(dirname "$0")/.."
first=(tests/serving tests/kernels)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$@" -p no:cacheprovider "${first[@]}" >"$log" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null; rm -f "$log"; exit 130' INT TERM
"$@" "${first[@]/#/--ignore=}"
status=$?
wait "$other" || status=$?
echo "== ${first[*]}"
cat "$log"
exit "$status"
