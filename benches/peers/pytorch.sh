#!/usr/bin/env bash
# Our training step against PyTorch's: FP32, BitLinear by fake quantization, and our float and int8 steps, in turn.
# The last line is JSON: medians in tokens per second, medians of the rounds' ratios, and peak memories.
# usage: pytorch.sh [SHAPE]
#   SHAPE       duck (default: 768 wide, 12 layers) or duck-small-gpt2 (128 wide, 4 layers)
#   ROUNDS=5 THREADS="1 2"
#   PYTHON=...  a Python with torch; default: a virtual environment with torch 2.9.0 from PyPI (several GB) in a cache
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here root=$here/../..
python=${PYTHON:-}
if [[ -z $python ]]; then
    venv=${XDG_CACHE_HOME:-$HOME/.cache}/burn-ternary/pytorch
    [[ -x $venv/bin/python ]] || python3 -m venv "$venv"
    "$venv/bin/python" -c 'import torch' 2>/dev/null || "$venv/bin/pip" install torch==2.9.0 numpy
    python=$venv/bin/python
fi
cargo build --manifest-path "$root/Cargo.toml" --release --example step_cost
target=$(cargo metadata --manifest-path "$root/Cargo.toml" --format-version 1 --no-deps |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
cd "$root"
exec python3 "$here/alternate_steps.py" "$python" "$target/release/examples/step_cost" "${1:-duck}"
