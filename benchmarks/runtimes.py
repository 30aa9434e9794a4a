"""SmolLM2 and random models of every family split, in every runtime at hand: docs/runtimes.md.

    python benchmarks/runtimes.py WORK RUNTIME [PYTHON]
    python benchmarks/runtimes.py WORK RUNTIME [PYTHON] families

Agreement, for RUNTIME one of `CLIENTS` or transformers: float32 weights and cache, the prompt and
32 greedy tokens, against transformers. PYTHON is that of the environment where the runtime is, if
it is not this one. With `families`: every family in each of its targets, those that the CSV file
has no row for (take rows out to measure them again). Speed, for RUNTIME `speed`: the default split
in llama.cpp against the dense model and against the dense model of its active size, each in turn,
three times, medians; 512 tokens of prompt, 64 decoded. Writes docs/runtimes/*.csv, where the other
runtimes' rows stay, and the tables in docs/runtimes.md. Conversions are kept in WORK.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from publish import publish_table, read_csv, replace_table, rows_of
from tests.conftest import tiny_config
from tests.parity.test_families import CASES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import moefy
from moefy.checkpoint.source import builtin
from moefy.errors import MoefyError
from moefy.recipe import LLAMA_MOE
from moefy.report.tables import Rows, write_csv

DOCS = Path(__file__).parents[1] / "docs"
EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none", "experts": 16, "active": 16}
FITTED: dict[str, Any] = {"experts": 16, "active": 8, "calibration_tokens": 4096}
FORMS: dict[str, dict[str, Any]] = {
    "mixtral": EXACT,
    "granitemoe": EXACT | {"target": "granitemoe"},
    "granitemoeshared": EXACT | {"experts": 24, "active": 24, "shared": 8},
    "glm4_moe": EXACT | {"shared": 4, "target": "glm4_moe"},
    "qwen3_moe": EXACT,
    "glm4_moe of Qwen3": EXACT | {"shared": 4},
    "mixtral 8/16": FITTED | {"shared": 0},
    "granitemoeshared 8/16": FITTED,
    "glm4_moe 8/16": FITTED | {"target": "glm4_moe"},
}
SIZES = {"vocab_size": 49_152, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
SIZES |= {"initializer_range": 0.1, "block_auto_adjust_ff_dim": False}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}  # the tokenizer's
SIZES |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
"""Family, settings and recipe of the first case of every family and target."""
for family, settings, shared, target in CASES:
    FAMILIES.setdefault(f"`{family}` as {target}", (family, settings, {"shared": shared}))
# which lose their biases in vLLM
for family in ("qwen2", "seed_oss"):
    asked_for = {"shared": 2, "target": "granitemoeshared"}
    FAMILIES[f"`{family}` as granitemoeshared"] = (family, {}, asked_for)
IN_FAMILIES = ("transformers", "llama.cpp", "mistral.rs", "vLLM")
QWEN3 = ("qwen3_moe", "glm4_moe of Qwen3")
HALF: dict[str, dict[str, Any]] = {
    "dense (same active size)": LLAMA_MOE | {"experts": 2, "active": 1, "shared": 1},
    "MoE 4/8": LLAMA_MOE | {"experts": 8, "active": 4},
    "MoE 8/16": LLAMA_MOE | {"experts": 16, "active": 8},
    "MoE 32/64, 16 shared": LLAMA_MOE | {"experts": 64, "active": 32, "shared": 16},
}
PROMPT = "The history of the city begins"
COUNT = 32
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
CLIENTS = {
    "llama.cpp": "llama_cpp",
    "mistral.rs": "mistral_rs",
    "vLLM": "vllm",
    "OpenVINO": "openvino",
    "MLX": "mlx",
    "tinygrad": "tinygrad",
    "fastllm": "fastllm",
}
READ_GGUF = ("llama.cpp", "tinygrad")


def ask(runtime: str, model: Path, ids: list[int], count: int, python: str) -> dict[str, Any]:
    """Return what the runtime's client prints, or the reason why it does not."""
    client = Path(__file__).parent / "clients" / f"ask_{CLIENTS[runtime]}.py"
    question = json.dumps({"model": str(model), "ids": ids, "text": PROMPT, "count": count})
    done = subprocess.run(
        [python, str(client)], input=question, capture_output=True, text=True, check=False
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if answers:  # vLLM logs behind it, fastllm ends with 0 whatever happens
        return json.loads(answers[-1])
    _, found, reason = (done.stdout + done.stderr).rpartition("Error: ")
    if not found:
        raise RuntimeError(f"{client} ended with {done.returncode}: {done.stderr}")
    return {"error": reason.splitlines()[0].partition(". Please")[0]}


def greedy(model: Any, ids: list[int]) -> dict[str, Any]:
    """Return 32 tokens, and the log-probabilities of the prompt's and theirs."""
    with torch.inference_mode():
        prompt = torch.tensor([ids])
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=COUNT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        rows = torch.cat([model(prompt).logits[0, :-1], *out.logits]).log_softmax(-1)
    return {
        "tokens": out.sequences[0, len(ids) :].tolist(),
        "logprobs": rows.gather(1, out.sequences[0, 1:, None])[:, 0].tolist(),
    }


def asked(
    runtime: str, work: Path, form: str, folder: Path, ids: list[int], python: str
) -> Iterator[dict[str, Any]]:
    if runtime == "transformers":
        for name in IMPLEMENTATIONS:
            model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=name)
            yield greedy(model, ids) | {"version": transformers.__version__}
    else:
        file = exported(work, form, folder) if runtime in READ_GGUF else folder
        yield ask(runtime, file, ids, COUNT, python)


def random_qwen3(folder: Path) -> Path:
    """Write a small random Qwen3, since PyPI has no trained one."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=49_152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        initializer_range=0.1,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin()).save_pretrained(folder)
    return folder


def random_model(folder: Path, family: str, settings: dict[str, Any]) -> Path:
    """Write a small random model, its norms and biases random too."""
    if (folder / "tokenizer.json").exists():
        return folder
    torch.manual_seed(0)
    sizes = {key: SIZES[key] for key in SIZES if key in tiny_config(family, **settings)}
    config = AutoConfig.for_model(**tiny_config(family, **settings | sizes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin()).save_pretrained(folder)
    return folder


def converted(work: Path, name: str, dense: str | Path, choices: dict[str, Any]) -> Path:
    # llama.cpp expects other special tokens of a file whose name has phi3 in it
    folder = work / name.replace("/", "-").replace("phi3", "p3")
    if not (folder / "config.json").exists():
        moefy.convert(dense, folder, **choices)
    return folder


def exported(work: Path, name: str, folder: Path) -> Path:
    file = work / f"{name.replace('/', '-')}.gguf"
    if not file.exists():
        moefy.export_gguf(folder, file, dtype="f32")
    return file


def agreement(work: Path, runtime: str, python: str) -> list[dict[str, str]]:
    rows = []
    for form, choices in FORMS.items():
        dense = random_qwen3(work / "qwen3") if form in QWEN3 else builtin()
        rows.append(row_of(work, runtime, python, form, dense, choices))
    return rows


def of_families(work: Path, runtime: str, python: str) -> list[dict[str, str]]:
    rows = [row for row in read_csv(DOCS / "runtimes/families.csv") if row["runtime"] == runtime]
    rows = [row for row in rows if row["form"] in FAMILIES]
    known = [row["form"] for row in rows]
    for form, (family, settings, choices) in FAMILIES.items():
        if form in known:
            continue
        dense = random_model(work / f"dense of {form}", family, settings)
        rows.append(row_of(work, runtime, python, form, dense, EXACT | choices))
        print(rows[-1], flush=True)
    return rows


def row_of(
    work: Path, runtime: str, python: str, form: str, dense: Path, choices: dict[str, Any]
) -> dict[str, str]:
    """Return what a runtime makes of a form, the worst answer where there are several."""
    tokenizer = AutoTokenizer.from_pretrained(builtin())
    ids = tokenizer(PROMPT)["input_ids"]
    folder = converted(work, form, dense, choices)
    reference = dense if choices["active"] == choices["experts"] else folder
    expected = greedy(
        AutoModelForCausalLM.from_pretrained(reference, experts_implementation="eager"), ids
    )
    expected["text"] = tokenizer.decode(expected["tokens"])
    try:
        answers = [*asked(runtime, work, form, folder, ids, python)]
    except MoefyError as error:  # no file of this architecture is written
        answers = [{"error": str(error).partition(";")[0].replace(f"{work}/", "")}]
    found = [compared(expected, answer) for answer in answers]
    worst = max(
        found, key=lambda row: (-int(row["same tokens"]), float(row["largest difference"] or 0))
    )
    return {"form": form, "runtime": runtime} | worst


def compared(expected: dict[str, Any], answer: dict[str, Any]) -> dict[str, str]:
    """Return how many tokens are the same, and how far log-probabilities differ up to there."""
    same, largest = 0, ""
    if "text" in answer:
        same = COUNT * (answer["text"] == expected["text"])
    if "tokens" in answer:
        pairs = list(zip(expected["tokens"], answer["tokens"], strict=False))  # it may stop early
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    if "logprobs" in answer and len(pairs) == COUNT:
        both = zip(reversed(expected["logprobs"]), reversed(answer["logprobs"]), strict=False)
        differences = [abs(ours - theirs) for ours, theirs in both]
        largest = f"{max(differences[COUNT - same :], default=0):.1e}"
    return {
        "version": answer.get("version", ""),
        "same tokens": str(same),
        "largest difference": largest,
        "error": answer.get("error", ""),
    }


def agreement_tables(rows: list[dict[str, str]]) -> tuple[Rows, Rows]:
    """Return the forms by runtimes, and the reasons of those that refuse."""
    versions = {row["runtime"]: row["version"] for row in rows if row["version"]}
    cells = {(row["form"], row["runtime"]): _cell(row) for row in rows}
    forms = [
        form for form in (*FORMS, *FAMILIES) if any((form, name) in cells for name in versions)
    ]
    table = [["form", *(f"{name} {version}" for name, version in versions.items())]]
    table += [[f, *(cells.get((f, name), "not run") for name in versions)] for f in forms]
    refused: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["error"]:
            refused.setdefault((row["runtime"], row["error"]), row["form"])
    reasons = [[runtime, form, error] for (runtime, error), form in refused.items()]
    return table, [["runtime", "form", "what it says"], *reasons]


def _cell(row: dict[str, str]) -> str:
    if row["error"]:
        return "no"
    difference = row["largest difference"]
    if row["same tokens"] == str(COUNT):
        return difference or "same text"
    if difference:
        return f"{row['same tokens']} tokens, {difference}"
    return f"{row['same tokens']} tokens" if int(row["same tokens"]) else "other text"


def speed(work: Path) -> list[dict[str, str]]:
    files = {"dense": exported(work, "dense", builtin())}
    for name, choices in HALF.items():
        files[name] = exported(work, name, converted(work, name, builtin(), choices))
    ids = torch.randint(0, 49_000, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    timings: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    for _ in range(3):
        for name, file in files.items():
            timings[name].append(ask("llama.cpp", file, ids, 64, sys.executable)["timings"])
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
            "prefill, vs. dense (same active size)": _share(row, same_size, "prefill tok/s"),
            "decode, vs. dense (same active size)": _share(row, same_size, "decode tok/s"),
        }
        for row in rows
    ]


def _share(row: dict[str, Any], same_size: dict[str, Any], key: str) -> str:
    return f"{row[key] / same_size[key]:.0%}"


def main(work: Path, runtime: str, *more: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    page = DOCS / "runtimes.md"
    if runtime == "speed":
        publish_table(rows_of(speed(work)), DOCS / "runtimes/speed.csv", page)
        return
    python = next((each for each in more if each != "families"), sys.executable)
    kind, measure = ("families", of_families) if "families" in more else ("agreement", agreement)
    file = DOCS / f"runtimes/{kind}.csv"
    rows = measure(work, runtime, python)
    rows += [row for row in read_csv(file) if row["runtime"] != runtime]
    order = ["transformers", *CLIENTS]
    rows.sort(key=lambda row: order.index(row["runtime"]))
    write_csv(file, rows_of(rows))
    marks = {"agreement": ("agreement", "refusals"), "families": ("in_runtimes", "not_run")}[kind]
    for mark, table in zip(marks, agreement_tables(rows), strict=True):
        replace_table(page, mark, table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
