"""Greedy tokens of a GGUF file in tinygrad (`pip install tinygrad`); see ask_llama_cpp.py."""

import json
import os
import sys
from importlib.metadata import version
from itertools import islice

os.environ.setdefault("DEV", "CPU")
os.environ["HALF"] = "0"  # float32 weights stay

from tinygrad.llm.model import Transformer

ask = json.load(sys.stdin)
model, _ = Transformer.from_gguf(ask["model"], max_context=256)
tokens = list(islice(model.generate(ask["ids"]), ask["count"]))
print(json.dumps({"version": version("tinygrad"), "tokens": tokens}))
