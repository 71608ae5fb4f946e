#!/usr/bin/env python3
"""Runs our bench and llama.cpp's in alternating pairs. usage: alternate.py BENCH LLAMA_CPP_BIN MODEL.gguf; see llama_cpp.sh."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

BENCH, BIN, MODEL = sys.argv[1:]
PEER_MODEL = os.environ.get("PEER_MODEL", MODEL)
PAIRS, PROMPT, GENERATE, BATCH = (int(os.environ.get(k, v)) for k, v in
                                  [("PAIRS", 5), ("PROMPT", 512), ("GENERATE", 128), ("BATCH", 8)])
THREADS = [int(t) for t in os.environ.get("THREADS", "1 2").split()]
# Prompt tokens of each sequence of the batch: llama-batched-bench requires some.
BATCH_PROMPT = 16
MEASURES = ["prompt", "generate", "batch"]


def run(*command):
    """What the command prints, and the most memory it held, in bytes."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen([str(c) for c in command], stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        out.seek(0), err.seek(0)
        if status != 0:
            sys.exit(f"{command[0]}: {err.read().decode(errors='replace')}")
        return out.read().decode(), usage.ru_maxrss * 1024


def ours(threads):
    out, _ = run(BENCH, MODEL, "--threads", threads, "--prompt", PROMPT, "--generate", GENERATE, "--batch", BATCH,
                 "--repetitions", 1, "--json")
    report = json.loads(out)
    speed = {m: report[f"{m}_tokens_per_s"] for m in MEASURES}
    return speed | {"resident": report["peak_resident_bytes"], "report": report}


def theirs(threads):
    out, resident = run(f"{BIN}/llama-bench", "-m", PEER_MODEL, "-t", threads, "-p", PROMPT, "-n", GENERATE, "-r", 1,
                        "-o", "json")
    speed = {"prompt" if r["n_prompt"] else "generate": r["avg_ts"] for r in json.loads(out)}
    out, _ = run(f"{BIN}/llama-batched-bench", "-m", PEER_MODEL, "-t", threads, "-tb", threads, "-npp", BATCH_PROMPT,
                 "-ntg", GENERATE, "-npl", BATCH, "-c", BATCH * (BATCH_PROMPT + GENERATE), "--output-format", "jsonl")
    speed["batch"] = next(json.loads(l)["speed_tg"] for l in out.splitlines() if l.startswith("{"))
    return speed | {"resident": resident}


def processor():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def compare(threads):
    pairs = []
    for n in range(PAIRS):
        # Who goes first alternates too.
        first, second = (ours, theirs) if n % 2 == 0 else (theirs, ours)
        a, b = first(threads), second(threads)
        pairs.append((a, b) if first is ours else (b, a))
        print(f"{threads} threads, pair {n + 1}: " + ", ".join(
            f"{m} {pairs[-1][0][m]:.0f} : {pairs[-1][1][m]:.0f}" for m in MEASURES), flush=True)
    median = lambda of: round(statistics.median(of), 3)
    row = {"threads": threads}
    for m in MEASURES:
        row[m] = {"ours": median(a[m] for a, _ in pairs), "llama_cpp": median(b[m] for _, b in pairs),
                  "ratio": median(a[m] / b[m] for a, b in pairs)}
    row["peak_resident_bytes"] = {"ours": max(a["resident"] for a, _ in pairs),
                                  "llama_cpp": max(b["resident"] for _, b in pairs)}
    for key in ["bandwidth_bytes_per_s", "bandwidth_share"]:
        row[key] = median(a["report"][key] for a, _ in pairs)
    return row


rows = [compare(t) for t in THREADS]
print(json.dumps({
    "machine": processor(), "file": os.path.basename(MODEL), "file_bytes": os.path.getsize(MODEL),
    "peer_file": os.path.basename(PEER_MODEL), "peer_file_bytes": os.path.getsize(PEER_MODEL),
    "command": "benches/peers/llama_cpp.sh", "pairs": PAIRS, "prompt": PROMPT, "generate": GENERATE, "batch": BATCH,
    "load_average": os.getloadavg()[0], "results": rows,
}))
