"""Every dense family in every form against transformers, saved and reloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import tiny_config, write_tiny_model
from tests.parity.test_construct import TOKENS, research_logits
from tests.toys import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import moefy
from moefy.calibrate.replay import ModelReplay
from moefy.calibrate.text import calibration_windows
from moefy.calibrate.walk import CalibrationWalk
from moefy.checkpoint.card import read_record
from moefy.checkpoint.cost import cost
from moefy.checkpoint.families import FAMILIES, NOT_CARRIED, WHOLES
from moefy.checkpoint.reader import DenseCheckpoint, read_config
from moefy.errors import ArchitectureError, CheckpointError, UsageError
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none"}


def longrope(rotated: int) -> dict[str, Any]:
    """Phi-3's settings; 100 tokens are more than 64, so the long factors are in use."""
    pairs = range(rotated // 2)
    return {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1 + 0.1 * i for i in pairs],
            "long_factor": [2.0 + i for i in pairs],
            "partial_rotary_factor": rotated / 8,
        },
    }


PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
GRANITE_SCALES = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
}
# family, its settings, the target without and with shared experts ("" where there is none)
FORMS: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", {"tie_word_embeddings": False}, "mixtral", "granitemoeshared"),
    ("llama", {"head_dim": 16}, "mixtral", "granitemoeshared"),
    ("llama", {"attention_bias": True}, "granitemoe", "granitemoeshared"),
    ("mistral", {"sliding_window": None}, "mixtral", "granitemoeshared"),
    ("mistral", {"sliding_window": 16}, "mixtral", "granitemoe_swa"),
    ("ministral", {"layer_types": ["full_attention"] * 2}, "mixtral", "granitemoeshared"),
    (
        "ministral",
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "granitemoe_swa",
        "granitemoe_swa",
    ),
    ("qwen2", {}, "granitemoe", "glm4_moe"),
    ("qwen2", {"tie_word_embeddings": False, "rms_norm_eps": 1e-3}, "granitemoe", "glm4_moe"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "granitemoe_swa",
        "granitemoe_swa",
    ),
    ("smollm3", {"no_rope_layers": [1, 0]}, "granitemoe_swa", "granitemoe_swa"),
    (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 16},
        "granitemoe_swa",
        "granitemoe_swa",
    ),
    ("qwen3", {}, "qwen3_moe", "glm4_moe"),
    ("qwen3", {"head_dim": 16, "tie_word_embeddings": False}, "qwen3_moe", "glm4_moe"),
    ("qwen3", {"attention_bias": True}, "qwen3_moe", ""),
    ("cwm", {}, "granitemoe_swa", "granitemoe_swa"),
    ("granite", GRANITE_SCALES, "granitemoe", "granitemoeshared"),
    ("granite", GRANITE_SCALES | {"attention_bias": True}, "granitemoe", "granitemoeshared"),
    ("seed_oss", {"head_dim": 16}, "granitemoe", "glm4_moe"),
    ("seed_oss", {"attention_out_bias": True}, "granitemoe", "granitemoeshared"),
    (
        "seed_oss",
        {"attention_bias": False, "attention_out_bias": True},
        "granitemoe",
        "granitemoeshared",
    ),
    ("ministral3", {}, "mixtral", "granitemoeshared"),
    ("hunyuan_v1_dense", {}, "", "hunyuan_v1_moe"),
    ("hunyuan_v1_dense", {"attention_bias": True, "head_dim": 16}, "", "hunyuan_v1_moe"),
    ("ernie4_5", {}, "ernie4_5_moe", "ernie4_5_moe"),
    ("ernie4_5", {"head_dim": 16, "tie_word_embeddings": False}, "ernie4_5_moe", "ernie4_5_moe"),
    ("lfm2", {}, "lfm2_moe", ""),
    ("lfm2", {"conv_bias": True, "block_auto_adjust_ff_dim": False}, "lfm2_moe", ""),
    ("olmo2", {}, "flex_olmo", ""),
    ("olmo2", {"attention_bias": True}, "flex_olmo", ""),
    ("cohere2", {}, "cohere2_moe", "cohere2_moe"),
    ("cohere2", {"attention_bias": True}, "cohere2_moe", "cohere2_moe"),
    ("qwen3_5_text", {}, "", "qwen3_5_moe_text"),
    ("phi3", {"tie_word_embeddings": False}, "mixtral", "granitemoeshared"),
    ("phi3", {"sliding_window": 16}, "mixtral", "granitemoe_swa"),
    ("phi3", longrope(8), "mixtral", "granitemoeshared"),
    ("phi3", {"rope_parameters": PARTIAL, "head_dim": 16}, "", "glm4_moe"),
    ("phi3", longrope(6), "", "glm4_moe"),
]
CASES = [
    (family, settings, shared, target)
    for family, settings, *targets in FORMS
    for shared, target in zip((0, 1 if family == "hunyuan_v1_dense" else 2), targets, strict=True)
    if target
]


def name_of(case: Any) -> str:
    return "-".join(case) if isinstance(case, dict) else str(case)


def token_ids(length: int) -> torch.Tensor:
    return torch.randint(0, 257, (2, length), generator=torch.Generator().manual_seed(1))


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


@pytest.mark.parametrize(("family", "settings", "shared", "target"), CASES, ids=name_of)
def test_all_active_equals_dense(
    tmp_path: Path, family: str, settings: dict[str, Any], shared: int, target: str
) -> None:
    dense, out = write_tiny_model(tmp_path / "dense", family, **settings), tmp_path / "moe"
    said: list[str] = []
    heard = {"report": lambda progress: said.append(progress.note)}
    moefy.convert(dense, out, experts=6, active=6, **heard, **EXACT | {"shared": shared})
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == target
    assert cost(read_config(out)).total_params == model.num_parameters()
    told = "vLLM 0.32 leaves out the biases" in (out / "README.md").read_text()
    biased = getattr(model.config, "attention_bias", False)
    assert told == (biased and target.startswith("granitemoe"))
    assert told == any("vLLM 0.32 answers nonsense" in note for note in said)
    ids = token_ids(100)
    expected = logits(dense, ids)
    assert (expected - logits(out, ids)).abs().max() < 1e-4
    assert expected.std() > 0.01
    with torch.inference_mode():
        cached, recomputed = (
            model.generate(
                ids[:1, :8],
                max_new_tokens=24,
                do_sample=False,
                use_cache=use_cache,
                attention_mask=torch.ones(1, 8),
                pad_token_id=0,
                eos_token_id=None,
            )
            for use_cache in (True, False)
        )
    assert cached.shape[1] == 32
    assert torch.equal(cached, recomputed)


@pytest.mark.parametrize(("family", "settings", "shared", "target"), CASES, ids=name_of)
def test_fitted_checkpoint_equals_research_form(
    tmp_path: Path, corpus: Path, family: str, settings: dict[str, Any], shared: int, target: str
) -> None:
    """Replay, walk, router, refit and writing agree with transformers' own forward pass."""
    dense, out = write_tiny_model(tmp_path / "dense", family, **settings), tmp_path / "moe"
    short = {"calibration_tokens": 2048, "calibration_length": 16}
    tokens = short if read_config(dense).get("sliding_window") else TOKENS
    choices = {"experts": 8, "active": 4, "shared": shared, "end_to_end_epochs": 0} | tokens
    made = moefy.convert(dense, out, data=corpus, **choices)
    assert made.recipe.target == target
    length = tokens["calibration_length"]
    windows = calibration_windows(
        corpus, dense, tokens=2048, sequence_length=length, needed_tokens=1
    )
    ids = torch.from_numpy(windows[:3])
    expected, tied = research_logits(dense, made.recipe, windows, ids, target)
    difference = (logits(out, ids) - expected).abs().amax(-1).flatten()
    assert difference[~tied].max() < 1e-4
    assert tied.float().mean() < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_replayed(tmp_path: Path, family: str) -> None:
    """The residual stream that a fit brings the converted model back to is the dense model's."""
    dense = write_tiny_model(tmp_path, family)
    ids = token_ids(16)
    replay = ModelReplay(DenseCheckpoint(dense))
    walk = CalibrationWalk(replay, ids.numpy(), follow_dense=True)
    assert walk.dense is not None
    for layer_idx in range(replay.num_layers):
        tokens = walk.enter(replay.layer(layer_idx))
        outputs = tokens.sample(slice(None)).outputs()
        walk.leave(tokens, lambda *_, outputs=outputs: outputs)
    expected, head = logits(dense, ids), replay.head()
    for states in (walk.dense, tokens.hidden):  # the second behind a split that loses nothing
        found = head(states[slice(None)]).view(expected.shape)
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("granite", GRANITE_SCALES),
        ("phi3", longrope(6) | {"sliding_window": 16}),
    ],
    ids=name_of,
)
def test_all_shared_stays_in_the_family(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    dense, out = write_tiny_model(tmp_path / "dense", family, **settings), tmp_path / "out"
    config = read_config(dense)
    code = {"auto_map": {"AutoConfig": "configuration_x.XConfig"}}  # Phi-3's folders have one
    (dense / "config.json").write_text(json.dumps(config | code))
    moefy.convert(dense, out, experts=8, active=8, **EXACT | {"shared": 8})
    assert read_config(out)["model_type"] == family
    assert "auto_map" not in read_config(out)
    difference = logits(dense, token_ids(100)) - logits(out, token_ids(100))
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_phi_4_minis_own_config_means_the_same(tmp_path: Path, kind: str) -> None:
    """The rotary settings as published: in three places and under older names."""
    dense, out = write_tiny_model(tmp_path / "dense", "phi3", **longrope(6)), tmp_path / "moe"
    expected = logits(dense, token_ids(100))
    config = read_config(dense)
    rope = config.pop("rope_parameters")
    factors = {name: rope[name] for name in ("short_factor", "long_factor")}
    config |= {"rope_scaling": {"type": kind} | factors, "rope_theta": rope["rope_theta"]}
    config |= {"partial_rotary_factor": 0.75}
    (dense / "config.json").write_text(json.dumps(config))
    moefy.convert(dense, out, experts=8, active=8, **EXACT | {"shared": 2})
    assert (logits(out, token_ids(100)) - expected).abs().max() < 1e-4


VISION: dict[str, dict[str, Any]] = {
    "mistral3": {"hidden_size": 32, "intermediate_size": 48, "image_size": 28, "patch_size": 14},
    "qwen3_vl": {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "out_hidden_size": 32},
    "qwen3_5": {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "out_hidden_size": 32},
}


def write_tiny_wrapper(folder: Path, wrapper: str, text: str) -> Any:
    """Write a random vision-language model for its text."""
    vision = VISION[wrapper] | {"num_hidden_layers": 1, "num_attention_heads": 4, "num_heads": 4}
    settings = tiny_config(text, sliding_window=None) | {"tie_word_embeddings": False}
    if text == "qwen3_vl_text":
        settings["rope_parameters"] |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = AutoConfig.for_model(
        wrapper, text_config=settings, vision_config=vision, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(folder)
    return whole


@pytest.mark.parametrize(
    ("wrapper", "text", "family"),
    [
        ("mistral3", "mistral", "mistral"),
        ("mistral3", "ministral3", "ministral3"),
        ("qwen3_vl", "qwen3_vl_text", "qwen3"),
        ("qwen3_5", "qwen3_5_text", "qwen3_5_text"),
    ],
)
def test_the_text_model_of_a_vision_language_model(
    tmp_path: Path, wrapper: str, text: str, family: str
) -> None:
    dense, out = tmp_path / "dense", tmp_path / "moe"
    whole = write_tiny_wrapper(dense, wrapper, text)
    choices = EXACT | {"experts": 6, "active": 6, "shared": 2}
    if wrapper not in WHOLES:
        with pytest.raises(ArchitectureError, match="pass --part text"):
            moefy.convert(dense, out, **choices)
    made = moefy.convert(dense, out, part="text", **choices)
    assert read_record(out)["source"]["config"]["model_type"] == family
    ids = token_ids(60)
    with torch.inference_mode():
        expected = whole(input_ids=ids).logits
    assert (logits(made.folder, ids) - expected).abs().max() < 1e-4
    with pytest.raises(ArchitectureError, match="leave --part out"):
        moefy.convert(
            write_tiny_model(tmp_path / "text", "llama"), tmp_path / "b", part="text", **choices
        )


def write_tiny_whole(folder: Path, wrapper: str) -> Any:
    """Write a random vision-language model whose images have four patches of 2 x 2."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 64, "patch_size": 2}
    if wrapper == "qwen3_vl":
        vision["deepstack_visual_indexes"] = [0]
    text = tiny_config(f"{wrapper}_text", tie_word_embeddings=False)
    text["rope_parameters"] |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = AutoConfig.for_model(
        wrapper, text_config=text, vision_config=vision, tie_word_embeddings=False, **IMAGE
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
            elif "visual" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


IMAGE = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252}
IMAGE |= {"vision_end_token_id": 253}


def whole_logits(model: Any, brightness: float | None) -> torch.Tensor:
    ids = token_ids(40)[:1] % 250
    if brightness is None:
        with torch.inference_mode():
            return model(input_ids=ids).logits
    ids[0, 4:10] = torch.tensor([252, 250, 250, 250, 250, 253])
    pixels = brightness * torch.randn(16, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model(
            input_ids=ids,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(ids == 250).int(),
        ).logits


@pytest.mark.parametrize(("wrapper", "shared"), [("qwen3_vl", 0), ("qwen3_5", 2)])
def test_a_vision_language_model_is_converted_whole(
    tmp_path: Path, wrapper: str, shared: int
) -> None:
    dense, out = tmp_path / "dense", tmp_path / "moe"
    whole = write_tiny_whole(dense, wrapper)
    (dense / "preprocessor_config.json").write_text("{}")
    choices = EXACT | {"experts": 6, "active": 6, "shared": shared}
    made = moefy.convert(dense, out, **choices)
    assert made.recipe.target == WHOLES[wrapper]["target"]
    found, notes = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(notes.values())
    assert type(found).__name__ == WHOLES[wrapper]["architecture"]
    prompts = (None, 1.0, 0.1)
    text, image, other = (whole_logits(whole, each) for each in prompts)
    assert (image - other).abs().max() > 0.001
    for expected, prompt in zip((text, image, other), prompts, strict=True):
        assert (expected - whole_logits(found, prompt)).abs().max() < 1e-4
    assert (out / "preprocessor_config.json").is_file()
    stored = load_file(out / "model.safetensors")
    first = "model.language_model.layers.0.mlp.experts"
    if wrapper == "qwen3_vl":  # columns first, as in the released models
        assert stored[f"{first}.gate_up_proj"].shape == (6, 32, 16)
    for wrong in ({"shared": 6}, {"target": "mixtral"}):
        with pytest.raises(ArchitectureError, match=r"layer by layer only|mixtral cannot hold"):
            moefy.convert(dense, tmp_path / "other", **choices | wrong)
    damaged = load_file(dense / "model.safetensors")
    del damaged["model.visual.blocks.1.attn.qkv.bias"]
    save_file(damaged, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blocks.1.attn.qkv.bias is missing"):
        moefy.convert(dense, tmp_path / "other", **choices)


def test_glm4_moe_has_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    """vLLM answers from an empty one where glm4_moe is tied, MLX refuses."""
    dense, moe, back = (tmp_path / name for name in ("dense", "moe", "back"))
    write_tiny_model(dense, "qwen3")
    moefy.convert(dense, moe, **EXACT | {"experts": 6, "active": 6, "shared": 2})
    moefy.export_dense(moe, back)
    stored = {name: load_file(tmp_path / name / "model.safetensors") for name in ("moe", "back")}
    config = json.loads((moe / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["rope_scaling"] is None  # MLX wants to see the key
    assert torch.equal(stored["moe"]["lm_head.weight"], stored["moe"]["model.embed_tokens.weight"])
    assert "lm_head.weight" not in stored["back"]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_pytorch_files_give_the_same_bytes(tmp_path: Path, family: str) -> None:
    dense = write_tiny_model(tmp_path / "dense", family)
    moefy.convert(dense, tmp_path / "a", experts=4, active=2, **LLAMA_MOE)
    state = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    del state["lm_head.weight"]  # tied
    names = sorted(state)
    (dense / "model.safetensors").unlink()
    torch.save(state, dense / "pytorch_model.bin")
    moefy.convert(dense, tmp_path / "b", experts=4, active=2, **LLAMA_MOE)
    (dense / "pytorch_model.bin").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: state[name] for name in part}, dense / file)
        weight_map.update(dict.fromkeys(part, file))
    index = dense / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    moefy.convert(dense, tmp_path / "c", experts=4, active=2, **LLAMA_MOE)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b == c


@pytest.mark.parametrize(
    ("family", "settings", "choices", "message"),
    [
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            {"shared": 0},
            r"no native target computes this split.*mixtral: it has no q/k norm; .*glm4_moe: it "
            r"has no sliding window \(16 tokens\); granitemoe_swa: it has no q/k norm\); --target",
        ),
        ("smollm3", {"no_rope_layers": [1, 0]}, {"target": "mixtral"}, "it rotates in all layers"),
        ("phi3", {"rope_parameters": PARTIAL}, {"shared": 0}, "it rotates whole heads, not 0.5 of"),
        (
            "mistral",
            {"sliding_window": None},
            {"target": "granitemoe_swa"},
            "is for models whose layers",
        ),
        (
            "qwen3",
            {},
            {"shared": 0, "target": "mixtral"},
            "it has no q/k norm; pass --target qwen3_moe",
        ),
        ("llama", {}, {"shared": 0, "target": "qwen3_moe"}, "always norms.*--target mixtral"),
        ("qwen2", {}, {"shared": 0, "target": "mixtral"}, "it has no bias on qkv"),
    ],
)
def test_what_no_target_expresses_is_refused(
    tmp_path: Path, family: str, settings: dict[str, Any], choices: dict[str, Any], message: str
) -> None:
    dense = write_tiny_model(tmp_path / "dense", family, **settings)
    with pytest.raises(ArchitectureError, match=message):
        moefy.convert(dense, tmp_path / "moe", experts=8, active=4, **EXACT | choices)
    assert not (tmp_path / "moe").exists()


def test_windows_longer_than_the_sliding_window_are_refused(tmp_path: Path, corpus: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense", "mistral", sliding_window=16)
    with pytest.raises(UsageError, match="calibration_length=16"):
        moefy.convert(dense, tmp_path / "moe", data=corpus, experts=8, active=4, shared=0, **TOKENS)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "spiral"}}, "rotary embedding 'spiral'; known are default"),
        ({"partial_rotary_factor": 0.5}, "rotates only a part of each head"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"is quantised \(hqq\)"),
        *(({"model_type": name}, why[:40]) for name, why in NOT_CARRIED.items()),
        ({"model_type": "nonsense"}, "'nonsense'; moefy converts dense llama, mistral"),
    ],
)
def test_unknown_settings_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    dense = write_tiny_model(tmp_path / "dense", "llama")
    config = json.loads((dense / "config.json").read_text())
    if "rope_scaling" in change:
        del config["rope_parameters"]
    (dense / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ArchitectureError, match=message):
        moefy.convert(dense, tmp_path / "moe", experts=8, active=4, **EXACT)


@pytest.mark.parametrize(
    ("family", "key", "value", "said"),
    [
        # a head of 2^31 had 13 GB of rotary frequencies
        *(
            ("ernie4_5", key, 1 << 31, rf"{key} = 2147483648: at most \d+ are read")
            for key in ("num_hidden_layers", "hidden_size", "head_dim")
        ),
        # LFM2 does not declare the key, so transformers does not check it
        ("lfm2", "head_dim", 0.5, r"head_dim = 0.5: a positive integer is needed"),
        ("phi3", "num_key_value_heads", 4, r"qkv_proj.weight has 64 rows, config.json says 96"),
    ],
)
def test_a_size_that_cannot_be_is_named(
    tmp_path: Path, family: str, key: str, value: float, said: str
) -> None:
    dense = write_tiny_model(tmp_path / "dense", family)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=said):
        moefy.convert(dense, tmp_path / "moe", experts=8, active=4, **EXACT)


def test_what_transformers_refuses_is_named_by_its_keys(tmp_path: Path) -> None:
    """Also where a default, 48 heads, is at odds with what the file says."""
    dense = write_tiny_model(tmp_path / "dense", "cwm")
    config = json.loads((dense / "config.json").read_text())
    del config["num_attention_heads"]
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="because of hidden_size and num_attention_heads"):
        moefy.convert(dense, tmp_path / "moe", experts=8, active=4, **EXACT)
