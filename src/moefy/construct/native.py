"""A converted layer in the form that a native architecture stores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moefy.checkpoint.families import O_BIAS, attention_bias
from moefy.checkpoint.fused import stored_form
from moefy.checkpoint.reader import DenseCheckpoint
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
    family = dense.family
    prefix = family.layer.format(layer=layer_idx)
    dtype = dense[prefix + family.down].dtype
    if target is None:
        layer = {name: dense[prefix + name] for name in dense.layer_tensors}
        layer |= {name: tensor.to("cpu", dtype) for name, tensor in _pruned(dense, split)}
        yield from ((prefix + name, whole) for name, whole in stored_form(family, layer).items())
        return
    for name in dense.layer_tensors:
        yield prefix + name, dense[prefix + name]
    if target.attention_bias == "qkvo" and attention_bias(dense.config) == "qkv":
        queries = dense[prefix + "self_attn.q_proj.weight"]
        yield prefix + O_BIAS, queries.new_zeros(queries.shape[1])
    for name, tensor in _experts(split, dense.residual_scale, target):
        yield prefix + name, tensor.to("cpu", dtype)
    if target.sinks:
        sinks = torch.full((dense.config["num_attention_heads"],), NO_SINK)
        yield prefix + target.sinks, sinks.to(dtype)
    if target.selection_bias:
        yield prefix + target.selection_bias, torch.zeros(len(split.partition.routed))


def _pruned(dense: DenseCheckpoint, split: SplitFfn) -> Iterator[tuple[str, Tensor]]:
    shared = torch.from_numpy(split.partition.shared)
    yield dense.family.gate, split.gate[shared]
    yield dense.family.up, split.up[shared]
    yield dense.family.down, split.down[:, : len(shared)] / dense.residual_scale


def _experts(
    split: SplitFfn, residual_scale: float, target: NativeTarget
) -> Iterator[tuple[str, Tensor]]:
    kept, size = len(split.partition.shared), split.partition.routed.shape[1]
    yield target.router, split.routing.router
    if kept and target.shared_gate and target.shared_up and target.shared_down:
        shared = torch.from_numpy(split.partition.shared)
        yield from _gate_up(
            target.shared_gate, target.shared_up, split.gate[shared], split.up[shared]
        )
        yield target.shared_down, _times(1 / residual_scale, split.down[:, :kept])
    factor = split.routing.folded_factor / residual_scale
    gates = (split.gate[neurons] for neurons in torch.from_numpy(split.partition.routed))
    ups = (split.up[neurons] for neurons in torch.from_numpy(split.partition.routed))
    downs = (_times(factor, columns) for columns in split.down[:, kept:].split(size, dim=1))
    if target.gate == target.up:
        yield target.gate, torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
        yield target.down, torch.stack(list(downs))
        return
    for expert, (gate, up, down) in enumerate(zip(gates, ups, downs, strict=True)):
        yield target.gate.format(expert=expert), gate
        yield target.up.format(expert=expert), up
        yield target.down.format(expert=expert), down


def _times(factor: float, matrix: Tensor) -> Tensor:
    return matrix if factor == 1 else factor * matrix


def _gate_up(
    gate_name: str, up_name: str, gate: Tensor, up: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield two matrices, or one above the other where both have the same name."""
    if gate_name == up_name:
        yield gate_name, torch.cat([gate, up])
    else:
        yield gate_name, gate
        yield up_name, up
