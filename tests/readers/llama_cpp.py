#!/usr/bin/env python3
"""Compares llama.cpp with our engine on model files: same ids for 200 texts, KL of the next-token distributions in nats
a token, same greedy continuations. Fails where a file does not load or a limit is broken.

usage: llama_cpp.py LLAMA_CPP_FOLDER MODEL.gguf... [--texts FILE_OR_FOLDER]...
LLAMA_CPP_FOLDER is the argument of benches/peers/build_llama_cpp.sh. Needs numpy, a C++ compiler and cargo.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys

import numpy

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXTS, PROMPTS, PROMPT_TOKENS, GREEDY_TOKENS, LOGIT_TEXTS, LOGIT_TOKENS = 200, 50, 16, 64, 32, 64
MAX_KL, MIN_GREEDY = 5e-3, 0.9
# What tokenizers get wrong: runs of spaces, line ends, digits, contractions, accents, other scripts, emoji.
HARD = ["", " ", "  two  spaces ", "\n\n\nlines\r\n\ttabs", "1234567 3.14159 1e-9", "don't we'll I'M YOU'RE", "naïve café Ångström",
        "日本語のテキスト", "Привет, мир!", "👩‍👩‍👧‍👦🦆 quack", "a_b-c/d\\e", "x=y+z; // code {}", "ﬁ ligature ½ ², №", "e\u0301 combining"]


def program(folder):
    """Builds the questions to llama.cpp against the library in `folder`."""
    path = folder / "burn_ternary_reader"
    lib = folder / "build" / "bin"
    subprocess.run(["c++", "-O1", "-std=c++17", str(ROOT / "tests/readers/llama_cpp.cpp"), "-o", str(path),
                    f"-I{folder}/llama.cpp/include", f"-I{folder}/llama.cpp/ggml/include", f"-L{lib}", "-lllama", "-lggml",
                    "-lggml-base", f"-Wl,-rpath,{lib}"], check=True)
    return path


def ours():
    build = ["cargo", "build", "--release", "-p", "ternary-infer", "--example", "probe", "--message-format", "json"]
    out = subprocess.run(build, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    built = [json.loads(line).get("executable") for line in out.splitlines()]
    return next(path for path in reversed(built) if path)


def ask(path, model, question, data, *more):
    run = subprocess.run([str(path), str(model), question, *map(str, more)], input=data, capture_output=True)
    if run.returncode != 0:
        sys.exit(f"{path} {model} {question}: {run.stderr.decode(errors='replace')}")
    return run.stdout


def ids_of(data):
    return [[int(i) for i in line.split()] for line in data.decode().split("\n")[:-1]]


def lines(ids):
    return "".join(" ".join(map(str, i)) + "\n" for i in ids).encode()


def log_softmax(logits):
    logits = logits.astype(numpy.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))


def passages(places):
    files = [f for p in places for f in (sorted(p.rglob("valid*.txt")) or sorted(p.rglob("*.txt")) if p.is_dir() else [p])
             if "LICENSE" not in f.name]
    rng = random.Random(1)
    found = list(HARD)
    while len(found) < TEXTS:
        text = files[len(found) % len(files)].read_text(errors="ignore")
        start = rng.randrange(max(1, len(text) - 400))
        found.append(text[start:start + 400].replace("\0", ""))
    return found


def compare(model, us, them, texts):
    data = b"".join(t.encode() + b"\0" for t in texts)
    a, b = (ids_of(ask(p, model, "tokenize", data)) for p in (us, them))
    same = sum(x == y for x, y in zip(a, b, strict=True))
    for text, x, y in [(t, x, y) for t, x, y in zip(texts, a, b) if x != y][:3]:
        print(f"  {text[:60]!r}: ours {x[:12]}, theirs {y[:12]}")

    long = [i[:LOGIT_TOKENS] for i in a[len(HARD):] if len(i) >= PROMPT_TOKENS]
    probed = long[:LOGIT_TEXTS]
    count = sum(map(len, probed))
    logits = [numpy.frombuffer(ask(p, model, "logits", lines(probed)), "<f4").reshape(count, -1) for p in (us, them)]
    p, q = map(log_softmax, logits)
    kl = float((numpy.exp(p) * (p - q)).sum(-1).mean())
    top = float((p.argmax(-1) == q.argmax(-1)).mean())

    prompts = lines(i[:PROMPT_TOKENS] for i in long[:PROMPTS])
    x, y = (ids_of(ask(p, model, "greedy", prompts, GREEDY_TOKENS)) for p in (us, them))
    greedy = sum(m == n for m, n in zip(x, y, strict=True)) / len(x)

    ok = same == len(texts) and kl < MAX_KL and greedy >= MIN_GREEDY
    print(f"{'ok  ' if ok else 'FAIL'} {model.name}: {same} of {len(texts)} texts tokenized alike, KL {kl:.1e} nats a token, "
          f"top-1 equal {top:.1%}, greedy text of {GREEDY_TOKENS} tokens equal on {greedy:.0%} of {len(x)} prompts", flush=True)
    return ok


parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("models", type=pathlib.Path, nargs="+")
parser.add_argument("--texts", type=pathlib.Path, action="append")
args = parser.parse_args()
texts = passages(args.texts or [ROOT / "../shared/data/text"])
us, them = ours(), program(args.folder.resolve())
sys.exit(0 if all([compare(m, us, them, texts) for m in args.models]) else 1)
