"""A model of ours as a GGUF file, and llama.cpp's own quantisations of it.

D hidden size, E experts, F inner width of an expert.
"""

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.llama import failure, llama_cpp
from moesaic.config import ModelConfig
from moesaic.model.transformer import Transformer

gguf: Any = importlib.import_module("gguf")

ARCHITECTURES = {"olmoe": "olmoe", "qwen3_moe": "qwen3moe"}
"""llama.cpp's name of a model_type. What the two compute differs in what their names imply only: OLMoE normalises
queries and keys over their whole width, and leaves the weights of a token's experts as the softmax gave them."""

FILE_TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def write_gguf(model: Transformer, path: Path) -> None:
    """The model, read from a Hugging Face directory, in its own dtype (float32 or bfloat16); without a vocabulary."""
    config = model.config
    if config.model_type not in ARCHITECTURES or config.moe is None or config.rope_scaling is not None:
        raise SystemExit(f"no GGUF is written for model_type {config.model_type!r}; use one of {list(ARCHITECTURES)}")
    assert config.moe.routed_scaling_factor == 1.0, "exported models have it in their experts"
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[config.model_type])
    _add_config(writer, config)
    for name, tensor in _tensors(model):
        _add_tensor(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def quantize(source: Path, target: Path, file_type: str, *, pure: bool = False, threads: int = 2) -> None:
    """By llama.cpp. `pure` makes every matrix the named type; else it keeps more bits where it deems that wise."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[file_type]
    parameters.pure = pure
    parameters.nthread = threads
    partial = target.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), parameters):
        raise failure(f"llama.cpp cannot quantise {source} to {file_type}")
    os.replace(partial, target)


def tensor_bytes(path: Path) -> int:
    """Of all tensors in a GGUF file but the input embedding."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if tensor.name != "token_embd.weight")


def _add_config(writer: Any, config: ModelConfig) -> None:
    moe = config.moe
    assert moe is not None
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(moe.moe_intermediate_size)
    writer.add_expert_feed_forward_length(moe.moe_intermediate_size)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: Transformer) -> list[tuple[str, Tensor]]:
    """All tensors by llama.cpp's names, as views."""
    named = [
        ("token_embd", model.embed_tokens.weight),
        ("output_norm", model.norm.weight),
        ("output", model.head_weight),
    ]
    for layer in range(model.config.num_hidden_layers):
        block = model.layers[layer].state_dict()
        gate_EFD, up_EFD = block["feed_forward.experts.gate_up"].chunk(2, dim=1)
        named += [
            (f"blk.{layer}.attn_norm", block["attention_norm.weight"]),
            (f"blk.{layer}.attn_q", block["attention.q_proj.weight"]),
            (f"blk.{layer}.attn_k", block["attention.k_proj.weight"]),
            (f"blk.{layer}.attn_v", block["attention.v_proj.weight"]),
            (f"blk.{layer}.attn_output", block["attention.o_proj.weight"]),
            (f"blk.{layer}.attn_q_norm", block["attention.q_norm.weight"]),
            (f"blk.{layer}.attn_k_norm", block["attention.k_norm.weight"]),
            (f"blk.{layer}.ffn_norm", block["feed_forward_norm.weight"]),
            (f"blk.{layer}.ffn_gate_inp", block["feed_forward.router.weight"]),
            (f"blk.{layer}.ffn_gate_exps", gate_EFD),
            (f"blk.{layer}.ffn_up_exps", up_EFD),
            (f"blk.{layer}.ffn_down_exps", block["feed_forward.experts.down"]),
        ]
    return [(f"{name}.weight", tensor.detach()) for name, tensor in named]


def _add_tensor(writer: Any, name: str, tensor: Tensor) -> None:
    """Vectors and routers in float32, as llama.cpp wants them."""
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        tensor = tensor.float()
    if tensor.dtype == torch.bfloat16:
        codes = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
