"""Requests to a server at random times: `serve_load.py URL REQUESTS RATE`. Without Keras.

Prints a JSON object: tokens per second, and percentiles of the time to the first text and of the time per token.
"""

import http.client
import json
import random
import statistics
import sys
import threading
import time
from pydoc_data.topics import topics


def ask(host, prompt, tokens, result):
    """Sends a request and reads its stream; `result` gets `(start, first, end, tokens)`."""
    body = {"model": "t5gemma", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    start, first, count = time.perf_counter(), None, 0
    connection = http.client.HTTPConnection(host, timeout=3600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise RuntimeError(event)
        if first is None:
            first = time.perf_counter()
        if event["usage"]:
            count = event["usage"]["completion_tokens"]
    connection.close()
    result.append((start, first, time.perf_counter(), count))


def percentiles(values):
    """The median and the 99th percentile."""
    return statistics.median(values), sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def main():
    url, requests, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    host, draws = url.removeprefix("http://"), random.Random(0)
    words = " ".join(topics.values()).split()
    threads, results = [], []
    for _ in range(requests):
        at, length = draws.randrange(len(words) - 100), draws.randint(8, 100)
        arguments = (host, " ".join(words[at : at + length]), draws.randint(8, 128), results)
        threads.append(threading.Thread(target=ask, args=arguments))
        threads[-1].start()
        time.sleep(draws.expovariate(rate))
    for thread in threads:
        thread.join()
    if len(results) < requests:
        sys.exit(f"{requests - len(results)} of {requests} requests failed.")
    starts, _, ends, counts = zip(*results, strict=True)
    first_p50, first_p99 = percentiles([first - start for start, first, *_ in results])
    token_p50, token_p99 = percentiles([1e3 * (end - start) / count for start, _, end, count in results])
    numbers = {
        "tokens_per_s": sum(counts) / (max(ends) - min(starts)),
        "first_p50_s": first_p50,
        "first_p99_s": first_p99,
        "token_p50_ms": token_p50,
        "token_p99_ms": token_p99,
    }
    print(json.dumps(numbers))


main()
