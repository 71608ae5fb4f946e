#!/usr/bin/env python3
"""How often the greedy answer to a held-out question is the one written for it, after earlier turns of a conversation.

    duck serve MODEL --port 8080 &
    experiments/turns.py http://127.0.0.1:8080 crates/burn-ternary/data/duck_questions.jsonl [TURNS...]

Each question is asked after TURNS other held-out questions and their written answers, drawn with a fixed seed. Prints, for
each number of turns, the share of exact answers, the share that repeats the answer before, and the share of answers that
were cut. A conversation that has no room in the model's context is left out and counted.
"""

import json
import random
import sys
import urllib.error
import urllib.request


def answer(url, model, messages):
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            choice = json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        if error.code == 400 and "context" in error.read().decode():
            return None, None
        raise
    return choice["message"]["content"].strip(), choice["finish_reason"]


def main():
    url, file, *turns = sys.argv[1:]
    with open(file) as lines:
        pairs = [json.loads(line) for line in lines if line.strip()]
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]
    print("turns  asked  exact  repeats  cut  no room")
    for turns in map(int, turns or ["0", "1", "2", "5", "10"]):
        draw = random.Random(turns)
        exact = repeats = cut = full = 0
        for pair in pairs:
            earlier = draw.sample([other for other in pairs if other["answer"] != pair["answer"]], turns)
            messages = [
                {"role": role, "content": text}
                for other in earlier
                for role, text in (("user", other["question"]), ("assistant", other["answer"]))
            ]
            text, reason = answer(url, model, [*messages, {"role": "user", "content": pair["question"]}])
            if text is None:
                full += 1
                continue
            exact += text == pair["answer"].strip()
            repeats += bool(earlier) and text == earlier[-1]["answer"].strip()
            cut += reason != "stop"
        asked = max(len(pairs) - full, 1)
        print(f"{turns:5}  {len(pairs) - full:5}  {exact / asked:.3f}  {repeats / asked:7.3f}  {cut:3}  {full:7}")


main()
