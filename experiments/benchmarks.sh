#!/usr/bin/env bash
# Everything that is measured on a GPU, into benchmarks/results/NAME:
#
#     experiments/benchmarks.sh NAME [PART ...]
#
# Each part is stopped after 9 minutes; one that fails or is stopped keeps what it has written, and
# the others go on. Without any, all. PYTHON says which python, RESULTS another folder than
# benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?"usage: experiments/benchmarks.sh NAME [PART ...]"}
shift
all=(attention schemes model inference training flags)
parts=("${@:-${all[@]}}")
for part in "${parts[@]}"; do
    if [[ " ${all[*]} " != *" $part "* ]]; then
        echo "error: no part $part; there are: ${all[*]}" >&2
        exit 2
    fi
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
out=${RESULTS:-benchmarks/results}/$name
benchmark="-m timesformer_jax.cli benchmark"
race="experiments/race_pytorch.py --device=cuda --minutes=8 --json=$out/race.json"

if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
    echo "error: JAX has no GPU here: nvidia-smi shows the driver, pip install '.[cuda13]'" >&2
    exit 2
fi
mkdir -p "$out"
failed=()
run() { timeout --foreground --kill-after=10 9m "$python" "$@" || failed+=("$part"); }
for part in "${parts[@]}"; do
    case $part in
        attention)  # the paper's figure 3
            run $benchmark attention --minutes=7 --schemes=divided,joint \
                --json="$out/attention.json"
            run experiments/attention_cost.py draw "$out/attention.json" ;;
        schemes)
            run $benchmark attention --minutes=7 --json="$out/schemes.json" \
                --schemes=space,time,space_then_time,parallel,axial,local_global ;;
        model) run $benchmark model --minutes=7 --json="$out/model.json" ;;
        inference | training) run $race --workloads="base_$part" ;;
        flags) run experiments/xla_flags.py --minutes=7 --json="$out/flags.json" ;;
    esac
done
part=tables run experiments/benchmark_tables.py
if [ ${#failed[@]} != 0 ]; then
    echo "error: failed, or not over in 9 minutes: ${failed[*]}" >&2
    exit 1
fi
