#!/usr/bin/env bash
# Everything that needs a GPU, in parts: build, tests, compute-sanitizer, benchmarks, a table of the proxy tasks, plots.
# `make gpu` runs it.
#
# benchmarks/results/GPU/ gets one JSON a benchmark, results/table-GPU/ the table, build/gpu/GPU/ one log a part. A part
# that has passed for this commit is not repeated, so that an interrupted run goes on by the same command. Each part has
# a time limit, 22 minutes in all; a benchmark begins nothing after three quarters of it, and writes what it has.
# PARTS="tests bench_steps" runs some alone; PYTHON is the interpreter; AVPPC_COMMIT names the commit of a copy without git.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
PARTS=${PARTS:-"build tests bench_steps bench_features sanitizer bench_peers bench_compiled data bench_train bench_loader table plots"}
export AVPPC_REQUIRE_GPU=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}

name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || {
  echo "make gpu: torch finds no CUDA device" >&2
  exit 1
}
results=benchmarks/results/$name
table=results/table-$name
data=data/gpu
state=build/gpu/$name
commit=$(git rev-parse HEAD 2>/dev/null || echo "${AVPPC_COMMIT:-unknown}")
mkdir -p "$results" "$state"

build() { AVPPC_CUDA=1 "$PYTHON" -m pip install -qq --no-build-isolation --no-deps --editable .; }

tests() {
  local beside=()
  # Most of the time goes into compiling kernels, which several processes do at once where they can.
  "$PYTHON" -c "import xdist" 2>/dev/null && beside=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  "$PYTHON" -m pytest -q "${beside[@]}" tests/ops/info_nce/triton/test_info_nce_triton_gpu.py \
    tests/ops/info_nce/triton/test_moments_triton_gpu.py tests/ops/log_mel/test_log_mel_cuda.py tests/data/packed/test_clip_loader.py \
    tests/data/on_the_fly/test_dali.py tests/data/on_the_fly/test_nvdec.py tests/data/test_variations.py tests/ops/test_clips.py
}

sanitizer() {
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
  if [ -z "$tool" ]; then
    echo "compute-sanitizer is not on this machine: install the CUDA toolkit" >&2
    return 1
  fi
  "$tool" --tool memcheck --error-exitcode 1 "$PYTHON" -m pytest -q tests/ops/log_mel/test_log_mel_cuda.py -k "hard_signals or limited" \
    && "$tool" --tool racecheck --error-exitcode 1 "$PYTHON" -m pytest -q tests/ops/log_mel/test_log_mel_cuda.py -k limited
}

# benchmark NAME ...: pytest's arguments; the results go to NAME.json
benchmark() {
  local name=$1
  shift
  # The plugin's warning of no results, an error in pytest, would take the place of what went wrong.
  "$PYTHON" -m pytest -q --benchmark-columns=median,iqr --benchmark-json="$results/$name.json" \
    --session-timeout="$((limit * 3 / 4))" --timeout="$((limit / 4))" \
    -W ignore::pytest_benchmark.logger.PytestBenchmarkWarning "$@"
}

bench_steps() { benchmark info_nce_cuda benchmarks/test_info_nce_cuda.py -k full_step; }

bench_peers() { benchmark info_nce_cuda_peers benchmarks/test_info_nce_cuda.py -k "not full_step and not compiled"; }

bench_compiled() { benchmark info_nce_cuda_compiled benchmarks/test_info_nce_cuda.py -k compiled; }

bench_features() { benchmark log_mel_cuda benchmarks/test_log_mel_cuda.py; }

# Talking mouths, no face and no voice in two splits.
data() {
  "$PYTHON" -m avppc synth --out "$data/videos" --words 50 --clips-per-word 100 --extra-clips 3000 \
    --train-speakers 400 --test-speakers 80 --val-speakers 20 \
    && "$PYTHON" -m avppc prepare --data "$data/videos" --out "$data/packed"
}

# Where the step's time goes, and what each part of the library brings.
bench_train() {
  for options in "" "--batch-size 256" "--compile" "--activation-checkpointing"; do
    "$PYTHON" -m avppc bench-train --data "$data/packed" --preset gpu $options >"$results/bench_train${options// /_}.json" || return 1
  done
  AVPPC_BENCH_DATA=$data benchmark train_step benchmarks/test_train_step.py -s --timeout="$limit" # one test, two minutes
}

bench_loader() { benchmark loader benchmarks/test_loader.py -k "packed_batches or packed_loader or dali"; }

# The proxy tasks under one budget; what its time limit leaves undone stays empty.
table() {
  local task command same="batch_size=256;encoder.channels=motion"
  command=("$PYTHON" -m avppc table --data "$data/packed" --out "$table" --preset gpu --steps 400 --labels 10,all --heads bins tconv --tasks)
  for task in av-permutative synchronization:rivals.sync_mode=multiway\; time-arrow correspondence visual-permutative; do
    case $task in *:*) command+=("${task}$same") ;; *) command+=("$task:$same") ;; esac
  done
  timeout 270 "${command[@]}" || { "${command[@]}" --only-finished && [ -s "$table/table.md" ]; }
}

plots() { "$PYTHON" benchmarks/plot.py "$results"; }

seconds_of() {
  case $1 in
    build) echo 60 ;;
    tests | bench_steps) echo 150 ;;
    bench_train) echo 240 ;;
    data | bench_compiled) echo 90 ;;
    table) echo 300 ;;
    plots) echo 15 ;;
    *) echo 50 ;;
  esac
}

failed=""
for part in $PARTS; do
  done_file=$state/$part.$commit
  if [ -e "$done_file" ]; then
    echo "== $part: passed before"
    continue
  fi
  limit=$(seconds_of "$part")
  echo "== $part (at most $limit s; log: $state/$part.log)"
  # a part runs in a shell of its own, so that its time limit ends all that it started
  export -f build tests sanitizer benchmark bench_steps bench_peers bench_compiled bench_features data bench_train bench_loader table plots
  export PYTHON results table data limit
  if timeout "$limit" bash -c "$part" >"$state/$part.log" 2>&1; then
    [ "$part" = plots ] || touch "$done_file"
    tail -1 "$state/$part.log"
  else
    echo "== $part failed:" >&2
    tail -15 "$state/$part.log" >&2
    failed="$failed $part"
  fi
done
if [ -n "$failed" ]; then
  echo "make gpu: failed:$failed; the same command tries these again" >&2
  exit 1
fi
echo "make gpu: all passed; results in $results"
