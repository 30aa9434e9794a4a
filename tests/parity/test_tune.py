"""Tuning: the loss is the one written down, only what may learn learns, and the form is kept."""

from __future__ import annotations

import errno
import functools
import json
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.conftest import write_tiny_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import moefy
import moefy.checkpoint.targets
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.data.conversations import read_conversations
from moefy.data.template import chat_template, make_examples
from moefy.errors import CorpusError, OutputError, TrainingError, UsageError
from moefy.experts.balance import switch_loss
from moefy.experts.routers import RouterTrace, routers_of
from moefy.progress import Progress
from moefy.recipe import LLAMA_MOE
from moefy.run_folder import RunFolder
from moefy.training.models import add_adapters, merge_adapters
from moefy.training.processes import ONE
from moefy.training.recipe import Lora, TrainRecipe, TuneRecipe
from moefy.training.state import read_log
from moefy.training.tune import heldout_loss

SHORT: dict[str, Any] = {
    "sequence_length": 256,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 3e-3,
    "precision": "float32",
    "epochs": 1,
}
TARGETS = {
    "mixtral": ("llama", {}, 0),
    "granitemoe": ("llama", {"attention_bias": True}, 0),
    "granitemoeshared": ("llama", {}, 1),
    "granitemoe_swa": ("mistral", {"sliding_window": 16}, 1),
    "qwen3_moe": ("qwen3", {"head_dim": 8}, 0),
    "glm4_moe": ("qwen3", {"head_dim": 8}, 1),
}


@pytest.fixture
def moe(make_llama: Callable[..., Path], tmp_path: Path) -> Path:
    moefy.convert(make_llama(), tmp_path / "moe", experts=4, active=2, **LLAMA_MOE)
    return tmp_path / "moe"


def convert_to(target: str, tmp_path: Path) -> Path:
    family, settings, shared = TARGETS[target]
    dense = write_tiny_model(tmp_path / f"{target}-dense", family, **settings)
    choices = LLAMA_MOE | {"shared": shared, "repair": "none"}
    folder = tmp_path / target
    moefy.convert(dense, folder, experts=4, active=2, target=target, **choices)
    return folder


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Forty conversations of one or two exchanges; the answers follow from the questions."""
    file = tmp_path / "talks.jsonl"
    rows = []
    for i in range(40):
        turns = [("human", f"say {i}"), ("gpt", "ab" * (i % 5 + 1))]
        if i % 2:
            turns += [("human", "more"), ("gpt", "ba" * (i % 3 + 1))]
        rows.append({"conversations": [{"from": who, "value": text} for who, text in turns]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sides(folder: Path, talks: Path) -> tuple[list[Any], list[Any]]:
    """Return the training and the held-out examples."""
    tokenizer = load_tokenizer(folder)
    whole, _ = read_conversations(talks)
    made = [
        make_examples(side, tokenizer, chat_template(tokenizer), max_length=256)[0]
        for side in ([c for c in whole if not c.is_held_out], [c for c in whole if c.is_held_out])
    ]
    assert all(made)
    return made[0], made[1]


def loss_by_hand(folder: Path, examples: list[Any]) -> float:
    """Mean over the assistant's tokens, from plain logits in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    model.set_experts_implementation("eager")
    losses = []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.ids])).logits[0]
        for i in range(1, len(example.ids)):
            if example.labels[i] >= 0:
                losses.append(F.cross_entropy(logits[i - 1], torch.tensor(example.ids[i])))
    return torch.stack(losses).mean().item()


def test_the_losses_are_those_of_plain_logits(moe: Path, talks: Path, tmp_path: Path) -> None:
    train, heldout = sides(moe, talks)
    one_step = SHORT | {"global_batch_size": len(train), "micro_batch_size": 1}
    done = moefy.tune(moe, tmp_path / "out", data=talks, **one_step)
    assert (done.steps, done.conversations) == (1, len(train))
    log = read_log(tmp_path / "out")
    assert log[1]["loss"] == pytest.approx(loss_by_hand(moe, train), abs=1e-5)
    assert done.heldout_before == pytest.approx(loss_by_hand(moe, heldout), abs=1e-5)
    assert done.heldout_before == log[0]["heldout_loss"]
    assert done.heldout_after == log[-1]["heldout_loss"]


def test_the_steps_are_those_of_transformers_trainer(
    moe: Path, talks: Path, tmp_path: Path
) -> None:
    """Order, the smaller last step of an epoch, rates, clipping and losses, over two epochs."""
    train, _ = sides(moe, talks)
    settings = SHORT | {"epochs": 2, "seed": 7, "global_batch_size": 6, "micro_batch_size": 3}
    assert len(train) % 6
    moefy.tune(moe, tmp_path / "out", data=talks, **settings)
    network = load_model(moe, dtype=torch.float32)
    for router in routers_of(network):
        router.requires_grad_(False)

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {
            name: pad_sequence(
                [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value
            )
            for name, value in {"input_ids": 0, "labels": -100, "attention_mask": 0}.items()
        }

    trainer = Trainer(
        network,
        TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            num_train_epochs=2,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=TuneRecipe().warmup_fraction,
            seed=7,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=[
            {"input_ids": e.ids, "labels": e.labels, "attention_mask": [1] * len(e.ids)}
            for e in train
        ],
    )
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "grad_norm" in line]
    ours = read_log(tmp_path / "out")[1:]
    assert len(ours) == 2 * -(-len(train) // 6)
    for mine, line in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert mine[key] == pytest.approx(line[key], rel=1e-5), (key, mine["step"])


def test_tuning_teaches_and_keeps_the_form(moe: Path, talks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with talks.open("a") as file:
        file.write('{"conversations": [{"from": "gpt", "value": "Ho"}]}\n')
    done = moefy.tune(moe, out, data=talks, **SHORT | {"epochs": 8})
    assert done.heldout_before is not None
    assert done.heldout_after is not None
    assert done.heldout_after < 0.5 * done.heldout_before
    _, heldout = sides(out, talks)
    assert done.heldout_after == pytest.approx(loss_by_hand(out, heldout), abs=1e-5)
    (broken,) = done.broken
    assert (out / "broken.txt").read_text() == broken + "\n"
    assert broken == f"{talks}, line 41: message 1 is assistant's, not user's"
    assert (out / "config.json").read_bytes() == (moe / "config.json").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (moe, out))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    record = json.loads((out / "moefy.json").read_text())
    assert record["stage"] == "tune"
    assert record["from"]["stage"] == "convert"
    assert record["result"]["heldout_after"] == done.heldout_after
    assert not (out / "checkpoint").exists()
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == "<|im_start|>user\nx<|im_end|>\n"
    stops = AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id
    assert tokenizer.eos_token_id in stops


def disturb(folder: Path) -> None:
    """Give sinks a gradient, and biases what bfloat16 cannot hold beside weights that it holds."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("sinks"):
            tensors[name] = torch.zeros_like(tensor).bfloat16()
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = torch.linspace(-1e-3, 1e-3, len(tensor))
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_routers_sinks_and_selection_biases_stay(
    target: str, lora_rank: int, talks: Path, tmp_path: Path
) -> None:
    folder, out = convert_to(target, tmp_path), tmp_path / "out"
    disturb(folder)
    moefy.tune(folder, out, data=talks, lora_rank=lora_rank, **SHORT | {"weight_decay": 0.1})
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    routing = moefy.checkpoint.targets.TARGETS[target]
    fixed = (routing.router, routing.selection_bias or "-", routing.sinks or "-")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.endswith(fixed)]
    matrices = {n for n, t in before.items() if t.ndim > 1 and not n.endswith(fixed)}
    outside = {"model.embed_tokens.weight", "lm_head.weight"} if lora_rank else set()
    assert matrices - changed == outside & matrices


def test_balanced_routers_learn(moe: Path, talks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moefy.tune(moe, out, data=talks, router="balanced", **SHORT)
    before, after = (load_file(path / "model.safetensors") for path in (moe, out))
    routers = [name for name in before if name.endswith("block_sparse_moe.gate.weight")]
    assert len(routers) == 2
    assert not any(torch.equal(before[name], after[name]) for name in routers)
    assert all(1 <= line["balance_loss"] < 2 for line in read_log(out)[1:-1])


@pytest.mark.parametrize("per_pass", ["one", "all"])
def test_the_balance_loss_is_that_of_the_step(
    per_pass: str, moe: Path, talks: Path, tmp_path: Path
) -> None:
    """The gradient of a step is that of CE over its tokens plus the mean over its passes."""
    train, _ = sides(moe, talks)
    network = load_model(moe, dtype=torch.float32)
    losses, sums = [], []
    for example in train:
        ids = torch.tensor(example.ids)
        with RouterTrace(network) as trace:
            logits = network(ids[None]).logits[0]
        labels = torch.tensor(example.labels)
        losses.append(F.cross_entropy(logits[:-1], labels[1:], reduction="none"))
        found = trace.sums()
        assert found is not None
        sums.append(found)
    num_tokens = sum(label >= 0 for example in train for label in example.labels)
    if per_pass == "one":
        balance = torch.stack([switch_loss(part) for part in sums]).mean()
    else:
        balance = switch_loss(functools.reduce(operator.add, sums))
    (torch.cat(losses).sum() / num_tokens + 20 * balance).backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()
    settings = SHORT | {
        "global_batch_size": len(train),
        "micro_batch_size": 1 if per_pass == "one" else len(train),
        "router": "balanced",
        "balance_coefficient": 20,
    }
    moefy.tune(moe, tmp_path / "out", data=talks, **settings)
    line = read_log(tmp_path / "out")[1]
    assert line["balance_loss"] == pytest.approx(balance.item(), abs=1e-5)
    assert line["loss"] == pytest.approx(torch.cat(losses).sum().item() / num_tokens, abs=1e-4)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("target", ["dense", *TARGETS])
def test_merged_adapters_give_the_same_logits(target: str, tmp_path: Path) -> None:
    if target == "dense":
        folder = write_tiny_model(tmp_path / "dense", "llama")
    else:
        folder = convert_to(target, tmp_path)
    network = load_model(folder, dtype=torch.float32)
    names = set(network.state_dict())
    tokens = torch.arange(2 * 17).view(2, 17)
    with torch.no_grad():
        plain = network(tokens).logits
        adapted = add_adapters(network, Lora(rank=3, alpha=6.0, modules="all"), 0, ONE)
        learning = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        assert all(".lora_" in name for name in learning)
        torch.manual_seed(1)
        for parameter in learning.values():
            parameter.normal_(std=0.05)
        with_adapters = adapted(tokens).logits
        merge_adapters(adapted)
        assert set(adapted.state_dict()) == names
        assert (with_adapters - plain).abs().max() > 1e-2
        assert torch.allclose(adapted(tokens).logits, with_adapters, atol=2e-6)


def test_lora_trains_a_plain_model(moe: Path, talks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = moefy.tune(moe, out, data=talks, lora_rank=4, **SHORT | {"learning_rate": 2e-2})
    assert done.heldout_before is not None
    assert done.heldout_after is not None
    assert done.heldout_after < done.heldout_before - 0.2
    _, heldout = sides(out, talks)
    model = AutoModelForCausalLM.from_pretrained(out)
    loss = heldout_loss(model, heldout, TrainRecipe(precision="float32"))
    assert loss == pytest.approx(done.heldout_after, abs=1e-5)


LONG: dict[str, Any] = SHORT | {"checkpoint_every_steps": 5, "epochs": 10}


def ends(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Return the weights and the log of a run, without times."""
    timed = {"tokens_per_s"}
    log = [{k: v for k, v in line.items() if k not in timed} for line in read_log(folder)]
    return (folder / "model.safetensors").read_bytes(), log


def test_a_killed_run_ends_as_if_uninterrupted(moe: Path, talks: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    moefy.tune(moe, whole, data=talks, **LONG)
    chosen = [flag for key, value in LONG.items() for flag in ("--set", f"{key}={value}")]
    arguments = ["tune", str(moe), str(killed), "--data", str(talks), *chosen]
    process = subprocess.Popen(
        [sys.executable, "-m", "moefy", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = killed / "log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 20):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists(), "the run was over before it was killed"
    resumed = moefy.tune(moe, killed, data=talks, **LONG)
    assert resumed.resumed_from_step >= 10
    assert ends(killed) == ends(whole)


@pytest.mark.parametrize("target", ["granitemoeshared", "glm4_moe"])
def test_stopped_adapters_end_as_if_uninterrupted(target: str, talks: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "tune" and progress.done == 14:
            raise KeyboardInterrupt

    folder = convert_to(target, tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = LONG | {"lora_rank": 2, "epochs": 2}
    moefy.tune(folder, whole, data=talks, **settings)
    with pytest.raises(KeyboardInterrupt):
        moefy.tune(folder, stopped, data=talks, report=stop, **settings)
    assert moefy.tune(folder, stopped, data=talks, **settings).resumed_from_step == 10
    assert ends(stopped) == ends(whole)


def test_a_run_that_fails_when_all_is_trained(
    moe: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    whole, failed = tmp_path / "whole", tmp_path / "failed"
    settings = LONG | {"epochs": 1}
    steps = moefy.tune(moe, whole, data=talks, **settings).steps
    assert steps % LONG["checkpoint_every_steps"] == 0
    with monkeypatch.context() as full_disk:
        full_disk.setattr("moefy.training.loop.TrainingLoop.write", fail)
        with pytest.raises(OSError, match="No space"):
            moefy.tune(moe, failed, data=talks, **settings)
    assert moefy.tune(moe, failed, data=talks, **settings).resumed_from_step == steps
    assert ends(failed) == ends(whole)


def test_what_cannot_be_done(
    moe: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, error: type[Exception] = UsageError, **settings: Any) -> None:
        with pytest.raises(error, match=message):
            moefy.tune(settings.pop("model", moe), tmp_path / "out", **{"data": talks} | settings)
        assert not (tmp_path / "out").exists()

    refused("leave one out", lora_rank=2, router="balanced")
    refused("must be a multiple of", global_batch_size=3, micro_batch_size=2)
    refused("longer than the context of .* 512 tokens: lower it", sequence_length=513)
    refused(
        "a llama model has no routers to balance",
        model=tmp_path / "dense",
        router="balanced",
        sequence_length=256,
    )
    refused(
        "no conversation to train on.*says nothing within 4 tokens", CorpusError, sequence_length=4
    )
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        message = r"lora needs the peft package: pip install 'moefy\[lora\]'"
        refused(message, lora_rank=2, sequence_length=256)
    moefy.tune(moe, tmp_path / "done", data=talks, **SHORT)
    inside = talks.rename(tmp_path / "done" / "talks.jsonl")
    with pytest.raises(OutputError, match=r"would replace its own source .*talks\.jsonl"):
        moefy.tune(moe, tmp_path / "done", data=inside, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        moefy.tune(moe, tmp_path / "full", data=inside)


def test_a_lost_run_says_so_and_refuses_other_settings(
    moe: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    settings = SHORT | {"learning_rate": 1e30, "checkpoint_every_steps": 1}
    with pytest.raises(TrainingError, match=r"step \d+: loss .* lower --learning-rate"):
        moefy.tune(moe, out, data=talks, **settings)
    assert not (out / "config.json").exists()
    with pytest.raises(OutputError, match=r"other settings .*learning_rate: was 1e\+30"):
        moefy.tune(moe, out, data=talks, **SHORT)
    done = moefy.tune(moe, out, data=talks, overwrite=True, **SHORT)
    assert done.steps > 0

    whole, beside = (out / "model.safetensors").read_bytes(), tmp_path / ".out.next"
    with pytest.raises(TrainingError):
        moefy.tune(moe, out, data=talks, overwrite=True, **settings)
    assert (out / "model.safetensors").read_bytes() == whole
    assert (beside / "checkpoint").is_dir()
    more = SHORT | {"seed": 1}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "_swap", killed)
        with pytest.raises(KeyboardInterrupt):
            moefy.tune(moe, out, data=talks, overwrite=True, **more)
    found = moefy.tune(moe, out, data=talks, overwrite=True, **more)
    assert (found.folder, found.elapsed_s, found.steps) == (out, 0.0, done.steps)
    assert found.heldout_after is not None
    assert (out / "model.safetensors").read_bytes() != whole
    assert not beside.exists()
