"""Vision-language models that are converted whole: FFNs of the text part are split, no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moefy.checkpoint.families import WHOLES
from moefy.checkpoint.meaning import meaning_of, own_keys
from moefy.errors import ArchitectureError, CheckpointError, reason

if TYPE_CHECKING:  # computing needs no pydantic (benchmarks/gpu.py)
    from moefy.recipe import ConvertRecipe

WHOLE = "whole"
"""Key of a dense text model's config that holds the config.json which it is a part of."""
VISION = "model.visual."
_TEXT = "model.language_model."
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_MROPE = ("mrope_section", "mrope_interleaved")


def whole_target(dense: Mapping[str, Any]) -> str:
    """Return the target of a whole's text part."""
    return WHOLES[dense[WHOLE]["model_type"]]["target"]


def text_type(dense: Mapping[str, Any]) -> str | None:
    """Return the `model_type` of the text part that a whole names, None for a text model."""
    return dense[WHOLE]["text_config"]["model_type"] if WHOLE in dense else None


def for_whole(asked: ConvertRecipe, dense: Mapping[str, Any]) -> ConvertRecipe:
    """Return a recipe with what it must be for a whole.

    Raises:
        ArchitectureError: it asks for something else.
    """
    if asked.end_to_end_epochs or asked.shared == asked.active:
        raise ArchitectureError(
            "a vision-language model is converted whole layer by layer only, and into experts: "
            "leave end_to_end_epochs out and shared below active, or pass --part text"
        )
    target = asked.target or whole_target(dense)
    return asked.model_copy(update={"target": target, "end_to_end_epochs": 0.0})


def stored_name(name: str) -> str:
    """Return the name in a whole of a tensor of its text model or of its vision part."""
    is_renamed = name.startswith("model.") and not name.startswith(VISION)
    return name.replace("model.", _TEXT, 1) if is_renamed else name


def whole_config(dense: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a whole whose text part is converted to `text`."""
    old = dense[WHOLE]
    made = WHOLES[old["model_type"]]
    # where images and texts stand, which the text model alone need not know
    rope = meaning_of(old["text_config"], "text_config")["rope_parameters"]
    rope = text["rope_parameters"] | {key: rope[key] for key in _MROPE if key in rope}
    vision = {"model_type": f"{made['model_type']}_vision"}
    keys = own_keys(vision) & old["vision_config"].keys()
    return {
        "architectures": [made["architecture"]],
        "model_type": made["model_type"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": text["dtype"],
        **{key: old[key] for key in _TOKENS if key in old},
        "text_config": {
            **{key: text[key] for key in text if key != "architectures"},
            **{"rope_parameters": rope, "rope_scaling": rope},
        },
        "vision_config": {**{key: old["vision_config"][key] for key in sorted(keys)}, **vision},
    }


def check_vision(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Compare the names and shapes of the vision tower's tensors with those of its class.

    Raises:
        CheckpointError: they are others.
        ArchitectureError: a tensor is of neither part.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    if others := sorted(name for name in shapes if not name.startswith((VISION, "mtp."))):
        raise ArchitectureError(
            f"{source} holds {others[0]}, which is of neither its text nor its vision part: pass "
            "--part text to convert the text model alone"
        )
    vision = config.get("vision_config")
    depth = len({name.split(".")[3] for name in shapes if name.startswith(f"{VISION}blocks.")})
    try:
        if not isinstance(vision, dict) or vision.get("depth", depth) != depth:
            raise ValueError(f"vision_config does not have depth = {depth}, that of its tensors")
        made = {key: vision[key] for key in own_keys(vision) & vision.keys()}
        with torch.device("meta"):
            tower = AutoModel.from_config(AutoConfig.for_model(vision["model_type"], **made))
    except Exception as error:  # wherever a wrong setting leads to
        raise CheckpointError(f"{source} has a vision part of no use: {reason(error)}") from error
    wanted = {VISION + name: tuple(p.shape) for name, p in tower.named_parameters()}
    found = {name: shape for name, shape in shapes.items() if name.startswith(VISION)}
    if differing := sorted(found.items() ^ wanted.items()):
        raise CheckpointError(
            f"{source}: {differing[0][0]} is missing, or is not what vision_config says: fetch it "
            "again"
        )
