"""Tokens a second of processor time of vLLM on a CPU. A script for vLLM's own environment:

    PYTHON serve_in_vllm.py FOLDER ROUNDS

FOLDER: of a Hugging Face model. Prints a line of JSON: by name, the median of ROUNDS.
"""

import json
import os
import random
import statistics
import sys
import time

for name, value in (
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    ("OMP_NUM_THREADS", "1"),
):
    os.environ.setdefault(name, value)

TOKENS, PROMPT, SHORT = 64, 1024, 24


def main() -> None:
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(1)
    given = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 2048}
    model = LLM(sys.argv[1], enable_prefix_caching=False, **given)
    draw = random.Random(0)

    def seconds(streams: int, length: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [draw.randrange(1000, 40000) for _ in range(length)]}
            for _ in range(streams)
        ]
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        begun = time.process_time()
        model.generate(prompts, settings, use_tqdm=False)
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
