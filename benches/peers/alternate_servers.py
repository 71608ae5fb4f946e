#!/usr/bin/env python3
"""Loads our server and llama.cpp's in alternating pairs. usage: alternate_servers.py DUCK LLAMA_SERVER MODEL.gguf LOAD.py; see
serve.sh."""

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

DUCK, LLAMA, MODEL, LOAD = sys.argv[1:]
PEER_MODEL = os.environ.get("PEER_MODEL", MODEL)
PAIRS, THREADS, SECONDS, STREAMS, TOKENS = (int(os.environ.get(k, v)) for k, v in [
    ("PAIRS", 3), ("THREADS", 2), ("SECONDS_EACH", 20), ("STREAMS", 8), ("TOKENS", 64)])


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def measure(name):
    """Tokens per second of one stream and of many, and bytes resident."""
    port = free_port()
    if name == "ours":
        command = [DUCK, "serve", MODEL, "--port", port, "--threads", THREADS, "--batch", STREAMS]
    else:
        command = [LLAMA, "-m", PEER_MODEL, "--host", "127.0.0.1", "--port", port, "-t", THREADS, "-tb", THREADS,
                   "-np", STREAMS, "-c", 2048 * STREAMS, "--no-webui"]
    log = open(os.devnull, "w")
    server = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log)
    try:
        for _ in range(600):
            if server.poll() is not None:
                sys.exit(f"{command[0]} ended with {server.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        result = {}
        for clients in (1, STREAMS):
            load = [sys.executable, LOAD, f"http://127.0.0.1:{port}/v1", "--completions", "--json", "--clients",
                    clients, "--seconds", SECONDS, "--tokens", TOKENS, "--pid", server.pid]
            load += ["--unequal"] if name != "ours" else []
            out = subprocess.run([str(c) for c in load], capture_output=True, text=True)
            if out.returncode != 0:
                sys.exit(f"{name}: {out.stderr}")
            report = json.loads(out.stdout)
            result[clients], result["resident"] = report["tokens_per_s"], report["resident_last_quarter"]
        return result
    finally:
        server.terminate()
        server.wait()


runs = {"ours": [], "theirs": []}
for pair in range(PAIRS):
    for name in ("ours", "theirs") if pair % 2 == 0 else ("theirs", "ours"):
        runs[name].append(measure(name))
        print(pair, name, runs[name][-1], flush=True)


def median(values):
    return round(statistics.median(values), 3)


summary = {"model": os.path.basename(MODEL), "machine": platform.machine(), "threads": THREADS, "pairs": PAIRS, "streams": STREAMS}
for name, results in runs.items():
    summary[name] = {"one": median(r[1] for r in results), "many": median(r[STREAMS] for r in results),
                     "many_over_one": median(r[STREAMS] / r[1] for r in results),
                     "resident_bytes": median(r["resident"] for r in results)}
pairs = list(zip(runs["ours"], runs["theirs"]))
summary["ours_over_theirs"] = {"one": median(a[1] / b[1] for a, b in pairs),
                               "many": median(a[STREAMS] / b[STREAMS] for a, b in pairs)}
print(json.dumps(summary))
