"""Layers with packed weights, as a model has them.

T tokens, D hidden size.
"""

import copy

import pytest
import torch
from torch import nn

from moesaic.model.packed_linear import PackedLinear
from moesaic.ops.quantize import FORMATS, unpack


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_it_computes_what_a_linear_layer_computes(format: str, bias: bool) -> None:
    plain = nn.Linear(100, 37, bias=bias)
    with torch.no_grad():
        if format == "mxfp4":
            plain.weight.copy_(torch.randint(-4, 5, (37, 100)) / 2)  # numbers that it has
    packed = PackedLinear.of(plain.weight, plain.bias, format, 32)
    assert (packed.packed.columns, packed.packed.rows) == (100, 37)
    with torch.no_grad():
        plain.weight.copy_(unpack(packed.packed))
        x = torch.randn(2, 9, 100)
        expected = plain(x)
        y = packed(x)
    assert y.shape == expected.shape
    assert (y - expected).norm() < 0.015 * expected.norm()  # the kernels round x to 8 bits
    assert f"out_features=37, format={format}" in repr(packed)


def test_its_weight_is_bytes_in_the_state_and_keeps_its_type() -> None:
    plain = nn.Linear(100, 37)
    packed = PackedLinear.of(plain.weight, plain.bias, "int4", 64)
    assert set(packed.state_dict()) == {"weight", "bias"}
    assert packed.weight.dtype == torch.uint8
    assert packed.weight.nbytes == 3 * 2 * (32 + 16 * 32)
    twin = PackedLinear.of(torch.empty(37, 100, device="meta"), plain.bias, "int4", 64)
    twin.load_state_dict(copy.deepcopy(packed.state_dict()), assign=True)
    x = torch.randn(5, 100)
    assert torch.equal(twin(x), packed(x))
    packed.to(torch.bfloat16)
    assert packed.weight.dtype == torch.uint8
    assert packed(x.bfloat16()).dtype == torch.bfloat16
