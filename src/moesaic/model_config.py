"""What a model is, as frozen dataclasses that hold every choice the supported families make.

Field names follow Hugging Face configs where such a field exists. Every class checks itself when it is made, so a
config that exists is a config that can be built.
"""

from dataclasses import dataclass
from typing import Literal

from moesaic.checks import require, require_between, require_not_negative, require_positive
from moesaic.moe_config import MoEConfig

QKNorm = Literal["none", "head", "width", "head_after_rope", "l2_after_rope"]
LayerType = Literal["full_attention", "sliding_attention", "chunked_attention"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that a model was first trained on."""

    rope_type: Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
    factor: float | None = None
    """Context is stretched by this; `longrope` may leave it to the ratio of the two context lengths."""
    original_max_position_embeddings: int | None = None
    """Context before stretching; None: max_position_embeddings."""
    attention_factor: float | None = None
    """Multiplies cos and sin; None: what the method computes (`yarn`, `longrope`)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """`yarn`: round the bounds of the blended dimensions."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """`yarn` of DeepSeek: what cos and sin, and the softmax scale, are multiplied by."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """`llama3`: bounds of the blended wavelengths."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    """`longrope`: a divisor per frequency, within and beyond the original context."""
    short_mscale: float | None = None
    long_mscale: float | None = None
    """`longrope` of Phi-3.5-MoE: what cos and sin are multiplied by, within and beyond the original context."""
    alpha: float | None = None
    """`dynamic` of Hunyuan: multiplies the base once and for all."""

    def __post_init__(self) -> None:
        require_positive(self, "original_max_position_embeddings")
        # Far beyond these bounds single numbers leave float32, and tables of cos and sin become NaN.
        require_between(
            self, 1e-6, 1e6, "factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor",
            "high_freq_factor", "short_mscale", "long_mscale", "alpha",
        )  # fmt: skip
        require_between(self, 0, 1e6, "mscale", "mscale_all_dim")
        require(
            self.low_freq_factor <= self.high_freq_factor,
            f"low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
            "the first must not be the larger",
        )
        has_factor = self.factor is not None or self.alpha is not None or self.rope_type == "longrope"
        require(has_factor, f"rope scaling {self.rope_type} needs a factor; set rope_scaling.factor")
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            require(
                bool(values) == (self.rope_type == "longrope") and all(1e-6 <= value <= 1e6 for value in values),
                f"{name} is {values}; longrope, and nothing else, needs a list of numbers between 1e-06 and 1e+06",
            )


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values share one small latent."""

    kv_lora_rank: int
    """Size of the latent that is cached."""
    qk_nope_head_dim: int
    """Part of a query or key head that carries no position."""
    qk_rope_head_dim: int
    """Part that does; one for all key heads."""
    v_head_dim: int
    q_lora_rank: int | None = None
    """Size of the queries' own latent; None projects them directly."""

    def __post_init__(self) -> None:
        require_positive(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. With `moe` its feed-forward layers are mixtures of experts, without it dense."""

    vocab_size: int
    hidden_size: int
    """D, width of the residual stream."""
    num_hidden_layers: int
    num_attention_heads: int
    """H, query heads."""
    num_key_value_heads: int
    """G, key and value heads; H / G query heads share one."""
    head_dim: int
    """d, width of one head; need not be D / H."""
    intermediate_size: int = 0
    """Inner width of the dense MLP; unused when every layer is a mixture of experts."""
    moe: MoEConfig | None = None
    max_position_embeddings: int = 2048
    model_type: str = ""
    """The Hugging Face family that the model was read from, and is written as; empty for one that was made here."""

    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    norm_bias: bool = False
    """LayerNorm only."""
    rms_norm_eps: float = 1e-6
    """Of either norm."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Norms before each sub-layer, or after it and before the residual sum (OLMo 2)."""

    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    """Share of each head's dimensions that RoPE turns."""
    rope_scaling: RopeScaling | None = None
    rope_interleaved: bool = False
    """Turn dimension 2i with 2i + 1 instead of i with i + rotary_dim / 2."""
    nope_layers: tuple[int, ...] = ()
    """Layers without RoPE (Llama 4)."""

    qk_norm: QKNorm = "head"
    """RMSNorm of queries and keys: none, on each head, over all heads together (OLMoE), on each head after RoPE
    (Hunyuan), or on each head after RoPE without weights and on RoPE layers only (Llama 4)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to +- this before RoPE: right after the projections (DBRX), or, where a norm
    of queries and keys comes before RoPE, after that (OLMoE)."""
    layer_types: tuple[LayerType, ...] = ()
    """What the attention of each layer sees; empty: everything before it, in every layer."""
    sliding_window: int | None = None
    """How many tokens, itself included, a token of a `sliding_attention` layer sees."""
    attention_chunk_size: int | None = None
    """`chunked_attention` layers see the tokens of their own chunk of so many positions."""
    attention_sinks: bool = False
    """A learned logit per head that takes its share of the softmax and gives nothing (gpt-oss)."""
    attn_scale: float = 0.0
    """Queries of layers without RoPE are multiplied by 1 + attn_scale * log(1 + floor((p + 1) / floor_scale))."""
    floor_scale: int = 8192
    mla: MLAConfig | None = None

    depth_layers: tuple[int, ...] = ()
    """Layers that most tokens of a sequence pass by (mixture of depths); a router in each picks those that do not."""
    depth_capacity: float = 0.125
    """Share of a sequence's tokens, rounded up, that such a layer computes in training."""

    mlp_bias: bool = False
    """Biases on the dense MLP and the shared experts."""
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    """Softmax scale; None: head_dim ** -0.5."""
    residual_multiplier: float = 1.0
    """Of what each sub-layer adds to the residual stream."""
    logits_scaling: float = 1.0
    """Logits are divided by this."""

    initializer_range: float = 0.02
    """Standard deviation of the initial matrices; 0 fits it to each matrix (see model/initialize.py)."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "clip_qkv", "sliding_window",
            "attention_chunk_size", "floor_scale", "embedding_multiplier", "attention_multiplier",
            "residual_multiplier", "logits_scaling",
        )  # fmt: skip
        require_not_negative(self, "intermediate_size", "initializer_range", "attn_scale")
        require_between(self, 0.0, 1.0, "partial_rotary_factor")
        self._check_attention()
        self._check_layers()
        require(
            not (self.tie_word_embeddings and self.lm_head_bias),
            "lm_head_bias needs an output projection of its own; set tie_word_embeddings = false",
        )
        for token_id in (*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])):
            require(
                0 <= token_id < self.vocab_size,
                f"special token id {token_id} is outside the vocabulary of {self.vocab_size}",
            )

    def _check_attention(self) -> None:
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads is {self.num_attention_heads} and num_key_value_heads is "
            f"{self.num_key_value_heads}; the second must divide the first",
        )
        require(
            self.rotary_dim > 0 and self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim,
            f"head_dim {self.head_dim} x partial_rotary_factor {self.partial_rotary_factor} gives {self.rotary_dim} "
            "rotary dimensions; RoPE needs an even number from 2 to head_dim",
        )
        require(
            self.norm == "layer" or not self.norm_bias,
            "norm_bias needs norm = 'layer': RMSNorm has no bias",
        )
        require(1 < self.rope_theta < 1e30, f"rope_theta is {self.rope_theta}; it must lie above 1 and below 1e30")
        scaling = self.rope_scaling
        if scaling is not None and scaling.rope_type == "longrope":
            original = scaling.original_max_position_embeddings or self.max_position_embeddings
            require(original > 1, f"longrope stretches a context of {original} tokens; it must hold 2 or more")
            lengths = {len(scaling.short_factor), len(scaling.long_factor)}
            require(
                lengths == {self.rotary_dim // 2},
                f"short_factor and long_factor have {sorted(lengths)} entries; {self.rotary_dim} rotary dimensions "
                f"need {self.rotary_dim // 2}",
            )
        if self.mla is not None:
            expected = self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
            require(
                self.head_dim == expected and self.num_key_value_heads == self.num_attention_heads,
                f"with latent attention head_dim is qk_nope_head_dim + qk_rope_head_dim, here {expected} and not "
                f"{self.head_dim}, and num_key_value_heads is num_attention_heads",
            )
            require(
                self.qk_norm == "none" and self.clip_qkv is None,
                "latent attention normalises its latents, not its heads; set qk_norm = 'none' and no clip_qkv",
            )

    def _check_layers(self) -> None:
        require(
            not self.layer_types or len(self.layer_types) == self.num_hidden_layers,
            f"layer_types has {len(self.layer_types)} entries; {self.num_hidden_layers} layers need as many",
        )
        for kind, size in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
            require(
                kind not in self.layer_types or getattr(self, size) is not None,
                f"layer_types names {kind}, but {size} is not set; set it",
            )
        named = (*self.nope_layers, *self.depth_layers, *(self.moe.mlp_only_layers if self.moe else ()))
        for index in named:
            require(
                0 <= index < self.num_hidden_layers,
                f"layer {index} is named in nope_layers, depth_layers or mlp_only_layers, but the layers are 0 to "
                f"{self.num_hidden_layers - 1}",
            )
        require(
            0.0 < self.depth_capacity <= 1.0,
            f"depth_capacity is {self.depth_capacity}; it must lie above 0 and at most 1",
        )
        require(
            len(set(self.depth_layers)) == len(self.depth_layers),
            f"depth_layers is {list(self.depth_layers)}; name each layer once",
        )
        require(
            self.num_dense_layers == 0 or self.intermediate_size > 0,
            f"{self.num_dense_layers} layers are dense but intermediate_size is 0; set intermediate_size",
        )
        require(
            self.moe is None or self.num_moe_layers > 0,
            f"first_k_dense_replace and mlp_only_layers make all {self.num_hidden_layers} layers dense; lower them, "
            "or remove [moe]",
        )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return self.mla.qk_rope_head_dim if self.mla else int(self.head_dim * self.partial_rotary_factor)

    @property
    def v_head_dim(self) -> int:
        """Width of a value head."""
        return self.mla.v_head_dim if self.mla else self.head_dim

    @property
    def num_dense_layers(self) -> int:
        """Layers whose feed-forward is a dense MLP."""
        return sum(not self.is_moe_layer(index) for index in range(self.num_hidden_layers))

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    def is_moe_layer(self, layer_index: int) -> bool:
        moe = self.moe
        return moe is not None and layer_index >= moe.first_k_dense_replace and layer_index not in moe.mlp_only_layers

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's experts depend on later tokens, so that this is no causal language model."""
        return self.moe is not None and self.moe.looks_ahead

    def layer_type(self, layer_index: int) -> LayerType:
        return self.layer_types[layer_index] if self.layer_types else "full_attention"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): W becomes W + alpha / rank x B A, and A and B alone are trained."""

    rank: int = 8
    """Rows of A and columns of B. Each expert has an A and a B of its own."""
    alpha: float = 16.0
    """B A is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("experts",)
    """What is adapted: experts, shared_experts, mlp (dense feed-forwards), attention, lm_head, router."""

    def __post_init__(self) -> None:
        require_positive(self, "rank", "alpha")
        require(bool(self.targets), "targets is empty, so nothing would be trained; set it to ['experts']")
        require(len(set(self.targets)) == len(self.targets), f"targets {list(self.targets)} names one of them twice")
