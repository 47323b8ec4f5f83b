"""What a model, a training run and an engine are, as frozen dataclasses.

Field names follow Hugging Face configs where such a field exists. Every class checks itself when it is made, so a
config that exists is a config that can be built; `config_io` makes them from TOML, JSON and command-line flags.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moesaic.checks import require, require_not_negative, require_positive, require_seed
from moesaic.model_config import LoRAConfig, MLAConfig, ModelConfig, RopeScaling
from moesaic.moe_config import SCORE_ROUTERS, UNLEARNED_ROUTERS, BalanceConfig, MoEConfig

__all__ = [
    "BalanceConfig",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "LoRAConfig",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeScaling",
    "SamplingConfig",
    "ScheduleConfig",
    "TrainConfig",
]

DTypeName = Literal["float32", "bfloat16"]
TransportName = Literal["exact", "bfloat16", "fp8", "int8"]
OverlapName = Literal["none", "shared", "halves"]


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
        require(bool(self.source), "data.source is empty; name a path, hub:NAME or stdlib")
        require(
            0.0 < self.validation_fraction < 0.5,
            f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 0.5",
        )
        require_not_negative(self, "max_tokens")


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
    expert_every: int = 1
    """Muon moves routed experts once in so many steps, so many times as far; their momentum takes in every gradient."""
    gradient_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "matrix_lr", "feed_forward_lr", "eps")
        require_not_negative(self, "embedding_lr", "weight_decay", "gradient_clip")
        require(self.expert_every >= 1, f"expert_every is {self.expert_every}; it must be at least 1")
        for name, value in (("betas[0]", self.betas[0]), ("betas[1]", self.betas[1]), ("momentum", self.momentum)):
            require(0.0 <= value < 1.0, f"{name} is {value}; it must lie in [0, 1)")


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
            require(0.0 <= value <= 1.0, f"{name} is {value}; it must lie between 0 and 1")
        require(
            self.name != "wsd" or self.warmup_fraction + self.decay_fraction <= 1.0,
            f"warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} add up to more than 1",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When run states are written and how many stay."""

    save_every: int = 200
    """Steps between saved states; the last step is always saved."""
    keep: int = 2
    """Verified states that stay on disk."""
    background: bool = False
    """Write states while training goes on, from a copy in memory."""

    def __post_init__(self) -> None:
        require_positive(self, "save_every", "keep")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over the ranks that torchrun starts, which number dp x fsdp x ep."""

    dp: int = 0
    """Copies of the model; 0: as many as the ranks make."""
    fsdp: int = 1
    """Ranks among which every parameter is cut (FSDP2)."""
    ep: int = 1
    """Ranks among which the experts of a layer are shared out."""
    transport: TransportName = "exact"
    """How tokens travel to their experts and back: as they are, or in fewer bytes."""
    gradient_transport: TransportName = "exact"
    """The same for their gradients."""
    overlap: OverlapName = "none"
    """What is computed while tokens travel: nothing, the shared experts, or these and the other half of the tokens."""
    ranks_per_host: int = 0
    """More than 0: a token travels once to each host of so many neighbouring ep ranks, and is handed on inside; 0: once
    to each rank."""
    timeout_seconds: int = 300
    """How long a rank waits for another in an exchange: longer than the slowest step and evaluation. One whose process
    stands still is given up after a minute, or sooner if this is less."""

    def __post_init__(self) -> None:
        require_not_negative(self, "dp", "ranks_per_host")
        require_positive(self, "fsdp", "ep", "timeout_seconds")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, complete: the file `config.json` of a run directory holds exactly this."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig | None = None
    """Train small matrices beside those of `init_from`, which stay as they are."""
    init_from: str = ""
    """MODEL whose weights the run starts from; it gives [model] and data.tokenizer too. Empty: from random weights."""
    freeze_router: bool = False
    """Leave the routers as they are, their selection bias too."""
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
        require_positive(
            self, "steps", "batch_size", "sequence_length", "evaluation_tokens", "max_nonfinite_steps"
        )  # fmt: skip
        require_not_negative(self, "micro_batch_size", "evaluate_every")
        require_seed(self.seed)
        require(
            self.batch_size % (self.micro_batch_size or self.batch_size) == 0,
            f"micro_batch_size is {self.micro_batch_size} and batch_size is {self.batch_size}; "
            "the first must divide the second",
        )
        require(
            self.sequence_length <= self.model.max_position_embeddings,
            f"sequence_length is {self.sequence_length} but model.max_position_embeddings is "
            f"{self.model.max_position_embeddings}; raise the second or lower the first",
        )
        moe = self.model.moe
        require(
            moe is None or not moe.has_constant_weights,
            "num_experts_per_tok is 1 and weights are normalised: every weight is 1, and the router gets no gradient; "
            "set model.moe.num_experts_per_tok = 2, or router = 'softmax_topk' with norm_topk_prob = false",
        )
        require(
            moe is not None or self.balance == BalanceConfig(depth_loss_coef=self.balance.depth_loss_coef),
            "[balance] needs [model.moe]: a dense model has nothing to balance; remove the section or set it to 0",
        )
        if moe is not None:
            self._check_balance(moe)
        self._check_parallel()
        self._check_fine_tuning()

    def _check_parallel(self) -> None:
        moe, ep = self.model.moe, self.parallel.ep
        require(ep == 1 or moe is not None, f"parallel.ep is {ep}, but a dense model has no experts; set it to 1")
        require(
            moe is None or ep <= moe.num_experts,
            f"parallel.ep is {ep}, but model.moe.num_experts is {moe and moe.num_experts}; set ep to that or less",
        )
        require(
            self.parallel.fsdp == 1 or self.optimizer.name != "muon",
            f"parallel.fsdp is {self.parallel.fsdp}, but optimizer.name muon needs whole matrices; use adamw, or set "
            "parallel.fsdp = 1",
        )

    def _check_fine_tuning(self) -> None:
        require(
            not self.freeze_router or self.model.moe is not None,
            "freeze_router is true, but a dense model has no router; leave it out",
        )
        require(
            not self.freeze_router or self.balance.bias_update_rate == 0,
            f"freeze_router is true and balance.bias_update_rate {self.balance.bias_update_rate}, which would move "
            "the selection bias of the routers; set the rate to 0",
        )
        require(
            not self.init_from or not self.data.tokenizer.startswith("bpe:"),
            f"data.tokenizer is {self.data.tokenizer}, a new one, and {self.init_from} knows the tokens of its own "
            "only; leave data.tokenizer out",
        )
        if self.lora is not None:
            self._check_lora(self.lora)

    def _check_lora(self, lora: LoRAConfig) -> None:
        require(bool(self.init_from), "[lora] adapts a model; name it with init_from = MODEL, or remove the section")
        require(
            not self.freeze_router or "router" not in lora.targets,
            "freeze_router is true, but lora.targets has router; leave one of them out",
        )
        require(
            self.optimizer.name != "muon",
            "optimizer.name muon orthogonalises whole matrices, and [lora] trains two factors of each; use adamw",
        )
        ep, fsdp = self.parallel.ep, self.parallel.fsdp
        require(
            ep == fsdp == 1,
            f"parallel.ep is {ep} and parallel.fsdp {fsdp}, but [lora] needs the whole model on every rank; set both "
            "to 1 (parallel.dp is free)",
        )

    def _check_balance(self, moe: MoEConfig) -> None:
        balance = self.balance
        refused = {
            "hash": "has no logits that could learn",
            "expert_choice": "gives every expert equally many tokens already",
            "soft": "gives every expert equally many mixtures already",
            "base": "gives every expert equally many tokens already",
        }
        require(
            balance.aux_loss_coef == 0 or moe.router not in refused,
            f"balance.aux_loss_coef is {balance.aux_loss_coef}, but the router {moe.router} "
            f"{refused.get(moe.router)}; set it to 0",
        )
        require(
            balance.z_loss_coef == 0 or moe.router not in (*UNLEARNED_ROUTERS, "soft"),
            f"balance.z_loss_coef is {balance.z_loss_coef}, but the router {moe.router} has no logits per token; set "
            "it to 0",
        )
        require(
            balance.aux_loss_devices <= 1 or moe.num_routed % balance.aux_loss_devices == 0,
            f"balance.aux_loss_devices is {balance.aux_loss_devices}; it must divide the {moe.num_routed} experts that "
            "the router chooses among, those that compute nothing included",
        )
        require(
            balance.bias_update_rate == 0 or moe.has_expert_bias,
            f"balance.bias_update_rate needs a selection bias, which the router {moe.router} does not have as set; "
            f"use {' or '.join(SCORE_ROUTERS)} with model.moe.expert_bias = true, or set the rate to 0",
        )
        quantile = balance.bias_update_rate > 0 and balance.bias_update_rule == "quantile"
        require(
            not quantile or (moe.expert_bias_form == "add" and moe.n_group == 1),
            f"bias_update_rule quantile needs a bias that is added, and no groups; expert_bias_form is "
            f"{moe.expert_bias_form} and n_group {moe.n_group}; use the rule sign or proportional",
        )
        require(
            not quantile or moe.num_experts_per_tok < moe.num_routed,
            f"bias_update_rule quantile needs an expert that a token leaves out; num_experts_per_tok is "
            f"{moe.num_experts_per_tok} of {moe.num_routed}",
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
    """How the next token is drawn, and when that ends. Temperature 0 takes the most likely one."""

    max_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep only tokens at least so many times as likely as the best."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that was generated already."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that it was."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in prompt and text (arXiv 1909.05858)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop: tuple[str, ...] = ()
    """Text that ends the generation, and is not part of it."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    seed: int = 0
    allow_lookahead: bool = False
    """Generate also from a model whose routers look at later tokens; computes the whole text anew for each token."""

    def __post_init__(self) -> None:
        require_positive(self, "max_tokens", "repetition_penalty")
        require_not_negative(self, "temperature", "top_k")
        require_seed(self.seed)
        require(0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}; it must lie above 0 and at most 1")
        require(0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}; it must lie between 0 and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-2.0 <= value <= 2.0, f"{name} is {value}; it must lie between -2 and 2")
        require(all(self.stop), "stop has an empty text, which would end everything at once; remove it")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How many texts are generated side by side, and with how much memory."""

    max_sequences: int = 16
    """Texts that are computed in the same step, at most."""
    step_tokens: int = 512
    """Tokens of a step, at most: longer prompts come in pieces, beside the texts that are being written."""
    kv_memory: str = "auto"
    """Of keys and values, such as 1GiB; auto is what `max_sequences` texts of `max_model_tokens` need, and at most a
    quarter of what the machine, or the budget, has left."""
    max_model_tokens: int = 8192
    """Prompt and answer together, at most; a model with fewer positions has fewer."""
    prefix_cache: bool = True
    """Keep keys and values of texts that have ended, for others that begin alike."""
    max_waiting: int = 256
    """Requests that wait for their turn; more are refused at once."""
    max_waiting_tokens: int = 262144
    """The same, counted in tokens of their prompts."""
    prompt_lookup: int = 0
    """Guess so many next tokens from what followed the same words before, and check them in one step (prompt-lookup
    decoding); it is left off while that is slower. 0 switches it off."""
    expert_bytes: str = ""
    """With experts on disk: texts advance together only as far as their step reads about so much, such as 256MiB; empty
    means all of them."""

    def __post_init__(self) -> None:
        require_positive(self, "max_sequences", "step_tokens", "max_model_tokens", "max_waiting", "max_waiting_tokens")
        require_not_negative(self, "prompt_lookup")
        require(
            self.step_tokens >= self.max_sequences,
            f"step_tokens is {self.step_tokens} and max_sequences {self.max_sequences}; each text needs a token a step",
        )
