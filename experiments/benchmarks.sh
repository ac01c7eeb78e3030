#!/usr/bin/env bash
# Everything that is measured on a GPU, into benchmarks/results/NAME:
#
#     experiments/benchmarks.sh NAME [kernels|attention|model|inference|training|flags ...]
#
# Each of the six is to end within 9 minutes; without any, all. PYTHON says which python, RESULTS
# another folder than benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?"usage: experiments/benchmarks.sh NAME [kernels|attention|model|inference|training|flags ...]"}
shift
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
out=${RESULTS:-benchmarks/results}/$name
mkdir -p "$out"

timesformer() { "$python" -m timesformer_jax.cli "$@"; }
race() {
    "$python" experiments/race_pytorch.py --device=cuda --works="$1" --minutes=7 \
        --json="$out/race.json"
}

for part in "${@:-kernels attention model inference training flags}"; do
    for one in $part; do
        case $one in
            kernels)  # all other parts then use the fastest
                timesformer benchmark attention --choose --minutes=7 --schemes=divided,joint \
                    --frames=8,16,32,96 --sides=224 --batch_size=8 --json="$out/kernels.json" ;;
            attention)
                timesformer benchmark attention --minutes=7 --json="$out/attention.json"
                "$python" experiments/attention_cost.py "$out/attention.json" ;;
            model) timesformer benchmark model --minutes=7 --json="$out/model.json" ;;
            inference) race base_inference ;;
            training) race base_training ;;
            flags) timesformer benchmark flags --minutes=7 --json="$out/flags.json" ;;
            *) echo "error: no part $one; there are kernels, attention, model, inference," \
                   "training, flags" >&2
               exit 2 ;;
        esac
    done
done
"$python" experiments/benchmark_tables.py
