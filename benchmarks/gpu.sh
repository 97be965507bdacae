#!/usr/bin/env bash
# Everything that needs a GPU, in parts: build, tests, compute-sanitizer, benchmarks, plots. `make gpu` runs it.
#
# benchmarks/results/GPU/ gets one JSON a benchmark, build/gpu/GPU/ one log a part. A part that has passed for this
# commit is not repeated, so that an interrupted run goes on by the same command. Each part has a time limit. PARTS="tests bench_steps" runs some alone; PYTHON is the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
PARTS=${PARTS:-"build tests sanitizer bench_steps bench_peers plots"}
export AVPPC_REQUIRE_GPU=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}

name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || {
  echo "make gpu: torch finds no CUDA device" >&2
  exit 1
}
results=benchmarks/results/$name
state=build/gpu/$name
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
mkdir -p "$results" "$state"

build() { AVPPC_CUDA=1 "$PYTHON" -m pip install -qq --no-build-isolation --no-deps --editable .; }

tests() {
  "$PYTHON" -m pytest -q tests/ops/test_info_nce_triton_gpu.py tests/ops/test_log_mel_cuda.py tests/data/test_clip_loader.py \
    tests/data/test_dali.py tests/data/test_nvdec.py tests/data/test_variations.py
}

sanitizer() {
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
  if [ -z "$tool" ]; then
    echo "compute-sanitizer is not on this machine: install the CUDA toolkit" >&2
    return 1
  fi
  "$tool" --tool memcheck --error-exitcode 1 "$PYTHON" -m pytest -q tests/ops/test_log_mel_cuda.py -k "hard_signals or limited" \
    && "$tool" --tool racecheck --error-exitcode 1 "$PYTHON" -m pytest -q tests/ops/test_log_mel_cuda.py -k limited
}

bench_steps() {
  "$PYTHON" -m pytest -q benchmarks/test_info_nce_cuda.py -k full_step --benchmark-columns=median,iqr \
    --benchmark-json="$results/info_nce_cuda.json"
}

bench_peers() {
  "$PYTHON" -m pytest -q benchmarks/test_info_nce_cuda.py -k "not full_step" --benchmark-columns=median,iqr \
    --benchmark-json="$results/info_nce_cuda_peers.json"
}

plots() { "$PYTHON" benchmarks/plot.py "$results"; }

seconds_of() {
  case $1 in
    build) echo 60 ;; tests | bench_steps) echo 150 ;; sanitizer | bench_peers) echo 50 ;; *) echo 15 ;;
  esac
}

failed=""
for part in $PARTS; do
  done_file=$state/$part.$commit
  if [ -e "$done_file" ]; then
    echo "== $part: passed before"
    continue
  fi
  echo "== $part (at most $(seconds_of "$part") s; log: $state/$part.log)"
  # a part runs in a shell of its own, so that its time limit ends all that it started
  export -f build tests sanitizer bench_steps bench_peers plots
  if PYTHON=$PYTHON results=$results timeout "$(seconds_of "$part")" bash -c "$part" >"$state/$part.log" 2>&1; then
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
