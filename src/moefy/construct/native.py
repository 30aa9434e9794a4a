"""A converted layer in the form that a native architecture stores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moefy.checkpoint.families import O_PROJ, QKV
from moefy.checkpoint.reader import DenseCheckpoint, stored_form
from moefy.checkpoint.targets import NativeTarget
from moefy.construct.ffn import SplitFfn

NO_SINK = -1e4
"""An attention sink's logit that takes exp(-10,000) = 0 of the attention, in every dtype."""


def native_layer(
    dense: DenseCheckpoint, layer_idx: int, split: SplitFfn, target: NativeTarget | None
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the names and tensors of one layer, in the dense weights' dtype.

    Args:
        dense: the source; attention and norms are copied from it.
        layer_idx: counted from 0.
        split: the converted FFN.
        target: the architecture; None for the dense family with the shared neurons alone.
    """
    prefix = dense.family.layer.format(layer=layer_idx)
    matrices = (dense.family.gate, dense.family.up, dense.family.down)
    dtype = dense.stored_dtype(*(prefix + name for name in matrices))
    layer = {name: dense[prefix + name] for name in dense.layer_tensors(layer_idx)}
    if target is None:
        layer |= {name: tensor.to("cpu", dtype) for name, tensor in _pruned(dense, split).items()}
        layer = stored_form(dense.family, layer)
    yield from ((prefix + name, tensor) for name, tensor in layer.items())
    if target is None:
        return
    # Qwen2 has biases on q, k and v alone; with a zero on the output the target computes the same
    biases = {f"{name}.bias": f"{name}.weight" for name in (*QKV, O_PROJ)}
    if target.attention_bias == "qkvo" and layer.keys() & biases:
        for name in sorted(biases.keys() - layer.keys()):
            yield prefix + name, layer[biases[name]].new_zeros(len(layer[biases[name]]))
    for name, tensor in _experts(split, dense.residual_scale, target):
        yield prefix + name, tensor.to("cpu", dtype)
    if target.sinks:
        sinks = torch.full((dense.config["num_attention_heads"],), NO_SINK)
        yield prefix + target.sinks, sinks.to(dtype)
    # float32 whatever the weights are: training moves it by a thousandth a step
    if target.selection_bias:
        bias = torch.zeros(len(split.partition.routed))
        yield prefix + target.selection_bias, bias.view(*target.selection_bias_shape)


def _pruned(dense: DenseCheckpoint, split: SplitFfn) -> dict[str, Tensor]:
    family, shared = dense.family, torch.from_numpy(split.rows.shared)
    down = split.down[:, : len(shared)] / dense.residual_scale
    return {family.gate: split.gate[shared], family.up: split.up[shared], family.down: down}


def _experts(
    split: SplitFfn, residual_scale: float, target: NativeTarget
) -> Iterator[tuple[str, Tensor]]:
    """Yield router and experts; the calibrated matrices have Granite's residual scale in them."""
    kept, size = len(split.partition.shared), split.partition.routed.shape[1]
    yield target.router, split.routing.router
    if kept and target.shared_gate and target.shared_up and target.shared_down:
        shared = torch.from_numpy(split.rows.shared)
        gate, up = split.gate[shared], split.up[shared]
        if target.shared_gate == target.shared_up:
            yield target.shared_gate, torch.cat([gate, up])
        else:
            yield target.shared_gate, gate
            yield target.shared_up, up
        # a switch of zeros lets half of the outputs through
        factor = (2 if target.shared_switch else 1) / residual_scale
        yield target.shared_down, _times(factor, split.down[:, :kept])
        if target.shared_switch:
            yield target.shared_switch, gate.new_zeros(1, gate.shape[1])
    # what the router's weights lack of 1 goes into down_proj, where every runtime reads it
    factor = split.routing.folded_factor / residual_scale
    neurons = torch.from_numpy(split.rows.routed)  # [experts, size]
    downs = (_times(factor, columns) for columns in split.down[:, kept:].split(size, dim=1))
    if target.gate == target.up:
        pairs = [torch.cat([split.gate[rows], split.up[rows]]) for rows in neurons]
        for name, parts in ((target.gate, pairs), (target.down, list(downs))):
            stacked = torch.stack(parts)
            yield name, stacked.mT.contiguous() if target.transposed else stacked
        return
    for expert, (rows, down) in enumerate(zip(neurons, downs, strict=True)):
        yield target.gate.format(expert=expert), split.gate[rows]
        yield target.up.format(expert=expert), split.up[rows]
        yield target.down.format(expert=expert), down


def _times(factor: float, matrix: Tensor) -> Tensor:
    return matrix if factor == 1 else factor * matrix  # a copy costs more than the test
