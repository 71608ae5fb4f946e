#!/usr/bin/env bash
# Our server against llama.cpp's on the same file: one stream, and eight at once, in alternating pairs.
# The last line is JSON: medians in tokens per second, the ratio of eight streams to one, and the ratio of ours to theirs.
# usage: serve.sh [MODEL.gguf [FOLDER]]
#   MODEL.gguf   default: a Duck of 768 x 12 with random ternary weights, written by our bench
#   FOLDER       where llama.cpp is or will be built; default: a cache folder
#   PAIRS=3 THREADS=2 SECONDS_EACH=20 STREAMS=8 TOKENS=64
#   PEER_MODEL=OTHER.gguf   the same model in another type for llama.cpp, such as Q4_0
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here root=$here/../..
bin=$(PROGRAMS=llama-server "$here/build_llama_cpp.sh" ${2:+"$2"})
cargo build --manifest-path "$root/Cargo.toml" --release -p duck --no-default-features
cargo build --manifest-path "$root/Cargo.toml" --release -p ternary-infer --example bench
target=$(cargo metadata --manifest-path "$root/Cargo.toml" --format-version 1 --no-deps |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')

model=${1:-}
if [[ -z $model ]]; then
    model=${XDG_CACHE_HOME:-$HOME/.cache}/burn-ternary/duck-tq2_0.gguf
    mkdir -p "$(dirname "$model")"
    [[ -f $model ]] || "$target/release/examples/bench" --shape duck --write "$model"
fi
exec python3 "$here/alternate_servers.py" "$target/release/duck" "$bin/llama-server" "$model" \
    "$root/crates/ternary-serve/tests/clients/load.py"
