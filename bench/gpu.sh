#!/usr/bin/env bash
# Everything that a GPU should be asked, in stages of less than eight minutes that run one by one, without a network.
#
#   bench/gpu.sh                    lists the stages
#   bench/gpu.sh STAGE...           runs some; results go to bench/results/<device>/, logs to build/gpu/
#   bench/gpu.sh --dry-run STAGE... at toy size, on a CPU too: do the commands work?
#
# A machine without network that has Python 3.12, torch 2.11 with CUDA 13 and triton 3.6 needs wheels for the rest. Fetch them
# elsewhere into wheels/, and take them along:
#
#   pip download --python-version 3.12 --only-binary=:all: --no-deps -d wheels -c constraints.txt \
#     tyro docstring-parser typeguard typing-extensions            # what GPU images lack most often
#     safetensors numpy tqdm pillow matplotlib scikit-learn h5py   # run time, where missing
#     scikit-build-core pybind11 ninja cmake packaging pathspec    # to build csrc/
#     pytest pytest-benchmark hypothesis scipy                     # to test
#
# (pip's --platform manylinux_2_28_x86_64 and its like choose wheels for another kind of machine.) A stage installs what is
# missing from there: pip install --no-index --find-links wheels. Never torch or triton: the machine's own are kept.
#
# What a stage took on an H200 with 16 processor cores: a benchmark 10 to 60 s with its compilation (DTYPES=bfloat16), a
# training step of uvit_h2 a minute before its first step where torch.compile is among the sides. Nobody knows it yet of
# bench_linear, compare_* and accuracy_*. One stage at a time: what else runs makes compilation several times slower.
#
# Half an hour of a GPU, in calls of less than ten minutes, answers most in this order: check tests_kernels accuracy_uvit_h2;
# step_uvit_h2; profile_uvit_h2 bench_linear (then budget.md shows the largest gap by measurement); compare_kernels_uvit_h2;
# step_dit_xl2; bench_sampler.
#
# Environment: PYTHON (python3), WHEELS (wheels), LIMIT_S (450: seconds for a command), ROUNDS (31), DTYPES (bfloat16 float32),
# ERDFAST_COMMIT (what results say where there is no .git), ERD, UVIT, LIGHTNINGDIT (checkouts of other repositories to be
# measured beside ours), OUT (a folder that gets a copy of the log and of every result that a stage wrote).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} wheels=${WHEELS:-wheels} limit=${LIMIT_S:-450} rounds=${ROUNDS:-31}
read -ra dtypes <<<"${DTYPES:-bfloat16 float32}"
logs=build/gpu
dry=
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

ops() {
  find bench -maxdepth 1 -name 'bench_*.py' ! -name bench_train_step.py ! -name bench_loader.py -printf '%f\n' | sed 's/\.py$//' | sort
}

stages() {
  printf '%-20s %s\n' \
    check "install, import, name the device and its ceilings" \
    tests_ops "tests/ops on the GPU against float64" \
    tests_kernels "tests/kernels on the GPU against float64, with guard zones" \
    tests_rest "tests/models, tests/training, tests/sampling" \
    memcheck "compute-sanitizer over small launches of every kernel, where it is installed"
  ops | while read -r name; do printf '%-20s %s\n' "$name" "benchmark"; done
  printf '%-20s %s\n' \
    step_uvit_h2 "training steps, batch 128" \
    step_uvit_h2_small "training steps, batch 32" \
    step_dit_xl2 "training steps, batch 128" \
    step_dit_xl2_small "training steps, batch 32" \
    step_dit_b2 "training steps, batch 128" \
    step_dit_b2_small "training steps, batch 32" \
    step_lightningdit_xl1 "training steps, batch 128" \
    step_jit_b16 "training steps on pixels of 256, batch 128" \
    step_adm_unet_imagenet64 "training steps on pixels of 64, batch 128" \
    compare_kernels_uvit_h2 "our compiled step with one kernel after the other replaced by what torch.compile makes" \
    compare_kernels_dit_xl2 "the same" \
    compare_kernels_lightningdit_xl1 "the same" \
    compare_kernels_jit_b16 "the same" \
    compare_graph_uvit_h2 "our compiled step with forward and backward as one CUDA graph" \
    compare_graph_dit_b2 "the same" \
    compare_fp8_uvit_h2 "our compiled step with float8 products" \
    compare_fp8_dit_xl2 "the same" \
    compare_segments_uvit_h2 "our compiled step with memory in segments that grow" \
    compare_full_uvit_h2 "our compiled step as one compiled graph: minutes of compilation" \
    compare_tuned_uvit_h2 "the same, kernels chosen by measurement: more minutes" \
    accuracy_uvit_h2 "loss and gradients of every option beside float32, batch 16" \
    accuracy_dit_xl2 "the same" \
    accuracy_lightningdit_xl1 "the same" \
    accuracy_jit_b16 "the same" \
    profile_uvit_h2 "where the time of a step goes, batch 128, compiled by blocks" \
    profile_dit_xl2 "the same" \
    profile_dit_b2 "the same" \
    profile_lightningdit_xl1 "the same" \
    profile_jit_b16 "the same: the share of the loss at pixels" \
    loader "reading shuffled latents beside others' ways, on the processor" \
    digits "the digits recipe and its quality" \
    weighting "loss weightings on mixtures, DiT-S/2: as many trainings as the time allows, then the next time"
}

run() { # one bounded command; a stage goes on without it and fails at its end
  echo "+ $*"
  local status=0
  timeout --kill-after=20 "$limit" "$@" || status=$?
  [ "$status" = 124 ] && echo "gpu.sh: stopped after $limit s: $*" >&2
  [ "$status" = 0 ] || failed=1
}

installed() { "$python" -c 'import tyro, safetensors, erdfast; from erdfast import _C' 2>/dev/null; }

install() {
  installed && return
  [ -n "$dry" ] && { echo "gpu.sh: erdfast is not installed for $python" >&2; exit 2; }
  local pip=("$python" -m pip install --quiet --no-index --find-links "$wheels" --no-build-isolation)
  # Requirements that are there already are left alone; what is missing must be in the folder of wheels.
  "${pip[@]}" tyro safetensors tqdm pillow matplotlib scikit-learn h5py scikit-build-core pybind11 ninja cmake \
    pytest pytest-benchmark hypothesis scipy
  "${pip[@]}" --no-deps --editable .
  installed || { echo "gpu.sh: erdfast cannot be imported; run: $python -c 'import erdfast._C, tyro'" >&2; exit 2; }
}

check() {
  run "$python" - "$dry" <<'PY'
import sys
import torch, triton
from bench.device import environment, measure_ceilings
print(environment())
dry = bool(sys.argv[1])
ceilings = measure_ceilings(quick=dry)
print("ceilings can be measured" if dry else ceilings)
PY
}

tests() {
  if [ -n "$dry" ]; then
    run "$python" -m pytest -qq --collect-only "$@"
  else
    local parallel=()
    "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
    run "$python" -m pytest -q -p no:cacheprovider --tb=short --durations=10 "${parallel[@]}" "$@"
  fi
}

memcheck() {
  local checker=compute-sanitizer
  command -v "$checker" >/dev/null || { echo "gpu.sh: no $checker here: nothing checked"; return; }
  # Without PyTorch's cache every tensor is an allocation of its own, so that one past its end is seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    run "$checker" --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -x -p no:cacheprovider tests/kernels --deselect tests/kernels/test_aot.py
  done
}

benchmark() {
  if [ -n "$dry" ]; then
    run "$python" -m "bench.$1" --quick --no-compile
  else
    run "$python" -m "bench.$1" --rounds "$rounds" --dtypes "${dtypes[@]}"
  fi
}

step() { # model batch
  if [ -n "$dry" ]; then
    run "$python" -m bench.bench_train_step --model "${1%%_*}_tiny" --batch 4 --sides eager ours --blocks 1 --steps 2 \
      --warmup 1 --no-save
    return
  fi
  local others=()
  [ -n "${ERD:-}" ] && others+=(--erd "$ERD")
  [[ -n "${UVIT:-}" && $1 = uvit* ]] && others+=(--uvit "$UVIT")
  [[ -n "${LIGHTNINGDIT:-}" && $1 = dit* ]] && others+=(--lightningdit "$LIGHTNINGDIT")
  run "$python" -m bench.bench_train_step --model "$1" --batch "$2" "${others[@]}"
}

compare() { # what model
  if [ -n "$dry" ]; then
    local sides=(ours_compile "ours_$1")
    [ "$1" = kernels ] && sides=(ours_compile without_modulated_norm)
    run "$python" -m bench.bench_train_step --compare "$1" --model "${2%%_*}_tiny" --batch 4 --sides "${sides[@]}" \
      --blocks 1 --steps 2 --warmup 1 --no-save
  else
    run "$python" -m bench.bench_train_step --compare "$1" --model "$2" --batch 128
  fi
}

accuracy() { # model
  if [ -n "$dry" ]; then
    run "$python" -m bench.step_accuracy --model "${1%%_*}_tiny" --batch 4 --sides plain ours --no-save
  else
    run "$python" -m bench.step_accuracy --model "$1"
  fi
}

profile() { # model
  if [ -n "$dry" ]; then
    run "$python" -m bench.profile_step --model "${1%%_*}_tiny" --batch 4 --side ours --steps 1 --warmup 1 --no-save
  else
    run "$python" -m bench.profile_step --model "$1" --batch 128
  fi
}

loader() {
  if [ -n "$dry" ]; then run "$python" -m bench.bench_loader --quick; else run "$python" -m bench.bench_loader; fi
}

digits() {
  rm -rf "$logs/digits"
  if [ -n "$dry" ]; then
    run "$python" -m erdfast.train --model uvit_tiny --data mixture:4x8x8 --steps 4 --sample-every 0 --out "$logs/digits"
  else
    run "$python" -m erdfast.train --out "$logs/digits"
    local results
    results=bench/results/$("$python" -c 'from bench.device import device_name; print(device_name())')
    mkdir -p "$results"
    run cp "$logs/digits/evaluation.json" "$results/digits.json"
    run cp "$logs/digits/summary.png" "$results/digits.png"
  fi
}

weighting() { # goes on where the cells in its folder end: bring them back with the results, and call it again
  if [ -n "$dry" ]; then
    run "$python" -m erdfast.experiments.weighting --quick --workers 1 --out "$logs/weighting"
  else
    local results
    results=bench/results/$("$python" -c 'from bench.device import device_name; print(device_name())')/weighting
    run "$python" -m erdfast.experiments.weighting --scale gpu --out "$results"
    run "$python" -m erdfast.experiments.weighting --scale gpu --out "$results" --only-report
  fi
}

stage() {
  case $1 in
    check) check ;;
    tests_ops) tests tests/ops ;;
    tests_kernels) tests tests/kernels ;;
    tests_rest) tests tests/models tests/training tests/sampling ;;
    memcheck) memcheck ;;
    bench_*) benchmark "$1" ;;
    step_*_small) name=${1#step_}; step "${name%_small}" 32 ;;
    step_*) step "${1#step_}" 128 ;;
    compare_*) name=${1#compare_}; compare "${name%%_*}" "${name#*_}" ;;
    accuracy_*) accuracy "${1#accuracy_}" ;;
    profile_*) profile "${1#profile_}" ;;
    loader) loader ;;
    digits) digits ;;
    weighting) weighting ;;
  esac
}

[ "${1:-}" = --dry-run ] && { dry=1; logs=$(mktemp -d); trap 'rm -rf "$logs"' EXIT; shift; }
[ $# -gt 0 ] || { stages; exit 0; }
for name in "$@"; do
  stages | awk '{print $1}' | grep -qx -- "$name" || { echo "gpu.sh: no stage is called $name; choose from:" >&2; stages >&2; exit 2; }
done
install
mkdir -p "$logs"
status=0
for name in "$@"; do
  echo "== $name"
  begun=$SECONDS outcome="all well"
  touch "$logs/begun"
  (
    failed=
    stage "$name"
    [ -z "$failed" ]
  ) 2>&1 | tee "$logs/$name.log" || outcome="not all well" status=1
  echo "== $name: $outcome, $((SECONDS - begun)) s"
  if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    cp "$logs/$name.log" "$OUT/"
    find bench/results \( -name '*.json' -o -name '*.png' -o -name '*.md' \) -newer "$logs/begun" -print0 | while IFS= read -r -d '' file; do
      mkdir -p "$OUT/$(basename "$(dirname "$file")")"
      cp "$file" "$OUT/$(basename "$(dirname "$file")")/"
    done
  fi
done
exit $status
