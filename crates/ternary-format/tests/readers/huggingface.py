"""Loads folders with transformers and compares them with the first, which has float weights.

    python huggingface.py FLOAT_FOLDER FOLDER...

Needs the PyPI packages transformers, accelerate and torch (a CPU build is enough). transformers multiplies
BitNet's packed weights with int8 activations, with one scale per token. So a packed folder is compared with the float folder
whose activations are rounded in the same way.
"""

import json
import os
import sys

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling needs a C++ compiler, and takes longer than the test

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import compare


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def round_activations(model):
    """Rounds the inputs of the linear layers of the blocks to int8, one scale per token."""

    def hook(module, inputs):
        scale = 127 / inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return ((inputs[0] * scale).round().clamp(-128, 127) / scale,)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            module.register_forward_pre_hook(hook)
    return model


def answers(model, prompts):
    """Logits of every prompt and its greedy continuation."""
    found = []
    with torch.no_grad():
        for ids in prompts:
            step = model(torch.tensor([ids]))
            logits, full = step.logits[0].float().numpy(), list(ids)
            for _ in range(min(compare.GREEDY_TOKENS, model.config.max_position_embeddings - len(ids))):
                full.append(int(step.logits[0, -1].argmax()))
                step = model(torch.tensor([full[-1:]]), past_key_values=step.past_key_values)
            found.append((logits, full))
    return found


def prompts(folder, model, count):
    """Ids of texts; empty if the folder has no tokenizer."""
    context = model.config.max_position_embeddings
    longest = min(48, max(1, context - compare.GREEDY_TOKENS))
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        generator = np.random.default_rng(0)
        return [generator.integers(0, model.config.vocab_size, longest).tolist() for _ in range(count)]
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    ids = [tokenizer.encode(text).ids[:longest] for text in compare.texts()[len(compare.ODD):]]
    return [found for found in ids if len(found) > 4][:count]


def check_tokenizer(folder):
    """Checks that the tokenizer that transformers loads has the ids of tokenizer.json."""
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        return True
    raw, loaded = Tokenizer.from_file(path), AutoTokenizer.from_pretrained(folder)
    texts = compare.texts()
    equal = sum(raw.encode(text).ids == loaded(text)["input_ids"] for text in texts)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    ends = (loaded.bos_token_id, loaded.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    good = equal == len(texts) and ends
    print(f"{'ok' if good else 'FAILED'}: {folder}: tokens equal on {equal} of {len(texts)} texts, ends equal: {ends}")
    if loaded.chat_template:
        message = [{"role": "user", "content": "Hello"}]
        print("    chat:", repr(loaded.apply_chat_template(message, tokenize=False, add_generation_prompt=True)))
    return good


def main():
    reference, *folders = sys.argv[1:]
    model = load(reference)
    ids = prompts(reference, model, 20)
    expected = answers(model, ids)
    rounded = None
    good = check_tokenizer(reference)
    for folder in folders:
        found = load(folder)
        if getattr(found.config, "quantization_config", None) is None:
            good &= compare.report(folder, expected, answers(found, ids))
            continue
        rounded = rounded or answers(round_activations(model), ids)
        found = answers(found, ids)
        good &= compare.report(f"{folder} (float weights, int8 activations)", rounded, found)
        compare.report(f"{folder} (float weights and activations; for information)", expected, found)
    sys.exit(not good)


if __name__ == "__main__":
    main()
