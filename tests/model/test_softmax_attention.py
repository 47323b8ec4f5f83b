"""Fused attention against plain products in float64.

B sequences, L queries, S keys, H query heads, G key-value heads, d and v widths.
"""

import pytest
import torch
from torch import Tensor

from moesaic.model.softmax_attention import attend


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:  # fmt: skip
    shared_by = query.shape[1] // key.shape[1]
    key_BHSd, value_BHSv = key.repeat_interleave(shared_by, 1), value.repeat_interleave(shared_by, 1)
    logits_BHLS = (query @ key_BHSd.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*logits_BHLS.shape[:3], 1)
        logits_BHLS = torch.cat((logits_BHLS, column), dim=-1)
    return logits_BHLS.softmax(-1)[..., : key.shape[2]] @ value_BHSv


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("with_sinks", [True, False])
@pytest.mark.parametrize("length", [1, 5, 20])
@pytest.mark.parametrize(("heads", "shared", "width", "value_width"), [(4, 4, 8, 8), (4, 2, 6, 10), (6, 1, 9, 4)])
def test_outputs_and_gradients_equal_plain_products(
    heads: int, shared: int, width: int, value_width: int, length: int, with_sinks: bool, masked: bool
) -> None:
    total = length + 3 if masked else length
    inputs = [
        torch.randn(2, heads, length, width),
        torch.randn(2, shared, total, width),
        torch.randn(2, shared, total, value_width),
    ]
    if with_sinks:
        inputs.append(torch.randn(heads) * 2)
    visible = torch.ones(length, total, dtype=torch.bool).tril(total - length).expand(2, 1, -1, -1)
    if masked:
        visible = visible & (torch.rand(2, 1, length, total) < 0.6)
        visible[..., 0] = True
    wide = [x.double().requires_grad_() for x in inputs]
    expected = by_hand(wide[0], wide[1], wide[2], visible, 0.3, wide[3] if with_sinks else None)
    narrow = [x.requires_grad_() for x in inputs]
    mask, sinks = visible if masked else None, narrow[3] if with_sinks else None
    out = attend(narrow[0], narrow[1], narrow[2], mask, scale=0.3, sinks=sinks)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    probe = torch.randn(out.shape)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    for ours, theirs in zip(narrow, wide, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_sinks_in_bfloat16_keep_its_precision(masked: bool) -> None:
    query, key, value = (torch.randn(2, heads, 6, 8).bfloat16() for heads in (4, 2, 2))
    sinks = (torch.randn(4) * 3).bfloat16()
    visible = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    expected = by_hand(query.double(), key.double(), value.double(), visible, 0.35, sinks.double())
    out = attend(query, key, value, visible if masked else None, scale=0.35, sinks=sinks)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05)
