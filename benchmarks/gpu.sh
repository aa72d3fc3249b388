#!/usr/bin/env bash
# The GPU measurements in two parts, on a machine that has torch with CUDA and no network:
#
#   benchmarks/gpu.sh speed [--minutes 8] [--output FOLDER] [--device cuda] [--size paper] [--only NAME ...]
#   benchmarks/gpu.sh loss  [the same]
#
# speed: memory and time of steps, where the time goes, first steps, refreshes (python -m benchmarks speed)
# loss:  training with several policies and seeds (python -m benchmarks convergence)
#
# Each writes JSON, a page and its log into FOLDER, and prints a short table last, with the targets and whether they are met.
# Work is ordered by worth. Nothing is begun that would not end within the minutes; whatever still runs then is stopped, and
# what it had found is written. `--only` comes last and names models, or variants. `--device cpu --size tiny` tries the script.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
minutes=8 output=benchmarks/results/gpu device=cuda size=paper only=()
case ${1-} in
  speed) part=speed name=speed ;;
  loss) part=loss name=convergence ;;
  *) usage ;;
esac
shift
while (($#)); do
  case $1 in
    --minutes | --output | --device | --size)
      (($# > 1)) || { echo "benchmarks/gpu.sh: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --only)
      only=("$@")
      break
      ;;
    *) usage ;;
  esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "benchmarks/gpu.sh: --minutes takes a whole number" >&2; exit 2; }
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
seconds=$((60 * minutes)) end=$((SECONDS + 60 * minutes))
"$python" - "$device" <<'PY' || exit 2
import sys

import torch

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no CUDA device")
PY
mkdir -p "$output"
# starting and ending take some of the time
work=$("$python" -c "print(($seconds - 25) / 60)")
timeout --kill-after=3 $((end - SECONDS - 8)) "$python" -m benchmarks "$name" --size "$size" --device "$device" \
  --output "$output" --minutes "$work" ${only[@]+"${only[@]}"} >"$output/$part.log" 2>&1 ||
  echo "exit $? of: benchmarks $name (see $output/$part.log)"
"$python" -m benchmarks.gpu_targets "$output" "$part"
