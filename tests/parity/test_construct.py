"""The saved checkpoint computes what the research form (mask · dense FFN) computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moefy
from moefy.calibrate.importance import window_importance
from moefy.calibrate.replay import ModelReplay
from moefy.calibrate.text import calibration_windows, self_windows
from moefy.calibrate.walk import CalibrationWalk
from moefy.checkpoint.reader import DenseCheckpoint
from moefy.checkpoint.targets import TARGETS
from moefy.construct.convert import calibration_walk, split_layers
from moefy.errors import ArchitectureError, CorpusError, UsageError
from moefy.recipe import LLAMA_MOE, ConvertRecipe

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none"}

CHOICES = [
    {"partition": "random", "router": "random", "repair": "paper"},
    {"partition": "random", "router": "random", "repair": "unscaled"},
    {"partition": "clustering-up", "router": "mean-gate", "repair": "none"},
    {"partition": "clustering-gate", "router": "representative", "repair": "scale"},
    {"partition": "coactivation", "router": "ridge", "repair": "refit"},
    {"partition": "sharing-inter", "router": "random", "repair": "refit"},
    {"partition": "gradient", "router": "mean-gate", "repair": "scale"},
    {"partition": "carve", "router": "representative", "repair": "none"},
    {"partition": "alternating", "router": "ridge-log", "repair": "refit", "aim": "ffn"},
    {"end_to_end_epochs": 0},
]
ONE_EXPERT = {
    "experts": 1,
    "active": 1,
    "shared": 0,
    "partition": "random",
    "router": "random",
    "repair": "none",
}
TOKENS = {"calibration_tokens": 2048, "calibration_length": 64, "end_to_end_epochs": 0}


def corpus_windows(dense: Path, corpus: Path) -> np.ndarray:
    return calibration_windows(corpus, dense, tokens=2048, sequence_length=64, needed_tokens=1)


def research_logits(
    dense: Path,
    recipe: ConvertRecipe,
    windows: np.ndarray | None,
    ids: torch.Tensor,
    target: str = "mixtral",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits, and the tokens of which rounding decides what expert runs."""
    checkpoint = DenseCheckpoint(dense)
    replay = ModelReplay(checkpoint)
    hidden = replay.embed(ids)
    walk = None
    if recipe.calibrated and windows is not None:
        walk = calibration_walk(replay, recipe, windows)
    tied = torch.zeros(ids.numel(), dtype=torch.bool)
    splits = split_layers(checkpoint, recipe, walk, TARGETS[target].score)
    for layer_idx, split in enumerate(splits):
        layer = replay.layer(layer_idx)
        entered, hidden = hidden, layer.attend(hidden)
        sample = layer.sample(hidden, entered)
        hidden = hidden + layer.added(split(sample.inputs)).view_as(hidden)
        logits = sample.inputs @ split.routing.router.T
        if 0 < (active := split.routing.active) < logits.shape[1]:
            last, next_ = logits.topk(active + 1, dim=1).values[:, -2:].T
            tied |= last - next_ < 1e-5 * logits.std()
    return replay.head()(hidden.flatten(0, 1)).unflatten(0, ids.shape), tied


@pytest.mark.parametrize(
    ("choices", "shared"),
    [
        *((choices, shared) for choices in CHOICES for shared in (0, 2)),
        ({"partition": "sharing-inner", "router": "random", "repair": "refit"}, 0),
        ({"repair": "fit", "end_to_end_epochs": 0}, 2),
    ],
    ids=lambda value: value.get("partition", "default") if isinstance(value, dict) else str(value),
)
def test_checkpoint_equals_research_form(
    tiny_llama: Path, corpus: Path, tmp_path: Path, choices: dict[str, Any], shared: int
) -> None:
    out = tmp_path / "moe"
    settings = choices | TOKENS | {"experts": 8, "active": 4, "shared": shared}
    moefy.convert(tiny_llama, out, data=corpus, **settings)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == ("granitemoeshared" if shared else "mixtral")
    windows = corpus_windows(tiny_llama, corpus)
    ids = torch.from_numpy(windows[:3])
    recipe = ConvertRecipe.build(**settings).for_model(48)
    expected, tied = research_logits(tiny_llama, recipe, windows, ids)
    with torch.inference_mode():
        difference = (model(ids).logits - expected).abs().amax(-1).flatten()
    assert difference[~tied].max() < 1e-4
    assert tied.float().mean() < 0.02


@pytest.mark.parametrize("shared", [1, 3])
def test_all_active_with_shared_experts_equals_dense(
    tiny_llama: Path, tmp_path: Path, shared: int
) -> None:
    out = tmp_path / "moe"
    moefy.convert(
        tiny_llama,
        out,
        experts=6,
        active=6,
        shared=shared,
        partition="random",
        router="random",
        repair="none",
    )
    ids = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        dense, moe = (
            AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (tiny_llama, out)
        )
    assert (dense - moe).abs().max() < 1e-4


def test_all_shared_is_a_smaller_dense_model(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """Static pruning with the refit, saved as the dense architecture."""
    out = tmp_path / "pruned"
    settings = TOKENS | {"experts": 8, "active": 4, "shared": 4}
    moefy.convert(tiny_llama, out, data=corpus, **settings)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.model_type, model.config.intermediate_size) == ("llama", 24)
    windows = corpus_windows(tiny_llama, corpus)
    ids = torch.from_numpy(windows[:3])
    expected, _ = research_logits(
        tiny_llama, ConvertRecipe.build(**settings).for_model(48), windows, ids
    )
    with torch.inference_mode():
        assert (model(ids).logits - expected).abs().max() < 1e-4


def test_layers_see_what_the_converted_ones_before_them_give(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """Inputs against the saved model run by transformers; the target against the dense one."""
    out = tmp_path / "moe"
    settings = TOKENS | {"experts": 8, "active": 4, "shared": 2}
    moefy.convert(tiny_llama, out, data=corpus, **settings)
    windows = corpus_windows(tiny_llama, corpus)
    seen: dict[str, torch.Tensor] = {}
    for name, folder in {"dense": tiny_llama, "moe": out}.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        last = model.model.layers[1]

        def keep(
            _module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor, name: str = name
        ) -> None:
            seen[f"{name} stream"], seen[f"{name} normed"] = args[0], output

        last.post_attention_layernorm.register_forward_hook(keep)
        last.register_forward_hook(
            lambda _module, _args, output, name=name: seen.update({f"{name} out": output})
        )
        with torch.inference_mode():
            model(torch.from_numpy(windows))
    seen = {name: found.flatten(0, 1) for name, found in seen.items()}
    dense = DenseCheckpoint(tiny_llama)
    replay, recipe = ModelReplay(dense), ConvertRecipe.build(**settings).for_model(48)
    walk = CalibrationWalk(replay, windows, follow_dense=True)
    own = calibration_walk(replay, recipe, windows)
    for layer_idx, split in enumerate(split_layers(dense, recipe, own)):
        tokens = walk.enter(replay.layer(layer_idx))
        sample = tokens.sample(slice(None))
        walk.leave(tokens, split)
    assert (sample.inputs - seen["moe normed"]).abs().max() < 1e-4
    assert (seen["dense normed"] - seen["moe normed"]).abs().max() > 1e-3
    assert sample.desired is not None
    expected = seen["dense out"] - seen["moe stream"]
    assert (sample.desired - expected).abs().max() < 1e-4


@pytest.mark.parametrize("choices", [{}, {"repair": "refit"}], ids=["fit", "refit"])
def test_states_in_a_file_give_the_same_bytes(
    tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choices: Any
) -> None:
    """Above half a GiB the residual stream lies in a file; memory does not grow with tokens."""
    settings = choices | TOKENS | {"experts": 8, "active": 4}
    moefy.convert(tiny_llama, tmp_path / "memory", data=corpus, **settings)
    monkeypatch.setattr("moefy.calibrate.walk._IN_MEMORY_BYTES", 1000)
    moefy.convert(tiny_llama, tmp_path / "file", data=corpus, **settings)
    one, two = (tmp_path / name / "model.safetensors" for name in ("memory", "file"))
    assert one.read_bytes() == two.read_bytes()


def test_a_fit_says_what_it_gained(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    settings = TOKENS | {"experts": 8, "active": 4}
    notes: list[str] = []
    moefy.convert(
        tiny_llama, tmp_path / "moe", data=corpus, report=lambda p: notes.append(p.note), **settings
    )
    record = json.loads((tmp_path / "moe/moefy.json").read_text())
    assert record["recipe"]["repair"] == "fit"
    assert len(record["fit_errors"]) == 2
    notes = [note for note in notes if "held-out" in note]
    for error, note in zip(record["fit_errors"], notes, strict=True):
        assert error["after"] <= error["before"]
        assert note == f"held-out error {error['before']:.3f} → {error['after']:.3f}"
    moefy.convert(tiny_llama, tmp_path / "fast", data=corpus, effort="fast", **settings)
    record = json.loads((tmp_path / "fast/moefy.json").read_text())
    assert record["recipe"]["repair"] == "refit"
    assert "fit_errors" not in record


def test_replay_is_the_model(tiny_llama: Path) -> None:
    ids = torch.randint(0, 257, (3, 50), generator=torch.Generator().manual_seed(1))
    recipe = ConvertRecipe.build(**ONE_EXPERT)
    found, _ = research_logits(tiny_llama, recipe, None, ids)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits
    assert (found - expected).abs().max() < 1e-5


def test_bad_construction_is_refused_before_the_work(
    make_llama: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    dense, out = make_llama(), tmp_path / "moe"
    with pytest.raises(UsageError, match="5 shared of 4 active experts is impossible"):
        moefy.convert(dense, out, experts=8, active=4, shared=5)
    with pytest.raises(ArchitectureError, match="a smaller dense model and not mixtral"):
        moefy.convert(dense, out, experts=8, active=4, shared=4, target="mixtral")
    with pytest.raises(CorpusError, match=r"64 calibration tokens are too few.*at least 96"):
        moefy.convert(
            make_llama("wide", intermediate_size=96),
            out,
            data=corpus,
            experts=8,
            active=4,
            repair="refit",
            calibration_tokens=64,
            calibration_length=32,
        )
    assert not out.exists()


def test_importance_is_the_gradient_of_the_whole_model(tiny_llama: Path, corpus: Path) -> None:
    """Layer by layer backwards, against autograd through transformers in float64."""
    windows = calibration_windows(
        corpus, tiny_llama, tokens=8 * 256, sequence_length=256, needed_tokens=1
    )
    segments = window_importance(ModelReplay(DenseCheckpoint(tiny_llama)), windows, 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).double()
    captured = {}
    for layer_idx, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _module, args, layer_idx=layer_idx: captured.__setitem__(layer_idx, args[0])
        )
    ids = torch.from_numpy(windows)
    logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    gradients = torch.autograd.grad(loss, [captured[i] for i in range(2)])
    scores = torch.stack([(captured[i] * gradients[i]).abs() for i in range(2)], dim=1)
    first, second = (scores[:, :, tokens].mean(2) for tokens in (slice(128), slice(128, None)))
    expected = torch.cat([first, second])
    assert torch.allclose(segments.scores.double(), expected, rtol=1e-3, atol=1e-7)


def test_the_dense_model_writes_its_own_calibration_text(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Sampled tokens are as likely under the model as its entropy says."""
    dense = make_llama(initializer_range=0.5)
    windows = self_windows(dense, tokens=200 * 24, sequence_length=24)
    assert windows.shape == (200, 24)
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(dense)(torch.from_numpy(windows)).logits
    log_probs = logits[:, :-1].log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    loss = -log_probs.gather(-1, torch.from_numpy(windows)[:, 1:, None])[..., 0]
    error = (loss - entropy).mean().abs()
    assert entropy.mean() < 5
    assert error < 4 * (loss - entropy).std() / loss.numel() ** 0.5
    settings = TOKENS | {"experts": 8, "active": 4, "partition": "alternating"}
    moefy.convert(dense, tmp_path / "moe", data="self", router="ridge", **settings)
    assert (tmp_path / "moe" / "config.json").is_file()


def test_weight_only_bytes_do_not_depend_on_threads(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    settings = {"experts": 16, "active": 4, "shared": 2, "repair": "paper"}
    for choices in (
        {"partition": "clustering-up", "router": "mean-gate"},
        {"partition": "random", "router": "random"},
    ):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            moefy.convert(dense, tmp_path / str(threads), overwrite=True, **settings | choices)
            assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in "12")
        assert one == two


@pytest.mark.parametrize("what", ["nan", "overflow"])
def test_activations_that_are_not_finite_are_refused(
    make_llama: Callable[..., Path], corpus: Path, tmp_path: Path, what: str
) -> None:
    dense = make_llama()
    model = AutoModelForCausalLM.from_pretrained(dense)
    weight = model.model.layers[1].mlp.up_proj.weight.data
    if what == "nan":
        weight[3, 3] = torch.nan
    else:
        weight *= 1e30
    model.save_pretrained(dense)
    for choices in ({}, {"partition": "carve", "router": "representative", "repair": "none"}):
        with pytest.raises(CorpusError, match="not finite on the calibration tokens"):
            moefy.convert(dense, tmp_path / "moe", data=corpus, experts=8, **choices, **TOKENS)
    assert not (tmp_path / "moe").exists()


def test_too_few_segments_are_refused_before_the_work(
    make_llama: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match="2 calibration segments cannot make 6 clusters"):
        moefy.convert(
            make_llama(),
            tmp_path / "moe",
            data=corpus,
            experts=8,
            active=4,
            partition="gradient",
            calibration_tokens=64,
            calibration_length=32,
        )
