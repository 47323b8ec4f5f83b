"""The small native operators against torch in float64, on every instruction set of this machine.

T new tokens of all sequences, L of one, S tokens attended to, H query heads, G key-value heads, d head dim, E experts.
"""

import math
import random
from dataclasses import dataclass, field, replace
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
from moesaic.ops.native_step import BLOCK_TOKENS, AttentionStep, Heads, RouterStep
from tests.model.paged import random_passes

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
    "odd width": {"d": 9, "qk_norm": "width", "rotary_dim": 6},
    "several tokens": {"lengths": [(21, 5), (3, 7)]},
    "nothing before": {"lengths": [(0, 3)]},
    "a long past": {"lengths": [(301, 1)]},
    "many of all lengths": {"lengths": [(past, 1 + past % 3) for past in range(0, 130, 9)]},
    "at the edges of blocks": {"lengths": [(31, 1), (32, 1), (31, 2), (0, 32), (64, 32), (33, 63)]},
    "long chunks": {"lengths": [(17, 70), (0, 33), (64, 1)], "qk_norm": "width", "H": 6},
    "a window": {"lengths": [(90, 40), (2, 3), (63, 1)], "window": 9},
    "a window and sinks": {"lengths": [(90, 40), (2, 3), (63, 1)], "window": 40, "sinks": True},
    "chunked": {"lengths": [(90, 40), (31, 2), (64, 1)], "chunk": 24},
}


@dataclass
class Pool:
    """Keys and values of sequences of `totals` tokens in shuffled blocks: NaN stands wherever nobody has written."""

    heads: Heads
    totals: list[int]
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    tables: Tensor = field(init=False)

    def __post_init__(self) -> None:
        G, d = self.heads.num_key_value_heads, self.heads.head_dim
        needed = [-(-total // BLOCK_TOKENS) for total in self.totals]
        numbers = torch.randperm(sum(needed) + 2)
        self.keys = torch.full((len(numbers), G, d, BLOCK_TOKENS), math.nan)
        self.values = torch.full((len(numbers), G, BLOCK_TOKENS, d), math.nan)
        self.tables = torch.full((len(needed), max(needed) + 1), 2**40)  # beyond a sequence's blocks: no block at all
        for table, blocks in zip(self.tables, numbers.split([*needed, 2]), strict=False):
            table[: len(blocks)] = blocks

    def fill(self, number: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values (G, S, d) of a sequence's first tokens."""
        for start in range(0, keys.shape[1], BLOCK_TOKENS):
            block, some = self.tables[number, start // BLOCK_TOKENS], slice(start, start + BLOCK_TOKENS)
            count = keys[:, some].shape[1]
            self.keys[block, :, :, :count] = keys[:, some].transpose(1, 2)
            self.values[block, :, :count] = values[:, some]

    def held(self, number: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a sequence, each (1, G, S, d)."""
        total = self.totals[number]
        blocks = self.tables[number, : -(-total // BLOCK_TOKENS)]
        keys = self.keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[None, :, :total]
        return keys, self.values[blocks].transpose(0, 1).flatten(1, 2)[None, :, :total]

    def step(self, parts: list[tuple[int, int, int]], **options: Any) -> AttentionStep:
        """Of the tokens from .. to - 1 of some sequences, each (number, from, to)."""
        counts = torch.tensor([0, *(end - start for _, start, end in parts)])
        num_keys = torch.tensor([end for _, _, end in parts])
        tables = self.tables[[number for number, _, _ in parts]]
        return AttentionStep(self.heads, self.keys, self.values, counts.cumsum(0), num_keys, tables, **options)


def first_keys_of(parts: list[tuple[int, int, int]], sizes: dict[str, Any]) -> Tensor | None:
    positions = torch.cat([torch.arange(start, end) for _, start, end in parts])
    if "window" in sizes:
        return (positions - sizes["window"] + 1).clamp_min(0)
    return positions - positions % sizes["chunk"] if "chunk" in sizes else None


@EVERY
@pytest.mark.parametrize("case", ATTENTION)
def test_attend(instruction_set: str, case: str) -> None:
    sizes = {"lengths": [(21, 1), (40, 1)], "H": 4, "G": 2, "d": 16} | ATTENTION[case]
    H, G, d, lengths = sizes["H"], sizes["G"], sizes["d"], sizes["lengths"]
    qk_norm, T = sizes.get("qk_norm", "none"), sum(new for _, new in lengths)
    heads = Heads(H, G, d, d**-0.5, qk_norm, EPS, sizes.get("interleaved", False))
    inputs = (torch.randn(1, T, H * d), torch.randn(1, T, G * d), torch.randn(1, T, G * d))
    pool = Pool(heads, [past + new for past, new in lengths])
    pasts = [(torch.randn(1, G, past, d), torch.randn(1, G, past, d)) for past, _ in lengths]
    for number, (keys, values) in enumerate(pasts):
        pool.fill(number, keys[0], values[0])
    unused = pool.keys.isnan().sum(), pool.values.isnan().sum()
    angles = torch.randn(1, 1, T, sizes.get("rotary_dim", d))
    rotary = (angles.cos(), angles.sin()) if angles.numel() else None
    width = {"head": (d, d), "width": (H * d, G * d)}.get(qk_norm)
    norms = None if width is None else (torch.randn(width[0]), torch.randn(width[1]))
    sinks = torch.randn(H) if sizes.get("sinks") else None
    parts = [(number, past, past + new) for number, (past, new) in enumerate(lengths)]
    first_keys = first_keys_of(parts, sizes)
    step = pool.step(parts, first_keys=first_keys, rotary=rotary, norms=norms, sinks=sinks)
    got = native_step.attend(step, *inputs, instruction_set=instruction_set)

    starts = step.first_tokens.tolist()
    for (number, past, total), old, start, end in zip(parts, pasts, starts, starts[1:], strict=False):
        mine = (inputs[0][:, start:end], inputs[1][:, start:end], inputs[2][:, start:end])
        turns = None if rotary is None else (rotary[0][:, :, start:end], rotary[1][:, :, start:end])
        positions, seen = torch.arange(past, total)[:, None], torch.arange(total)
        first = 0 if first_keys is None else first_keys[start:end, None]
        mask = (seen <= positions) & (seen >= first)
        expected, keys, values = attention_oracle(heads, mine, old, mask, turns, norms, sinks)
        assert_close(got[:, start:end], expected, 1e-5)
        held_keys, held_values = pool.held(number)
        assert_close(held_keys, keys, 5e-6)
        assert_close(held_values, values, 0.0)
        assert torch.equal(held_keys[:, :, :past], old[0])
    written = T * G * d
    assert (pool.keys.isnan().sum(), pool.values.isnan().sum()) == (unused[0] - written, unused[1] - written)


@EVERY
@pytest.mark.parametrize(
    "sizes", [{}, {"window": 20}, {"chunk": 24, "H": 6, "G": 1, "d": 9}, {"H": 3, "G": 3, "d": 40}]
)
def test_what_a_sequence_gets_depends_on_nothing_else(instruction_set: str, sizes: dict[str, Any]) -> None:
    """Bit for bit: each alone in one pass, all in one pass, and cut into passes with random others, of which one has no
    finite numbers."""
    H, G, d = (sizes.get(name, default) for name, default in (("H", 8), ("G", 2), ("d", 16)))
    heads = Heads(H, G, d, d**-0.5, "head", EPS)
    totals = [random.randint(1, 150) for _ in range(4)]
    norms, sinks = (torch.randn(d), torch.randn(d)), torch.randn(H)
    inputs = [tuple(torch.randn(1, total, heads * d) for heads in (H, G, G)) for total in totals]
    inputs.append(tuple(torch.full_like(each, random.choice((math.inf, math.nan))) for each in inputs[0]))
    angles = [torch.randn(1, 1, total, d // 2 * 2) for total in totals]
    angles.append(angles[0])

    def run(passes: list[list[tuple[int, int, int]]]) -> list[Tensor]:
        pool = Pool(heads, [*totals, totals[0]])
        results: list[list[Tensor]] = [[] for _ in inputs]
        for parts in passes:
            turns = torch.cat([angles[number][:, :, start:end] for number, start, end in parts], 2)
            rows = [torch.cat([inputs[n][i][:, start:end] for n, start, end in parts], 1) for i in range(3)]
            step = pool.step(
                parts,
                first_keys=first_keys_of(parts, sizes),
                rotary=(turns.cos(), turns.sin()),
                norms=norms,
                sinks=sinks,
            )
            out = native_step.attend(step, *rows, instruction_set=instruction_set)
            for (number, _, _), some in zip(parts, out.split([end - start for _, start, end in parts], 1), strict=True):
                results[number].append(some)
        return [torch.cat(some, 1) for some in results if some][: len(totals)]

    alone = run([[(number, 0, total)] for number, total in enumerate(totals)])
    assert all(each.isfinite().all() for each in alone)
    together = run([[(4, 0, totals[0]), *((number, 0, total) for number, total in enumerate(totals))]])
    assert all(map(torch.equal, alone, together))
    for most in (3, 50):
        assert all(map(torch.equal, alone, run(random_passes([*totals, totals[0]], most))))


def test_what_does_not_fit_together_is_not_read_beyond_its_end() -> None:
    heads = Heads(2, 1, 8, 0.3)
    inputs = (torch.randn(1, 3, 16), torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    pool = Pool(heads, [5, 6])
    parts, angles = [(0, 4, 5), (1, 4, 6)], torch.ones(1, 1, 3, 8)
    with pytest.raises(UsageError, match="3 new tokens, angles for 1, windows for 3 and tables of 2 sequences"):
        native_step.attend(pool.step(parts, rotary=(angles[:, :, :1], angles[:, :, :1])), *inputs)
    with pytest.raises(UsageError, match="3 new tokens, angles for 3, windows for 2 and tables of 2 sequences"):
        native_step.attend(pool.step(parts, first_keys=torch.zeros(2, dtype=torch.int64)), *inputs)
    for name in ("num_keys", "block_tables", "first_tokens"):
        whole = pool.step(parts)
        with pytest.raises(UsageError, match="tables of 1, 2 sequences do not fit together"):
            native_step.attend(replace(whole, **{name: getattr(whole, name)[:-1]}), *inputs)


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
