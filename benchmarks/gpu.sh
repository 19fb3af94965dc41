#!/bin/sh
# The GPU lines that docs/results.md lists as open, in pieces of under ten minutes; each leaves its results in $OUT.
#   benchmarks/gpu.sh speed|cifar|ablations|methods DATA
# DATA: CIFAR-10. A piece that is called again goes on where it stopped: runs/ stays on a machine that is kept warm.
set -eu
piece=$1
data=$2
out=${OUT:-docs/results}
limit=${LIMIT:-540}
export SIMSIAM_CACHE="${SIMSIAM_CACHE:-$PWD/runs/cache}" PYTHONUNBUFFERED=1
mkdir -p runs "$out"

# SIGTERM: the run saves its state and ends; the next call resumes it.
train() {
    run=$1
    shift
    if [ -f "$run/summary.json" ]; then return; fi
    if [ -f "$run/config.toml" ]; then set -- --resume -o "$run"; else set -- "$data" -o "$run" "$@"; fi
    timeout --signal=TERM "$limit" python -m simsiam train "$@" || echo "$run: stopped, call again to go on"
}

case $piece in
speed)
    python benchmarks/training.py --size 32 --device cuda --seconds 20 --json "$out/training-gpu-32.json"
    python benchmarks/training.py --size 224 --device cuda --seconds 40 --repeats 3 --json "$out/training-gpu-224.json"
    ;;
cifar)
    train runs/cifar-200 --recipe cifar --epochs 200
    train runs/cifar-800 --recipe cifar
    for run in runs/cifar-200 runs/cifar-800; do
        [ -f $run/summary.json ] || continue
        [ -f $run/evaluation.json ] || python -m simsiam evaluate $run --sgd
        cp $run/summary.json "$out/$(basename $run)-summary.json"
        cp $run/evaluation.json "$out/$(basename $run)-evaluation.json"
    done
    ;;
ablations | methods)
    names="stop-gradient predictor bn symmetry"
    [ "$piece" = methods ] && names="comparison cifar"
    for name in $names; do
        timeout --signal=TERM "$limit" python -m simsiam reproduce $name --data "$data" --scale cifar --epochs 100 \
            --seeds 1 -o runs/reproduce-$name || echo "$name: stopped, call again to go on"
        [ -f runs/reproduce-$name/result.json ] && cp runs/reproduce-$name/result.json "$out/reproduce-$name.json"
    done
    ;;
*)
    echo "There is no piece $piece: speed, cifar, ablations or methods." >&2
    exit 2
    ;;
esac
