"""However a batch is cut, padded, recomputed or computed: equal loss, gradients, norm, biases and statistics.

B sequences, L positions, E experts, K experts per token, D hidden size, V vocabulary.

One way to compute a batch is the plain one: uncut, without additional padding, nothing recomputed, by the reference
backend. Every other way must give its numbers over three optimizer steps: in float64 to 1e-10 of their scale, in
float32 to 1e-4. The ways are chosen so that every two settings meet; each is crossed with every router.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import BalanceConfig, ModelConfig, MoEConfig, TrainConfig
from moesaic.model.routers import ROUTERS, ReLURouter
from moesaic.model.transformer import Transformer
from moesaic.train.objective import Batch, accumulate_gradients, update_after_step

B, L, D, E, K, V = 4, 6, 16, 8, 2, 40
STEPS = 3
GLOBAL = BalanceConfig(aux_loss_coef=0.1, z_loss_coef=0.01)
SEQUENCE = replace(GLOBAL, aux_loss_scope="sequence")
BIAS = replace(SEQUENCE, bias_update_rate=0.05)
Z_ONLY = BalanceConfig(z_loss_coef=0.01)
FREE = {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2}
CASES: dict[str, tuple[dict[str, Any], BalanceConfig]] = {
    "softmax_topk": ({"router": "softmax_topk"}, GLOBAL),
    "softmax_topk, device groups": ({"router": "softmax_topk"}, replace(GLOBAL, aux_loss_devices=4)),
    "softmax_topk, device groups of each sequence": ({"router": "softmax_topk"}, replace(SEQUENCE, aux_loss_devices=2)),
    "softmax_topk, quantile bias": (
        {"router": "softmax_topk", "expert_bias": True},
        replace(BIAS, bias_update_rule="quantile", bias_update_rate=0.5),
    ),
    "softmax_topk, multiplying bias": (
        {"router": "softmax_topk", "expert_bias": True, "expert_bias_form": "multiply"},
        replace(BIAS, bias_update_rule="proportional"),
    ),
    "softmax_topk, shared experts": ({"router": "softmax_topk", "n_shared_experts": 1}, SEQUENCE),
    "softmax_topk, jitter": ({"router": "softmax_topk", "router_input_jitter": 0.2}, GLOBAL),
    "softmax_topk, Switch": (
        {"router": "softmax_topk", "num_experts_per_tok": 1, "norm_topk_prob": False, "capacity_factor": 1.0}, GLOBAL,
    ),
    "sigmoid_topk": ({"router": "sigmoid_topk"}, replace(BIAS, aux_loss_scope="global_batch")),
    "sigmoid_topk, groups, proportional": (
        {"router": "sigmoid_topk", "n_group": 4, "topk_group": 2}, replace(BIAS, bias_update_rule="proportional"),
    ),
    "sigmoid_topk, quantile bias": ({"router": "sigmoid_topk"}, replace(BIAS, bias_update_rule="quantile")),
    "topk_softmax": ({"router": "topk_softmax", "router_bias": True}, SEQUENCE),
    "topk_sigmoid_input": ({"router": "topk_sigmoid_input"}, GLOBAL),
    "sparsemixer": ({"router": "sparsemixer"}, GLOBAL),
    "noisy_topk": ({"router": "noisy_topk"}, GLOBAL),
    "capacity, drop": ({"router": "softmax_topk", "capacity_factor": 1.0}, GLOBAL),
    "capacity, next choice, bias": (
        {"router": "sigmoid_topk", "capacity_factor": 1.0, "drop_policy": "next_choice"}, BIAS,
    ),
    "capacity, pad": ({"router": "topk_softmax", "capacity_factor": 1.5, "drop_policy": "pad"}, GLOBAL),
    "free experts": ({"router": "softmax_topk", **FREE}, replace(GLOBAL, aux_loss_devices=3)),
    "free experts, bias, capacity": ({"router": "sigmoid_topk", "capacity_factor": 1.0, **FREE}, BIAS),
    "softmax_top_p": ({"router": "softmax_top_p", "num_experts_per_tok": 4}, GLOBAL),
    "relu": ({"router": "relu"}, Z_ONLY),
    "relu, Switch loss": ({"router": "relu"}, SEQUENCE),
    "hash": ({"router": "hash"}, BalanceConfig()),
    "expert_choice": ({"router": "expert_choice"}, Z_ONLY),
    "sinkhorn": ({"router": "sinkhorn"}, GLOBAL),
    "base": ({"router": "base"}, Z_ONLY),
    "soft": ({"router": "soft", "slots_per_expert": 2}, BalanceConfig()),
    "depths": ({"router": "softmax_topk", "depth_layers": (1,), "depth_capacity": 0.5}, GLOBAL),
    "depths, bias": ({"router": "sigmoid_topk", "depth_layers": (0,), "depth_capacity": 0.7}, BIAS),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a batch is computed."""

    micro_batches: int = 1
    padding: str = "none"
    checkpointing: bool = False
    backend: str = "reference"
    ragged: bool = False
    """Sequences of unequal lengths, so that some padding is there in any case."""


PLAIN = (Way(), Way(ragged=True, padding="right"))
WAYS = (
    Way(2),
    Way(4, "left", checkpointing=True),
    Way(2, "right", checkpointing=True),
    Way(1, "left"),
    Way(4, "right"),
    Way(1, checkpointing=True),
    Way(2, "left", ragged=True),
    Way(4, "right", checkpointing=True, ragged=True),
    Way(1, "left", checkpointing=True, ragged=True),
)
# In float32, where only what no rounding decides repeats.
FLOAT32_WAYS = (
    Way(2, "left"),
    Way(4, "right", checkpointing=True, ragged=True),
    Way(1, backend="grouped"),
    Way(4, "left", backend="grouped"),
    Way(2, "right", checkpointing=True, backend="grouped", ragged=True),
)
PERTURBATION = 1e-5
"""Relative change of the weights under which an example must teach the same before it is judged in float32."""
PERTURBED_RUNS = 3
MAX_DRAWS = 200


@dataclass(frozen=True)
class Example:
    """Sequences of distinct tokens: equal tokens in a row would tie up to rounding."""

    tokens: Tensor
    targets: Tensor
    noise_keys: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def draw(cls) -> "Example":
        rows_BS = torch.stack([torch.randperm(V)[: L + 1] for _ in range(B)])
        keys_B = torch.randint(-(2**62), 2**62, (B,))
        return cls(rows_BS[:, :-1], rows_BS[:, 1:], keys_B, tuple(torch.randint(1, L + 1, (B,)).tolist()))

    def batch(self, way: Way) -> Batch:
        """With padding of other tokens where the way asks for it, in three columns more than the plain one has."""
        if way.padding == "none":
            return Batch(self.tokens, self.targets, noise_keys=self.noise_keys)
        width = L if way in PLAIN else L + 3
        tokens_BL, targets_BL = torch.randint(0, V, (2, B, width))
        positions_BL = torch.full((B, width), -1)
        for index, length in enumerate(self.lengths if way.ragged else (L,) * B):
            columns = slice(width - length, width) if way.padding == "left" else slice(0, length)
            tokens_BL[index, columns] = self.tokens[index, :length]
            targets_BL[index, columns] = self.targets[index, :length]
            positions_BL[index, columns] = torch.arange(length)
        return Batch(tokens_BL, targets_BL, positions_BL, self.noise_keys)


@dataclass
class Observed:
    """What three steps showed: scalars and statistics by step, tensors by step and name."""

    scalars: list[list[float]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    tensors: list[dict[str, Tensor]] = field(default_factory=list)


def make_config(name: str) -> tuple[ModelConfig, BalanceConfig]:
    settings, balance = CASES[name]
    depth = {key: value for key, value in settings.items() if key.startswith("depth_")}
    sizes: dict[str, Any] = {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 8}
    moe = sizes | {key: value for key, value in settings.items() if key not in depth}
    config = ModelConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        initializer_range=0.3, **depth,
        moe=MoEConfig(**moe),
    )  # fmt: skip
    TrainConfig(model=config, balance=balance, batch_size=B, sequence_length=L)  # allowed
    return config, balance


def observe(
    config: ModelConfig,
    balance: BalanceConfig,
    example: Example,
    way: Way,
    dtype: torch.dtype,
    perturbation: float = 0.0,
) -> Observed:
    model = Transformer(config, backend=way.backend)
    model.init_weights(seed=0)
    model.to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + perturbation * torch.randn_like(parameter)
    model.activation_checkpointing = way.checkpointing
    for layer in model.moe_layers:
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, layer.router.num_experts))
        if isinstance(layer.router, ReLURouter):
            layer.router.log_l1_weight.fill_(math.log(1e6))  # an L1 weight that shows
    observed = Observed()
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        micro_batches = example.batch(way).split(B // way.micro_batches)
        result = accumulate_gradients(model, micro_batches, balance)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.3 * parameter.grad  # type: ignore[operator]
        update_after_step(model, result, balance)
        losses = [result.loss, result.aux_loss, result.z_loss, result.l1_loss, result.depth_loss]
        observed.scalars.append([*losses, float(norm)])
        observed.rows.append(result.statistics.row())
        assert all(gradient is not None for gradient in gradients.values())
        clones = {f"gradient of {name}": value.clone() for name, value in gradients.items() if value is not None}
        observed.tensors.append(clones | {name: value.clone() for name, value in model.named_buffers()})
    return observed


def assert_equal(got: Observed, expected: Observed, tolerance: float, floor: float = 1e-3) -> None:
    """To `tolerance` of the scale of what is compared, which for tensors is at least `floor` of the step's largest."""
    for step in range(STEPS):
        assert got.scalars[step] == pytest.approx(expected.scalars[step], rel=tolerance, abs=tolerance)
        assert got.rows[step].keys() == expected.rows[step].keys()
        for key, value in expected.rows[step].items():
            assert same(got.rows[step][key], value, tolerance), f"step {step}: {key}"
        largest = max(float(value.abs().max()) for value in expected.tensors[step].values() if value.numel())
        for name, value in expected.tensors[step].items():
            scale = max(float(value.abs().max()), floor * largest)
            difference = float((got.tensors[step][name] - value).abs().max())
            assert difference <= tolerance * scale, f"step {step}: {name} differs by {difference} of {scale}"


def same(got: Any, expected: Any, tolerance: float) -> bool:
    """Statistics are rounded, hence in float32 the larger tolerance."""
    if isinstance(expected, list):
        return all(same(one, other, tolerance) for one, other in zip(got, expected, strict=True))
    if expected is None or tolerance < 1e-8:
        return bool(got == expected)
    return abs(got - expected) <= 1e-3 * max(1.0, abs(expected))


def plain_of(way: Way) -> Way:
    return PLAIN[way.ragged]


def test_every_router_is_in_the_suite() -> None:
    covered = {str(settings["router"]) for settings, _ in CASES.values()}
    assert covered == {*ROUTERS, "soft"}


@pytest.mark.parametrize("name", CASES)
def test_no_way_to_compute_a_batch_changes_what_it_teaches(name: str) -> None:
    config, balance = make_config(name)
    assert_all_ways_teach_the_same(config, balance, Example.draw(), WAYS, torch.float64, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_no_backend_changes_what_a_batch_teaches(name: str) -> None:
    config, balance = make_config(name)
    example = draw_stable(config, balance)
    assert_all_ways_teach_the_same(config, balance, example, FLOAT32_WAYS, torch.float32, 1e-4)


def assert_all_ways_teach_the_same(
    config: ModelConfig, balance: BalanceConfig, example: Example, ways: Sequence[Way], dtype: torch.dtype, bound: float
) -> None:
    # Gradients that cancel keep the rounding of their terms: in float32 some 1e-6 of the largest.
    floor = 1e-3 if dtype == torch.float64 else 0.1
    expected = {way: observe(config, balance, example, way, dtype) for way in PLAIN}
    for way in ways:
        got = observe(config, balance, example, way, dtype)
        try:
            assert_equal(got, expected[plain_of(way)], bound, floor)
        except AssertionError as error:
            raise AssertionError(f"{way}: {error}") from error


def draw_stable(config: ModelConfig, balance: BalanceConfig) -> Example:
    """An example in which no choice is so close that a perturbation a hundred times above rounding turns it."""
    for _ in range(MAX_DRAWS):
        example = Example.draw()
        if all(is_stable(config, balance, example, way) for way in PLAIN):
            return example
    raise AssertionError(f"none of {MAX_DRAWS} examples is stable")


def is_stable(config: ModelConfig, balance: BalanceConfig, example: Example, way: Way) -> bool:
    expected = observe(config, balance, example, way, torch.float32)
    for _ in range(PERTURBED_RUNS):
        got = observe(config, balance, example, way, torch.float32, perturbation=PERTURBATION)
        try:
            assert_equal(got, expected, 1e-2)
        except AssertionError:
            return False
        # A score that changes its bin moves a quantile, and so a bias, by less than that.
        for now, before in zip(got.tensors, expected.tensors, strict=True):
            for name in (name for name in before if name.endswith("expert_bias")):
                if float((now[name] - before[name]).abs().max()) > PERTURBATION:
                    return False
    return True
