#!/usr/bin/env bash
# The GPU measurements in one call, on a machine that has torch with CUDA and no network:
#
#   benchmarks/gpu.sh [--minutes N] [--output FOLDER] [--device cuda] [--size paper]
#
# Runs the tests that need a GPU, then the benchmarks at the paper's sizes, writes JSON, pages and plots into FOLDER, and prints a
# short table last, with the targets and whether they are met. Work is ordered by worth; each part has a share of N minutes and
# is stopped when twice that and a minute are over, at the latest when N minutes are; what it had found by then is written.
# `--device cpu --size tiny` tries the script itself.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=10 output=benchmarks/results/gpu device=cuda size=paper
while (($#)); do
  case $1 in
    --minutes | --output | --device | --size)
      (($# > 1)) || { echo "benchmarks/gpu.sh: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    *)
      sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
      exit 2
      ;;
  esac
done
[[ $minutes =~ ^[0-9]+$ ]] || { echo "benchmarks/gpu.sh: --minutes takes a whole number" >&2; exit 2; }
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
"$python" - "$device" <<'PY' || exit 2
import sys

import torch

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no CUDA device")
PY
mkdir -p "$output"
end=$((SECONDS + 60 * minutes - 15))

part() { # share of the time in percent, file of the log, command
  local limit=$((2 * minutes * 60 * $1 / 100 + 60)) log=$output/$2.log left=$((end - SECONDS))
  shift 2
  ((left > 0)) || { echo "not run, time is up: $*"; return; }
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$log" 2>&1 ||
    echo "exit $? of: $* (see $log)"
}
bench() { # share in percent, name, options
  local share=$1 name=$2
  shift 2
  part "$share" "$name" "$python" -m benchmarks "$name" --size "$size" --device "$device" --output "$output" \
    --minutes "$("$python" -c "print($minutes * $share / 100)")" "$@"
}

of_paper=() first=()
if [[ $size == paper ]]; then
  of_paper=(--only LLaMA-1B "LLaMA-1B, batch 64" LLaMA-130M)
  first=(--only LLaMA-130M)
fi
bench 45 memory_time "${of_paper[@]}"
bench 2 frontier
bench 8 step_parts "${first[@]}"
[[ $device == cuda ]] && part 10 tests "$python" -m pytest -q tests -k "cuda or gpu"
bench 8 micro
bench 10 refresh "${first[@]}"
bench 15 convergence
"$python" -m benchmarks.gpu_targets "$output"
