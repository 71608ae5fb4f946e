"""Comparisons shared by the scripts here: logits of texts, greedy continuations, tokens."""

import glob
import os

import numpy as np

# Limits for every reader.
MOST_KL = 5e-3  # nats per token
LEAST_EQUAL_GREEDY = 0.9
GREEDY_TOKENS = 64
# Texts on which tokenizers often differ.
ODD = ["", " ", "  two  spaces ", "naïve café", "日本語のテキスト", "a\tb\nc", "🦆 quack!", "don't 1234567"]


def texts(count=200):
    """Passages of the file $TEXTS (a model is most certain about its training text), else lines of real text from
    ../shared, else generated lines; in each case also texts with unusual characters."""
    here = os.path.dirname(os.path.abspath(__file__))
    shared = os.path.join(here, "../../../../../shared/data/text")
    lines = list(ODD)
    if "TEXTS" in os.environ:
        with open(os.environ["TEXTS"], encoding="utf-8") as file:
            text = file.read()
        lines += [text[start:start + 400] for start in range(0, len(text) - 400, 50)]
        shared = "-"
    for path in sorted(glob.glob(os.path.join(shared, "*/valid*")) + glob.glob(os.path.join(shared, "*/valid/*"))):
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                lines += [line.strip() for line, _ in zip(file, range(400)) if len(line) > 20]
    if len(lines) < count:
        print("skipped: ../shared/data/text: missing, texts are generated")
        lines += [f"Text number {i} of {i * i}, once upon a time." for i in range(count)]
    step = max(1, (len(lines) - len(ODD)) // (count - len(ODD)))
    return ODD + lines[len(ODD)::step][:count - len(ODD)]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(expected, found):
    """KL divergence of each position, in nats."""
    p, q = log_softmax(expected), log_softmax(found)
    return (np.exp(p) * (p - q)).sum(-1)


def report(name, expected, found, most_kl=MOST_KL):
    """Compares lists of `(logits [seq, vocab], greedy ids)`; returns whether they differ by less than the limits."""
    divergence = np.concatenate([kl(e, f) for (e, _), (f, _) in zip(expected, found)])
    top = np.concatenate([e.argmax(-1) == f.argmax(-1) for (e, _), (f, _) in zip(expected, found)])
    difference = max(np.abs(e - f).max() / np.abs(e).max() for (e, _), (f, _) in zip(expected, found))
    greedy = np.mean([list(e) == list(f) for (_, e), (_, f) in zip(expected, found)])
    good = divergence.mean() < most_kl and greedy >= LEAST_EQUAL_GREEDY
    print(
        f"{'ok' if good else 'FAILED'}: {name}: KL {divergence.mean():.1e} nats per token (largest {divergence.max():.1e}),"
        f" top-1 equal {top.mean():.4f}, logits within {difference:.1e}, greedy equal {greedy:.2f}"
        f" of {len(expected)} prompts"
    )
    return bool(good)
