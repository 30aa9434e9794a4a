"""Perplexity is transformers' own; the divergence is that of float64."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import write_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moefy
from moefy.checkpoint.families import FAMILIES
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.cli import app
from moefy.data.records import open_domains
from moefy.data.tokenise import pack
from moefy.errors import CorpusError, UsageError
from moefy.evaluation import compare
from moefy.evaluation.compare import window_quality
from moefy.evaluation.output_loss import LogitsInput
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none"}


def test_perplexity_and_kl(make_llama: Callable[..., Path], corpus: Path, tmp_path: Path) -> None:
    # larger weights than usual, so that the FFNs decide which token is the likeliest
    dense = make_llama(tie_word_embeddings=False, initializer_range=0.2)
    for name, active in {"half": 2, "all": 4}.items():
        moefy.convert(dense, tmp_path / name, experts=4, active=active, **EXACT)
    done = moefy.evaluate(
        [tmp_path / "half", dense, tmp_path / "all"],
        data=corpus,
        windows=3,
        sequence_length=48,
    )
    assert done.reference == str(dense)
    assert done.tokens == 2 * 3 * 47
    half, reference, every = done.results
    assert (reference.kl_to_reference, reference.top1_agreement) == (0, 1)
    assert reference.excess_loss is None
    assert half.excess_loss.value == pytest.approx(
        math.log(half.perplexity / reference.perplexity), rel=1e-6
    )
    assert half.excess_loss.low < half.excess_loss.value < half.excess_loss.high
    assert every.top1_agreement > 0.99  # rounding may turn a tie
    assert abs(every.kl_to_reference) < 1e-6
    assert every.perplexity == pytest.approx(reference.perplexity, rel=1e-5)
    assert half.cost.active_params < reference.cost.active_params < half.cost.total_params
    assert all(r.prefill_tokens_per_s > 0 and r.decode_tokens_per_s > 0 for r in done.results)

    tokenizer = load_tokenizer(dense)
    windows = {
        domain.name: torch.from_numpy(
            pack(domain.documents("heldout"), tokenizer, sequence_length=48, max_windows=3)
        )
        for domain in open_domains(corpus)
    }
    p, q = (AutoModelForCausalLM.from_pretrained(f).double() for f in (dense, tmp_path / "half"))
    divergences, agreements = [], []
    with torch.inference_mode():
        for name, ids in windows.items():
            assert half.domain_perplexity[name] == pytest.approx(
                math.exp(q(ids, labels=ids).loss), rel=1e-5
            )
            log_p, log_q = (model(ids).logits.log_softmax(-1) for model in (p, q))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            agreements.append(log_p.argmax(-1) == log_q.argmax(-1))
    expected = torch.cat(divergences).mean().item()
    share = torch.cat(agreements).double().mean().item()
    assert 0 < share < 1
    assert half.top1_agreement == pytest.approx(share, abs=0.01)
    float32_rounding = 1e-7
    assert half.kl_to_reference == pytest.approx(expected, rel=1e-3, abs=float32_rounding)


def test_means_by_hand() -> None:
    """Two positions, two tokens; the logits are the hidden states themselves."""
    reference = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    model = torch.tensor([[[0.25, 0.75], [0.6, 0.4]]]).log()
    ids, matrix = torch.tensor([[0, 1]]), torch.eye(2)
    with torch.no_grad():
        dense = LogitsInput(reference, matrix)
        losses, divergences, agreements = window_quality(LogitsInput(model, matrix), ids, dense)
        alone = window_quality(LogitsInput(model, matrix), ids, None)
    assert losses == alone[0] == [pytest.approx(-math.log(0.75))]
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    second = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    assert divergences == [pytest.approx((first + second) / 2, abs=1e-6)]
    assert agreements == [0.5]
    assert alone[1:] == ([], [])


@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_those_of_all_logits(tmp_path: Path, family: str) -> None:
    """In float64, with what a family multiplies its logits by; no position is left out."""
    scales = {"logits_scaling": 2.0, "embedding_multiplier": 3.0} if family == "granite" else {}
    write_tiny_model(tmp_path, family, initializer_range=0.2, **scales)
    dense, other = (AutoModelForCausalLM.from_pretrained(tmp_path).double() for _ in "ab")
    other.get_parameter(f"model.layers.0.{FAMILIES[family].down}").data *= 0.5
    ids = torch.arange(24).view(3, 8)
    with torch.no_grad():
        found = window_quality(LogitsInput.of(other, ids), ids, LogitsInput.of(dense, ids))
        log_p, log_q = (model(ids).logits.log_softmax(-1) for model in (dense, other))
    losses = -log_q[:, :-1].gather(-1, ids[:, 1:, None]).mean((1, 2))
    assert found[0] == pytest.approx(losses.tolist(), rel=1e-12)
    divergences = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    assert found[1] == pytest.approx(divergences.tolist(), rel=1e-9)
    assert found[2] == pytest.approx(
        (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(1).tolist()
    )


def test_one_model_at_a_time_is_in_memory(
    make_llama: Callable[..., Path], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[weakref.ref[torch.nn.Module]] = []
    most = 0

    def load(folder: Path, *, dtype: torch.dtype) -> Any:
        nonlocal most
        gc.collect()
        network = load_model(folder, dtype=dtype)
        bodies.append(weakref.ref(network.base_model))
        most = max(most, sum(body() is not None for body in bodies))
        return network

    monkeypatch.setattr(compare, "load_model", load)
    models = [make_llama(name) for name in "abcd"]
    moefy.evaluate(models, data=corpus, windows=1, sequence_length=16)
    assert (len(bodies), most) == (4, 1)


def test_other_vocabularies_are_refused(make_llama: Callable[..., Path], corpus: Path) -> None:
    models = [make_llama("a"), make_llama("b", vocab_size=300)]
    with pytest.raises(UsageError, match="257, 300"):
        moefy.evaluate(models, data=corpus)


def test_other_tokens_are_refused(make_llama: Callable[..., Path], corpus: Path) -> None:
    dense, same, other = (make_llama(name) for name in ("dense", "same", "other"))
    spoken = json.loads((dense / "tokenizer.json").read_text())
    (same / "tokenizer.json").write_text(json.dumps(spoken))  # the same in other bytes
    vocab = spoken["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(spoken))
    short: dict[str, Any] = {"windows": 1, "sequence_length": 8, "decode": False}
    moefy.evaluate([dense, same], data=corpus, **short)
    with pytest.raises(UsageError, match=r"dense and .*other have different tokens"):
        moefy.evaluate([dense, same, other], data=corpus, **short)


def test_the_text_is_called_what_it_is(make_llama: Callable[..., Path], corpus: Path) -> None:
    short = ["--windows", "1", "--sequence-length", "8", "--no-decode"]
    for split, name in {"heldout": "held-out", "train": "training"}.items():
        command = ["eval", str(make_llama()), "--data", str(corpus), "--split", split, *short]
        assert f"14 {name} tokens per model; loss above" in CliRunner().invoke(app, command).stdout


def test_too_little_text_is_refused(make_llama: Callable[..., Path], corpus: Path) -> None:
    with pytest.raises(CorpusError, match="shorter than one window"):
        moefy.evaluate(make_llama(), data=corpus, sequence_length=100_000)


def test_a_model_without_tokenizer_is_named(make_llama: Callable[..., Path], corpus: Path) -> None:
    dense = make_llama()
    for file in dense.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match="no readable tokenizer"):
        moefy.evaluate(dense, data=corpus)
