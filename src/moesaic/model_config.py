"""What a model is, as frozen dataclasses that hold every choice the supported families make.

Field names follow Hugging Face configs where such a field exists. Every class checks itself when it is made, so a
config that exists is a config that can be built.
"""

from dataclasses import dataclass
from typing import Literal

from moesaic.checks import require, require_between, require_not_negative, require_positive

RouterName = Literal["softmax_topk", "topk_softmax", "sigmoid_topk", "topk_sigmoid_input", "sparsemixer"]
ActivationName = Literal["swiglu", "clamped_swiglu"]
SCORE_ROUTERS: tuple[RouterName, ...] = ("softmax_topk", "sigmoid_topk")
"""Those that score all experts first: only then can scores be limited to groups, biased, and their best normalised."""
QKNorm = Literal["none", "head", "width", "head_after_rope", "l2_after_rope"]
LayerType = Literal["full_attention", "sliding_attention", "chunked_attention"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts feed-forward: which router, how many experts, how wide."""

    num_experts: int
    """E, routed experts per layer."""
    num_experts_per_tok: int
    """K, routed experts that each token visits."""
    moe_intermediate_size: int
    """F, inner width of one expert."""
    router: RouterName = "softmax_topk"
    """`softmax_topk` (Mixtral, Qwen3-MoE), `topk_softmax` (softmax over the chosen logits only: Granite, gpt-oss),
    `sigmoid_topk` (DeepSeek-V3, GLM-4), `topk_sigmoid_input` (Llama 4: the score scales the expert's input) or
    `sparsemixer` (Phi-3.5-MoE)."""
    norm_topk_prob: bool = True
    """Divide the K weights of a token by their norm; `softmax_topk` and `sigmoid_topk` only."""
    norm_topk_order: float = 1.0
    """Order of that norm: 1 is the sum, DBRX may take another."""
    norm_topk_min: float = 1e-20
    """The norm counts as at least this."""
    routed_scaling_factor: float = 1.0
    """Multiplies the routed output; K restores the output scale of a dense layer when weights sum to 1."""
    expert_bias: bool | None = None
    """A bias per expert that takes part in the choice, never in the weight, and is moved by the load. None: the router
    decides, `sigmoid_topk` has one and the others do not."""
    router_bias: bool = False
    """A learned bias on the router's logits (gpt-oss)."""
    router_jitter_noise: float = 0.01
    """`sparsemixer` only: how far below the best logit, relatively, an expert may be and still share the softmax."""
    n_group: int = 1
    """Experts are split into so many groups, of which a token may visit `topk_group` (DeepSeek)."""
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    """What a group is worth: its best expert (DeepSeek-V2) or its best two (DeepSeek-V3)."""
    n_shared_experts: int = 0
    """Experts that every token visits, fused into one MLP of width n_shared_experts * moe_intermediate_size."""
    shared_expert_intermediate_size: int = 0
    """Inner width of that MLP where it is not a multiple of an expert's; 0 leaves it to n_shared_experts."""
    shared_expert_gate: bool = False
    """A learned sigmoid weighs the shared experts' output (Qwen2-MoE)."""
    first_k_dense_replace: int = 0
    """The first k layers use the dense MLP of width intermediate_size instead."""
    mlp_only_layers: tuple[int, ...] = ()
    """Further layers that do."""
    activation: ActivationName = "swiglu"
    """Of the routed experts: `swiglu` is silu(gate) * up; `clamped_swiglu` is gpt-oss's."""
    swiglu_limit: float = 7.0
    """`clamped_swiglu` only: gate is clamped above, up on both sides."""
    swiglu_alpha: float = 1.702
    """`clamped_swiglu` only: gain inside the sigmoid."""
    projection_bias: bool = False
    """Biases on the projections of the routed experts (gpt-oss)."""

    def __post_init__(self) -> None:
        require_positive(
            self, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor",
            "norm_topk_order", "n_group", "topk_group", "swiglu_limit", "swiglu_alpha",
        )  # fmt: skip
        require_not_negative(
            self, "n_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace", "norm_topk_min",
            "router_jitter_noise",
        )  # fmt: skip
        require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok is {self.num_experts_per_tok} but num_experts is {self.num_experts}; "
            f"a token can visit at most {self.num_experts} experts",
        )
        require(
            self.num_experts % self.n_group == 0 and self.topk_group <= self.n_group,
            f"n_group is {self.n_group} and topk_group {self.topk_group} with {self.num_experts} experts; the first "
            "must divide the experts, and the second not exceed it",
        )
        require(
            self.num_experts_per_tok <= self.num_experts // self.n_group * self.topk_group,
            f"num_experts_per_tok is {self.num_experts_per_tok} but {self.topk_group} of {self.n_group} groups hold "
            f"{self.num_experts // self.n_group * self.topk_group} experts; raise topk_group",
        )
        require(
            self.n_group == 1 or self.router in SCORE_ROUTERS,
            f"n_group is {self.n_group}, but the router {self.router} does not choose by group; set n_group = 1",
        )
        require(
            self.n_group == 1 or self.group_score == "max" or self.num_experts // self.n_group >= 2,
            f"group_score top2_sum needs groups of 2 experts or more; {self.num_experts} experts in {self.n_group} "
            "groups leave 1; set group_score = 'max'",
        )
        require(
            not self.has_expert_bias or self.router in SCORE_ROUTERS,
            f"expert_bias is set, but the router {self.router} has none; use softmax_topk or sigmoid_topk",
        )
        require(
            self.router != "sparsemixer" or self.num_experts_per_tok == 2,
            f"num_experts_per_tok is {self.num_experts_per_tok}, but sparsemixer always takes 2",
        )
        require(
            not self.shared_expert_gate or self.shared_intermediate_size > 0,
            "shared_expert_gate is set but there are no shared experts; set n_shared_experts",
        )

    @property
    def has_expert_bias(self) -> bool:
        return self.router == "sigmoid_topk" if self.expert_bias is None else self.expert_bias

    @property
    def has_constant_weights(self) -> bool:
        """Whether the one weight of every token is 1, so that no gradient reaches the router."""
        divided_by_itself = self.norm_topk_prob and self.router in SCORE_ROUTERS
        return self.num_experts_per_tok == 1 and (divided_by_itself or self.router == "topk_softmax")

    @property
    def shared_intermediate_size(self) -> int:
        """Inner width of the shared experts' MLP; 0 when there are none."""
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.moe_intermediate_size


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
        named = (*self.nope_layers, *(self.moe.mlp_only_layers if self.moe else ()))
        for index in named:
            require(
                0 <= index < self.num_hidden_layers,
                f"layer {index} is named in nope_layers or mlp_only_layers, but the layers are 0 to "
                f"{self.num_hidden_layers - 1}",
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

    def layer_type(self, layer_index: int) -> LayerType:
        return self.layer_types[layer_index] if self.layer_types else "full_attention"
