"""Loads an adapter with PEFT and compares the model with one into which this crate merged the adapter.

    duck export RUN base/ --type F32
    duck export RUN merged/ --type F32 --adapter LORA_RUN/adapter
    python adapter.py base/ LORA_RUN/adapter merged/ again/
    duck export RUN merged_again/ --type F32 --adapter again/      must have the weights of merged/

Needs the PyPI packages peft, transformers and torch (a CPU build is enough). `again/` is the adapter as PEFT writes it.
"""

import sys

import torch
from peft import PeftModel

import compare
import huggingface


def main():
    base, adapter, merged, again = sys.argv[1:]
    expected = huggingface.load(merged)
    ids = huggingface.prompts(merged, expected, 20)
    without = huggingface.load(base)
    with torch.no_grad():
        prompt = torch.tensor([ids[0]])
        apart = (without(prompt).logits - expected(prompt).logits).abs().max().item()
    model = PeftModel.from_pretrained(without, adapter).eval()
    kinds = sorted(model.peft_config["default"].target_modules)
    print(f"the adapter moves logits by up to {apart:.2f}; PEFT has it at {', '.join(kinds)}")
    answers = [huggingface.answers(found, ids) for found in (expected, model)]
    good = compare.report(adapter, *answers, most_kl=1e-6)
    model.save_pretrained(again)
    sys.exit(not (good and apart > 0.1))


if __name__ == "__main__":
    main()
