"""Checks that `gguf` (PyPI) reads the same values from a GGUF file as from a Hugging Face folder of the same model.

usage: gguf.py MODEL.gguf FOLDER, after
  cargo run --release -p ternary-format --example convert -- MODEL.gguf FOLDER F32
needs: pip install gguf safetensors numpy
"""

import glob
import os
import sys

# This file has the same name as the package: remove its folder from the path.
sys.path = [path for path in sys.path if os.path.abspath(path or ".") != os.path.dirname(os.path.abspath(__file__))]
import gguf
import numpy as np
from safetensors.numpy import load_file

LLAMA = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm",
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}
GPT2 = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj", "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head",
}


def expected(name, arch, heads, folder):
    """Values in the folder of a tensor of the file."""
    part, kind = name.rsplit(".", 1)
    names, blocks = (GPT2, "transformer.h") if arch == "gpt2" else (LLAMA, "model.layers")
    if part.startswith("blk."):
        _, block, part = part.split(".")
        values = folder[f"{blocks}.{block}.{names[part]}.{kind}"]
        if arch == "gpt2" and values.ndim == 2:
            values = values.T  # Conv1D
    else:
        values = folder[f"{names[part]}.{kind}"]
    if arch == "llama" and part in ("attn_q", "attn_k"):
        rows, cols = values.shape
        values = values.reshape(heads[part], 2, rows // heads[part] // 2, cols).swapaxes(1, 2).reshape(rows, cols)
    return values


def main(path, folder):
    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:
        # Q2_0, type 42, is newer than gguf 0.19.
        print(f"skipped: {path}: {error}")
        return 0 if "42 is not a valid" in str(error) else 1
    field = lambda key: reader.fields[key].contents()
    arch = field("general.architecture")
    heads = {"attn_q": field(f"{arch}.attention.head_count"), "attn_k": field(f"{arch}.attention.head_count_kv")}
    stored = {}
    for shard in glob.glob(os.path.join(folder, "*.safetensors")):
        stored |= load_file(shard)
    stored |= {f"transformer.{key}": value for key, value in stored.items() if not key.startswith("transformer.")}
    types = {}
    for tensor in reader.tensors:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        want = expected(tensor.name, arch, heads, stored)
        if found.shape != want.shape or not np.array_equal(found, want.astype(np.float32)):
            print(f"FAILED: {tensor.name}: shape {found.shape}, expected {want.shape}, or other values")
            return 1
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    tokens = field("tokenizer.ggml.tokens") if "tokenizer.ggml.tokens" in reader.fields else []
    if len(set(tokens)) != len(tokens):
        print("FAILED: duplicate tokens")
        return 1
    print(f"ok: gguf {path}: {types}, {len(tokens)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
