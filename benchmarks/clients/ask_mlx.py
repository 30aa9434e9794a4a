"""Greedy tokens of a model folder in MLX on a CPU (`pip install 'mlx[cpu]' mlx-lm`).

The log-probabilities begin with those of the prompt, from its second token on. See
ask_llama_cpp.py.
"""

import json
import sys
from importlib.metadata import version

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step

ask = json.load(sys.stdin)
mx.set_default_device(mx.cpu)
model, _ = load(ask["model"])
ids = mx.array(ask["ids"])
prompt = model(ids[None])[0, :-1]
rows = list(prompt - mx.logsumexp(prompt, axis=-1, keepdims=True))
tokens = []
for token, row in generate_step(ids, model, max_tokens=ask["count"]):
    tokens.append(int(token))
    rows.append(row)
logprobs = [float(row[i]) for row, i in zip(rows, [*ask["ids"][1:], *tokens], strict=True)]
print(json.dumps({"version": version("mlx-lm"), "tokens": tokens, "logprobs": logprobs}))
