"""Alternates training steps of PyTorch and of burn-ternary, each in a process of its own; see pytorch.sh."""
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

python, step_cost, shape = sys.argv[1:]
rounds = int(os.environ.get("ROUNDS", "5"))
SHAPES = {
    "duck": dict(width=768, layers=12, heads=12, ff=3072, vocab=8192, seq=128, batch=8),
    "duck-small-gpt2": dict(width=128, layers=4, heads=4, ff=512, vocab=8192, seq=128, batch=8),
}
sizes = SHAPES[shape]
peer = Path(__file__).with_name("pytorch_step.py")
flags = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]


def run(command, threads):
    environment = dict(os.environ, RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads))
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def torch(linear):
    return lambda threads: run([python, peer, "--linear", linear, "--threads", str(threads), *flags], threads)


def ours(variant):
    return lambda threads: run([step_cost, "--rounds", "3", "--variants", variant, *flags], threads)


PROGRAMS = {
    "torch_fp32": torch("float"),
    "torch_bitlinear": torch("bitlinear"),
    "ours_float": ours("float"),
    "ours_int8": ours("int8"),
}
summary = {"shape": shape, "rounds": rounds}
for threads in map(int, os.environ.get("THREADS", "1 2").split()):
    speeds, memory, last = {name: [] for name in PROGRAMS}, {name: 0 for name in PROGRAMS}, {}
    for turn in range(1, rounds + 1):
        for name, program in PROGRAMS.items():
            last[name] = program(threads)
            speeds[name].append(last[name]["tokens_per_s"])
            memory[name] = max(memory[name], last[name]["peak_rss_bytes"])
            print(f"{threads} threads, round {turn}, {name}: {speeds[name][-1]} tokens/s", file=sys.stderr, flush=True)
    ratio = lambda a, b: round(statistics.median(x / y for x, y in zip(speeds[a], speeds[b])), 3)
    summary[f"threads_{threads}"] = {
        "tokens_per_s": {name: statistics.median(values) for name, values in speeds.items()},
        "int8_over_torch_fp32": ratio("ours_int8", "torch_fp32"),
        "int8_over_torch_bitlinear": ratio("ours_int8", "torch_bitlinear"),
        "int8_over_ours_float": ratio("ours_int8", "ours_float"),
        "float_over_torch_fp32": ratio("ours_float", "torch_fp32"),
        "peak_rss_bytes": memory,
        "int8_effective_gflops": last["ours_int8"]["gflops"],
        "matrix_peak_gflops": last["ours_float"]["matrix_peak_gflops"],
    }
summary["torch"] = last["torch_fp32"]["torch"]
summary["device"] = last["ours_int8"]["device"]
print(json.dumps(summary))
