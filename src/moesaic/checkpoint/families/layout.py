"""Where each tensor of ours lies in a Hugging Face checkpoint, as data that is read in both directions.

A stored tensor fills regions of our tensors, one after the other along its first axis. A region is a view: a function
of our tensor that shows the part in the shape that it has on disk. Reading copies the stored tensor into the view,
writing copies the view out, so that one line says both. Where checkpoints of a family come in several layouts (one
tensor per expert, or all experts in one), a tensor has alternatives: the first is written, any is read.

E experts, D hidden size, F expert intermediate size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from moesaic.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """Part of one of our tensors, seen as it is stored."""

    ours: str
    view: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: its regions, concatenated along the first axis."""

    name: str
    regions: tuple[Region, ...]
    joined_axes: tuple[int, int] | None = None
    """First and last axis of the view that are one axis on disk."""

    def views(self, ours: Mapping[str, Tensor]) -> list[Tensor]:
        return [region.view(ours[region.ours]) for region in self.regions]

    def shape(self, ours: Mapping[str, Tensor]) -> Shape:
        """The shape on disk; tensors on the meta device will do."""
        shapes = [self._joined(tuple(view.shape)) for view in self.views(ours)]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _joined(self, shape: Shape) -> Shape:
        if self.joined_axes is None:
            return shape
        first, last = self.joined_axes
        size = 1
        for axis in range(first, last + 1):
            size *= shape[axis]
        return (*shape[:first], size, *shape[last + 1 :])


Alternatives = tuple[tuple[StoredTensor, ...], ...]
"""The layouts in which the same tensors may be stored; the first is the published one, which we write."""


@dataclass(frozen=True)
class Layout:
    """All tensors of a model in one family.

    `fillers` are tensors (name -> shape) that the family has and our model does not, because they do nothing: shared
    experts of width 0, and what weighs them. They are written as zeros; on reading they may be absent, and nobody looks
    at their values. `ignored` says of other names in a checkpoint whether they may be skipped.
    """

    tensors: tuple[Alternatives, ...]
    fillers: dict[str, Shape] = field(default_factory=dict)
    ignored: Callable[[str], bool] = lambda name: False


@dataclass(frozen=True)
class Names:
    """What a family calls things. `{}` stands for the index of a layer; names below the first block are within it."""

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}"

    attention_norm: str = "input_layernorm"
    feed_forward_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"
    output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    mlp: str = "mlp"
    moe: str = "mlp"

    router: str = "gate"
    """Within `moe`, as are the names below."""
    expert_bias: str = "gate.e_score_correction_bias"
    experts: str = "experts"
    expert_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_experts: str = "shared_experts"
    shared_expert_gate: str = "shared_expert_gate"


Part = Callable[[ModelConfig, Names, str, str], list[Alternatives]]
"""(config, names, our prefix, their prefix) -> the tensors of one part of a layer."""


def same(ours: str, theirs: str) -> Alternatives:
    """One of our tensors, stored as it is."""
    return ((StoredTensor(theirs, (Region(ours),)),),)


def linear(ours: str, theirs: str, *, bias: bool) -> list[Alternatives]:
    return [same(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in ("weight", *(["bias"] if bias else []))]


def grouped_query_attention(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    tensors: list[Alternatives] = []
    for projection in ("q_proj", "k_proj", "v_proj"):
        tensors += linear(f"{ours}.{projection}", f"{theirs}.{projection}", bias=config.attention_bias)
    return tensors + output_and_extras(config, names, ours, theirs)


def output_and_extras(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    """What grouped-query attention has besides its three input projections."""
    tensors = linear(f"{ours}.o_proj", f"{theirs}.{names.output}", bias=config.attention_output_bias)
    if config.qk_norm not in ("none", "l2_after_rope"):
        tensors.append(same(f"{ours}.q_norm.weight", f"{theirs}.{names.query_norm}.weight"))
        tensors.append(same(f"{ours}.k_norm.weight", f"{theirs}.{names.key_norm}.weight"))
    if config.attention_sinks:
        tensors.append(same(f"{ours}.sinks", f"{theirs}.sinks"))
    return tensors


def latent_attention(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    assert config.mla is not None
    bias = config.attention_bias
    if config.mla.q_lora_rank is None:
        tensors = linear(f"{ours}.q_proj", f"{theirs}.q_proj", bias=False)
    else:
        tensors = linear(f"{ours}.q_a_proj", f"{theirs}.q_a_proj", bias=bias)
        tensors.append(same(f"{ours}.q_a_norm.weight", f"{theirs}.q_a_layernorm.weight"))
        tensors += linear(f"{ours}.q_b_proj", f"{theirs}.q_b_proj", bias=False)
    tensors += linear(f"{ours}.kv_a_proj", f"{theirs}.kv_a_proj_with_mqa", bias=bias)
    tensors.append(same(f"{ours}.kv_a_norm.weight", f"{theirs}.kv_a_layernorm.weight"))
    tensors += linear(f"{ours}.kv_b_proj", f"{theirs}.kv_b_proj", bias=False)
    return tensors + linear(f"{ours}.o_proj", f"{theirs}.{names.output}", bias=config.attention_output_bias)


def mlp(ours: str, theirs: str, *, bias: bool) -> list[Alternatives]:
    leaves = ("gate_proj", "up_proj", "down_proj")
    return [tensor for leaf in leaves for tensor in linear(f"{ours}.{leaf}", f"{theirs}.{leaf}", bias=bias)]


def routed_experts(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    """One tensor per expert and projection, as most families publish them, or fused `gate_up_proj` and `down_proj`."""
    return [
        (split, (StoredTensor(f"{theirs}.{fused}", (Region(f"{ours}.{leaf}"),)),))
        for leaf, fused, split in (
            ("gate_up", "gate_up_proj", split_gate_up(config, names, ours, theirs)),
            ("down", "down_proj", split_down(config, names, ours, theirs)),
        )
    ]


def split_gate_up(
    config: ModelConfig, names: Names, ours: str, theirs: str, *, bias: bool = False
) -> tuple[StoredTensor, ...]:
    """Weights, or biases, of the first two projections, one tensor for each of every expert."""
    assert config.moe is not None
    width = config.moe.moe_intermediate_size
    gate, up, _ = names.expert_projections
    stacked, leaf = (f"{ours}.gate_up_bias", "bias") if bias else (f"{ours}.gate_up", "weight")
    return tuple(
        StoredTensor(f"{theirs}.{expert}.{projection}.{leaf}", (Region(stacked, _rows(expert, start, width)),))
        for expert in range(config.moe.num_experts)
        for projection, start in ((gate, 0), (up, width))
    )


def split_down(
    config: ModelConfig, names: Names, ours: str, theirs: str, *, bias: bool = False
) -> tuple[StoredTensor, ...]:
    """Weights, or biases, of the last projection, one tensor for each expert."""
    assert config.moe is not None
    down = names.expert_projections[2]
    rows = config.hidden_size
    stacked, leaf = (f"{ours}.down_bias", "bias") if bias else (f"{ours}.down", "weight")
    return tuple(
        StoredTensor(f"{theirs}.{expert}.{down}.{leaf}", (Region(stacked, _rows(expert, 0, rows)),))
        for expert in range(config.moe.num_experts)
    )


def _rows(expert: int, start: int, count: int) -> Callable[[Tensor], Tensor]:
    return lambda stacked: stacked[expert, start : start + count]


def decoder_layout(
    config: ModelConfig,
    names: Names | None = None,
    *,
    attention: Part | None = None,
    experts: Part = routed_experts,
    shared_experts: Part | None = None,
) -> Layout:
    """The layout of a whole decoder. Families whose attention or experts lie otherwise pass functions for these.

    Layers after the last one, which predict further tokens (MTP), and rotary tables of old checkpoints are skipped; so
    is the head when it is tied to the embedding.
    """
    names = names or Names()
    attention = attention or (latent_attention if config.mla else grouped_query_attention)
    tensors = [
        same("embed_tokens.weight", f"{names.embedding}.weight"),
        *_norm(config, "norm", names.final_norm),
    ]
    if not config.tie_word_embeddings:
        tensors.append(same("lm_head.weight", f"{names.head}.weight"))
    if config.lm_head_bias:
        tensors.append(same("lm_head.bias", f"{names.head}.bias"))
    for index in range(config.num_hidden_layers):
        ours, theirs = f"layers.{index}", names.layer.format(index)
        tensors += _norm(config, f"{ours}.attention_norm", f"{theirs}.{names.attention_norm}")
        tensors += _norm(config, f"{ours}.feed_forward_norm", f"{theirs}.{names.feed_forward_norm}")
        tensors += attention(config, names, f"{ours}.attention", f"{theirs}.{names.attention}")
        if config.is_moe_layer(index):
            block = f"{ours}.feed_forward", f"{theirs}.{names.moe}"
            tensors += _router(config, names, *block)
            tensors += experts(config, names, f"{block[0]}.experts", f"{block[1]}.{names.experts}")
            tensors += (shared_experts or _shared_experts)(config, names, *block)
        else:
            tensors += mlp(f"{ours}.feed_forward", f"{theirs}.{names.mlp}", bias=config.mlp_bias)
    return Layout(tuple(tensors), {}, _ignored(config, names))


def with_empty_shared_experts(config: ModelConfig, names: Names | None = None, *, gate: bool = False) -> Layout:
    """`decoder_layout`, but where there are no shared experts, families of transformers have some of width 0, and with
    `gate` a weight for what they put out."""
    assert config.moe is not None
    names = names or Names()
    usual = decoder_layout(config, names)
    if config.moe.shared_intermediate_size:
        return usual
    empty: dict[str, Shape] = {}
    for index in range(config.num_hidden_layers):
        if config.is_moe_layer(index):
            block = f"{names.layer.format(index)}.{names.moe}"
            empty[f"{block}.{names.shared_experts}.gate_proj.weight"] = (0, config.hidden_size)
            empty[f"{block}.{names.shared_experts}.up_proj.weight"] = (0, config.hidden_size)
            empty[f"{block}.{names.shared_experts}.down_proj.weight"] = (config.hidden_size, 0)
            if gate:
                empty[f"{block}.{names.shared_expert_gate}.weight"] = (1, config.hidden_size)
    return replace(usual, fillers=empty)


def _norm(config: ModelConfig, ours: str, theirs: str) -> list[Alternatives]:
    return linear(ours, theirs, bias=config.norm_bias)


def _router(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    assert config.moe is not None
    tensors = linear(f"{ours}.router", f"{theirs}.{names.router}", bias=config.moe.router_bias)
    if config.moe.has_expert_bias:
        tensors.append(same(f"{ours}.router.expert_bias", f"{theirs}.{names.expert_bias}"))
    return tensors


def _shared_experts(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    assert config.moe is not None
    if not config.moe.shared_intermediate_size:
        return []
    tensors = mlp(f"{ours}.shared_experts", f"{theirs}.{names.shared_experts}", bias=config.mlp_bias)
    if config.moe.shared_expert_gate:
        tensors.append(same(f"{ours}.shared_expert_gate.weight", f"{theirs}.{names.shared_expert_gate}.weight"))
    return tensors


def _ignored(config: ModelConfig, names: Names) -> Callable[[str], bool]:
    suffixes = ("rotary_emb.inv_freq", *([f"{names.head}.weight"] if config.tie_word_embeddings else []))
    before_index = names.layer.partition("{}")[0]

    def ignored(name: str) -> bool:
        index = name.removeprefix(before_index).partition(".")[0] if name.startswith(before_index) else ""
        beyond = index.isdecimal() and len(index) < 10 and int(index) >= config.num_hidden_layers
        return beyond or name.endswith(suffixes)

    return ignored
