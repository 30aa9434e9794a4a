"""Greedy text of a model folder in mistral.rs (`pip install mistralrs`); see ask_llama_cpp.py."""

import json
import sys
from importlib.metadata import version

import mistralrs

ask = json.load(sys.stdin)
plain = mistralrs.Which.Plain(model_id=ask["model"], dtype=mistralrs.ModelDType.F32)
answer = mistralrs.Runner(which=plain).send_completion_request(
    mistralrs.CompletionRequest(
        model="", prompt=ask["text"], max_tokens=ask["count"], temperature=0.0, top_k=1
    )
)
print(json.dumps({"version": version("mistralrs"), "text": answer.choices[0].text}))
