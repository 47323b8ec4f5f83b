"""Where each tensor of ours lies in a Hugging Face checkpoint, as data that is read in both directions.

The decoder families share their names. Routed experts come in two layouts: one tensor per expert and projection, as
published checkpoints have them and as we write, or one fused tensor per layer. Both are read.

E experts, D hidden size, F expert intermediate size.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from moesaic.config import ModelConfig

LAYER_INDEX = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TensorRule:
    """One tensor of ours. On disk it is `whole`, or row `e` of it is the concatenation of the tensors `pieces[e]`."""

    ours: str
    whole: str
    pieces: tuple[tuple[str, ...], ...] = ()
    scale_on_write: float = 1.0
    """Multiplies what is written: a factor that the family cannot say in its config."""


@dataclass(frozen=True)
class Layout:
    """All tensors of a model in one family.

    `zeros` are tensors (name -> shape) that the family has and our model does not, because they are zero or empty: they
    are written as zeros; on reading they may be absent and must be zero. `ignored` says of other names in a checkpoint
    whether they may be skipped.
    """

    rules: tuple[TensorRule, ...]
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: Callable[[str], bool] = lambda name: False


def decoder_rules(config: ModelConfig) -> list[TensorRule]:
    """Names of embedding, attention, norms, dense MLPs, routers and routed experts: alike in all families."""
    rules = [
        TensorRule("embed_tokens.weight", "model.embed_tokens.weight"),
        TensorRule("norm.weight", "model.norm.weight"),
    ]
    if not config.tie_word_embeddings:
        rules.append(TensorRule("lm_head.weight", "lm_head.weight"))
    for index in range(config.num_hidden_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        rules += [
            TensorRule(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
            TensorRule(f"{ours}.feed_forward_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        ]
        rules += _same(f"{ours}.attention", f"{theirs}.self_attn", _attention_leaves(config))
        if not config.is_moe_layer(index):
            rules += mlp_rules(f"{ours}.feed_forward", f"{theirs}.mlp")
        else:
            rules.append(TensorRule(f"{ours}.feed_forward.router.weight", f"{theirs}.mlp.gate.weight"))
            rules += _expert_rules(config, f"{ours}.feed_forward.experts", f"{theirs}.mlp.experts")
    return rules


def mlp_rules(ours: str, theirs: str) -> list[TensorRule]:
    return _same(ours, theirs, ["gate_proj.weight", "up_proj.weight", "down_proj.weight"])


def ignored_in_every_family(config: ModelConfig) -> Callable[[str], bool]:
    """A tied head that was saved all the same, and the rotary tables of old checkpoints."""
    suffixes = ("rotary_emb.inv_freq", *(["lm_head.weight"] if config.tie_word_embeddings else []))
    return lambda name: name.endswith(suffixes)


def zero_output_bias(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Qwen3's attention_bias gives the output projection a bias as well; ours has none."""
    layers = range(config.num_hidden_layers) if config.attention_bias else range(0)
    return {f"model.layers.{index}.self_attn.o_proj.bias": (config.hidden_size,) for index in layers}


def layer_of(name: str) -> int | None:
    match = LAYER_INDEX.match(name)
    return int(match[1]) if match else None


def _same(ours: str, theirs: str, leaves: list[str]) -> list[TensorRule]:
    return [TensorRule(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in leaves]


def _attention_leaves(config: ModelConfig) -> list[str]:
    leaves = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
    if config.attention_bias:
        leaves += ["q_proj.bias", "k_proj.bias", "v_proj.bias"]
    if config.qk_norm:
        leaves += ["q_norm.weight", "k_norm.weight"]
    return leaves


def _expert_rules(config: ModelConfig, ours: str, theirs: str) -> list[TensorRule]:
    assert config.moe is not None
    experts = range(config.moe.num_experts)
    return [
        TensorRule(
            f"{ours}.gate_up",
            f"{theirs}.gate_up_proj",
            tuple((f"{theirs}.{e}.gate_proj.weight", f"{theirs}.{e}.up_proj.weight") for e in experts),
        ),
        TensorRule(
            f"{ours}.down",
            f"{theirs}.down_proj",
            tuple((f"{theirs}.{e}.down_proj.weight",) for e in experts),
        ),
    ]
