"""What a mixture-of-experts layer is, as one frozen dataclass that holds every choice of the supported routers.

E experts, K experts per token, F inner width of an expert.
"""

from dataclasses import dataclass
from typing import Literal

from moesaic.checks import require, require_between, require_not_negative, require_positive

RouterName = Literal[
    "softmax_topk",
    "topk_softmax",
    "sigmoid_topk",
    "topk_sigmoid_input",
    "sparsemixer",
    "noisy_topk",
    "softmax_top_p",
    "relu",
    "hash",
    "expert_choice",
    "sinkhorn",
    "base",
    "soft",
]
SCORE_ROUTERS: tuple[RouterName, ...] = ("softmax_topk", "sigmoid_topk")
"""Those that score all experts first: only then can scores be limited to groups, biased, and their best normalised."""
PUBLISHED_ROUTERS: tuple[RouterName, ...] = (*SCORE_ROUTERS, "topk_softmax", "topk_sigmoid_input", "sparsemixer")
"""Those that published checkpoints have."""
TOPK_ROUTERS: tuple[RouterName, ...] = (*SCORE_ROUTERS, "topk_softmax", "noisy_topk")
"""Token choice of exactly K experts: these can have a capacity, and experts that compute nothing."""
LOOKAHEAD_ROUTERS: tuple[RouterName, ...] = ("expert_choice", "soft")
"""What a token gets depends on later tokens, in evaluation too: such a model is no causal language model."""
UNLEARNED_ROUTERS: tuple[RouterName, ...] = ("hash",)
"""Without logits, so that neither a loss nor a bias can balance them."""
ActivationName = Literal["swiglu", "clamped_swiglu"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts feed-forward: which router, how many experts, how wide."""

    num_experts: int
    """E, routed experts per layer."""
    num_experts_per_tok: int
    """K, routed experts that each token visits; the mean for `expert_choice`, the target for `relu`, the most for
    `softmax_top_p`, without meaning for `soft`."""
    moe_intermediate_size: int
    """F, inner width of one expert."""
    router: RouterName = "softmax_topk"
    """`softmax_topk` (Mixtral, Qwen3-MoE), `topk_softmax` (softmax over the chosen logits only: Granite, gpt-oss),
    `sigmoid_topk` (DeepSeek-V3, GLM-4), `topk_sigmoid_input` (Llama 4: the score scales the expert's input) or
    `sparsemixer` (Phi-3.5-MoE); and those that no published checkpoint has: docs/routing.md tells them apart."""
    norm_topk_prob: bool = True
    """Divide the K weights of a token by their norm; `softmax_topk`, `sigmoid_topk` and `softmax_top_p` only."""
    norm_topk_order: float = 1.0
    """Order of that norm: 1 is the sum, DBRX may take another."""
    norm_topk_min: float = 1e-20
    """The norm counts as at least this."""
    routed_scaling_factor: float = 1.0
    """Multiplies the routed output; K restores the output scale of a dense layer when weights sum to 1."""
    expert_bias: bool | None = None
    """A bias per expert that takes part in the choice, never in the weight, and is moved by the load. None: the router
    decides, `sigmoid_topk` has one and the others do not."""
    expert_bias_form: Literal["add", "multiply"] = "add"
    """How it takes part: added to the score, or, as its exponential, multiplying it."""
    router_bias: bool = False
    """A learned bias on the router's logits (gpt-oss)."""
    router_jitter_noise: float = 0.01
    """`sparsemixer` only: how far below the best logit, relatively, an expert may be and still share the softmax."""
    router_input_jitter: float = 0.0
    """In training the router's input is multiplied by factors drawn evenly from 1 - this to 1 + this (Switch)."""
    capacity_factor: float | None = None
    """In training an expert takes at most this times its even share of a sequence; None: as many as come (dropless).
    `expert_choice` takes exactly this much; None then means 1."""
    drop_policy: Literal["drop", "next_choice", "pad"] = "drop"
    """What becomes of the rest: nothing, or the token's next best expert with room; `pad` drops, and fills every expert
    up to its capacity with rows of weight 0, so that all compute equally many."""
    top_p: float = 0.4
    """`softmax_top_p` only: a token visits its best experts until their probabilities sum to this."""
    slots_per_expert: int = 1
    """`soft` only: mixtures of a sequence's tokens that each expert computes."""
    num_zero_experts: int = 0
    """Experts that compute nothing, beside the E that do: whose output is 0 (MoE++) …"""
    num_copy_experts: int = 0
    """… the token itself (MoE++, LongCat) …"""
    num_constant_experts: int = 0
    """… or a learned vector mixed with the token (MoE++)."""
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
            "norm_topk_order", "n_group", "topk_group", "swiglu_limit", "swiglu_alpha", "capacity_factor",
            "slots_per_expert",
        )  # fmt: skip
        require_not_negative(
            self, "n_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace", "norm_topk_min",
            "router_jitter_noise", "num_zero_experts", "num_copy_experts", "num_constant_experts",
        )  # fmt: skip
        require_between(self, 0.0, 0.99, "router_input_jitter")
        require_between(self, 0.001, 1.0, "top_p")
        require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok is {self.num_experts_per_tok} but num_experts is {self.num_experts}; "
            f"a token can visit at most {self.num_experts} experts",
        )
        require(
            not self.shared_expert_gate or self.shared_intermediate_size > 0,
            "shared_expert_gate is set but there are no shared experts; set n_shared_experts",
        )
        self._check_groups()
        self._check_router()

    def _check_groups(self) -> None:
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

    def _check_router(self) -> None:
        require(
            not self.has_expert_bias or self.router in SCORE_ROUTERS,
            f"expert_bias is set, but the router {self.router} has none; use softmax_topk or sigmoid_topk",
        )
        require(
            self.router != "sparsemixer" or self.num_experts_per_tok == 2,
            f"num_experts_per_tok is {self.num_experts_per_tok}, but sparsemixer always takes 2",
        )
        require(
            self.capacity_factor is None or self.router in (*TOPK_ROUTERS, "expert_choice"),
            f"capacity_factor is set, but the router {self.router} has no capacity; remove it, or use one of "
            f"{', '.join(TOPK_ROUTERS)}, expert_choice",
        )
        require(
            self.num_free_experts == 0 or self.router in TOPK_ROUTERS,
            f"experts that compute nothing need a router that weighs them; {self.router} does not, use one of "
            f"{', '.join(TOPK_ROUTERS)}",
        )
        require(
            self.num_free_experts == 0 or self.n_group == 1,
            f"n_group is {self.n_group}, but experts that compute nothing belong to no group; set n_group = 1",
        )
        require(
            not self.router_bias or self.router not in (*UNLEARNED_ROUTERS, "soft"),
            f"router_bias is set, but the router {self.router} has no logits per token; set it to false",
        )
        used = {
            "drop_policy": self.capacity_factor is not None and self.router in TOPK_ROUTERS,
            "top_p": self.router == "softmax_top_p",
            "slots_per_expert": self.router == "soft",
            "expert_bias_form": self.has_expert_bias,
        }
        for name, is_used in used.items():
            default = getattr(MoEConfig, name)
            require(
                is_used or getattr(self, name) == default,
                f"{name} is {getattr(self, name)!r}, which nothing reads: the router is {self.router}, capacity_factor "
                f"{self.capacity_factor} and expert_bias {self.has_expert_bias}; leave it at {default!r}",
            )
        require(
            self.router_input_jitter == 0 or self.router not in (*UNLEARNED_ROUTERS, "soft"),
            f"router_input_jitter is set, but the router {self.router} takes no jitter; set it to 0",
        )

    @property
    def num_free_experts(self) -> int:
        """Experts that compute nothing; the router sees them as experts E, E + 1, …: zero, then copy, then constant."""
        return self.num_zero_experts + self.num_copy_experts + self.num_constant_experts

    @property
    def num_routed(self) -> int:
        """All that a router chooses among, with the experts that compute nothing."""
        return self.num_experts + self.num_free_experts

    @property
    def looks_ahead(self) -> bool:
        """Whether what a token gets depends on later tokens, also when the model is evaluated."""
        return self.router in LOOKAHEAD_ROUTERS

    @property
    def has_expert_bias(self) -> bool:
        return self.router == "sigmoid_topk" if self.expert_bias is None else self.expert_bias

    @property
    def has_constant_weights(self) -> bool:
        """Whether the one weight of every token is 1, so that no gradient reaches the router."""
        divided_by_itself = self.norm_topk_prob and self.router in (*SCORE_ROUTERS, "softmax_top_p")
        over_chosen_only = self.router in ("topk_softmax", "noisy_topk")
        return self.num_experts_per_tok == 1 and (divided_by_itself or over_chosen_only)

    @property
    def shared_intermediate_size(self) -> int:
        """Inner width of the shared experts' MLP; 0 when there are none."""
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the load of the experts even. Coefficients of 0 switch a term off."""

    aux_loss_coef: float = 0.0
    """Weight of the Switch load-balance loss, mean over layers; its balanced value is 1."""
    aux_loss_scope: Literal["micro_batch", "sequence", "global_batch"] = "global_batch"
    """Over what the load must be even: a micro-batch, each sequence, or all tokens of an optimizer step. The last needs
    all loads before the first gradient: with several micro-batches each is first passed forward once more without one,
    about a third more compute, and its choices of experts are kept."""
    aux_loss_devices: int = 0
    """Experts are pooled into so many equal groups of neighbours, among which the loss wants the load to be even; 0 or
    1: every expert counts alone."""
    z_loss_coef: float = 0.0
    """Weight of the mean squared log-partition of the router logits."""
    bias_update_rate: float = 0.0
    """Step of the selection bias, once per optimizer step; follows the learning-rate schedule."""
    bias_update_rule: Literal["sign", "proportional", "quantile"] = "sign"
    """An expert below the mean load gains the rate; or the rate times what it misses, as a share of the mean; or all
    go that part of the way (1 is all of it) to the bias that would have balanced the batch."""
    relu_l1_growth: float = 1.2
    """`relu` routers only: by what the weight of their L1 loss is multiplied or divided in each optimizer step."""
    depth_loss_coef: float = 0.01
    """Weight of the loss that teaches mixture-of-depths routers to decide without seeing later tokens."""

    def __post_init__(self) -> None:
        require_not_negative(
            self, "aux_loss_coef", "aux_loss_devices", "z_loss_coef", "bias_update_rate", "depth_loss_coef"
        )
        require(
            1.0 < self.relu_l1_growth <= 10.0,
            f"relu_l1_growth is {self.relu_l1_growth}; it must lie above 1 and at most 10",
        )
        require(
            self.aux_loss_devices <= 1 or self.aux_loss_coef > 0,
            f"aux_loss_devices is {self.aux_loss_devices}, but aux_loss_coef is 0, so there is no loss; set both",
        )
        require(
            self.aux_loss_scope == BalanceConfig.aux_loss_scope or self.aux_loss_coef > 0,
            f"aux_loss_scope is {self.aux_loss_scope}, but aux_loss_coef is 0, so there is no loss; set both",
        )
        require(
            self.bias_update_rule == BalanceConfig.bias_update_rule or self.bias_update_rate > 0,
            f"bias_update_rule is {self.bias_update_rule}, but bias_update_rate is 0, so no bias moves; set both",
        )
        require(
            self.bias_update_rate <= 1,
            f"bias_update_rate is {self.bias_update_rate}; scores lie between 0 and 1, so set at most 1",
        )
