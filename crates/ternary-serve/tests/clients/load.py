"""Many clients at once: `load.py http://127.0.0.1:8080/v1 [CLIENTS] [REQUESTS] [TOKENS] [KEY]`.

Each client streams one chat after the other; what is printed are tokens by the server's count.
"""

import http.client
import json
import statistics
import sys
import threading
import time
from urllib.parse import urlparse

url = urlparse(sys.argv[1])
clients, requests, tokens = (int(sys.argv[i]) if len(sys.argv) > i else n for i, n in ((2, 64), (3, 4), (4, 64)))
headers = {"Content-Type": "application/json"}
if len(sys.argv) > 5:
    headers["Authorization"] = f"Bearer {sys.argv[5]}"


def connect():
    return http.client.HTTPConnection(url.hostname, url.port, timeout=600)


def ask(connection, model, question, seed):
    """Seconds to the first text, seconds in all, tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "seed": seed,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun = time.perf_counter()
    connection.request("POST", f"{url.path}/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        response.read()
        return response.status
    first, count = None, None
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        part = json.loads(line[6:])
        if part.get("usage"):
            count = part["usage"]["completion_tokens"]
        elif part["choices"][0]["delta"].get("content"):
            first = first or time.perf_counter() - begun
    return first or 0.0, time.perf_counter() - begun, count


def client(number, model, results):
    connection = connect()
    for i in range(requests):
        seed = number * requests + i
        results.append(ask(connection, model, f"Tell me of pond number {seed}.", seed))


connection = connect()
connection.request("GET", f"{url.path}/models", headers=headers)
model = json.load(connection.getresponse())["data"][0]["id"]
results = []
begun = time.perf_counter()
threads = [threading.Thread(target=client, args=(number, model, results)) for number in range(clients)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
wall = time.perf_counter() - begun
refused = [result for result in results if isinstance(result, int)]
answered = [result for result in results if not isinstance(result, int)]
assert len(results) == clients * requests, "a client died"
total = sum(result[2] for result in answered)
firsts = sorted(result[0] for result in answered)
print(f"{clients} clients, {len(answered)} answered, {len(refused)} refused {sorted(set(refused))}")
print(f"{total} tokens in {wall:.1f} s: {total / wall:.0f} tokens/s")
print(f"to the first: median {statistics.median(firsts):.2f} s, 95th of 100 {firsts[int(0.95 * (len(firsts) - 1))]:.2f} s")
