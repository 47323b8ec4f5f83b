"""Adapters on a model: what they compute, what is trained, and what they refuse. E experts, r rank, T tokens."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.config import LoRAConfig, ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.model.experts import Experts
from moesaic.model.lora import Adapter, adapted_state, add_adapters, load_adapted_state, merge_adapters
from moesaic.model.quantize import make_quantization, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.ops import BACKENDS, Routing

V, D, F, E, S = 64, 32, 16, 6, 2
MODEL = ModelConfig(
    vocab_size=V, hidden_size=D, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, initializer_range=0.2,
    moe=MoEConfig(
        num_experts=E, num_experts_per_tok=2, moe_intermediate_size=F, n_shared_experts=S, first_k_dense_replace=1
    ),
)  # fmt: skip
EVERYWHERE = ("experts", "shared_experts", "mlp", "attention", "lm_head", "router")


def make_model(config: ModelConfig = MODEL) -> Transformer:
    model = Transformer(config)
    model.init_weights(int(torch.randint(2**31, ())))
    return model


def tokens(count: int = 24) -> Tensor:
    return torch.randint(0, V, (2, count))


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Adapter):
            module.B.normal_(0.0, 0.3)


@pytest.mark.parametrize("rank", [1, 4])
def test_parameters_are_as_many_as_the_formula_says_and_the_base_has_no_gradient(rank: int) -> None:
    numbers = {
        "experts": 2 * E * ((D + 2 * F) + (F + D)),
        "shared_experts": 2 * 3 * (D + S * F),
        "mlp": 3 * (D + 48),
        "attention": 3 * ((D + 32) + 2 * (D + 16) + (32 + D)),
        "lm_head": D + V,
        "router": 2 * (D + E),
    }
    for targets in [(one,) for one in EVERYWHERE] + [EVERYWHERE]:
        model = make_model()
        base = set(dict(model.named_parameters()).values())
        add_adapters(model, LoRAConfig(rank=rank, targets=targets))
        model(tokens()).square().sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in trained) == rank * sum(numbers[one] for one in targets)
        assert not base & set(trained)
        assert all(parameter.grad is None for parameter in base)
        assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("backend", [name for name, one in BACKENDS.items() if one.gradients])
@pytest.mark.parametrize("rank", [1, 3])
def test_every_backend_computes_the_thin_products_of_each_expert(backend: str, rank: int) -> None:
    """Against float64 and another order: B (A x) beside W x, expert by expert; gradients of A, B and x."""
    experts = Experts(MODEL, backend)
    torch.nn.init.normal_(experts.gate_up, 0.0, 0.3)
    torch.nn.init.normal_(experts.down, 0.0, 0.3)
    plain = {name: getattr(experts, name).detach().double() for name in ("gate_up", "down")}
    model = make_model()
    model.moe_layers[0].experts = experts
    add_adapters(model, LoRAConfig(rank=rank, alpha=5.0))
    randomize(experts)
    factors = {name: experts.parametrizations[name][0] for name in plain}  # type: ignore[index]
    wide = {
        f"{name}.{leaf}": getattr(one, leaf).detach().double().requires_grad_()
        for name, one in factors.items()
        for leaf in "AB"
    }
    x_TD = torch.randn(9, D, requires_grad=True)
    x64_TD = x_TD.detach().double().requires_grad_()
    ids_TK = torch.stack([torch.randperm(E - 1)[:2] for _ in range(9)])  # the last expert gets nothing
    weights_N = torch.rand(18)
    routing = Routing(torch.arange(9).repeat_interleave(2), ids_TK.flatten(), weights_N, torch.zeros(9, E), E, top_k=2)

    def adapted(name: str, expert: int, x: Tensor) -> Tensor:
        low = wide[f"{name}.A"][expert] @ x
        return plain[name][expert] @ x + 5.0 / rank * (wide[f"{name}.B"][expert] @ low)

    rows = []
    for t in range(9):
        outputs = []
        for k in range(2):
            expert = int(ids_TK[t, k])
            gate, up = adapted("gate_up", expert, x64_TD[t]).chunk(2)
            outputs.append(weights_N[2 * t + k].double() * adapted("down", expert, functional.silu(gate) * up))
        rows.append(outputs[0] + outputs[1])
    expected_TD, got_TD = torch.stack(rows), experts(x_TD, routing)
    slope_TD = torch.randn(9, D)
    expected_TD.backward(slope_TD.double())
    got_TD.backward(slope_TD)
    torch.testing.assert_close(got_TD.double(), expected_TD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_TD.grad, x64_TD.grad, rtol=1e-4, atol=1e-3, check_dtype=False)
    for name, expected in wide.items():
        matrix, leaf = name.split(".")
        grad, wanted = getattr(factors[matrix], leaf).grad, expected.grad
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3, check_dtype=False, msg=name)
        assert float(grad[-1].abs().max()) == 0.0


def test_learning_reaches_every_adapter_and_each_expert_with_tokens() -> None:
    """B after one step, A, whose gradient is 0 while B is, after two."""
    model = make_model()
    add_adapters(model, LoRAConfig(rank=2, targets=EVERYWHERE))
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    first = {name: (module.A.detach().clone(), module.B.detach().clone()) for name, module in adapters.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    ids_BL = tokens(4)  # few, so that some experts may get none
    served: list[list[Tensor]] = []  # of each step and layer, which experts got tokens
    for step in range(2):
        routings: list[Routing] = []
        model(ids_BL, routings=routings).logsumexp(-1).square().sum().backward()
        served.append([routing.load() > 0 for routing in routings])
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        for name, adapter in adapters.items():
            moved_A, moved_B = (
                (new.detach() != old).flatten(-2).any(-1)
                for new, old in zip((adapter.A, adapter.B), first[name], strict=True)
            )
            assert step == 1 or not moved_A.any()
            if ".experts." in name:
                layer = int(name.split(".")[1]) - 1  # layer 0 is dense
                served_SE = torch.stack([each[layer] for each in served])
                assert torch.equal(moved_B, served_SE.any(0)), name
                assert step == 0 or torch.equal(moved_A, served_SE.all(0)), name
            else:
                assert moved_B.all(), name
                assert step == 0 or moved_A.all(), name


def test_new_adapters_change_nothing_and_merged_ones_are_gone() -> None:
    model, ids_BL = make_model(), tokens()
    names, before = list(model.state_dict()), model(ids_BL)
    add_adapters(model, LoRAConfig(rank=3, targets=EVERYWHERE), seed=5)
    assert torch.equal(model(ids_BL), before)
    again = make_model()
    add_adapters(again, LoRAConfig(rank=3, targets=EVERYWHERE), seed=5)
    for name, value in adapted_state(again).items():
        assert torch.equal(value, adapted_state(model)[name])
    randomize(model)
    adapted, kept = model(ids_BL), copy.deepcopy(adapted_state(model))
    assert not torch.allclose(adapted, before, atol=0.1)
    assert set(kept) == {name for name, each in model.named_parameters() if each.requires_grad}
    merge_adapters(model)
    assert torch.equal(model(ids_BL), adapted)
    assert sorted(model.state_dict()) == sorted(names)
    assert type(model.moe_layers[0].experts) is Experts
    add_adapters(model, LoRAConfig(rank=3, targets=EVERYWHERE))
    load_adapted_state(model, kept)
    assert all(torch.equal(value, kept[name]) for name, value in adapted_state(model).items())


def test_sums_are_rounded_once_under_autocast_too() -> None:
    weight = torch.randn(3, 8, 12).bfloat16()
    adapter = Adapter(weight, 2, 0.5, torch.Generator())
    adapter.B.data.normal_()
    expected = (weight.double() + 0.5 * adapter.B.double() @ adapter.A.double()).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(adapter(weight), expected, rtol=2**-8, atol=0)
        assert adapter(weight.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "lora", "message"),
    [
        (MODEL, LoRAConfig(targets=("expert",)), "'expert', which is not known; choose of experts, shared_exp"),
        (
            ModelConfig(vocab_size=V, hidden_size=D, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                        num_hidden_layers=1, intermediate_size=8, tie_word_embeddings=True),
            LoRAConfig(targets=("mlp", "experts")),
            r"'experts', which is not in this model; choose of mlp, attention$",
        ),
        (
            ModelConfig(vocab_size=V, hidden_size=D, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                        num_hidden_layers=1, intermediate_size=8, tie_word_embeddings=True),
            LoRAConfig(targets=("lm_head",)),
            r"its head is the embedding \(tie_word_embeddings\); choose of mlp, attention$",
        ),
        (MODEL, LoRAConfig(rank=17), r"rank is 17, but layers.1.feed_forward.experts.down is 32 x 16; set at most 16"),
    ],
)  # fmt: skip
def test_what_adapters_do_not_reach_is_refused(config: ModelConfig, lora: LoRAConfig, message: str) -> None:
    model = make_model(config)
    with pytest.raises(UsageError, match=message):
        add_adapters(model, lora)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_packed_weights_are_refused() -> None:
    model = make_model()
    quantize_model(model, make_quantization("int8", MODEL))
    with pytest.raises(UsageError, match="the model is quantised, and adapters need plain weights"):
        add_adapters(model, LoRAConfig(rank=2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0}, {"rank": -3}, {"alpha": float("nan")}, {"alpha": float("inf")}, {"alpha": 0.0}, {"targets": ()},
        {"targets": ("experts", "experts")},
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        LoRAConfig(**wrong)  # type: ignore[arg-type]
