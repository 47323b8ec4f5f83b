"""What a model, a training run and an engine are, as frozen dataclasses.

Field names follow Hugging Face configs where such a field exists. Every class checks itself when it is made, so a
config that exists is a config that can be built; `config_io` makes them from TOML, JSON and command-line flags.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from moesaic.errors import UsageError

RouterName = Literal["softmax_topk", "sigmoid_topk"]
DTypeName = Literal["float32", "bfloat16"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _require_seed(seed: int) -> None:
    _require(0 <= seed < 2**63, f"seed is {seed}; it must lie between 0 and 2^63 - 1")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value < math.inf, f"{name} is {value}; it must be a number above 0")


def _require_not_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value < math.inf, f"{name} is {value}; it must be a number, 0 or above")


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
    """`softmax_topk` (Mixtral, Qwen3-MoE) or `sigmoid_topk` (DeepSeek-V3, GLM-4: selects with a bias)."""
    norm_topk_prob: bool = True
    """Divide the K weights of a token by their sum."""
    routed_scaling_factor: float = 1.0
    """Multiplies the routed output; K restores the output scale of a dense layer when weights sum to 1."""
    n_shared_experts: int = 0
    """Experts that every token visits, fused into one MLP of width n_shared_experts * moe_intermediate_size."""
    first_k_dense_replace: int = 0
    """The first k layers use the dense MLP of width intermediate_size instead."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor")
        _require_not_negative(self, "n_shared_experts", "first_k_dense_replace")
        _require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok is {self.num_experts_per_tok} but num_experts is {self.num_experts}; "
            f"a token can visit at most {self.num_experts} experts",
        )
        _require(
            not (self.router == "softmax_topk" and self.norm_topk_prob and self.num_experts_per_tok == 1),
            "num_experts_per_tok is 1 with norm_topk_prob, so every weight is 1 and the router gets no gradient; "
            "set norm_topk_prob = false",
        )

    @property
    def shared_intermediate_size(self) -> int:
        """Inner width of the shared experts' MLP; 0 when there are none."""
        return self.n_shared_experts * self.moe_intermediate_size


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
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    """Share of each head's dimensions that RoPE turns."""
    qk_norm: bool = True
    """RMSNorm on each query and key head before RoPE."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    """Standard deviation of the initial matrices; 0 fits it to each matrix (see model/initialize.py)."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_positive(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        )  # fmt: skip
        _require_not_negative(self, "intermediate_size", "initializer_range")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads is {self.num_attention_heads} and num_key_value_heads is "
            f"{self.num_key_value_heads}; the second must divide the first",
        )
        _require(
            self.rotary_dim > 0 and self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim,
            f"head_dim {self.head_dim} x partial_rotary_factor {self.partial_rotary_factor} gives {self.rotary_dim} "
            "rotary dimensions; RoPE needs an even number from 2 to head_dim",
        )
        _require(
            self.num_dense_layers == 0 or self.intermediate_size > 0,
            f"{self.num_dense_layers} layers are dense but intermediate_size is 0; set intermediate_size",
        )
        _require(
            self.moe is None or self.num_moe_layers > 0,
            f"first_k_dense_replace makes all {self.num_hidden_layers} layers dense; lower it, or remove [moe]",
        )
        for token_id in (*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])):
            _require(
                0 <= token_id < self.vocab_size,
                f"special token id {token_id} is outside the vocabulary of {self.vocab_size}",
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_dense_layers(self) -> int:
        """Layers whose feed-forward is a dense MLP; they come first."""
        if self.moe is None:
            return self.num_hidden_layers
        return min(self.moe.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    def is_moe_layer(self, layer_index: int) -> bool:
        return layer_index >= self.num_dense_layers


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = "stdlib"
    """`stdlib` (the running Python's standard library), a file or folder of text, JSONL or parquet, or `hub:NAME`."""
    validation: str = ""
    """A second source for validation; empty holds out part of `source`."""
    validation_fraction: float = 0.02
    """Share of the documents held out when `validation` is empty."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe:N` (byte-level BPE of N entries trained on the data), or the path of a tokenizer.json."""
    text_field: str = "text"
    """Which field of JSONL and parquet rows, or of a hub data set, holds the text."""
    max_tokens: int = 0
    """Stop preparing after this many training tokens; 0 takes all that the run can use."""

    def __post_init__(self) -> None:
        _require(bool(self.source), "data.source is empty; name a path, hub:NAME or stdlib")
        _require(
            0.0 < self.validation_fraction < 0.5,
            f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 0.5",
        )
        _require_not_negative(self, "max_tokens")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-3
    """Peak rate of AdamW."""
    embedding_lr: float = 0.0
    """Peak rate of the input embedding (always AdamW); 0 means lr."""
    matrix_lr: float = 4e-3
    """Peak rate of attention matrices under Muon."""
    feed_forward_lr: float = 4e-3
    """Peak rate of dense, shared and routed feed-forward matrices under Muon."""
    weight_decay: float = 0.1
    """Decoupled decay, on attention and feed-forward matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon's Nesterov momentum."""
    gradient_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _require_positive(self, "lr", "matrix_lr", "feed_forward_lr", "eps")
        _require_not_negative(self, "embedding_lr", "weight_decay", "gradient_clip")
        for name, value in (("betas[0]", self.betas[0]), ("betas[1]", self.betas[1]), ("momentum", self.momentum)):
            _require(0.0 <= value < 1.0, f"{name} is {value}; it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rates move over the run, as a factor on their peaks."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.5
    """WSD only: share of the run, at its end, over which the factor falls linearly."""
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "decay_fraction", "final_factor"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, f"{name} is {value}; it must lie between 0 and 1")
        _require(
            self.name != "wsd" or self.warmup_fraction + self.decay_fraction <= 1.0,
            f"warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} add up to more than 1",
        )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the load of the experts even. Coefficients of 0 switch a term off."""

    aux_loss_coef: float = 0.0
    """Weight of the Switch load-balance loss of a micro-batch, mean over layers; its balanced value is 1."""
    z_loss_coef: float = 0.0
    """Weight of the mean squared log-partition of the router logits."""
    bias_update_rate: float = 0.0
    """Step of the selection bias of `sigmoid_topk`, once per optimizer step; follows the learning-rate schedule."""

    def __post_init__(self) -> None:
        _require_not_negative(self, "aux_loss_coef", "z_loss_coef", "bias_update_rate")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When run states are written and how many stay."""

    save_every: int = 200
    """Steps between saved states; the last step is always saved."""
    keep: int = 2
    """Verified states that stay on disk."""

    def __post_init__(self) -> None:
        _require_positive(self, "save_every", "keep")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, complete: the file `config.json` of a run directory holds exactly this."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    steps: int = 1000
    batch_size: int = 32
    """Sequences per optimizer step."""
    micro_batch_size: int = 0
    """Sequences per forward pass; gradients accumulate to batch_size. 0 means batch_size."""
    sequence_length: int = 256
    seed: int = 0
    dtype: DTypeName = "float32"
    """Compute type; parameters stay float32 and bfloat16 runs under autocast."""
    device: str = "auto"
    backend: str = "auto"
    """How experts are computed; `moesaic doctor` lists the choices."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass; keeps the routing that the forward pass chose."""
    evaluate_every: int = 100
    """Steps between evaluations; 0 evaluates at the end only."""
    evaluation_tokens: int = 65536
    max_nonfinite_steps: int = 5
    """Stop after this many skipped updates in a row."""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            self, "steps", "batch_size", "sequence_length", "evaluation_tokens", "max_nonfinite_steps"
        )  # fmt: skip
        _require_not_negative(self, "micro_batch_size", "evaluate_every")
        _require_seed(self.seed)
        _require(
            self.batch_size % (self.micro_batch_size or self.batch_size) == 0,
            f"micro_batch_size is {self.micro_batch_size} and batch_size is {self.batch_size}; "
            "the first must divide the second",
        )
        _require(
            self.sequence_length <= self.model.max_position_embeddings,
            f"sequence_length is {self.sequence_length} but model.max_position_embeddings is "
            f"{self.model.max_position_embeddings}; raise the second or lower the first",
        )
        moe = self.model.moe
        _require(
            moe is not None or self.balance == BalanceConfig(),
            "[balance] needs [model.moe]: a dense model has nothing to balance; remove the section or set it to 0",
        )
        _require(
            self.balance.bias_update_rate == 0 or (moe is not None and moe.router == "sigmoid_topk"),
            "balance.bias_update_rate needs model.moe.router = 'sigmoid_topk', the router that has a selection bias; "
            "use balance.aux_loss_coef with the others",
        )

    @property
    def micro_batches(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. Temperature 0 takes the most likely one."""

    max_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "max_tokens")
        _require_not_negative(self, "temperature", "top_k")
        _require_seed(self.seed)
        _require(0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}; it must lie above 0 and at most 1")
