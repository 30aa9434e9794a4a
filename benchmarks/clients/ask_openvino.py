"""Greedy tokens of a model folder in OpenVINO (`pip install optimum-intel openvino`).

The log-probabilities begin with those of the prompt, from its second token on. See
ask_llama_cpp.py.
"""

import json
import sys
from importlib.metadata import version

import torch
from optimum.intel import OVModelForCausalLM

ask = json.load(sys.stdin)
model = OVModelForCausalLM.from_pretrained(
    ask["model"],
    export=True,
    load_in_8bit=False,
    ov_config={"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
)
ids = torch.tensor([ask["ids"]])
mask = torch.ones_like(ids)
out = model.generate(
    ids,
    attention_mask=mask,
    max_new_tokens=ask["count"],
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_logits=True,
)
rows = torch.cat([model(ids, attention_mask=mask).logits[0, :-1], *out.logits]).log_softmax(-1)
print(
    json.dumps(
        {
            "version": version("openvino"),
            "tokens": out.sequences[0, ids.shape[1] :].tolist(),
            "logprobs": rows.gather(1, out.sequences[0, 1:, None])[:, 0].tolist(),
        }
    )
)
