"""SmolLM2 split in every form, in every runtime at hand: docs/runtimes.md.

    pip install mistralrs==0.9.5          # not a dependency of moefy
    python benchmarks/runtimes.py WORK    # about 5 minutes on two cores; conversions are kept

Agreement: all experts active, float32 weights and cache, the prompt and 32 greedy tokens. Speed:
the default split against the dense model and against the dense model of its active size, each in
turn, three times, medians; 512 tokens of prompt, 64 decoded. Writes docs/runtimes/*.csv and the
tables in docs/runtimes.md; `agreement` or `speed` behind WORK does one of the two.
"""

from __future__ import annotations

import ast
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moefy
from moefy.checkpoint.source import builtin
from moefy.recipe import LLAMA_MOE
from moefy.report.tables import replace_table

DOCS = Path(__file__).parents[1] / "docs"
EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none", "experts": 16, "active": 16}
FORMS: dict[str, dict[str, Any]] = {
    "mixtral": EXACT,
    "granitemoe": EXACT | {"target": "granitemoe"},
    "granitemoeshared": EXACT | {"experts": 24, "active": 24, "shared": 8},
    "glm4_moe": EXACT | {"shared": 4, "target": "glm4_moe"},
}
HALF: dict[str, dict[str, Any]] = {
    "dense of the active size": LLAMA_MOE | {"experts": 2, "active": 1, "shared": 1},
    "MoE 4/8": LLAMA_MOE | {"experts": 8, "active": 4},
    "MoE 8/16": LLAMA_MOE | {"experts": 16, "active": 8},
    "MoE 32/64, 16 shared": LLAMA_MOE | {"experts": 64, "active": 32, "shared": 16},
}
PROMPT = "The history of the city begins"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")

LLAMA_CPP = """
import json, sys, xllamacpp
ask = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = ask["file"]
params.n_ctx, params.n_parallel, params.warmup = 1024, 1, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
answer = xllamacpp.Server(params).handle_completions(
    {"prompt": ask["ids"], "n_predict": ask["count"], "temperature": 0, "n_probs": 1,
     "ignore_eos": True, "cache_prompt": False}
)
print(json.dumps({"tokens": answer["choices"][0]["logprobs"]["content"],
                  "timings": answer["timings"]}))
"""

MISTRAL_RS = """
import sys, mistralrs
plain = mistralrs.Which.Plain(model_id=sys.argv[1], dtype=mistralrs.ModelDType.F32)
answer = mistralrs.Runner(which=plain).send_completion_request(
    mistralrs.CompletionRequest(model="", prompt=sys.argv[2], max_tokens=32, temperature=0.0,
                                top_k=1)
)
print("TEXT", repr(answer.choices[0].text))
"""


def mistral_rs(folder: Path) -> str:
    """Return the text that it writes, or the reason why it does not."""
    command = [sys.executable, "-c", MISTRAL_RS, str(folder), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error: " in line]
        return errors[-1].partition("Error: ")[2].partition(". Please")[0]
    text = next(line for line in done.stdout.splitlines() if line.startswith("TEXT "))
    return ast.literal_eval(text.removeprefix("TEXT "))


def llama_cpp(file: Path, ids: list[int], count: int) -> dict[str, Any]:
    ask = json.dumps({"file": str(file), "ids": ids, "count": count})
    command = [sys.executable, "-c", LLAMA_CPP]
    done = subprocess.run(command, input=ask, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def greedy(model: Any, ids: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits)


def converted(work: Path, name: str, choices: dict[str, Any]) -> tuple[Path, Path]:
    folder, file = work / name.replace("/", "-"), work / f"{name.replace('/', '-')}.gguf"
    if not (folder / "config.json").exists():
        moefy.convert("smollm2-135m", folder, **choices)
    if not file.exists():
        moefy.export_gguf(folder, file, dtype="f32")
    return folder, file


def agreement(work: Path) -> list[dict[str, str]]:
    dense = AutoModelForCausalLM.from_pretrained(builtin())
    tokenizer = AutoTokenizer.from_pretrained(builtin())
    ids = tokenizer(PROMPT)["input_ids"]
    tokens, logits = greedy(dense, ids, 32)
    rows = []
    for form, choices in FORMS.items():
        folder, file = converted(work, form, choices)
        for name in IMPLEMENTATIONS:
            model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=name)
            found, theirs = greedy(model, ids, 32)
            difference = (logits.log_softmax(-1) - theirs.log_softmax(-1))[range(32), tokens]
            same = "the dense model's" if found == tokens else "differ"
            rows.append(_row(form, f"transformers, {name}", same, difference.tolist()))
        answer = llama_cpp(file, ids, 32)["tokens"]
        expected = logits.log_softmax(-1)[range(32), tokens].tolist()
        differences = [a - b["logprob"] for a, b in zip(expected, answer, strict=True)]
        same = "the dense model's" if [item["id"] for item in answer] == tokens else "differ"
        rows.append(_row(form, "llama.cpp (xllamacpp)", same, differences))
        text = mistral_rs(folder)
        same = "the dense model's" if text == tokenizer.decode(tokens) else text
        rows.append(_row(form, "mistral.rs", same, []))
    return rows


def _row(form: str, runtime: str, tokens: str, differences: list[float]) -> dict[str, str]:
    largest = f"{max(map(abs, differences)):.1e}" if differences else ""
    return {
        "form": form,
        "runtime": runtime,
        "32 greedy tokens": tokens,
        "largest difference of log-probabilities": largest,
    }


def speed(work: Path) -> list[dict[str, str]]:
    folders = {"dense": (builtin(), work / "dense.gguf")}
    if not folders["dense"][1].exists():
        moefy.export_gguf(*folders["dense"], dtype="f32")
    folders |= {name: converted(work, name, choices) for name, choices in HALF.items()}
    ids = torch.randint(0, 49_000, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    timings: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for _ in range(3):
        for name, (_, file) in folders.items():
            timings[name].append(llama_cpp(file, ids, 64)["timings"])
    rows = []
    for name, found in timings.items():
        prefill, decode = (
            statistics.median(t[key] for t in found)
            for key in ("prompt_per_second", "predicted_per_second")
        )
        rows.append({"model": name, "prefill tok/s": prefill, "decode tok/s": decode})
    same_size = rows[1]
    return [
        {
            "model": str(row["model"]),
            "prefill tok/s": f"{row['prefill tok/s']:.0f}",
            "decode tok/s": f"{row['decode tok/s']:.1f}",
            "prefill, of the active size": _share(row, same_size, "prefill tok/s"),
            "decode, of the active size": _share(row, same_size, "decode tok/s"),
        }
        for row in rows
    ]


def _share(row: dict[str, Any], same_size: dict[str, Any], key: str) -> str:
    return f"{row[key] / same_size[key]:.0%}"


def main(work: Path, tables: list[str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (DOCS / "runtimes").mkdir(exist_ok=True)
    for name in tables or ["agreement", "speed"]:
        rows = {"agreement": agreement, "speed": speed}[name](work)
        with (DOCS / "runtimes" / f"{name}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        table_rows = [list(rows[0]), *(list(row.values()) for row in rows)]
        replace_table(DOCS / "runtimes.md", name, table_rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
