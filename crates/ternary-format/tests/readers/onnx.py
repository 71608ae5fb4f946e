"""Runs ONNX files in onnxruntime and compares them with transformers on a float folder of the same model.

    python onnx.py FLOAT_FOLDER FILE.onnx...

Needs the PyPI packages onnxruntime (1.28 or newer), transformers and torch (a CPU build is enough). Each file is run
twice: with all products in float (accuracy level 0) where it allows that, and as it is used, with activations rounded
to int8. Prompts go in whole, in two pieces through the cache, and padded in a batch.
"""

import os
import sys

import numpy as np
import onnxruntime

import compare
import huggingface


def session(path, accuracy):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    # How INT2 weights are multiplied, once onnxruntime has fused them: 4 rounds activations to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Model:
    """A session and its KV cache."""

    def __init__(self, session):
        self.session = session
        self.past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
        self.outputs = [o.name for o in session.get_outputs()]

    def run(self, ids, mask, cache=None):
        """Logits, and the next KV cache."""
        ids, mask = np.asarray(ids, np.int64), np.asarray(mask, np.int64)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1]:]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if cache is None:
            cache = {i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32) for i in self.past}
        found = dict(zip(self.outputs, self.session.run(self.outputs, feed | cache)))
        cache = {i.name: found[i.name.replace("past_key_values", "present")] for i in self.past}
        return found["logits"], cache

    def answer(self, ids, context):
        """Logits of the prompt, processed in two parts, and its greedy continuation."""
        half = len(ids) // 2
        first, cache = self.run([ids[:half]], np.ones((1, half)))
        second, cache = self.run([ids[half:]], np.ones((1, len(ids))), cache)
        full, logits = list(ids), second
        for _ in range(min(compare.GREEDY_TOKENS, context - len(ids))):
            full.append(int(logits[0, -1].argmax()))
            logits, cache = self.run([full[-1:]], np.ones((1, len(full))), cache)
        return np.concatenate([first[0], second[0]]), full


def check_batch(model, prompts):
    """Checks that a left-padded prompt in a batch has the same logits as alone."""
    length = max(map(len, prompts))
    ids = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    batch, _ = model.run(ids, mask)
    worst = 0.0
    for row, prompt in zip(batch, prompts):
        alone, _ = model.run([prompt], np.ones((1, len(prompt))))
        worst = max(worst, compare.kl(alone[0], row[-len(prompt):]).max())
    return worst


def main():
    folder, *files = sys.argv[1:]
    reference = huggingface.load(folder)
    context = reference.config.max_position_embeddings
    prompts = huggingface.prompts(folder, reference, 20)
    expected = huggingface.answers(reference, prompts)
    good = True
    for path in files:
        megabytes = os.path.getsize(path) / 1e6
        for accuracy in (0, 4):
            model = Model(session(path, accuracy))
            found = [model.answer(ids, context) for ids in prompts]
            name = f"{path} ({megabytes:.1f} MB, accuracy level {accuracy})"
            good &= compare.report(name, expected, found)
            worst = check_batch(model, [prompt[: 5 + 3 * i] for i, prompt in enumerate(prompts[:4])])
            good &= worst < compare.MOST_KL
            print(f"{'ok' if worst < compare.MOST_KL else 'FAILED'}:     padded batch: largest KL {worst:.1e}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
