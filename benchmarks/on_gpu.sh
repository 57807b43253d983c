#!/usr/bin/env bash
# What a lent GPU is for, each piece with a process and a time limit of its own: a kernel that
# breaks the device ends its part only. Runs from a bare checkout with torch, triton, pytest.
#
#   benchmarks/on_gpu.sh tests       the tests marked gpu, then a tiny run of every benchmark (3 min)
#   benchmarks/on_gpu.sh bench       head steps, whole steps, labels, cross entropy (9 min)
#   benchmarks/on_gpu.sh tune        tiles and chunks by time; with .paper/, the paper's kernels (7 min)
#
# Results go under $OUT (else benchmarks/results/gpu). ELMO_COMMIT names the commit where git cannot.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"

part() { # part NAME SECONDS [MORE]: rows are added to $OUT/rows.jsonl
    timeout "$2" python benchmarks/gpu.py --out "$OUT" --parts "$1" "${@:3}" 2>&1 | tee -a "$OUT/log"
}

case ${1:-} in
tests)
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
    workers=$(python -c "import importlib.util as u; print('-n 12' if u.find_spec('xdist') else '')")
    # shellcheck disable=SC2086
    timeout 420 python -m pytest $workers -rfE --tb=short -m gpu 2>&1 | tee "$OUT/pytest.log"
    timeout 150 python benchmarks/gpu.py --out "$OUT/dry" --dry 2>&1 | tee "$OUT/dry.log"
    ;;
bench)
    part bce 150
    part step 270
    part labels 60
    part ce 110
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
