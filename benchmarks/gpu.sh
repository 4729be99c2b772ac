#!/usr/bin/env bash
# What only a GPU can show, in about ten minutes: kernels against float32, then the published 2B shape with random
# weights, ours and its rivals in turn. Prints its tables last; keeps everything in the folder OUT (default runs/gpu).
#
#     benchmarks/gpu.sh [pairs in a batch (256)] [texts (1500)] [images (500)]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu}
mkdir -p "$out"
python=${PYTHON:-python}
pairs=${1:-256} texts=${2:-1500} images=${3:-500}
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTORCH_ALLOC_CONF=expandable_segments:True
tests() { CUDA_VISIBLE_DEVICES=0,1 timeout 240 "$python" -m pytest -s -q -p no:cacheprovider tests/gpu/test_cuda.py; }
step() {
    timeout 420 "$python" benchmarks/train_step.py --device cuda --size 2b --rounds 1 --chunk-tokens 8192 --chunk-items 32 "$@"
}
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
    date -u +%F
} >"$out/environment.txt" 2>&1
tests >"$out/tests.txt" 2>&1
step --sizes "$pairs" --arms ours,st,recipe,eager,paper >"$out/train_step.md" 2>"$out/train_step.log"
timeout 300 "$python" benchmarks/encode.py --device cuda --size 2b --rounds 1 --texts "$texts" --images "$images" \
    >"$out/encode.md" 2>"$out/encode.log"
cat "$out/environment.txt"
tail -n 25 "$out/tests.txt"
tail -n 3 "$out/train_step.log" "$out/encode.log"
cat "$out/train_step.md" "$out/encode.md"
