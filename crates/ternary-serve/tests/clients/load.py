"""Many clients at once, for a while: `load.py http://127.0.0.1:8080/v1 [--clients 64] [--seconds 60] ...`.

Each client streams one text after the other. A stream must be, to the letter, what the server answers to the same
request alone: none may be lost, cut or mixed with another. Speeds are in tokens by the server's count.
"""

import argparse
import http.client
import itertools
import json
import statistics
import sys
import threading
import time
from urllib.parse import urlparse

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--clients", type=int, default=64)
parser.add_argument("--seconds", type=float, default=60)
parser.add_argument("--tokens", type=int, default=64, help="the longest answer")
parser.add_argument("--questions", type=int, default=16, help="different requests")
parser.add_argument("--key")
parser.add_argument("--pid", help="process of the server, to look at its memory")
parser.add_argument("--completions", action="store_true", help="texts that go on, instead of chats")
parser.add_argument("--unequal", action="store_true", help="for servers whose answers depend on their neighbours")
parser.add_argument("--json", action="store_true")
options = parser.parse_args()

url = urlparse(options.url)
headers = {"Content-Type": "application/json"}
if options.key:
    headers["Authorization"] = f"Bearer {options.key}"


def connect():
    return http.client.HTTPConnection(url.hostname, url.port, timeout=600)


def get(path):
    connection = connect()
    connection.request("GET", f"{url.path}{path}", headers=headers)
    return json.load(connection.getresponse())


model = get("/models")["data"][0]["id"]


def request(number, stream):
    body = {"model": model, "seed": number, "max_tokens": options.tokens, "stream": stream}
    if options.completions:
        body["prompt"] = f"One day on pond number {number} a duck"
    else:
        body["messages"] = [{"role": "user", "content": f"Tell me of pond number {number}."}]
    if stream:
        body["stream_options"] = {"include_usage": True}
    return f"{url.path}{'/completions' if options.completions else '/chat/completions'}", json.dumps(body)


def text_of(choice):
    return (choice["text"] if options.completions else choice.get("delta", choice.get("message"))["content"]) or ""


def alone(number):
    connection = connect()
    connection.request("POST", *request(number, False), headers)
    response = connection.getresponse()
    answer = json.load(response)
    assert response.status == 200, answer
    return text_of(answer["choices"][0])


def stream(connection, number):
    """Text, seconds to the first of it, seconds in all, tokens."""
    begun = time.perf_counter()
    connection.request("POST", *request(number, True), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read()[:300]}")
    text, first, tokens, done = "", None, None, False
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done = True
            continue
        part = json.loads(line[6:])
        if "error" in part:
            raise RuntimeError(part["error"])
        if part.get("usage"):
            tokens = part["usage"]["completion_tokens"]
        if part["choices"] and (part["choices"][0].get("delta", part["choices"][0]).get("content")
                                or part["choices"][0].get("text")):
            first = first or time.perf_counter() - begun
            text += text_of(part["choices"][0])
    if not done:
        raise RuntimeError("the stream was cut")
    return text, first or 0.0, time.perf_counter() - begun, tokens


def resident():
    """Bytes."""
    with open(f"/proc/{options.pid}/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS"))


expected = {} if options.unequal else {number: alone(number) for number in range(options.questions)}
empty = sum(not text for text in expected.values())
if 2 * empty > len(expected):
    sys.exit(f"{empty} of {len(expected)} answers hold no text: there is nothing to compare")
numbers = itertools.count()
results, errors, memory = [], [], []
begun = time.perf_counter()
end = begun + options.seconds


def client():
    connection = connect()
    while time.perf_counter() < end and not errors:
        number = next(numbers) % options.questions
        if options.unequal:
            connection = connect()  # some servers close connections without a word
        try:
            text, *result = stream(connection, number)
            if text != expected.get(number, text):
                raise RuntimeError(f"mixed: expected {expected[number]!r}, found {text!r}")
            results.append(result)
        except Exception as error:  # noqa: BLE001: whatever it is, it is a finding
            errors.append(f"request {number}: {error!r}")


threads = [threading.Thread(target=client) for _ in range(options.clients)]
[thread.start() for thread in threads]
while options.pid and time.perf_counter() < end:
    memory.append(resident())
    time.sleep(min(1.0, options.seconds / 20))
[thread.join() for thread in threads]
wall = time.perf_counter() - begun
if errors or not results:
    sys.exit("\n".join(errors[:5]) or "nothing was answered")
tokens = sum(result[2] for result in results)
firsts = sorted(result[0] for result in results)
report = {
    "clients": options.clients,
    "answered": len(results),
    "seconds": round(wall, 1),
    "tokens": tokens,
    "tokens_per_s": round(tokens / wall, 1),
    "first_median_s": round(statistics.median(firsts), 3),
    "first_p95_s": round(firsts[int(0.95 * (len(firsts) - 1))], 3),
}
if memory:
    # The first quarter fills caches: one sequence for each place of the batch.
    quarter = len(memory) // 4
    report |= {"resident_first_quarter": max(memory[: quarter + 1]), "resident_last_quarter": max(memory[-quarter - 1 :])}
if options.json:
    print(json.dumps(report))
else:
    print(f"{report['clients']} clients, {report['answered']} answers, all whole"
          + ("" if options.unequal else " and as they are alone"))
    print(f"{tokens} tokens in {wall:.1f} s: {tokens / wall:.0f} tokens/s")
    print(f"to the first: median {report['first_median_s']} s, 95th of 100 {report['first_p95_s']} s")
    if memory:
        print(f"resident: {report['resident_first_quarter'] / 1e6:.1f} MB at most in the first quarter, "
              f"{report['resident_last_quarter'] / 1e6:.1f} MB in the last")
