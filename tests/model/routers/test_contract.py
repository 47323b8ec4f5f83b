"""What every router promises, whatever it chooses: the same for a sequence in any company, replayable, causal as said.

B sequences, L positions, n tokens of a sequence, T = B x L, D hidden size, E experts. Float64, so that another order of
the same sums moves no choice.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.model.routers import ROUTERS
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice

from .helpers import MARGIN, MAX_DRAWS, SETTINGS, VOCAB_SIZE, D, E, as_matrix, context_of, make_config, make_router
from .topk_oracle import draw_tokens

MODES = pytest.mark.parametrize("training", [False, True])
EVERY = pytest.mark.parametrize("name", SETTINGS)


def build(name: str, training: bool) -> Any:
    return make_router(make_config(**SETTINGS[name])).double().train(training)


def gradients(router: Any, matrix: Tensor, mix: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of the inputs and all parameters; zeros where there is none."""
    leaves = [*inputs, *router.parameters()]
    loss = (matrix * mix).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


@MODES
@EVERY
def test_neither_padding_nor_company_changes_what_a_sequence_gets(name: str, training: bool) -> None:
    """Sequences alone against one batch of them, padded on the left or the right with NaN."""
    router = build(name, training)
    lengths = [7, 12, 1, 0, 9]
    batch_size, length = len(lengths), 12
    mask_BL = torch.zeros(batch_size, length, dtype=torch.bool)
    for row, n in enumerate(lengths):
        first = 0 if torch.rand(()) < 0.5 else length - n
        mask_BL[row, first : first + n] = True
    context = context_of(batch_size, length, mask_BL)
    x_BLD = torch.randn(batch_size, length, D, dtype=torch.float64)
    mix_BLE = torch.randn(batch_size, length, E, dtype=torch.float64)

    padded_BLD = x_BLD.masked_fill(~mask_BL.unsqueeze(-1), torch.nan).requires_grad_()
    batch = router(padded_BLD.flatten(0, 1), context)
    assert mask_BL.flatten()[batch.token_ids].all()
    assert batch.top_k is None
    batch_BLE = as_matrix(batch).view_as(mix_BLE)
    x_grad_BLD, *weight_grads = gradients(router, batch_BLE, mix_BLE, padded_BLD)
    assert not x_grad_BLD[~mask_BL].any()

    rows_E, load_E, dropped, expected_grads = torch.zeros(E), torch.zeros(E), 0, [0.0] * len(weight_grads)
    for row in range(batch_size):
        here_L = mask_BL[row]
        assert context.noise_keys is not None
        seen = RoutingContext(context.tokens[row : row + 1, here_L], None, context.noise_keys[row : row + 1, here_L])
        x_nD = x_BLD[row, here_L].requires_grad_()
        alone = router(x_nD, seen)
        alone_nE = as_matrix(alone)
        assert torch.equal(alone_nE != 0, batch_BLE[row, here_L] != 0)
        torch.testing.assert_close(batch_BLE[row, here_L], alone_nE, rtol=1e-10, atol=1e-12)
        x_grad_nD, *alone_grads = gradients(router, alone_nE, mix_BLE[row, here_L], x_nD)
        torch.testing.assert_close(x_grad_BLD[row, here_L], x_grad_nD, rtol=1e-9, atol=1e-11)
        expected_grads = [left + right for left, right in zip(expected_grads, alone_grads, strict=True)]
        rows_E, load_E = rows_E + alone.tokens_per_expert(), load_E + alone.load()
        dropped += int(alone.num_dropped())
    torch.testing.assert_close(weight_grads, expected_grads, rtol=1e-9, atol=1e-11)
    assert batch.tokens_per_expert().tolist() == rows_E.tolist()
    assert batch.load().tolist() == load_E.tolist()
    assert int(batch.num_dropped()) == dropped


@MODES
@EVERY
def test_a_replayed_choice_gives_the_same_routing_and_gradients(name: str, training: bool, monkeypatch) -> None:
    router = build(name, training)
    context = context_of(3, 8, torch.rand(3, 8) < 0.8 if torch.rand(()) < 0.5 else None)
    x_TD = torch.randn(24, D, dtype=torch.float64, requires_grad=True)
    mix_TE = torch.randn(24, E, dtype=torch.float64)
    first = router(x_TD, context)
    monkeypatch.setattr(router, "select", None)  # whoever chooses, fails
    again = router(x_TD, replace(context, replay=(first.decision,)))
    assert first.top_k == again.top_k
    for field in ("token_ids", "expert_ids", "weights", "logits"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert torch.equal(first.load(), again.load())
    assert torch.equal(first.num_dropped(), again.num_dropped())
    expected = gradients(router, as_matrix(first), mix_TE, x_TD)
    assert all(map(torch.equal, gradients(router, as_matrix(again), mix_TE, x_TD), expected))

    with torch.no_grad():
        for parameter in router.parameters():
            parameter.neg_()
    turned = router(x_TD, replace(context, replay=(again.decision,)))
    assert torch.equal(turned.token_ids, first.token_ids)
    assert torch.equal(turned.expert_ids, first.expert_ids)


def test_a_choice_of_another_number_of_experts_is_refused() -> None:
    """One expert each of twice the tokens has as many rows, and would be taken for two experts of each."""
    router = build("softmax_topk", training=False)
    x_TD, context = torch.randn(4, D), context_of(1, 4)
    twice = torch.randint(0, E, (2 * router.top_k, 2))
    for choice in (Choice.of_topk(twice), Choice.of_mask(torch.rand(4, E) < 0.5)):
        with pytest.raises(UsageError, match=f"and this router to {router.top_k}"):
            router(x_TD, replace(context, replay=(choice,)))


def changed_after(router: Any, position: int, training: bool) -> bool:
    """Whether other tokens after this position change what those up to it get."""
    router.train(training)
    context = context_of(2, 12)
    x_BLD = torch.randn(2, 12, D, dtype=torch.float64)
    before_BLE = as_matrix(router(x_BLD.flatten(0, 1), context)).view(2, 12, E)
    tokens_BL, x_BLD = context.tokens.clone(), x_BLD.clone()
    tokens_BL[:, position:] = torch.randint(0, VOCAB_SIZE, (2, 12 - position))
    x_BLD[:, position:] = torch.randn(2, 12 - position, D, dtype=torch.float64)
    after_BLE = as_matrix(router(x_BLD.flatten(0, 1), replace(context, tokens=tokens_BL))).view(2, 12, E)
    return not torch.equal(before_BLE[:, :position] != 0, after_BLE[:, :position] != 0)


@MODES
@EVERY
def test_later_tokens_matter_where_the_router_says_so_and_nowhere_else(name: str, training: bool) -> None:
    router = build(name, training)
    looks_ahead = router.looks_ahead == "always" or (training and router.looks_ahead == "in training")
    changed = [changed_after(router, position, training) for position in range(1, 12) for _ in range(3)]
    assert any(changed) == looks_ahead


def promised(name: str, num_tokens: int, training: bool) -> tuple[int, int, int, int]:
    """The fewest and most experts of a token, and tokens of an expert, in a sequence of so many tokens."""
    moe = make_config(**SETTINGS[name])
    top_k, even = moe.num_experts_per_tok, num_tokens * moe.num_experts_per_tok / E
    if moe.router == "expert_choice":
        room = min(num_tokens, math.ceil(even * (moe.capacity_factor or 1.0) - 1e-9))
        return 0, E, room, room
    if moe.capacity_factor is not None and training:
        return 0, top_k, 0, math.ceil(even * moe.capacity_factor - 1e-9)
    if moe.router == "base" and training:
        return top_k, top_k, math.floor(even), math.ceil(even)
    if moe.router == "relu":
        return 0, E, 0, num_tokens
    return (1 if moe.router == "softmax_top_p" else top_k), top_k, 0, num_tokens


@settings(max_examples=150)
@given(data=st.data())
def test_every_token_and_expert_gets_what_is_promised(data: st.DataObject) -> None:
    name, training = data.draw(st.sampled_from(sorted(SETTINGS))), data.draw(st.booleans())
    batch_size, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 14))
    scale = data.draw(st.sampled_from([0.0, 1e-6, 1.0, 20.0]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    router = build(name, training)
    mask_BL = torch.rand(batch_size, length) < 0.7 if data.draw(st.booleans()) else None
    x_TD = torch.randn(batch_size * length, D, dtype=torch.float64) * scale
    routing = router(x_TD, context_of(batch_size, length, mask_BL))

    own_N = slice(None) if SETTINGS[name].get("drop_policy") != "pad" else routing.weights > 0
    counts_TE = torch.zeros(batch_size * length, E, dtype=torch.long)
    places = (routing.token_ids[own_N], routing.expert_ids[own_N])
    counts_TE.index_put_(places, torch.ones_like(places[0]), accumulate=True)
    assert bool((counts_TE <= 1).all())
    assert bool(routing.weights.isfinite().all())
    assert bool((routing.weights >= 0).all())
    for row, counts_LE in enumerate(counts_TE.view(batch_size, length, E)):
        mask_L = torch.ones(length, dtype=torch.bool) if mask_BL is None else mask_BL[row]
        assert not counts_LE[~mask_L].any()
        fewest, most, least, greatest = promised(name, int(mask_L.sum()), training)
        assert all(fewest <= count <= most for count in counts_LE[mask_L].sum(1).tolist())
        assert all(least <= count <= greatest for count in counts_LE.sum(0).tolist())


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30])
@MODES
@EVERY
def test_equal_and_infinitely_distant_logits_stay_finite(name: str, training: bool, scale: float) -> None:
    router = make_router(make_config(**SETTINGS[name])).train(training)
    if hasattr(router, "weight"):
        router.weight.data = torch.eye(E, D)
    x_TD = (torch.randint(-1, 2, (30, D)) * scale).requires_grad_()
    routing = router(x_TD, context_of(2, 15))
    assert torch.isfinite(routing.weights).all()
    assert torch.isfinite(router.scores(routing.logits)).all()
    mix_TE = torch.randn(30, E)
    assert all(torch.isfinite(one).all() for one in gradients(router, as_matrix(routing), mix_TE, x_TD))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (3, 1)])
@MODES
@EVERY
def test_no_token_and_one_token(name: str, training: bool, shape: tuple[int, int]) -> None:
    router = build(name, training)
    num_tokens = shape[0] * shape[1]
    x_TD = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
    routing = router(x_TD, context_of(*shape))
    assert routing.logits.shape == (num_tokens, E)
    assert routing.tokens_per_expert().shape == (E,)
    if not num_tokens:
        assert routing.token_ids.numel() == 0
    elif not name.startswith("relu"):
        assert set(routing.token_ids.tolist()) == set(range(num_tokens))
    only_padding = router(x_TD, context_of(*shape, torch.zeros(shape, dtype=torch.bool)))
    assert only_padding.token_ids.numel() == 0
    gradients(router, as_matrix(routing), torch.randn(num_tokens, E), x_TD)


@MODES
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "hash"])
def test_gradients_are_the_slopes_of_the_weights(name: str, training: bool) -> None:
    moe = make_config(**SETTINGS[name])
    router = build(name, training)
    if name == "sparsemixer":
        x_TD = draw_tokens(router.float(), moe, 6).double()
        router.double()
    else:
        for _ in range(MAX_DRAWS):
            x_TD = torch.randn(6, D, dtype=torch.float64)
            if float(router(x_TD, context_of(2, 3)).logits.detach().abs().min()) > MARGIN:  # where ReLU has its bend
                break
    context = context_of(2, 3)
    context = replace(context, replay=(router(x_TD, context).decision,))
    names = [key for key, _ in router.named_parameters()]

    def weights(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(router, state, (x, context)).weights

    inputs = [x_TD, *(parameter.detach() for parameter in router.parameters())]
    assert torch.autograd.gradcheck(weights, [one.clone().requires_grad_() for one in inputs])


def test_only_the_hash_router_learns_nothing() -> None:
    unlearned = {name for name in ROUTERS if not list(build(name, training=True).parameters())}
    assert unlearned == {"hash"}
    assert not build("hash", training=True).state_dict()
