"""Greedy tokens of a GGUF file in llama.cpp (`pip install xllamacpp`), with a float32 cache.

Every client here reads `{"model": …, "ids": …, "text": …, "count": …}` from standard input and
prints the answer as the last line: tokens and their log-probabilities. A process of its own: some
runtimes need another environment than moefy, and llama.cpp writes to stderr from C.
"""

import json
import sys
from importlib.metadata import version

import xllamacpp

ask = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = ask["model"]
params.n_ctx, params.n_parallel = 1024, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
answer = xllamacpp.Server(params).handle_completions(
    {
        "prompt": ask["ids"],
        "n_predict": ask["count"],
        "temperature": 0,
        "n_probs": 1,
        "ignore_eos": True,
        "cache_prompt": False,
    }
)
found = answer["choices"][0]["logprobs"]["content"]
print(
    json.dumps(
        {
            "version": version("xllamacpp"),
            "tokens": [item["id"] for item in found],
            "logprobs": [item["logprob"] for item in found],
            "timings": answer["timings"],
        }
    )
)
