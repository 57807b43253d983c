#!/usr/bin/env bash
# What a lent GPU is for, each piece with a process and a time limit of its own: a kernel that
# breaks the device ends its part only. Runs from a bare checkout with torch, triton, pytest.
#
#   benchmarks/on_gpu.sh tests       the tests marked gpu, then tiny runs of benchmarks (9 min at most)
#   benchmarks/on_gpu.sh bench       head steps, whole steps, cross entropy, labels (10 min at most)
#   benchmarks/on_gpu.sh tune        tiles and chunks by time; with .paper/, the paper's kernels (7 min)
#
# The tests compile some 450 kernels, 1.5 s each: carry pytest-xdist on PYTHONPATH
# (`pip install --target .whl pytest-xdist`). A part that runs out of time is interrupted, not
# killed: tracebacks and tables are written.
# Results go under $OUT (else benchmarks/results/gpu). ELMO_COMMIT names the commit where git cannot.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"

tests() { # tests NAME SECONDS [MORE]: pytest's output in $OUT/NAME.log
    # One compile process a worker: each would start a pool of its own.
    # shellcheck disable=SC2086
    TORCHINDUCTOR_COMPILE_THREADS=1 timeout -s INT -k 15 "$2" \
        python -m pytest $workers -v -rfE --tb=short -m gpu "${@:3}" 2>&1 | tee "$OUT/$1.log"
}

part() { # part NAME SECONDS [MORE]: rows are added to $OUT/rows.jsonl
    # shellcheck disable=SC2086
    timeout -s INT -k 15 "$2" python benchmarks/gpu.py --out "$OUT" --parts $1 "${@:3}" 2>&1 |
        tee -a "$OUT/log"
}

case ${1:-} in
tests)
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
    workers=$(python -c "import importlib.util as u; print('-n 12' if u.find_spec('xdist') else '')")
    tests kernels 240 --ignore=tests/cuda
    tests cuda 200 tests/cuda
    part "bce ce labels" 90 --dry
    ;;
bench)
    part bce 130
    part step 300
    part ce 100
    part labels 50
    ;;
tune)
    [[ -d .paper ]] && part paper 120 --paper .paper
    part tune 420
    ;;
*)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
