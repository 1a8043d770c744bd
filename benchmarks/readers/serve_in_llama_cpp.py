"""Tokens a second of processor time of llama.cpp's server, inside of this process.

    python serve_in_llama_cpp.py FILE.gguf ROUNDS

Prints a line of JSON: by name, the median of ROUNDS. Needs `xllamacpp`.
"""

import json
import random
import statistics
import sys
import threading
import time
import urllib.request
from typing import Any

TOKENS, PROMPT, SHORT, MOST = 64, 1024, 24, 16


def main() -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    # The context is shared out to the slots.
    parameters.n_ctx, parameters.n_parallel = MOST * 1280, MOST
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    draw = random.Random(0)

    def complete(length: int, tokens: int) -> None:
        body: dict[str, Any] = {
            "prompt": [draw.randrange(1000, 40000) for _ in range(length)],
            "n_predict": tokens,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        head = {"Content-Type": "application/json"}
        url = f"{server.listening_address}/completion"
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), head), timeout=600
        ) as answer:
            answer.read()

    def seconds(streams: int, length: int, tokens: int) -> float:
        threads = [threading.Thread(target=complete, args=(length, tokens)) for _ in range(streams)]
        begun = time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.process_time() - begun

    seconds(1, SHORT, 4)
    found: dict[str, list[float]] = {}
    for _ in range(int(sys.argv[2])):
        for streams in (1, 8, 16):
            spent = seconds(streams, SHORT, TOKENS)
            found.setdefault(f"{streams} texts", []).append(streams * TOKENS / spent)
        found.setdefault("a prompt", []).append(PROMPT / seconds(1, PROMPT, 1))
    print(json.dumps({name: statistics.median(each) for name, each in found.items()}))


if __name__ == "__main__":
    main()
