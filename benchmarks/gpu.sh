#!/usr/bin/env bash
# The GPU measurements in one call, on a machine that has torch with CUDA and no network:
#
#   benchmarks/gpu.sh [MINUTES] [OUTPUT]
#
# Runs the tests that need a GPU, then the benchmarks at the paper's sizes, writes JSON, pages and plots into OUTPUT, and
# prints a short table last. Work is ordered by worth; each part gets a share of MINUTES and writes what it has when its share is up.
# A share can be overrun by the model that is being measured.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=${1:-10}
output=${2:-benchmarks/results/gpu}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$output"

"$python" - <<'PY' || exit 2
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no CUDA device")
PY

share() { "$python" -c "print(round($minutes * $1, 2))"; }
part() { # share, names and options of the benchmarks
  local of_time=$1
  shift
  timeout "$("$python" -c "print(int($minutes * $of_time * 60 + 120))")" \
    "$python" -m benchmarks "$@" --size paper --device cuda --output "$output" \
    --minutes "$(share "$of_time")" >"$output/$1.log" 2>&1 || echo "$1: exit $?, see $output/$1.log"
}

"$python" -m pytest -q tests -k "cuda or gpu" >"$output/tests.log" 2>&1
tail -1 "$output/tests.log"
part 0.45 memory_time --only LLaMA-1B LLaMA-130M
part 0.02 frontier
part 0.08 micro
part 0.10 refresh
part 0.30 convergence
"$python" - "$output" <<'PY'
import json
import pathlib
import sys

rows = []
path = pathlib.Path(sys.argv[1]) / "memory_time.json"
for row in json.loads(path.read_text())["rows"] if path.exists() else []:
    if "ratio" in row:
        saved, peak = (row[key] / 2**30 for key in ("saved_nbytes", "peak_nbytes"))
        print(f"{row['model']:12} {row['method']:28} saved {saved:6.1f} peak {peak:6.1f} GiB, step {row['ratio']:.3f}")
    else:
        print(f"{row['model']:12} {row['method']:28} {row.get('error', 'not timed')}")
PY
