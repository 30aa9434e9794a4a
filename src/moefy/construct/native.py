"""A converted layer in the form that a native architecture stores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moefy.checkpoint.families import O_BIAS, attention_bias
from moefy.checkpoint.fused import stored_form
from moefy.checkpoint.reader import DenseCheckpoint
from moefy.checkpoint.targets import NativeTarget
from moefy.construct.split import SplitFfn

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
        layer |= {name: tensor.to(dtype) for name, tensor in _pruned(dense, split)}
        yield from ((prefix + name, whole) for name, whole in stored_form(family, layer).items())
        return
    for name in dense.layer_tensors:
        yield prefix + name, dense[prefix + name]
    if target.attention_bias == "qkvo" and attention_bias(dense.config) == "qkv":
        queries = dense[prefix + "self_attn.q_proj.weight"]
        yield prefix + O_BIAS, queries.new_zeros(queries.shape[1])
    for name, tensor in _experts(split, dense.residual_scale, target):
        yield prefix + name, tensor.to(dtype)
    if target.sinks:
        sinks = torch.full((dense.config["num_attention_heads"],), NO_SINK)
        yield prefix + target.sinks, sinks.to(dtype)
    if target.selection_bias:
        yield prefix + target.selection_bias, torch.zeros(len(split.partition.routed))


def _pruned(dense: DenseCheckpoint, split: SplitFfn) -> Iterator[tuple[str, Tensor]]:
    kept = len(split.partition.shared)
    yield dense.family.gate, split.gate[:kept]
    yield dense.family.up, split.up[:kept]
    yield dense.family.down, split.down[:, :kept] / dense.residual_scale


def _experts(
    split: SplitFfn, residual_scale: float, target: NativeTarget
) -> Iterator[tuple[str, Tensor]]:
    kept, experts = len(split.partition.shared), len(split.partition.routed)
    down = split.down if residual_scale == 1 else split.down / residual_scale
    yield target.router, split.routing.router
    if kept and target.shared_gate and target.shared_up and target.shared_down:
        yield from _gate_up(
            target.shared_gate, target.shared_up, split.gate[:kept], split.up[:kept]
        )
        yield target.shared_down, down[:, :kept]
    gates = split.gate[kept:].unflatten(0, (experts, -1))
    ups = split.up[kept:].unflatten(0, (experts, -1))
    downs = down[:, kept:].unflatten(1, (experts, -1)).transpose(0, 1)
    downs = split.routing.folded_factor * downs
    if target.gate == target.up:
        yield target.gate, torch.cat([gates, ups], dim=1)
        yield target.down, downs
        return
    for expert in range(experts):
        yield target.gate.format(expert=expert), gates[expert]
        yield target.up.format(expert=expert), ups[expert]
        yield target.down.format(expert=expert), downs[expert]


def _gate_up(
    gate_name: str, up_name: str, gate: Tensor, up: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield two matrices, or one above the other where both have the same name."""
    if gate_name == up_name:
        yield gate_name, torch.cat([gate, up])
    else:
        yield gate_name, gate
        yield up_name, up
