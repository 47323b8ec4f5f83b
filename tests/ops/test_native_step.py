"""The small native operators against torch in float64, on every instruction set of this machine.

B sequences, L new tokens, S tokens attended to, H query heads, G key-value heads, d head dim, T tokens, E experts.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.errors import UsageError
from moesaic.model.rope import rotate
from moesaic.ops import native_step
from moesaic.ops.native import native_instruction_sets
from moesaic.ops.native_step import AttentionStep, Heads, RouterStep

from .sanitized import COMPILER, SANITIZERS, run_sanitized

INSTRUCTION_SETS = native_instruction_sets() or [pytest.param("", marks=pytest.mark.skip(reason="kernels not built"))]
EVERY = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
EPS = 1e-5


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert float((got.double() - expected).abs().max() if expected.numel() else 0.0) <= tolerance * scale


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_operator_leaves_its_arrays(sanitizer: str, tmp_path: Path, seed: int) -> None:
    run_sanitized("step_tests", [str(seed), "5" if sanitizer == "thread" else "20"], sanitizer, tmp_path)


@EVERY
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (5, 7), (2, 3, 64), (600, 130), (0, 8)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm(instruction_set: str, shape: tuple[int, ...], weighted: bool) -> None:
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1]) if weighted else None
    got = native_step.rms_norm(x, weight, EPS, instruction_set=instruction_set)
    wide_weight = None if weight is None else weight.double()
    assert_close(got, functional.rms_norm(x.double(), shape[-1:], wide_weight, EPS))


def attention_oracle(
    heads: Heads,
    inputs: tuple[Tensor, Tensor, Tensor],
    past: tuple[Tensor, Tensor],
    mask: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, by torch's operators: (B, L, H d), and all keys and values (B, G, S, d)."""
    query, key, value = (x.double() for x in inputs)
    if norms is not None and heads.qk_norm == "width":
        query, key = (
            functional.rms_norm(x, x.shape[-1:], w.double(), EPS) for x, w in zip((query, key), norms, strict=True)
        )
    query, key, value = (x.unflatten(-1, (-1, heads.head_dim)) for x in (query, key, value))
    if norms is not None and heads.qk_norm == "head":
        query, key = (
            functional.rms_norm(x, x.shape[-1:], w.double(), EPS) for x, w in zip((query, key), norms, strict=True)
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if rotary is not None:
        tables = (rotary[0].double(), rotary[1].double())
        query, key = rotate(query, tables, heads.interleaved), rotate(key, tables, heads.interleaved)
    keys, values = torch.cat((past[0].double(), key), 2), torch.cat((past[1].double(), value), 2)
    shared_by = heads.num_heads // heads.num_key_value_heads
    scores = heads.scale * query @ keys.repeat_interleave(shared_by, 1).transpose(2, 3)
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        sink_column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink_column), -1)
    shares = scores.softmax(-1)[..., : keys.shape[2]]
    out = shares @ values.repeat_interleave(shared_by, 1)
    return out.transpose(1, 2).flatten(2), keys, values


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads normalised": {"qk_norm": "head"},
    "width normalised": {"qk_norm": "width"},
    "interleaved": {"interleaved": True},
    "no rotation": {"rotary_dim": 0},
    "part rotates": {"rotary_dim": 4},
    "sinks": {"sinks": True},
    "one key-value head": {"H": 6, "G": 1},
    "as many as queries": {"H": 3, "G": 3, "qk_norm": "head"},
    "wide heads": {"d": 128, "H": 4, "G": 2},
    "odd width": {"d": 10, "qk_norm": "width", "rotary_dim": 6},
    "several tokens": {"L": 5},
    "nothing before": {"past": 0, "L": 3},
    "a long past": {"past": 301, "B": 1},
}


@EVERY
@pytest.mark.parametrize("case", ATTENTION)
def test_attend(instruction_set: str, case: str) -> None:
    sizes = {"B": 2, "L": 1, "H": 4, "G": 2, "d": 16, "past": 21} | ATTENTION[case]
    B, L, H, G, d, past = (int(sizes[name]) for name in ("B", "L", "H", "G", "d", "past"))
    qk_norm, S = str(sizes.get("qk_norm", "none")), past + L
    heads = Heads(H, G, d, d**-0.5, qk_norm, EPS, bool(sizes.get("interleaved", False)))
    inputs = (torch.randn(B, L, H * d), torch.randn(B, L, G * d), torch.randn(B, L, G * d))
    cache = (torch.randn(B, G, S + 3, d), torch.randn(B, G, S + 3, d))
    before = (cache[0].clone(), cache[1].clone())
    angles = torch.randn(B, 1, L, int(sizes.get("rotary_dim", d)))
    rotary = (angles.cos(), angles.sin()) if angles.numel() else None
    width = {"head": (d, d), "width": (H * d, G * d)}.get(qk_norm)
    norms = None if width is None else (torch.randn(width[0]), torch.randn(width[1]))
    sinks = torch.randn(H) if sizes.get("sinks") else None
    mask = torch.rand(B, 1, L, S) < 0.7
    mask[..., -1] = True
    step = AttentionStep(heads, *cache, S, mask, rotary, norms, sinks)
    got = native_step.attend(step, *inputs, instruction_set=instruction_set)
    old = (before[0][:, :, :past], before[1][:, :, :past])
    expected, keys, values = attention_oracle(heads, inputs, old, mask, rotary, norms, sinks)
    assert_close(got, expected, 1e-5)
    assert_close(cache[0][:, :, :S], keys, 5e-6)
    assert_close(cache[1][:, :, :S], values, 0.0)
    for now, then in zip(cache, before, strict=True):
        assert torch.equal(now[:, :, S:], then[:, :, S:])
        assert torch.equal(now[:, :, :past], then[:, :, :past])


@EVERY
def test_one_mask_serves_all_sequences(instruction_set: str) -> None:
    heads = Heads(2, 1, 8, 0.3)
    inputs = (torch.randn(3, 2, 16), torch.randn(3, 2, 8), torch.randn(3, 2, 8))
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]]).view(1, 1, 2, 5)
    results = []
    for rows in (mask, mask.expand(3, -1, -1, -1)):
        keys, values = torch.ones(3, 1, 5, 8), torch.full((3, 1, 5, 8), 2.0)
        step = AttentionStep(heads, keys, values, 5, rows.contiguous(), rotary=None)
        results.append(native_step.attend(step, *inputs, instruction_set=instruction_set))
    assert torch.equal(*results)


def test_what_torch_would_broadcast_is_not_read_beyond_its_end() -> None:
    heads = Heads(2, 1, 8, 0.3)
    inputs = (torch.randn(3, 1, 16), torch.randn(3, 1, 8), torch.randn(3, 1, 8))
    mask, angles = torch.ones(1, 1, 1, 5, dtype=torch.bool), torch.ones(3, 1, 1, 8)
    for batch, rows, capacity in ((1, 3, 5), (3, 1, 5), (3, 3, 4)):
        cache = (torch.zeros(batch, 1, capacity, 8), torch.zeros(batch, 1, capacity, 8))
        step = AttentionStep(heads, *cache, 5, mask, (angles[:rows], angles[:rows]))
        with pytest.raises(UsageError, match=f"cache of {batch} x {capacity}, 1 masks and angles for {rows} x 1"):
            native_step.attend(step, *inputs)


@EVERY
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "shape", [(1, 2048, 64, 8), (5, 24, 7, 3), (16, 33, 130, 6), (2, 8, 4, 4), (1, 4, 1, 1), (0, 8, 4, 2)]
)
@pytest.mark.parametrize("extras", [False, True])
def test_route(instruction_set: str, scores: str, shape: tuple[int, int, int, int], extras: bool) -> None:
    T, D, E, K = shape
    x, weight = torch.randn(T, D), torch.randn(E, D) / D**0.5
    bias = torch.randn(E) if extras else None
    selection_bias = 0.1 * torch.randn(E) if extras else None
    step = RouterStep(weight, K, scores, extras, 1e-9, 1.7 if extras else 1.0, bias, selection_bias)
    logits, ids, weights = native_step.route(step, x, instruction_set=instruction_set)
    wide = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close(logits, wide, 1e-5)
    all_scores = wide.softmax(-1) if scores == "softmax" else wide.sigmoid()
    selection = all_scores if selection_bias is None else all_scores + selection_bias
    assert all(len(set(row)) == K for row in ids.tolist())
    chosen, best = selection.gather(1, ids), selection.topk(K, dim=-1).values
    assert_close(chosen, best, 1e-5)  # the same experts, but for ties
    expected = all_scores.gather(1, ids)
    if extras:
        expected = 1.7 * expected / expected.sum(-1, keepdim=True)
    assert_close(weights, expected, 1e-5)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_logits_of_any_size_give_finite_weights(scores: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-300.0, -300.0, -200.0, -300.0]])
    step = RouterStep(logits.T.contiguous(), 2, scores, normalise=True, least_sum=1e-20, scaling=1.0)
    _, ids, weights = native_step.route(step, torch.eye(3))
    assert torch.isfinite(weights).all()
    assert ids[0, 0] == 0
    if scores == "softmax":  # the sigmoid of -200 is 0 in float32
        assert ids[2, 0] == 2
        assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))


@EVERY
@pytest.mark.parametrize("shape", [(1, 64, 8), (4097, 32, 4), (5, 7, 7), (3, 1, 1), (0, 8, 2)])
def test_top_k(instruction_set: str, shape: tuple[int, int, int]) -> None:
    rows, size, k = shape
    values = torch.randn(rows, size)
    assert native_step.ranks(values)
    ids = native_step.top_k(values, k, instruction_set=instruction_set)
    assert torch.equal(values.gather(1, ids), values.topk(k, dim=-1).values)
    ties = torch.zeros(rows, size)
    assert torch.equal(native_step.top_k(ties, k, instruction_set=instruction_set), torch.arange(k).expand(rows, k))


@EVERY
def test_top_k_of_what_is_no_number_or_infinite(instruction_set: str) -> None:
    inf, nan = math.inf, math.nan
    values = torch.tensor([[1, -inf, -inf, 2], [-inf, -inf, -inf, -inf], [nan, nan, 1, nan], [3, inf, nan, 5]])
    ids = native_step.top_k(values, 4, instruction_set=instruction_set)
    assert ids.tolist() == [[3, 0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 2], [1, 2, 3, 0]]
    wide = torch.randn(50, 64)
    wide[:, 3] = nan  # hides none of the others
    ids = native_step.top_k(wide, 9, instruction_set=instruction_set)
    assert torch.equal(ids, wide.topk(9, dim=-1).indices)
    with pytest.raises(UsageError, match="5 of 4 values"):
        native_step.top_k(values, 5)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UsageError, match="no native kernels for 'mmx'"):
        native_step.rms_norm(torch.ones(1, 4), None, EPS, instruction_set="mmx")


def test_only_inference_in_float32_on_the_cpu_is_served() -> None:
    x = torch.ones(1, 4)
    assert not native_step.serves(x)  # gradients may be wanted
    with torch.no_grad():
        assert native_step.serves(x) == bool(native_instruction_sets())
        assert not native_step.serves(x.double())
        assert not native_step.serves(x.bfloat16())
        assert not native_step.serves(x.to("meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not native_step.serves(x)


def test_what_torch_func_wraps_has_no_memory_to_read() -> None:
    seen: list[bool] = []

    def chosen(values: Tensor) -> Tensor:
        seen.append(native_step.ranks(values))
        return values.sum()

    torch.func.grad(chosen)(torch.ones(2, 4))
    torch.func.vmap(chosen)(torch.ones(2, 4))
    assert seen == [False, False]
