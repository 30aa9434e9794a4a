"""A dense model's logits again, when its layers are no longer in memory."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class Recall:
    """Gives a model's logits again without its layers.

    Keeps the last hidden states of the passes that it watched, and puts them through whatever the
    model does with them.

    Args:
        network: transformers' model for causal language modelling; its passes are of one sequence.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._hidden: list[Tensor] = []
        self._hook = network.base_model.register_forward_hook(
            lambda _module, _inputs, out: self._hidden.append(out.last_hidden_state)
        )

    def forget_layers(self) -> None:
        """Stop watching and give the layers' memory back."""
        self._hook.remove()
        setattr(self._network, self._network.base_model_prefix, _Body())

    def logits(self, pass_idx: int) -> Float[Tensor, "tokens vocab"]:
        """Return the logits of an earlier pass."""
        self._network.base_model.hidden = self._hidden[pass_idx]
        return self._network(use_cache=False).logits[0]


class _Body(torch.nn.Module):
    """Stands where the layers were; its output is what `hidden` says."""

    hidden: Tensor

    def forward(self, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.hidden)
