"""Rows in fewer bytes, and what that saves. R rows, D hidden size."""

from dataclasses import replace

import pytest
import torch

from moesaic.parallel.cost import ExchangeShape, backward_bytes, forward_bytes, host_rows, rows_sent, visited
from moesaic.parallel.transport import TRANSPORTS

from .processes import on_ranks
from .test_expert_parallel import BASE, B, D, E, K, L, build, learn, learn_on_ranks, whole

ERRORS = {"exact": 0.0, "bfloat16": 2**-8, "fp8": 2**-4, "int8": 0.5 / 127}
"""Of a row's largest number, for int8; of each number, for those with a mantissa, until it is subnormal."""


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_arrive_as_precisely_as_their_bytes_allow(name: str, dtype: torch.dtype) -> None:
    rows_RD = (torch.randn(7, D, dtype=torch.float64) * torch.logspace(-6, 6, 7, dtype=torch.float64)[:, None]).to(
        dtype
    )
    rows_RD[3] = 0.0
    transport = TRANSPORTS[name]
    message = transport.encode(rows_RD)
    got_RD = transport.decode(message, dtype)
    assert got_RD.dtype == dtype
    assert message.shape[1] * message.itemsize == transport.row_bytes(D, rows_RD.itemsize)
    largest_R1 = rows_RD.abs().amax(1, keepdim=True).double()
    rounding = 2**-8 if dtype == torch.bfloat16 and name in ("fp8", "int8") else 1e-7
    assert bool(((got_RD.double() - rows_RD.double()).abs() <= (ERRORS[name] * 1.01 + rounding) * largest_R1).all())
    assert transport.decode(transport.encode(rows_RD[:0]), dtype).shape == (0, D)


@pytest.mark.parametrize("name", ["bfloat16", "fp8", "int8"])
def test_low_precision_stays_near_and_counts_fewer_bytes(name: str, seed: int) -> None:
    """The exact exchange and the cost model, over many tokens, to the noise of which experts they chose."""
    expected = learn(build(BASE, seed), seed, slice(None))
    exact = on_ranks(2, learn_on_ranks, BASE, seed, [0, 2, 4])
    fewer = on_ranks(2, lambda: learn_on_ranks(BASE, seed, [0, 2, 4], transport=name, gradient_transport=name))
    got = whole([part for part, _ in fewer])
    for key, value in expected.items():
        error = float((got[key] - value).norm() / (value.norm() + 1e-6))
        assert error > 0 or key.endswith("embed_tokens.weight")
        assert error < 0.3, (key, error)
    assert sum(sent for _, sent in fewer) < 0.45 * sum(sent for _, sent in exact)


def test_the_model_of_costs_is_what_is_sent(seed: int) -> None:
    """Bytes depend on which experts are chosen; summed over ranks they are near the mean, which the model gives."""
    parts = on_ranks(2, learn_on_ranks, BASE, seed, [0, 2, 4])
    shape = ExchangeShape(
        num_experts=E, top_k=K, hidden_size=D, num_ranks=2, itemsize=8, weight_itemsize=8
    )  # fmt: skip
    tokens, layers = B * L, 2
    counts = 2 * layers * 16
    predicted = tokens * layers * (forward_bytes(shape) + backward_bytes(shape)) + counts
    sent = sum(sent for _, sent in parts)
    assert sent == pytest.approx(predicted, rel=0.25)


def test_expected_rows_agree_with_drawing_them() -> None:
    shape = ExchangeShape(num_experts=10, top_k=4, hidden_size=8, num_ranks=4, ranks_per_host=2)
    bounds = torch.tensor([3, 6, 8])  # ends of the first three ranks' experts
    picks_TK = torch.rand(40_000, 10).argsort(1)[:, :4].contiguous()
    ranks_TK = torch.bucketize(picks_TK, bounds, right=True)
    home_T = torch.randint(0, 4, (len(picks_TK),))
    hits_TP = torch.zeros(len(picks_TK), 4, dtype=torch.bool).scatter(1, ranks_TK, True)
    away_TP = hits_TP & (torch.arange(4) != home_T[:, None])
    assert rows_sent(shape) == pytest.approx(float(away_TP.sum(1).float().mean()), rel=0.02)
    single = replace(shape, deduplicated=False)
    assert rows_sent(single) == pytest.approx(float((ranks_TK != home_T[:, None]).sum(1).float().mean()), rel=0.02)
    other_host_TP = hits_TP & (torch.arange(4) // 2 != (home_T // 2)[:, None])
    assert host_rows(shape, hierarchical=False) == pytest.approx(float(other_host_TP.sum(1).float().mean()), rel=0.02)
    hosts_T = other_host_TP.unflatten(1, (2, 2)).any(2).sum(1)
    assert host_rows(shape, hierarchical=True) == pytest.approx(float(hosts_T.float().mean()), rel=0.02)
    assert visited(10, 10, 1) == 1.0
