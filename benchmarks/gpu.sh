#!/usr/bin/env bash
# Run the tests that take a device, the benchmarks and the papers' claims on a GPU, within a time; needs no network.
#
#   bash benchmarks/gpu.sh OUT                  # 9 minutes on cuda; CSV files and logs are left in the folder OUT
#   bash benchmarks/gpu.sh OUT 120 cpu          # the same in 120 seconds on the CPU
#
# PYTHON names the interpreter (python3 by default); torch, torchvision, timm, safetensors, numpy and Pillow are enough.
# What needs another library that is missing is left out with a line. GPU_TESTS, GPU_BENCHMARKS and GPU_EVIDENCE hold
# further arguments of the three parts (data of the evidence, for instance); GPU_PARTS names those to run, all by
# default; GPU_RESULTS is the folder of the evidence's results, for a run that goes on with another's.
set -uo pipefail

out=${1:?the folder for the results must be given}
seconds=${2:-540}
device=${3:-cuda}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
start=$SECONDS

left() { echo $((seconds - (SECONDS - start))); }

# part NAME SECONDS COMMAND…: run a command for so many seconds at most; its output is left in NAME.log
part() {
  local name=$1 most=$2 status=0
  shift 2
  if ((most < 5)); then echo "$name: left out, as no time is left"; return; fi
  echo "$name: at most $most s"
  # what is asked to end at its limit has 10 seconds to write what it has
  timeout --kill-after=10 "$most" "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) echo "$name: done" ;;
    124 | 137) echo "$name: stopped at its limit" ;;
    *) echo "$name: ended with status $status; the last lines of $name.log:"; tail -n 15 "$out/$name.log"; failed=1 ;;
  esac
}

failed=0
has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
{
  "$python" -c "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__)"
  "$python" -m pip list --format=freeze 2>/dev/null
  nvidia-smi 2>/dev/null
} >"$out/machine.txt"
head -n 1 "$out/machine.txt"

runs() { [[ " ${GPU_PARTS:-tests benchmarks evidence} " == *" $1 "* ]]; }

if ! runs tests; then
  :
elif has pytest && has hypothesis; then
  # every test file with a test that takes the device; pytest's options are set here, as its plugins may be missing
  mapfile -t files < <(grep -rl --include='test_*.py' 'device: torch.device' tests | sort)
  VISADAPT_TEST_DEVICE=$device part tests $((seconds * 25 / 100)) "$python" -m pytest -q -o addopts= -o timeout=0 \
    -W default -p no:cacheprovider "${files[@]}" ${GPU_TESTS:-}
else
  echo "tests: left out (pytest or hypothesis is not installed)"
fi

if runs benchmarks; then
  budget=$(left)
  ! runs evidence || budget=$((budget * 60 / 100))
  part benchmarks $((budget + 15)) "$python" -m benchmarks --device "$device" --budget "$budget" --out "$out" \
    ${GPU_BENCHMARKS:-}
fi

if runs evidence; then
  # processes that share a GPU wait for each other's kernels without this service
  if [[ $device == cuda* ]] && command -v nvidia-cuda-mps-control >/dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
    nvidia-cuda-mps-control -d && trap 'echo quit | nvidia-cuda-mps-control' EXIT
    timeout 40 "$python" -c "import torch; torch.ones(1, device='cuda').item()" ||
      { echo quit | nvidia-cuda-mps-control; unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY; trap - EXIT; }
  fi
  processes=1
  [[ $device != cuda* ]] || processes=$(($(nproc) > 2 ? $(nproc) - 1 : 1))
  # the last seconds are for writing what was measured; what was published is not computed again
  budget=$(($(left) - 20))
  results=${GPU_RESULTS:-$(mktemp -d)}
  csv=evidence-${device%%:*}.csv
  [[ -e $out/$csv || ! -e benchmarks/results/$csv ]] || cp "benchmarks/results/$csv" "$out/$csv"
  part evidence $((budget + 10)) "$python" -m benchmarks.evidence "$results" --device "$device" \
    --processes "$processes" --budget "$budget" --out "$out/$csv" ${GPU_EVIDENCE:-}
  [[ -n ${GPU_RESULTS:-} ]] || rm -rf "$results"
fi

echo "after $((SECONDS - start)) s, in $out:" && ls "$out"
exit "$failed"
