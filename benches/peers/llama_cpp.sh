#!/usr/bin/env bash
# Our engine against llama.cpp on the same file: alternating pairs of prompt, generation and a batch of eight sequences.
# The last line is JSON: medians in tokens per second, and medians of the pairs' ratios (ours over theirs).
# usage: llama_cpp.sh [MODEL.gguf [FOLDER]]
#   MODEL.gguf   default: a Duck of 768 x 12 with random ternary weights, written by our bench
#   FOLDER       where llama.cpp is or will be built; default: a cache folder
#   PAIRS=5 THREADS="1 2" PROMPT=512 GENERATE=128 BATCH=8
#   PEER_MODEL=OTHER.gguf   the same model in another type for llama.cpp, such as Q4_0
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here root=$here/../..
bin=$("$here/build_llama_cpp.sh" ${2:+"$2"})
cargo build --manifest-path "$root/Cargo.toml" --release -p ternary-infer --example bench
target=$(cargo metadata --manifest-path "$root/Cargo.toml" --format-version 1 --no-deps |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
bench=$target/release/examples/bench

model=${1:-}
if [[ -z $model ]]; then
    model=${XDG_CACHE_HOME:-$HOME/.cache}/burn-ternary/duck-tq2_0.gguf
    mkdir -p "$(dirname "$model")"
    [[ -f $model ]] || "$bench" --shape duck --write "$model"
fi
exec python3 "$here/alternate.py" "$bench" "$bin" "$model"
