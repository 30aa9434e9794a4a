"""GGUF files written again: quantised by llama.cpp's own code, or the only layer repeated."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
)
from gguf import (
    GGMLQuantizationType as Type,
)
from gguf.quants import dequantize

from moefy.errors import UsageError
from moefy.progress import Progress, ProgressFn, silent

# most matrices' type, and the file's
_KINDS = {
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": (Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
QUANTISED = tuple(_KINDS)
"""The kinds of file that `rewrite` makes, as llama.cpp calls them."""

# where a row is no multiple of a type's block
_SMALLER_BLOCKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
_VALUES_AT_ONCE = 1 << 22


def require_quantiser() -> None:
    """Raise a UsageError where xllamacpp, which holds llama.cpp's code, is not installed."""
    if find_spec("xllamacpp") is None:
        raise UsageError("quantising needs llama.cpp's code: pip install 'moefy[gguf]'")


def rewrite(
    file: Path,
    out: Path,
    *,
    kind: str | None = None,
    layers: int | None = None,
    report: ProgressFn = silent,
) -> None:
    """Write a GGUF file again, a tensor at a time.

    Args:
        file: of floats, where it is to be quantised.
        out: file to write.
        kind: one of `QUANTISED`, types by tensor as llama.cpp chooses them without an importance
            matrix: vectors and routers stay as they are. None leaves all as it is.
        layers: how often the only layer is repeated; None leaves the layers as they are.
        report: told about progress.

    Raises:
        UsageError: see `require_quantiser`.
    """
    if kind:
        require_quantiser()
    reader = GGUFReader(file)
    values = {key: field.contents() for key, field in reader.fields.items() if "GGUF." not in key}
    architecture = values["general.architecture"]
    blocks = values[f"{architecture}.block_count"] = layers or values[f"{architecture}.block_count"]
    if kind:
        values["general.file_type"] = int(_KINDS[kind][1])
    writer = GGUFWriter(out, architecture)  # which writes general.architecture itself
    for key, value in values.items():
        types = reader.fields[key].types
        inner = types[-1] if types[0] == GGUFValueType.ARRAY else None
        if key != "general.architecture":
            writer.add_key_value(key, value, types[0], sub_type=inner)
    tensors = [
        (re.sub(r"^blk\.0\.", f"blk.{layer}.", tensor.name) if layers else tensor.name, tensor)
        for layer in range(layers or 1)
        for tensor in reader.tensors
        if layer == 0 or tensor.name.startswith("blk.")
    ]
    tied = all(name != "output.weight" for name, _ in tensors)
    eight = values.get(f"{architecture}.expert_count") == 8
    stored = []
    for name, tensor in tensors:
        chosen, shape = tensor.tensor_type, [int(size) for size in reversed(tensor.shape)]
        if kind and len(shape) > 1 and "ffn_gate_inp" not in name:
            chosen = _type_of(kind, name, shape[-1], blocks, tied, eight)
        stored.append(chosen)
        block, block_bytes = GGML_QUANT_SIZES[chosen]
        row_bytes = shape[-1] // block * block_bytes
        size = int(np.prod(shape[:-1])) * row_bytes
        data_shape = shape if chosen in (Type.F32, Type.F16) else [*shape[:-1], row_bytes]
        data_type = {Type.F32: np.float32, Type.F16: np.float16}.get(chosen, np.uint8)
        writer.add_tensor_info(name, data_shape, np.dtype(data_type), size, chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, ((_, tensor), chosen) in enumerate(zip(tensors, stored, strict=True), start=1):
        same = chosen == tensor.tensor_type
        writer.write_tensor_data(tensor.data if same else _quantised(tensor, chosen))
        report(Progress("quantise", done, len(tensors)))
    writer.close()


def _type_of(kind: str, name: str, row: int, layers: int, tied: bool, eight: bool) -> Type:
    """Return what llama.cpp stores a matrix as (src/llama-quant.cpp, `tensor_type_fallback`)."""
    chosen, file_type = _KINDS[kind]
    mixed = kind.endswith("_m")
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        chosen = Type.Q8_0 if kind == "q8_0" else Type.Q6_K
    elif eight and ("attn_v." in name or "attn_k." in name):
        chosen = Type.Q8_0
    elif mixed and more and ("attn_v." in name or "ffn_down" in name):
        chosen = Type.Q6_K
    elif eight and file_type == LlamaFileType.MOSTLY_Q4_K_M and "attn_output." in name:
        chosen = Type.Q5_K
    if row % GGML_QUANT_SIZES[chosen][0]:
        chosen = _SMALLER_BLOCKS.get(chosen, chosen)
    return Type.F16 if row % GGML_QUANT_SIZES[chosen][0] else chosen


def _quantised(tensor: Any, kind: Type) -> np.ndarray:
    """Return a float tensor's bytes in another type, rows in parallel."""
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    width = int(tensor.shape[0])
    if kind == Type.F16:
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
    code = ctypes.CDLL(import_module("xllamacpp.xllamacpp").__file__).ggml_quantize_chunk
    block, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = width // block * block_bytes
    out = np.empty((len(rows), row_bytes), dtype=np.uint8)

    def quantise(first: int) -> None:
        floats = dequantize(rows[first : first + step], tensor.tensor_type)
        floats = np.ascontiguousarray(floats, dtype=np.float32)
        sizes = map(ctypes.c_int64, (0, len(floats), width))
        # a call of ctypes lets the other threads run
        code(
            int(kind),
            *map(ctypes.c_void_p, (floats.ctypes.data, out[first:].ctypes.data)),
            *sizes,
            None,
        )

    step = max(1, _VALUES_AT_ONCE // width)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(quantise, range(0, len(rows), step)))
    return out
