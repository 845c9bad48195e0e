#!/usr/bin/env bash
# Everything that is claimed of one GPU, in under ten minutes: bash benchmarks/gpu/run.sh [OUT]
# Without a GPU: bash benchmarks/gpu/run.sh OUT --device cpu --models resnet18 --batches 1 2 --photos 4 --rounds 1
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-gpu-results.md}; shift || true
export PYTHONPATH=$PWD/src
python -m benchmarks.gpu.measure "$@" | tee "$out"
