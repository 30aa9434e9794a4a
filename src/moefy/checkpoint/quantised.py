"""Quantised weight files, one weight at a time: a row of `METHODS` for each `quant_method`.

A function takes the tensors of one module (names behind its prefix) and the settings under
`quantization_config`. It takes out those that make the weight, and returns how they make it; None
where the module is not quantised. The formulas are those of the libraries that write the formats,
whose kernels need a GPU.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moefy.checkpoint.tensor_file import WEIGHT_DTYPES, TensorFile
from moefy.errors import ArchitectureError, CheckpointError, reason

Parts = dict[str, Tensor]
Rows = Callable[[slice], Tensor]
"""Gives some rows of a matrix as a new float32 tensor."""
Settings = Mapping[str, Any]

_NAME = re.compile(r"(.*?)\.(weight\..+|[^.]+)")  # a module, and what a tensor is to it
_FOR_ACTIVATIONS = {
    f"{what}_{kind}"
    for what in ("activation", "input", "output", "q", "k", "v")
    for kind in ("scale", "scale_ub", "global_scale", "zero_point")
}
_MOST_STATE_BYTES = 1 << 16
_BAND = 1 << 17  # numbers
_ROW = (1, 0)  # a block of one row, as long as the number of scales says
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = torch.cat([_E2M1, -_E2M1])


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the unsigned numbers in the last dimension's bytes, the low bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    numbers = packed.contiguous().view(torch.uint8)[..., None] >> shifts
    return (numbers & (2**bits - 1)).flatten(-2)


def _looked_up(
    packed: Tensor, bits: int, codebook: Tensor | None = None, *, high_first: bool = False
) -> Rows:
    """Return the numbers in rows of bytes, or what a codebook has for them, by one look-up each."""
    codes = _unpacked(torch.arange(256, dtype=torch.uint8)[:, None], bits).int()
    codes = codes.flip(-1) if high_first else codes
    numbers = codes.float() if codebook is None else codebook.float()[codes]
    table = numbers.contiguous().numpy().view(f"V{32 // bits}").ravel()

    def rows(chosen: slice) -> Tensor:
        places = packed[chosen].contiguous().view(torch.uint8).numpy()
        # numpy looks up several times as fast as torch, and "clip" is its mode without a test
        return torch.from_numpy(table.take(places, mode="clip").view(np.float32))

    return rows


def _stored(weight: Tensor) -> Rows:
    """Return the numbers of a weight of integers or float8, which torch converts slowly."""
    if weight.dtype.itemsize != 1:  # rounded by training or calibration, and not yet stored so
        raise ValueError(f"a weight stored as {weight.dtype} has a scale")
    if weight.is_floating_point():
        codebook = torch.arange(256, dtype=torch.uint8).view(weight.dtype).float()
        return _looked_up(weight, 8, codebook)
    return lambda chosen: weight[chosen].float()


@dataclass(frozen=True)
class _Weight:
    """A weight of values (numbers - zero) * scale, scales standing for blocks.

    `group` says for every column which scale of its row it has; `block` is a block's size, where
    the number of scales does not say it.
    """

    numbers: Rows
    shape: Sequence[int]  # two
    scale: Tensor
    zero: Tensor | float = 0.0
    group: Tensor | None = None
    block: tuple[int, int] | None = None
    whole: list[int] | None = None  # shape of the weight, where `shape` is not

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in a dtype.

        Its float32 values are made in bands of rows that stay in the processor's cache: pages that
        were not used before cost more than the arithmetic.
        """
        scale, group, (rows, columns) = self.scale, self.group, self.shape
        if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):  # an exponent
            scale = torch.exp2(scale.view(torch.uint8).float() - 127)
        if not scale.is_floating_point():
            raise ValueError(f"scales stored as {scale.dtype}")
        scale = scale.float().reshape(scale.shape if scale.ndim == 2 else (scale.numel(), 1))
        down, across = scale.shape
        given = self.block or (0, 0)
        high, wide = (
            said or -(-size // max(count, 1))
            for said, size, count in zip(given, self.shape, scale.shape, strict=True)
        )
        # a block may stick out only where its size is said: a number of scales fits many sizes
        fits = -(-rows // high) == down and (given[0] or rows % down == 0)
        if group is not None:
            fits = fits and len(group) == columns
        else:
            fits = fits and -(-columns // wide) == across and (given[1] or columns % across == 0)
        if not fits:
            raise ValueError(f"scales of shape {[down, across]} for numbers of {[rows, columns]}")
        if group is not None and torch.equal(group.long(), torch.arange(columns) // wide):
            group = None  # the order is the usual one
        if group is None and across * wide != columns:  # a block sticks out
            group = torch.arange(columns) // wide
        group = None if group is None else group.long()
        affine = [scale]
        if isinstance(self.zero, Tensor):
            affine.append(self.zero.float().reshape(scale.shape))
        if high > 1:
            affine = [each.repeat_interleave(min(high, rows), 0)[:rows] for each in affine]
        found = torch.empty(self.shape, dtype=dtype)
        step = max(8, _BAND // columns // 8 * 8)
        for start in range(0, rows, step):
            band = slice(start, start + step)
            # [rows, scales, columns of a scale], or a scale for each column
            here = [each[band] for each in affine]
            if group is not None:
                here = [each.index_select(1, group) for each in here]
            here = [each[..., None] for each in here]
            values = self.numbers(band).view(len(here[0]), here[0].shape[1], -1)
            values.sub_(here[1] if len(here) == 2 else self.zero).mul_(here[0])
            found[band] = values.view(len(values), columns)
        if self.whole is None:
            return found
        return found.view(-1)[: math.prod(self.whole)].view(self.whole)


def _only(settings: Settings, key: str, allowed: tuple[Any, ...]) -> Any:
    found = settings.get(key, allowed[0])
    if found not in allowed:
        raise ArchitectureError(f"{key} = {reason(repr(found))}; allowed are {allowed}")
    return found


def _float8(parts: Parts, settings: Settings) -> _Weight | None:
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    if name not in parts:
        return None
    sizes = settings.get("weight_block_size")
    block = tuple(sizes) if sizes else None
    weight = parts.pop("weight")
    return _Weight(_stored(weight), weight.shape, parts.pop(name), block=block)


def _float4(parts: Parts, settings: Settings) -> _Weight | None:
    packed, scales = "weight_packed", "weight_scale"
    if "weight_blocks" in parts:  # 16 bytes and a scale each
        packed, scales = "weight_blocks", "weight_scales"
    if packed not in parts:
        return None
    scale, codes = parts.pop(scales), parts.pop(packed).flatten(1)
    if "weight_global_scale" in parts:  # NVFP4
        scale = scale.float() / parts.pop("weight_global_scale").float()
    shape = (len(codes), 2 * codes.shape[1] * codes.element_size())
    return _Weight(_looked_up(codes, 4, _E2M1), shape, scale)


def _compressed(parts: Parts, settings: Settings) -> _Weight | None:
    if settings.get("transform_config"):
        raise ArchitectureError("it has a transform_config, which moefy does not undo")
    _only(settings.get("sparsity_config") or {}, "format", ("dense",))
    groups = [each.get("weights") or {} for each in (settings.get("config_groups") or {}).values()]
    for each in groups:
        _only(each, "num_bits", (8, 4, 2))
    packed = parts.get("weight_packed")
    if packed is not None and packed.dtype == torch.uint8:
        return _float4(parts, settings)
    scale, group = parts.pop("weight_scale", None), parts.pop("weight_g_idx", None)
    if scale is None:
        return None
    zero: Tensor | float | None = parts.pop("weight_zero_point", None)
    if packed is None:
        weight, zero = parts.pop("weight"), 0.0 if zero is None else zero
        block = None
        for each in groups:  # of which one is this weight's
            sizes = [int(size) for size in re.findall(r"\d+", str(each.get("block_structure")))]
            counts = [-(-n // size) for n, size in zip(weight.shape, sizes, strict=False)]
            block = (sizes[0], sizes[1]) if counts == [*scale.shape] else block
        return _Weight(_stored(weight), weight.shape, scale, zero, group, block)
    del parts["weight_packed"]
    rows, columns = parts.pop("weight_shape").tolist()
    fits = [b for b in (2, 4, 8) if -(-columns * b // 32) == packed.shape[1]]
    if rows != len(packed) or len(fits) != 1:
        raise ValueError(f"weight_shape {rows} x {columns} for packed {[*packed.shape]}")
    if not isinstance(zero, Tensor):
        zero = float(2 ** (fits[0] - 1))
    elif zero.dtype == torch.int8:  # as files of 2024 have it
        zero = zero.float() + 2 ** (fits[0] - 1)
    else:
        zero = _unpacked(zero.T, fits[0]).T[:rows]
    numbers = _looked_up(packed, fits[0])
    return _Weight(
        lambda band: numbers(band)[:, :columns].contiguous(), (rows, columns), scale, zero, group
    )


def _gptq(parts: Parts, settings: Settings) -> _Weight | None:
    if "qweight" not in parts:
        return None
    stored = _format(settings, ("gptq", "gptq_v2"))
    scale, group = parts.pop("scales"), parts.pop("g_idx", None)
    zero, packed = parts.pop("qzeros"), parts.pop("qweight").T
    # a module may have other bits than the rest (`dynamic`)
    word_bits = 8 * packed.element_size()
    bits = _only({"bits": word_bits * zero.shape[1] // scale.shape[1]}, "bits", (4, 2, 8))
    if group is None and settings.get("desc_act"):
        raise ValueError("desc_act without g_idx")
    zero = _unpacked(zero, bits)
    if stored == "gptq":  # which stores one less
        zero = (zero + 1) & (2**bits - 1)
    shape = (len(packed), packed.shape[1] * word_bits // bits)
    return _Weight(_looked_up(packed, bits), shape, scale.T, zero.T, group, _ROW)


def _awq(parts: Parts, settings: Settings) -> _Weight | None:
    if "qweight" not in parts:
        return None
    _only(settings, "bits", (4,))
    _only(settings, "zero_point", (True,))
    _format(settings, ("gemm",))
    zero = _unpacked(parts.pop("qzeros"), 4).unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2).T
    # A word holds eight rows of a column. Bands are of whole words.
    words = parts.pop("qweight").T
    shifts = 4 * torch.tensor(_AWQ_ORDER, dtype=words.dtype)[:, None]

    def numbers(band: slice) -> Tensor:
        some = words[band.start // 8 : -(-band.stop // 8)].contiguous()[:, None]
        return (some >> shifts & 15).float().flatten(0, 1)

    shape, scale = (8 * len(words), words.shape[1]), parts.pop("scales").T
    return _Weight(numbers, shape, scale, zero, block=_ROW)


def _format(settings: Settings, allowed: tuple[str, ...]) -> str:
    """Return the layout of the integers, which has had three names."""
    keys = ("checkpoint_format", "version", "format")
    named = {str(settings[key]).lower() for key in keys if settings.get(key)}
    named |= {"llm-awq"} & {settings.get("backend")}
    named |= {"marlin"} if settings.get("is_marlin_format") else set()
    found = " and ".join(sorted(named)) or allowed[0]
    return str(_only({"format": found}, "format", allowed))


def _bitsandbytes(parts: Parts, settings: Settings) -> _Weight | None:
    if "SCB" in parts:
        layout = parts.pop("weight_format", torch.zeros(1))
        _only({"weight_format": int(layout.flatten()[0])}, "weight_format", (0,))  # row by row
        weight = parts.pop("weight")
        return _Weight(_stored(weight), weight.shape, parts.pop("SCB").float() / 127)
    states = [name for name in parts if name.startswith("weight.quant_state.")]
    if not states:
        return None
    state = json.loads(bytes(parts.pop(states[0])[:_MOST_STATE_BYTES].tolist()))
    scales, codebook = parts.pop("weight.absmax"), parts.pop("weight.quant_map")
    if scales.dtype == torch.uint8:
        own, size = parts.pop("weight.nested_absmax"), state["nested_blocksize"]
        if -(-len(scales) // size) != len(own):
            raise ValueError(f"{len(own)} scales for {len(scales)} scales")
        values = parts.pop("weight.nested_quant_map")[scales.int()]
        scales = values * own.repeat_interleave(min(size, len(scales)))[: len(scales)]
        scales += state["nested_offset"]
    packed, shape = parts.pop("weight").flatten().view(torch.uint8), state["shape"]
    if 2 * len(packed) != math.prod(shape):
        raise ValueError(f"{2 * len(packed)} numbers for shape {shape}")
    size = min(state["blocksize"], 2 * len(packed))
    # a block, the last one filled up, is a row
    packed = F.pad(packed, (0, -len(packed) % (size // 2))).view(-1, size // 2)
    numbers = _looked_up(packed, 4, codebook, high_first=True)
    return _Weight(numbers, (len(packed), size), scales, block=(1, size), whole=shape)


METHODS: dict[str, Callable[[Parts, Settings], _Weight | None]] = {
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
    settings, text = config["quantization_config"], config.get("text_config") or {}
    dtypes = [each.get(key) for each in (config, text) for key in ("dtype", "torch_dtype")]
    named = next((str(each) for each in dtypes if each), "")
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
            read = METHODS[method](parts, settings)
            weight = read.values(dtype) if read else None
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
            yield f"{prefix}weight", weight
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
