#!/bin/sh
# Measures the GPU figures of docs/results.md and its open items, in pieces of under ten minutes; results go to $OUT.
#   benchmarks/gpu.sh tests|step|speed|peers|cifar|ablations|methods DATA
# DATA: CIFAR-10. Each call of cifar, ablations or methods starts or resumes the first unfinished run or experiment, so
# keep runs/ between calls. Run one piece at a time: the tests would share the GPU with any other run.
set -eu
piece=$1
data=${2:-demo}
out=${OUT:-docs/results/gpu}
limit=${LIMIT:-540}
export SIMSIAM_CACHE="${SIMSIAM_CACHE:-$PWD/runs/cache}" PYTHONUNBUFFERED=1
mkdir -p runs "$out"

# On SIGTERM the run saves its state and exits; the next call resumes it.
train() {
    run=$1
    shift
    if [ -f "$run/summary.json" ]; then return; fi
    if [ -f "$run/config.toml" ]; then set -- --resume -o "$run"; else set -- "$data" -o "$run" "$@"; fi
    timeout --signal=TERM "$limit" python -m simsiam train "$@" || echo "$run: stopped, call again to go on"
}

case $piece in
tests) # one thread each: ten processes of sixteen threads block one another; on SIGINT pytest still reports failures
    OMP_NUM_THREADS=1 timeout --signal=INT --kill-after=20 "$limit" \
        python -m pytest -v --tb=short -n 10 --dist worksteal tests >"$out/tests.log" 2>&1 || true
    grep -E "FAILED|ERROR|passed|failed" "$out/tests.log" || true
    ;;
step)
    python benchmarks/step.py --json "$out/step-32.json"
    python benchmarks/step.py --ways 0,1,2,3 --recipe imagenet --encoder resnet50 --size 224 --source 256 --batch 64 \
        --seconds 1.5 --repeats 3 --json "$out/step-224.json"
    python benchmarks/step.py --ways 1,3 --method fastsiam --batch 128 --json "$out/step-fastsiam.json"
    ;;
speed)
    python benchmarks/training.py --size 32 --device cuda --data "$data" --seconds 15 --repeats 3 \
        --settings train.compile=true --json "$out/training-32.json"
    python benchmarks/training.py --size 224 --device cuda --seconds 30 --repeats 3 \
        --settings train.compile=true train.batch_size=256 encoder.name=resnet50 --json "$out/training-224.json"
    ;;
peers)
    python benchmarks/peers.py --only training --sizes 32 --device cuda --encoder cifar-resnet18 --batch 512 --data "$data" \
        --images 16000 --seconds 8 --repeats 3 --compile --json "$out/peers-32.json"
    ;;
cifar)
    for epochs in 200 800; do
        run=runs/cifar-$epochs
        if [ -f $run/evaluation.json ]; then continue; fi
        if [ -f $run/summary.json ]; then
            timeout "$limit" python -m simsiam evaluate $run --sgd
            cp $run/summary.json "$out/cifar-$epochs-summary.json"
            cp $run/evaluation.json "$out/cifar-$epochs-evaluation.json"
        else
            train $run --recipe cifar --epochs $epochs
        fi
        break
    done
    ;;
ablations | methods)
    names="stop-gradient predictor bn symmetry"
    [ "$piece" = methods ] && names="comparison cifar"
    for name in $names; do
        if [ -f "$out/reproduce-$name.json" ]; then continue; fi
        timeout --signal=TERM "$limit" python -m simsiam reproduce $name --data "$data" --scale cifar --epochs 100 \
            --seeds 1 -o runs/reproduce-$name || echo "$name: stopped, call again to go on"
        if [ -f runs/reproduce-$name/result.json ]; then
            cp runs/reproduce-$name/result.json "$out/reproduce-$name.json"
        fi
        break
    done
    ;;
*)
    echo "There is no piece $piece: tests, step, speed, peers, cifar, ablations or methods." >&2
    exit 2
    ;;
esac
