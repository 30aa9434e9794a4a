"""Greedy text of a model folder in fastllm (`pip install ftllm`); see ask_llama_cpp.py."""

import json
import sys
from importlib.metadata import version

from ftllm import llm

ask = json.load(sys.stdin)
model = llm.model(ask["model"], dtype="float32")
model.direct_query = True  # no chat template
text = model.response(ask["text"], max_length=ask["count"], top_k=1)
print("\n" + json.dumps({"version": version("ftllm"), "text": text}))
