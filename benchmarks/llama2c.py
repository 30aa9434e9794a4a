"""A llama2.c checkpoint as a Hugging Face folder, for experiments on the smallest real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_NUM_HEADER_INTS = 7


def write_llama2c_model(file: Path, folder: Path) -> None:
    """Write config, weights and a tokenizer of numbered tokens (1 begins a text, 2 ends it).

    The file holds seven int32 (hidden, d_ff, layers, heads, key/value heads, vocabulary, context;
    a negative vocabulary means an untied output matrix) and then all weights in float32, tensor
    after tensor, each kind for all layers. Rotary pairs are neighbours there and halves in
    transformers, so the rows of wq and wk are rearranged.
    """
    header = np.fromfile(file, dtype="<i4", count=_NUM_HEADER_INTS).tolist()
    hidden, d_ff, layers, heads, kv_heads, vocab, context = header
    assert vocab > 0, "only tied models are read"
    numbers = torch.from_numpy(np.fromfile(file, dtype="<f4", offset=4 * _NUM_HEADER_INTS))
    head_dim = hidden // heads
    kv_size = kv_heads * head_dim
    place = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return numbers[place - size : place].reshape(shape)

    def halves(rows: torch.Tensor) -> torch.Tensor:
        pairs = rows.reshape(layers, -1, head_dim // 2, 2, hidden)
        return pairs.transpose(2, 3).reshape(rows.shape)

    state = {"model.embed_tokens.weight": take(vocab, hidden)}
    by_layer = {
        "input_layernorm": take(layers, hidden),
        "self_attn.q_proj": halves(take(layers, hidden, hidden)),
        "self_attn.k_proj": halves(take(layers, kv_size, hidden)),
        "self_attn.v_proj": take(layers, kv_size, hidden),
        "self_attn.o_proj": take(layers, hidden, hidden),
        "post_attention_layernorm": take(layers, hidden),
        "mlp.gate_proj": take(layers, d_ff, hidden),
        "mlp.down_proj": take(layers, hidden, d_ff),
        "mlp.up_proj": take(layers, d_ff, hidden),
    }
    for name, stacked in by_layer.items():
        for layer_idx, tensor in enumerate(stacked):
            state[f"model.layers.{layer_idx}.{name}.weight"] = tensor
    state["model.norm.weight"] = take(hidden)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=d_ff,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
        )
    )
    model.load_state_dict(state)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2").save_pretrained(
        folder
    )
