"""What a recipe can ask of training beyond the defaults: each option does what it says."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import write_tiny_model
from transformers import AutoModelForCausalLM

import moefy
from moefy.checkpoint.load import load_tokenizer
from moefy.data.corpus import open_corpus
from moefy.data.mixture import Mixture
from moefy.data.records import open_domains
from moefy.data.tokenise import pack
from moefy.errors import CorpusError, OutputError, StorageError, UsageError
from moefy.recipe import LLAMA_MOE
from moefy.training.state import read_log

LENGTH = 32
SHORT: dict[str, Any] = {
    "sequence_length": LENGTH,
    "global_batch_size": 4,
    "micro_batch_size": 4,
    "precision": "float32",
    "learning_rate": 3e-3,
}


def steps(count: int) -> dict[str, Any]:
    return SHORT | {"tokens": LENGTH * 4 * count}


@pytest.fixture
def dense(make_llama: Callable[..., Path]) -> Path:
    return make_llama()


@pytest.fixture
def moe(dense: Path, tmp_path: Path) -> Path:
    moefy.convert(dense, tmp_path / "moe", experts=4, active=2, **LLAMA_MOE)
    return tmp_path / "moe"


@pytest.fixture
def glm(dense: Path, tmp_path: Path) -> Path:
    choices = LLAMA_MOE | {"shared": 1, "repair": "none", "target": "glm4_moe"}
    moefy.convert(dense, tmp_path / "glm", experts=4, active=2, **choices)
    return tmp_path / "glm"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    return {name for name in old if not torch.equal(old[name], new[name])}


def heldout(folder: Path, corpus: Path, name: str) -> torch.Tensor:
    (domain,) = (domain for domain in open_domains(corpus) if domain.name == name)
    windows = pack(
        domain.documents("heldout"), load_tokenizer(folder), sequence_length=32, max_windows=3
    )
    return torch.from_numpy(windows)


class StopError(Exception):
    pass


def stop_at(step: int) -> Callable[[Any], None]:
    """Report to a run by breaking it off when a step is done, as a kill would."""

    def report(progress: Any) -> None:
        if progress.stage == "train" and progress.done == step:
            raise StopError

    return report


def without_time(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = {"tokens_per_s"}
    return [{key: value for key, value in line.items() if key not in timed} for line in log]


RESUMED: dict[str, dict[str, Any]] = {
    "dynamic mixture": {
        "mixture": "DynamicUniform",
        "mixture_interval_steps": 5,
        "evaluate_every_steps": 3,
        "distillation": {"alpha": 0.0},
    },
    "noisy gate": {"balance": {"kind": "importance-load", "noise": 1.0}},
    "distillation": {"distillation": {"layers": "ffn", "temperature": 2.0}},
    "adapters": {"lora": {"rank": 2}, "distillation": {"alpha": 0.0}},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_stopped_run_ends_as_if_uninterrupted(
    case: str, moe: Path, dense: Path, corpus: Path, tmp_path: Path
) -> None:
    settings = steps(20) | {"checkpoint_every_steps": 4, "teacher": str(dense)} | RESUMED[case]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    moefy.train(moe, whole, data=corpus, **settings)
    with pytest.raises(StopError):
        moefy.train(moe, stopped, data=corpus, report=stop_at(11), **settings)
    done = moefy.train(moe, stopped, data=corpus, **settings)
    assert done.resumed_from_step == 8
    assert without_time(read_log(stopped)) == without_time(read_log(whole))
    assert not changed(whole, stopped)


def test_the_mixture_follows_the_dense_models_losses(
    moe: Path, dense: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = steps(12) | RESUMED["dynamic mixture"] | {"heldout_sequences": 3}
    moefy.train(moe, out, data=corpus, teacher=str(dense), **settings)
    reference = json.loads((out / "reference.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(dense).double()
    for name in ("ab", "xyz"):
        ids = heldout(dense, corpus, name)
        assert reference[name] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)
    log = read_log(out)
    updates = {line["step"]: line["mixture"] for line in log if "mixture" in line}
    assert list(updates) == [1, 6, 11]
    for step in (6, 11):
        before, now = updates[step - 5], updates[step]
        grown = {
            name: before["weights"][name] * np.exp(now["losses"][name] - reference[name])
            for name in reference
        }
        for name, value in grown.items():
            share = 0.9999 * value / sum(grown.values()) + 1e-4 / len(grown)
            assert now["weights"][name] == pytest.approx(share, rel=1e-12)
    trained = AutoModelForCausalLM.from_pretrained(out).double()
    ids = heldout(dense, corpus, "ab")
    expected = trained(ids, labels=ids).loss.item()
    assert log[-1]["heldout_loss"]["ab"] == pytest.approx(expected, abs=1e-5)


def test_a_run_that_begins_again_measures_its_own_reference(
    moe: Path, make_llama: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = steps(3) | RESUMED["dynamic mixture"]
    parents = [make_llama(f"parent{seed}", initializer_range=0.1 * seed) for seed in (1, 3)]
    with pytest.raises(StopError):
        moefy.train(moe, out, data=corpus, teacher=str(parents[0]), report=stop_at(1), **settings)
    first = json.loads((out / "reference.json").read_text())
    other: dict[str, Any] = {"data": corpus, "teacher": str(parents[1]), **settings}
    with pytest.raises(OutputError, match=r"unfinished model with other settings .*parent: was"):
        moefy.train(moe, out, **other)
    moefy.train(moe, out, overwrite=True, **other)
    assert json.loads((out / "reference.json").read_text())["ab"] > first["ab"] + 0.1


def test_a_mixture_that_follows_nothing_is_refused(moe: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name it with --teacher"):
        moefy.train(moe, tmp_path / "out", data=corpus, mixture="DynamicUniform", **steps(2))


def test_a_prepared_corpus_is_drawn_from_like_text(moe: Path, corpus: Path, tmp_path: Path) -> None:
    small, prepared = tmp_path / "small", tmp_path / "tokens"
    small.mkdir()
    for domain in open_domains(corpus):  # a run reads all of it, and some of it twice
        texts = list(domain.documents())[:16]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (small / f"{domain.name}.jsonl").write_text(lines)
    moefy.prepare(small, prepared, tokenizer=str(moe), workers=1)
    settings = steps(60) | {"mixture": {"ab": 0.25, "xyz": 0.75}}
    logs = []
    for data in (small, prepared):
        out = tmp_path / f"from-{data.name}"
        moefy.train(moe, out, data=data, **settings)
        logs.append(read_log(out))
    drawn = [[(line["tokens"], line["domain_loss"].keys()) for line in log[1:]] for log in logs]
    assert drawn[0] == drawn[1]
    assert [log[-1]["epochs"] for log in logs] == [{"xyz": 1}, {"xyz": 1}]
    other = tmp_path / "other"
    shutil.copytree(moe, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = dict(
        zip(
            tokenizer["model"]["vocab"], reversed(tokenizer["model"]["vocab"].values()), strict=True
        )
    )
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CorpusError, match="is another one"):
        moefy.train(other, tmp_path / "wrong", data=prepared, **settings)


def test_distillation_is_the_divergence_from_the_teacher(
    moe: Path, make_llama: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    out, parent = tmp_path / "out", make_llama("parent", initializer_range=0.3)
    moefy.train(moe, out, data=corpus, teacher=str(parent), **steps(1))
    line = read_log(out)[1]
    windows = open_corpus(corpus, moe, sequence_length=32, max_sequences=4).train
    counts = {name: len(found) for name, found in windows.items()}
    mixture = Mixture(counts, {"ab": 0.5, "xyz": 0.5}, seed=0, global_batch_size=4)
    drawn = mixture.next_batch()
    ids = torch.from_numpy(np.stack([windows[name][idx] for name, idx, _ in drawn]))
    student, teacher = (AutoModelForCausalLM.from_pretrained(m).double() for m in (moe, parent))
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].log_softmax(-1) for m in (teacher, student))
    assert line["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert line["loss"] == pytest.approx(student(ids, labels=ids).loss.item(), rel=1e-5)


def test_frozen_parts_stay_bit_for_bit(glm: Path, corpus: Path, tmp_path: Path) -> None:
    names = {
        "embeddings": ["embed_tokens", "lm_head"],
        "attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "o_proj"],
        "norms": ["norm"],
        "experts": ["mlp.experts."],
        "shared-experts": ["mlp.shared_experts."],
        "routers": ["mlp.gate.weight"],
    }
    everything = set(tensors(glm)) - {n for n in tensors(glm) if "correction_bias" in n}
    for part, fragments in names.items():
        out = tmp_path / part
        moefy.train(glm, out, data=corpus, frozen=(part,), **steps(2))
        expected = {n for n in everything if not any(f in n for f in fragments)}
        assert changed(glm, out) == expected, part


def test_selection_bias_evens_the_load(glm: Path, corpus: Path, tmp_path: Path) -> None:
    spread = {}
    for balance in ("none", "selection-bias"):
        out = tmp_path / balance
        settings = steps(60) | {"balance": {"kind": balance}, "learning_rate": 1e-4}
        if balance == "selection-bias":
            settings["balance"]["rate"] = 1e-2
        moefy.train(glm, out, data=corpus, **settings)
        load = np.array([line["expert_load"] for line in read_log(out)[-20:]]).mean(0)
        spread[balance] = load.std()
    assert spread["selection-bias"] < 0.5 * spread["none"]
    biases = [t for n, t in tensors(out).items() if "correction_bias" in n]
    assert all(bias.dtype == torch.float32 and bias.abs().max() > 0 for bias in biases)


def test_the_noisy_gate_is_not_in_the_model(moe: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    noisy = {"kind": "importance-load", "noise": 1.0}
    moefy.train(moe, out, data=corpus, balance=noisy, **steps(3))
    assert tensors(out).keys() == tensors(moe).keys()
    quiet = tmp_path / "quiet"
    moefy.train(moe, quiet, data=corpus, balance=noisy | {"noise": 0.0}, **steps(3))
    assert read_log(out)[1]["loss"] != read_log(quiet)[1]["loss"]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile's own
@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile"])
def test_how_it_is_computed_does_not_change_what(
    option: str, moe: Path, corpus: Path, tmp_path: Path
) -> None:
    logs = []
    for value in (False, True):
        out = tmp_path / str(value)
        moefy.train(moe, out, data=corpus, **steps(4) | {option: value})
        logs.append(read_log(out)[1:])
    for plain, other in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "balance_loss"):
            assert other[key] == pytest.approx(plain[key], rel=1e-3), (key, plain["step"])


def test_adapters_are_merged_into_a_plain_model(moe: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lora = {"rank": 4, "modules": "all"}
    followed = {"evaluate_every_steps": 20, "heldout_sequences": 3}
    moefy.train(moe, out, data=corpus, lora=lora, **followed, **steps(20))
    assert tensors(out).keys() == tensors(moe).keys()
    moved = changed(moe, out)
    assert moved == {n for n in tensors(moe) if "_proj" in n or "experts" in n}
    log = read_log(out)
    assert log[-1]["loss"] < log[1]["loss"]
    model, ids = AutoModelForCausalLM.from_pretrained(out), heldout(moe, corpus, "ab")
    # measured before the merge, with the adapters beside the weights
    expected = log[-1]["heldout_loss"]["ab"]
    assert model(ids, labels=ids).loss.item() == pytest.approx(expected, abs=1e-4)
    differences = [
        torch.linalg.matrix_rank((tensors(out)[name] - tensors(moe)[name]).double(), rtol=1e-4)
        for name in moved
    ]
    assert max(differences) <= 4


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"lora": {"modules": ["lm_head"]}}, "lora.modules = .*'attention' or 'all'"),
        ({"micro_batch_size": 3}, "must be a multiple of 3: 1 process with micro_batch_size 3"),
        ({"frozen": ("shared-experts",)}, "frozen shared-experts: a mixtral model has none"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # peft's own
def test_what_would_do_nothing_is_refused(
    choices: dict[str, Any], message: str, moe: Path, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        moefy.train(moe, tmp_path / "out", data=corpus, **steps(2) | choices)


def test_a_large_seed_is_a_seed(moe: Path, corpus: Path, tmp_path: Path) -> None:
    moefy.train(moe, tmp_path / "out", data=corpus, **steps(1) | {"seed": 10**20})


def test_the_only_checkpoint_kept_is_the_new_one(moe: Path, corpus: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", steps(12) | {"checkpoint_every_steps": 2}
    with pytest.raises(StopError):
        moefy.train(moe, out, data=corpus, report=stop_at(9), **settings)
    (out / "checkpoint" / "step-00000008" / "checksums.json").unlink()
    settings |= {"checkpoint_every_steps": 1, "checkpoints_kept": 1}
    with pytest.raises(StopError):
        moefy.train(moe, out, data=corpus, report=stop_at(8), **settings)
    assert [folder.name for folder in (out / "checkpoint").iterdir()] == ["step-00000007"]


@pytest.mark.parametrize("changed", ["text", "parent"])
def test_what_a_stopped_run_read_must_be_the_same(
    changed: str, moe: Path, dense: Path, corpus: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "out", steps(12) | {"checkpoint_every_steps": 4}
    settings["teacher"] = str(dense)
    with pytest.raises(StopError):
        moefy.train(moe, out, data=corpus, report=stop_at(5), **settings)
    if changed == "text":
        text = (corpus / "ab.jsonl").read_text()
        (corpus / "ab.jsonl").write_text(text.replace("b", "c"))
    else:
        weights = tensors(dense)
        save_file({n: t * 1.5 for n, t in weights.items()}, dense / "model.safetensors")
    with pytest.raises(OutputError, match=f"{changed}: was"):
        moefy.train(moe, out, data=corpus, **settings)


@pytest.mark.parametrize("seen", ["before", "while writing"])
def test_a_full_disk_keeps_the_last_checkpoint(
    seen: str, moe: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "out", steps(12) | {"checkpoint_every_steps": 4}
    usage = shutil.disk_usage(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Any) -> None:
        if progress.stage == "train" and progress.done == 7 and seen == "before":
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        elif progress.stage == "train" and progress.done == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    try:
        with pytest.raises(StorageError, match=r"GB free|the disk filled up"):
            moefy.train(moe, out, data=corpus, report=fill, **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert [folder.name for folder in (out / "checkpoint").iterdir()] == ["step-00000004"]
    assert moefy.train(moe, out, data=corpus, **settings).resumed_from_step == 4


def test_a_longer_sequence_than_the_context_is_refused(
    moe: Path, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=r"--sequence-length 1024 is longer than the context .*512"
    ):
        moefy.train(moe, tmp_path / "out", data=corpus, sequence_length=1024, tokens=2048)
    short = tmp_path / "short"
    shutil.copytree(moe, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    with pytest.raises(UsageError, match=r"--sequence-length 32 is longer than .*short, 16 tokens"):
        moefy.train(
            moe, tmp_path / "out", data=corpus, teacher=str(short), sequence_length=32, tokens=64
        )


def test_tensorboard_gets_every_number(moe: Path, corpus: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    moefy.train(moe, out, data=corpus, trackers=("tensorboard",), **steps(3))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    written = [event.value for event in events.Scalars("loss")]
    assert written == pytest.approx([line["loss"] for line in read_log(out)[1:]])
    assert "domain_loss/ab" in events.Tags()["scalars"]
    # the events are the run's own
    moefy.train(moe, out, data=corpus, overwrite=True, **steps(3))
    assert not (out / "tensorboard").exists()
    with pytest.raises(UsageError, match="wandb is not installed: pip install wandb"):
        moefy.train(moe, tmp_path / "none", data=corpus, trackers=("wandb",), **steps(3))


@pytest.mark.parametrize(
    ("family", "settings", "target"),
    [
        ("mistral", {"sliding_window": 16}, "granitemoe_swa"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "granitemoe_swa"),
        ("granite", {"residual_multiplier": 0.5, "logits_scaling": 3.0}, "granitemoeshared"),
        ("qwen2", {}, "granitemoeshared"),
        ("qwen3", {}, "glm4_moe"),
        ("phi3", {}, "granitemoeshared"),
    ],
)
def test_every_family_trains(
    family: str, settings: dict[str, Any], target: str, corpus: Path, tmp_path: Path
) -> None:
    source, moe, out = (tmp_path / name for name in ("family", "moe", "out"))
    write_tiny_model(source, family, initializer_range=0.3, **settings)
    choices = LLAMA_MOE | {"shared": 2, "repair": "none", "target": target}
    moefy.convert(source, moe, experts=6, active=4, **choices)
    towards = {"layers": "residual", "alpha": 1.0}
    distilled = {"teacher": str(source), "distillation": towards}
    moefy.train(moe, out, data=corpus, **distilled, **steps(16) | {"learning_rate": 3e-4})
    log = read_log(out)
    assert log[-1]["layer_loss"] < log[1]["layer_loss"]
    assert (out / "config.json").read_bytes() == (moe / "config.json").read_bytes()
    still = {name for name in tensors(moe) if "correction_bias" in name or "sinks" in name}
    assert changed(moe, out) == tensors(moe).keys() - still
    assert len(still) == (2 if target in ("granitemoe_swa", "glm4_moe") else 0)
