"""Rows in fewer bytes, and what that saves. R rows, D hidden size."""

from dataclasses import replace

import pytest
import torch

from moesaic.parallel.cost import ExchangeShape, backward_bytes, forward_bytes
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


@pytest.mark.parametrize(("name", "tolerance"), [("bfloat16", 0.02), ("fp8", 0.2), ("int8", 0.05)])
def test_low_precision_stays_near_and_counts_fewer_bytes(name: str, tolerance: float, seed: int) -> None:
    """In one layer, whose router sees the same rows either way: a second one may choose other experts."""
    config = replace(BASE, num_hidden_layers=1)
    expected = learn(build(config, seed), seed, slice(None))
    exact = on_ranks(2, learn_on_ranks, config, seed, [0, 2, 4])
    fewer = on_ranks(2, lambda: learn_on_ranks(config, seed, [0, 2, 4], transport=name, gradient_transport=name))
    got = whole([part for part, _ in fewer])
    for key, value in expected.items():
        error = float((got[key] - value).norm() / (value.norm() + 1e-6))
        assert error > 0 or key.endswith("embed_tokens.weight")
        assert error < tolerance, (key, error)
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
