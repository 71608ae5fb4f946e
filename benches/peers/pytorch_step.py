"""A training step of a GPT-2 in PyTorch, the rival of our own: forward, backward and fused AdamW on random tokens.

usage: pytorch_step.py --linear float|bitlinear --width 768 --layers 12 --heads 12 --ff 3072 --vocab 8192 --seq 128 --batch 8
                       --threads 2 --steps 3
Prints one JSON line: tokens per second (median step after two that warm up) and the peak memory of the process."""
import argparse
import json
import os
import resource
import statistics
import time

parser = argparse.ArgumentParser()
parser.add_argument("--linear", choices=["float", "bitlinear"], default="float")
for name, value in dict(width=768, layers=12, heads=12, ff=3072, vocab=8192, seq=128, batch=8, threads=2, steps=3).items():
    parser.add_argument(f"--{name}", type=int, default=value)
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.set_num_threads(args.threads)
torch.manual_seed(0)


class BitLinear(nn.Linear):
    """Fake quantization as in the training tips of BitNet b1.58, with a scale a channel."""

    def forward(self, x):
        w = self.weight
        scale = w.abs().mean(dim=1, keepdim=True).clamp(min=1e-5)
        ternary = w + ((w / scale).round().clamp(-1, 1) * scale - w).detach()
        step = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
        rounded = x + ((x / step).round() * step - x).detach()
        return F.linear(rounded, ternary, self.bias)


Linear = {"float": nn.Linear, "bitlinear": BitLinear}[args.linear]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        width = args.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, args.ff), Linear(args.ff, width)

    def forward(self, x):
        batch, seq, width = x.shape
        heads = [t.view(batch, seq, args.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(width, 2)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(args.vocab, args.width), nn.Embedding(args.seq, args.width)
        self.blocks = nn.Sequential(*[Block() for _ in range(args.layers)])
        self.norm = nn.LayerNorm(args.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids, targets):
        hidden = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
        logits = F.linear(self.norm(self.blocks(hidden)), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
seconds = []
for step in range(args.steps + 2):
    text = torch.randint(0, args.vocab, (args.batch, args.seq + 1))
    began = time.perf_counter()
    model(text[:, :-1], text[:, 1:]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if step >= 2:
        seconds.append(time.perf_counter() - began)
print(
    json.dumps(
        {
            "torch": torch.__version__,
            "linear": args.linear,
            "threads": args.threads,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_per_s": round(args.batch * args.seq / statistics.median(seconds), 1),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
)
