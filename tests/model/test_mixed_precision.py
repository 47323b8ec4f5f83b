"""Experts of two precisions: who gets 8 bits, and that each is computed as what its own precision holds.

L layers with experts, E experts of a layer.
"""

import copy
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.model.experts import Experts
from moesaic.model.mixed_precision import HotBudget, HotExperts, expert_bits
from moesaic.model.quantize import Quantization, is_quantized, make_quantization, packed_weights, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing, native_packed
from moesaic.ops.instruction_set import native_module
from moesaic.ops.quantize import pack, unpack
from moesaic.residency.residency import residency_of

from .test_block_step import SERVED, Calls
from .test_block_step import decoded as decoded_in_blocks
from .test_quantize import BASE, CONFIGS, log_probabilities, random_model

SPARSE = [name for name in CONFIGS if name != "dense"]
NO_KERNELS = native_module() is None


def random_hot(config: ModelConfig) -> HotExperts:
    """Some experts of each layer, and where there are three layers none of one and all of another."""
    assert config.moe is not None
    numbers = range(config.moe.num_experts)
    layers = [sorted(random.sample(numbers, random.randint(1, len(numbers) - 1))) for _ in range(config.num_moe_layers)]
    if len(layers) > 2:
        some = random.sample(range(len(layers)), 2)
        layers[some[0]], layers[some[1]] = [], list(numbers)
    return tuple(map(tuple, layers))


def mixed(model: Transformer, hot: HotExperts) -> Transformer:
    packed = copy.deepcopy(model)
    quantize_model(packed, make_quantization("int4", model.config, hot=hot))
    return packed


@torch.no_grad()
def unpacked(model: Transformer, packed: Transformer, hot: HotExperts) -> Transformer:
    """`model` in float64, each of its experts packed and unpacked alone, the rest as `packed` has it."""
    twin = copy.deepcopy(model).double()
    if "lm_head.weight" in packed.state_dict() and not hasattr(twin, "lm_head"):
        twin.lm_head = torch.nn.Linear(twin.config.hidden_size, twin.config.vocab_size, bias=False).double()
    state = twin.state_dict()
    state |= {
        name: unpack(weight, torch.float64)
        for kind, name, weight in packed_weights(packed)
        if kind not in ("experts", "hot_experts")
    }
    twin.load_state_dict(state)
    for layer, numbers in zip(twin.moe_layers, hot, strict=True):
        for name in ("gate_up", "down"):
            for expert, weight in enumerate(layer.experts.get_parameter(name)):
                format = "int8" if expert in numbers else "int4"
                weight.copy_(unpack(pack(weight.float(), format), torch.float64))
    return twin


@pytest.mark.parametrize("name", SPARSE)
def test_each_expert_is_computed_in_its_own_precision(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Without the kernels, so that inputs are not rounded."""
    monkeypatch.setattr(native_packed, "native_module", lambda: None)
    monkeypatch.setattr("moesaic.ops.expert_rows.native_module", lambda: None)
    model, tokens = random_model(CONFIGS[name]), torch.randint(0, 97, (2, 15))
    hot = random_hot(model.config)
    packed = mixed(model, hot)
    assert is_quantized(packed)
    assert residency_of(packed) is None
    found, expected = log_probabilities(packed, tokens), log_probabilities(unpacked(model, packed, hot), tokens)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)
    assert (found - log_probabilities(mixed(model, ()), tokens)).abs().max() > 0.05
    kinds = {(kind, weight.format) for kind, _, weight in packed_weights(packed) if kind.endswith("experts")}
    assert {("experts", "int4"), ("hot_experts", "int8")} <= kinds <= {
        ("experts", "int4"), ("hot_experts", "int8"), ("shared_experts", "int8"),
    }  # fmt: skip


@pytest.mark.skipif(NO_KERNELS, reason="the kernels are not built here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_kernels_add_up_both_precisions(name: str, dtype: torch.dtype) -> None:
    config = replace(CONFIGS[name], moe=replace(CONFIGS[name].moe, num_experts_per_tok=3))  # type: ignore[type-var]
    plain = random_model(config).moe_layers[0].experts
    plain.requires_grad_(False)
    hot = tuple(sorted(random.sample(range(5), random.randint(1, 4))))
    x_TD, routing = torch.randn(23, 64).to(dtype), random_routing(23)
    layers = {}
    for format, numbers in (("int4", ()), ("int8", ()), ("mixed", hot)):
        layers[format] = copy.deepcopy(plain)
        layers[format].quantize("int8" if format == "int8" else "int4", 32, numbers)
    y_TD = layers["mixed"](x_TD, routing)
    assert y_TD.dtype == dtype
    is_hot_N = torch.isin(routing.expert_ids, torch.tensor(hot))
    parts = [
        layers[format](x_TD.float(), replace(routing, weights=routing.weights * chosen_N))
        for format, chosen_N in (("int8", is_hot_N), ("int4", ~is_hot_N))
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert (y_TD.float() - sum(parts)).norm() < tolerance * y_TD.float().norm()


def random_routing(num_tokens: int) -> Routing:
    expert_ids_TK = torch.rand(num_tokens, 5).argsort(1)[:, :3]
    return Routing(
        torch.arange(num_tokens).repeat_interleave(3), expert_ids_TK.flatten(), torch.rand(3 * num_tokens),
        torch.zeros(num_tokens, 5), num_experts=5, top_k=3,
    )  # fmt: skip


@pytest.mark.skipif(NO_KERNELS, reason="the kernels are not built here")
@pytest.mark.parametrize(("batch", "new"), [(1, 1), (3, 2), (1, 60)])
@pytest.mark.parametrize("name", ["qwen3_moe", "clamped"])
def test_a_block_in_one_call_gives_what_its_parts_give(
    monkeypatch: pytest.MonkeyPatch, name: str, batch: int, new: int
) -> None:
    model = random_model(SERVED[name])
    model = mixed(model, random_hot(model.config))
    tokens = torch.randint(BASE["vocab_size"], (batch, max(16, new + 20)))
    with monkeypatch.context() as patch:
        Calls(patch, allowed=False)
        expected = decoded_in_blocks(model, tokens, new)
    calls = Calls(monkeypatch)
    found = decoded_in_blocks(model, tokens, new)
    assert calls.number > 0
    assert torch.equal(found, expected)


def test_a_state_makes_the_same_model_again() -> None:
    config = CONFIGS["gpt_oss"]
    model = random_model(config)
    hot = random_hot(config)
    packed, tokens = mixed(model, hot), torch.randint(0, 97, (2, 9))
    with torch.device("meta"):
        empty = Transformer(config)
    quantize_model(empty, make_quantization("int4", config, hot=hot))
    state = packed.state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in state.items()
    }
    of_split = {name.rpartition(".")[2] for name in state if "hot_" in name}
    assert of_split == {"hot_gate_up", "hot_down"}
    empty.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    twin = copy.deepcopy(packed)
    expected = log_probabilities(packed, tokens)
    for tensor in packed.buffers():  # neither of the others may read its memory
        tensor.zero_()
    assert torch.equal(log_probabilities(empty.eval(), tokens), expected)
    assert torch.equal(log_probabilities(twin, tokens), expected)


def test_all_hot_is_int8_and_none_is_int4() -> None:
    config = CONFIGS["qwen3_moe"]
    model = random_model(config)
    everyone = (tuple(range(5)),) * 3
    for hot, scheme in ((everyone, "int8"), ((), "int4"), (((),) * 3, "int4")):
        plain = copy.deepcopy(model)
        experts = make_quantization(scheme, config).formats["experts"]
        quantize_model(plain, Quantization(scheme, 32, {"experts": experts}))
        packed = mixed(model, hot)
        for one, other in zip(packed.moe_layers, plain.moe_layers, strict=True):
            assert one.experts.store is None
            for name in ("gate_up", "down"):
                assert torch.equal(one.experts.get_buffer(name), other.experts.get_buffer(name))


def skewed_model() -> Transformer:
    """Two of its twelve experts are in nearly every token's choice, others in few."""
    moe = MoEConfig(num_experts=12, num_experts_per_tok=2, moe_intermediate_size=40, router_bias=True)
    model = random_model(ModelConfig(**{**BASE, "initializer_range": 0.1}, moe=moe))
    with torch.no_grad():
        for layer in model.moe_layers:
            bias_E = layer.router.get_parameter("bias")
            bias_E.copy_(torch.linspace(4, -4, 12)[torch.randperm(12)])
            for name in ("gate_up", "down"):
                layer.experts.get_parameter(name).mul_(3)
    return model


def test_bits_go_where_they_help() -> None:
    """Only experts are packed, so that nothing else hides what that changes."""
    model, tokens = skewed_model(), torch.randint(0, 97, (16, 40))
    counts_LE = np.zeros((3, 12))

    def counting(layer: int):
        def count(module: Experts, args: tuple[Tensor, Routing], output: Tensor) -> None:
            counts_LE[layer] += args[1].tokens_per_expert().numpy()

        return count

    hooks = [layer.experts.register_forward_hook(counting(i)) for i, layer in enumerate(model.moe_layers)]
    before = log_probabilities(model, tokens)
    for hook in hooks:
        hook.remove()
    uses_LE = counts_LE / counts_LE.sum(1, keepdims=True)
    budget = HotBudget("record", share=0.25)
    hot, rarest = budget.plan(uses_LE, model.config, 32), budget.plan(-uses_LE, model.config, 32)
    assert sum(uses_LE[layer, list(numbers)].sum() for layer, numbers in enumerate(hot)) > 0.5 * 3
    formats = {"experts": "int4", "hot_experts": "int8"}
    divergence = {}
    for name, quantization in {
        "int8": Quantization("int8", 32, {"experts": "int8"}),
        "hot": Quantization("int4", 32, formats, hot),
        "rarest": Quantization("int4", 32, formats, rarest),
        "int4": Quantization("int4", 32, {"experts": "int4"}),
    }.items():
        packed = copy.deepcopy(model)
        quantize_model(packed, quantization)
        after = log_probabilities(packed, torch.clone(tokens))
        divergence[name] = float((before.exp() * (before - after)).sum(-1).mean())
    assert divergence["int8"] < divergence["hot"] < 0.8 * divergence["int4"], divergence
    assert divergence["hot"] < divergence["rarest"], divergence


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_budget_is_used_and_kept(group_size: int) -> None:
    config = CONFIGS["qwen3_moe"]  # of 5 experts and 3 layers; sizes that do not fill panels and groups
    uses_LE = np.random.dirichlet(np.full(5, 0.3), 3)
    cold, hot = (expert_bits(config, format, group_size) for format in ("int4", "int8"))
    for _ in range(10):
        share = random.uniform(1 / 15, 0.999)
        for budget in (HotBudget("r", share=share), HotBudget("r", bits=cold + share * (hot - cold))):
            plan = budget.plan(uses_LE, config, group_size)
            assert sum(map(len, plan)) == int(15 * share)
            least = min(uses_LE[layer, number] for layer, numbers in enumerate(plan) for number in numbers)
            left = [use for layer, row in enumerate(uses_LE) for e, use in enumerate(row) if e not in plan[layer]]
            assert max(left) <= least
            model = random_model(config)
            quantize_model(model, make_quantization("int4", config, group_size, plan))
            stacks = [each for kind, _, each in packed_weights(model) if kind in ("experts", "hot_experts")]
            bits = 8 * sum(each.data.nbytes for each in stacks) / (15 * 3 * 64 * 40)
            assert bits <= cold + share * (hot - cold) + 1e-9 < bits + (hot - cold) / 15 + 1e-9


def test_ties_go_to_the_first() -> None:
    plan = HotBudget("r", share=7 / 15).plan(np.full((3, 5), 0.2), CONFIGS["qwen3_moe"], 32)
    assert plan == ((0, 1, 2, 3, 4), (0, 1), ())


def test_what_cannot_be_is_refused() -> None:
    config = CONFIGS["qwen3_moe"]
    uses_LE = np.full((3, 5), 0.2)
    formats = {"experts": "int4", "hot_experts": "int8"}
    cold, hot = (expert_bits(config, format, 32) for format in ("int4", "int8"))
    for call, message in (
        (lambda: HotBudget("r"), "need a hot share or bits, and neither is given"),
        (lambda: HotBudget("r", 0.2, 5.0), "and both are given"),
        (lambda: HotBudget("r", 1.0), "hot share 1 is not between 0 and 1"),
        (lambda: HotBudget("r", float("nan")), "hot share nan is not between"),
        (lambda: HotBudget("r", 0.06).plan(uses_LE, config, 32), "is none; one of them is --hot-share 0.0667"),
        (lambda: HotBudget("r", bits=cold).plan(uses_LE, config, 32), f"{cold:.2f} per weight in int4, {hot:.2f} in"),
        (lambda: HotBudget("r", bits=hot).plan(uses_LE, config, 32), "one of the 15 adds"),
        (lambda: HotBudget("r", bits=float("nan")).plan(uses_LE, config, 32), "nan bits"),
        (lambda: make_quantization("int8", config, hot=((1,), (), ())), "scheme int8 has none of these"),
        (lambda: make_quantization("mxfp4", config, hot=((1,), (), ())), "scheme mxfp4 has none of these"),
        (lambda: make_quantization("int4", CONFIGS["dense"], hot=((1,),)), "this model has no experts"),
        (lambda: make_quantization("int4", config, hot=((1,), ())), "given for 2 layers, and 3 layers of this model"),
        (lambda: make_quantization("int4", config, hot=((1,), (5,), ())), "layer 1 of 3: they need to be numbers from"),
        (lambda: make_quantization("int4", config, hot=((), (1,), (2, 2))), "layer 2 of 3: "),
        (lambda: make_quantization("int4", config, hot=((2, 1), (), ())), "layer 0 of 3: "),
        (lambda: Quantization("int4", 32, formats), "there are 0 hot experts, and a format for them"),
        (lambda: Quantization("int4", 32, {"experts": "int4"}, ((1,),)), "there are 1 hot experts, and no format"),
        (lambda: Quantization("int4", 32, {"hot_experts": "int8"}, ((1,),)), "int8 beside others of int4"),
        (
            lambda: quantize_model(random_model(config), Quantization("int4", 32, formats, ((1,),))),
            "given for 1 layers, and 3",
        ),
    ):
        with pytest.raises(UsageError, match=re.escape(message)) as caught:
            call()
        assert str(caught.value).isprintable()


def test_gradients_and_a_budget_of_memory_are_refused() -> None:
    config = CONFIGS["qwen3_moe"]
    packed = mixed(random_model(config), ((0, 3), (1,), (2,)))
    experts = packed.moe_layers[0].experts
    with pytest.raises(UsageError, match="of two precisions are for inference and give no gradients"):
        experts(torch.randn(4, 64, requires_grad=True), random_routing(4))
    with pytest.raises(UsageError, match="quantise the model without --hot, or leave memory out"):
        experts.move_out(torch.float32)
