"""Weights as the libraries that own the quantised formats write and read them, for a test.

    pip install --no-deps compressed-tensors bitsandbytes auto-gptq    # and what they import
    tar xzf autoawq-0.2.9.tar.gz                                       # the folder of its sdist
    PYTHONPATH=autoawq-0.2.9 python benchmarks/quantised_libraries.py

Every form of a random matrix, and what the library itself dequantises it to on a CPU, go into
tests/parity/quantised_libraries.safetensors, which tests/parity/test_quantised_source.py reads
without the libraries. AutoAWQ and AutoGPTQ are not imported whole, because that needs a GPU: the
files that pack and unpack are.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = Path(__file__).parents[1] / "tests/parity/quantised_libraries.safetensors"
ROWS, COLUMNS, GROUP = 32, 64, 16
Form = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]


def matrix() -> Tensor:
    return 0.02 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def compressed(name: str, form: str, **chosen: Any) -> Form:
    """Compress and decompress; scales are of the smallest and largest numbers."""
    weight, args = matrix(), QuantizationArgs(**chosen)
    size = {"channel": COLUMNS, "tensor": ROWS * COLUMNS}.get(chosen["strategy"], args.group_size)
    if args.block_structure:
        high, wide = args.block_structure
        parts = weight.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2)
        parts = parts.flatten(2)
    else:
        parts = weight.reshape(-1, size)
        parts = parts.view(ROWS, -1, size) if chosen["strategy"] != "tensor" else parts
    state = {"weight": weight}
    if chosen["strategy"] == "tensor_group":
        state["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
    scale, zero = calculate_qparams(
        parts.amin(-1), parts.amax(-1), args, state.get("weight_global_scale")
    )
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    library = BaseCompressor.get_value_from_registry(form)
    stored = library.compress(state, scheme)
    expected = library.decompress(stored, scheme)["weight"]
    groups = {"group_0": {"weights": json.loads(args.model_dump_json())}}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    return name, settings, stored, expected


def bitsandbytes(name: str, quant_type: str, **chosen: Any) -> Form:
    import bitsandbytes as bnb

    weight, settings = matrix().bfloat16(), {"quant_method": "bitsandbytes"}
    if quant_type == "int8":
        numbers, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        form = torch.tensor(0, dtype=torch.uint8)
        stored = {"weight": numbers, "SCB": scale, "weight_format": form}
        return name, settings, stored, bnb.functional.int8_vectorwise_dequant(numbers, scale)
    parameter = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=quant_type, blocksize=64, **chosen
    )
    layer = bnb.nn.Linear4bit(COLUMNS, ROWS, bias=False, quant_type=quant_type)
    layer.weight = parameter
    layer = layer.to("cpu")
    parameter = layer.weight
    if not parameter.bnb_quantized:
        parameter = parameter._quantize("cpu")
        layer.weight = parameter
    expected = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return name, settings, dict(layer.state_dict()), expected


def file_of(package: str, path: str) -> Any:
    """Import one file of a package that cannot be imported here."""
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations
    file = Path(found.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def affine(bits: int, group: Tensor) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a layer, and scales and zeros of its groups of columns, [rows, groups]."""
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight.data = matrix()
    parts = torch.stack([matrix()[:, group == i] for i in range(int(group.max()) + 1)], 1)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / (2**bits - 2)).half().float()  # no number is clipped
    return layer, scale, (-low / scale).round().clamp(1, 2**bits - 1)


def gptq(name: str, bits: int, size: int, order: Tensor | None = None) -> Form:
    module = file_of("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py")
    group = torch.arange(COLUMNS) // size if order is None else order
    layer, scale, zero = affine(bits, group)
    packed = module.QuantLinear(bits, size, COLUMNS, ROWS, bias=False, weight_dtype=torch.float32)
    packed.pack(layer, scale.clone(), zero.clone(), group.int())
    expected = packed(torch.eye(COLUMNS)).T
    stored = {name: each for name, each in packed.state_dict().items() if each is not None}
    settings = {"quant_method": "gptq", "bits": bits, "desc_act": order is not None}
    return name, settings, stored, expected


def awq(name: str) -> Form:
    unpack = file_of("awq", "utils/packing_utils.py").dequantize_gemm
    source = file_of("awq", "modules/linear/gemm.py").WQLinear_GEMM
    layer, scale, zero = affine(4, torch.arange(COLUMNS) // GROUP)
    packed = source.from_linear(layer, 4, GROUP, scales=scale.T, zeros=zero.T)
    stored = dict(packed.state_dict())
    found = unpack(stored["qweight"], stored["qzeros"], stored["scales"], 4, GROUP)
    return name, {"quant_method": "awq", "bits": 4, "version": "gemm"}, stored, found.T


def forms() -> Iterator[Form]:
    ints, floats = {"type": "int"}, {"type": "float", "symmetric": True}
    group = {"strategy": "group", "group_size": GROUP}
    for bits in (2, 4, 8):
        chosen = ints | group | {"num_bits": bits}
        yield compressed(f"pack-quantized, {bits} bits", "pack-quantized", **chosen)
        asymmetric = chosen | {"symmetric": False}
        yield compressed(f"pack-quantized, {bits} bits, zeros", "pack-quantized", **asymmetric)
    channel, eight = {"strategy": "channel"}, {"num_bits": 8}
    yield compressed("int-quantized", "int-quantized", **ints, **eight, **channel)
    asymmetric = ints | eight | channel | {"symmetric": False}
    yield compressed("int-quantized, zeros", "int-quantized", **asymmetric)
    for strategy in ("channel", "tensor"):
        chosen = floats | eight | {"strategy": strategy}
        yield compressed(f"float-quantized, {strategy}", "float-quantized", **chosen)
    blocks = {"strategy": "block", "block_structure": [16, 32]}
    yield compressed("float-quantized, block", "float-quantized", **floats, **eight, **blocks)
    nv = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    yield compressed("nvfp4", "nvfp4-pack-quantized", **floats, **nv)
    mx = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    yield compressed("mxfp4", "mxfp4-pack-quantized", **floats, **mx, num_bits=4)
    yield compressed("mxfp8", "mxfp8-quantized", **floats, **mx, num_bits=8)
    for quant_type in ("nf4", "fp4"):
        yield bitsandbytes(quant_type, quant_type, compress_statistics=False)
        yield bitsandbytes(f"{quant_type}, nested", quant_type, compress_statistics=True)
    chosen = {"compress_statistics": False, "quant_storage": torch.bfloat16}
    yield bitsandbytes("nf4, stored as bfloat16", "nf4", **chosen)
    yield bitsandbytes("int8", "int8")
    for bits in (2, 4, 8):
        yield gptq(f"gptq, {bits} bits", bits, GROUP)
    yield gptq("gptq, one group", 4, COLUMNS)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1)) // GROUP
    yield gptq("gptq, order of activations", 4, GROUP, order.int())
    yield awq("awq")


def main() -> None:
    tensors, told = {}, {}
    for name, settings, stored, expected in forms():
        told[name] = settings
        parts = stored | {"expected": expected}
        tensors |= {
            f"{name}|{part}": each.detach().contiguous().clone() for part, each in parts.items()
        }
        error = (expected.float() - matrix()).abs().max()
        print(f"{name}: {', '.join(stored)}; {expected.dtype}, off by {error:.3g}")
    save_file(tensors, FILE, metadata={"settings": json.dumps(told)})


if __name__ == "__main__":
    main()
