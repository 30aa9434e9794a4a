"""Quantised weight files, one weight at a time: a row of `METHODS` for each `quant_method`.

A function takes the tensors of one module (names behind its prefix) and the settings under
`quantization_config`. It takes out those that make the weight, and returns that as float32, rows
first; None where the module is not quantised. The formulas are those of the libraries that write
the formats, whose kernels need a GPU.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.checkpoint.tensor_file import WEIGHT_DTYPES, TensorFile
from moefy.errors import ArchitectureError, CheckpointError, reason

Parts = dict[str, Tensor]
Settings = Mapping[str, Any]

_NAME = re.compile(r"(.*?)\.(weight\..+|[^.]+)")  # a module, and what a tensor is to it
_FOR_ACTIVATIONS = {
    *("activation_scale", "input_scale", "input_zero_point", "input_global_scale"),
    *("q_scale", "k_scale", "v_scale"),
}
_MOST_STATE_BYTES = 1 << 16
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = torch.cat([_E2M1, -_E2M1])


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the unsigned numbers in the last dimension's bytes, the low bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    numbers = packed.contiguous().view(torch.uint8)[..., None] >> shifts
    return (numbers & (2**bits - 1)).flatten(-2)


def _scaled(
    numbers: Tensor,
    scale: Tensor,
    zero: Tensor | float = 0.0,
    group: Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Return (numbers - zero) * scale, scales standing for blocks, or columns for their group."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):  # an exponent
        scale = torch.exp2(scale.view(torch.uint8).float() - 127)
    scale = scale.float().reshape(scale.shape if scale.ndim == 2 else (scale.numel(), 1))
    (rows, columns), (down, across) = numbers.shape, scale.shape
    steps = [
        given or size // max(count, 1)
        for size, count, given in zip(numbers.shape, scale.shape, block or (0, 0), strict=True)
    ]
    fits = -(-rows // steps[0]) == down and (group is not None or -(-columns // steps[1]) == across)
    if not fits or (group is not None and len(group) != columns):
        raise ValueError(f"scales of shape {[down, across]} for numbers of {[rows, columns]}")
    if group is not None and torch.equal(group.long(), torch.arange(columns) // steps[1]):
        group = None  # the order is the usual one
    found = numbers.float()
    zeros = zero.float().reshape(scale.shape) if isinstance(zero, Tensor) else None
    if group is None and (down * steps[0], across * steps[1]) == (rows, columns):
        parts = found.view(down, steps[0], across, steps[1])  # much faster than a scale for each
        parts.sub_(zero if zeros is None else zeros[:, None, :, None])
        parts.mul_(scale[:, None, :, None])
        return found
    places = torch.arange(columns) // steps[1] if group is None else group.long()
    down_to_rows = torch.arange(rows) // steps[0] if steps[0] > 1 else slice(None)
    found.sub_(zero if zeros is None else zeros.index_select(1, places)[down_to_rows])
    return found.mul_(scale.index_select(1, places)[down_to_rows])


def _only(settings: Settings, key: str, allowed: tuple[Any, ...]) -> Any:
    found = settings.get(key, allowed[0])
    if found not in allowed:
        raise ArchitectureError(f"{key} = {reason(repr(found))}; allowed are {allowed}")
    return found


def _float8(parts: Parts, settings: Settings) -> Tensor | None:
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    if name not in parts:
        return None
    sizes = settings.get("weight_block_size")
    return _scaled(parts.pop("weight"), parts.pop(name), block=tuple(sizes) if sizes else None)


def _float4(parts: Parts, settings: Settings) -> Tensor | None:
    packed, scales = "weight_packed", "weight_scale"
    if "weight_blocks" in parts:  # 16 bytes and a scale each
        packed, scales = "weight_blocks", "weight_scales"
    if packed not in parts:
        return None
    scale = parts.pop(scales)
    if "weight_global_scale" in parts:  # NVFP4
        scale = scale.float() / parts.pop("weight_global_scale").float()
    return _scaled(_E2M1[_unpacked(parts.pop(packed).flatten(1), 4).int()], scale)


def _compressed(parts: Parts, settings: Settings) -> Tensor | None:
    if settings.get("transform_config"):
        raise ArchitectureError("it has a transform_config, which moefy does not undo")
    _only(settings.get("sparsity_config") or {}, "format", ("dense",))
    packed = parts.get("weight_packed")
    if packed is not None and packed.dtype == torch.uint8:
        return _float4(parts, settings)
    groups = settings.get("config_groups") or {}
    sizes = {str((each.get("weights") or {}).get("block_structure")) for each in groups.values()}
    block = json.loads(sizes.pop()) if len(sizes) == 1 and "None" not in sizes else None
    scale, group = parts.pop("weight_scale", None), parts.pop("weight_g_idx", None)
    if scale is None:
        return None
    zero: Tensor | float | None = parts.pop("weight_zero_point", None)
    if packed is None:
        return _scaled(parts.pop("weight"), scale, 0.0 if zero is None else zero, group, block)
    del parts["weight_packed"]
    rows, columns = parts.pop("weight_shape").tolist()
    fits = [b for b in (2, 4, 8) if -(-columns * b // 32) == packed.shape[1]]
    if rows != len(packed) or len(fits) != 1:
        raise ValueError(f"weight_shape {rows} x {columns} for packed {[*packed.shape]}")
    if isinstance(zero, Tensor):
        zero = _unpacked(zero.T, fits[0]).T[:rows]
    else:
        zero = float(2 ** (fits[0] - 1))
    return _scaled(_unpacked(packed, fits[0])[:, :columns], scale, zero, group)


def _gptq(parts: Parts, settings: Settings) -> Tensor | None:
    if "qweight" not in parts:
        return None
    bits = _only(settings, "bits", (4, 2, 8))
    stored = _only(settings, "checkpoint_format", ("gptq", "gptq_v2"))
    zero = _unpacked(parts.pop("qzeros"), bits)
    if stored == "gptq":  # which stores one less
        zero = (zero + 1) & (2**bits - 1)
    numbers = _unpacked(parts.pop("qweight").T, bits)
    return _scaled(numbers, parts.pop("scales").T, zero.T, parts.pop("g_idx", None))


def _awq(parts: Parts, settings: Settings) -> Tensor | None:
    if "qweight" not in parts:
        return None
    _only(settings, "bits", (4,))
    _only({"version": str(settings.get("version", "gemm")).lower()}, "version", ("gemm",))
    numbers, zero = (
        _unpacked(parts.pop(name), 4).unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2).T
        for name in ("qweight", "qzeros")
    )
    return _scaled(numbers, parts.pop("scales").T, zero)


def _bitsandbytes(parts: Parts, settings: Settings) -> Tensor | None:
    if "SCB" in parts:
        parts.pop("weight_format", None)
        return _scaled(parts.pop("weight"), parts.pop("SCB").float() / 127)
    states = [name for name in parts if name.startswith("weight.quant_state.")]
    if not states:
        return None
    state = json.loads(bytes(parts.pop(states[0])[:_MOST_STATE_BYTES].tolist()))

    def blocks(codes: Tensor, prefix: str, size: int) -> Tensor:
        codebook, scales = (parts.pop(f"weight.{prefix}{name}") for name in ("quant_map", "absmax"))
        if scales.dtype == torch.uint8:
            scales = blocks(scales, "nested_", state["nested_blocksize"]) + state["nested_offset"]
        if -(-len(codes) // size) != len(scales):
            raise ValueError(f"{len(scales)} scales for {len(codes)} numbers")
        repeated = scales.repeat_interleave(min(size, len(codes)))
        return codebook[codes.int()] * repeated[: len(codes)]

    # the first number is in the high bits
    codes = _unpacked(parts.pop("weight").flatten(), 4).unflatten(-1, (-1, 2)).flip(-1).flatten()
    return blocks(codes, "", state["blocksize"]).view(state["shape"])


METHODS: dict[str, Callable[[Parts, Settings], Tensor | None]] = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _float8,
    "fp8": _float8,
    "gptq": _gptq,
    "mxfp4": _float4,
    "mxfp8": _float8,
}
"""What is read, by `quant_method`."""


def method_of(config: Mapping[str, Any], folder: Path) -> str | None:
    """Return the `quant_method` of a config.json, None where the weights are plain.

    Raises:
        ArchitectureError: it is not read.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = str(settings.get("quant_method") if isinstance(settings, dict) else None)
    if method not in METHODS:
        raise ArchitectureError(
            f"{folder} is quantised ({reason(method, 60)}); moefy dequantises "
            f"{', '.join(METHODS)}: convert the checkpoint without quantization_config"
        )
    return method


def dequantised_tensors(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, TensorFile]
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over a model's plain tensors, weights in the config's dtype.

    Raises:
        CheckpointError: tensors do not fit together, or none is quantised.
        ArchitectureError: a variant of the format is not read.
    """
    settings, named = config["quantization_config"], str(config.get("dtype"))
    method = settings["quant_method"]
    dtype = getattr(torch, named if named in WEIGHT_DTYPES else "float32")
    modules: dict[str, list[str]] = defaultdict(list)
    for name in files:
        found = _NAME.fullmatch(name)
        modules[found[1] if found else ""].append(name)
    quantised = 0
    for module, names in modules.items():
        start = len(module) + 1 if module else 0
        parts = {name[start:]: files[name].read(name) for name in names}
        where = f"{folder}: {module} is quantised ({method})"
        try:
            weight = METHODS[method](parts, settings)
        except ArchitectureError as error:
            raise ArchitectureError(
                f"{where}, and {error}: convert the unquantised checkpoint"
            ) from error
        except Exception as error:  # damaged shapes and types fail wherever they lead to
            raise CheckpointError(
                f"{where}, and its tensors do not fit together ({reason(error)}): fetch them again"
            ) from error
        prefix = module + "." * bool(module)
        if weight is not None:
            quantised += 1
            yield f"{prefix}weight", weight.to(dtype)
            del weight
        for part in parts.keys() - _FOR_ACTIVATIONS:
            if parts[part].dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise CheckpointError(
                    f"{where}, which does not explain {part}, stored as {parts[part].dtype}"
                )
            yield prefix + part, parts[part]
    if not quantised:
        raise CheckpointError(
            f"{folder} is quantised ({method}) by its config.json, but none of its tensors is: "
            "take quantization_config out, or fetch it again"
        )
