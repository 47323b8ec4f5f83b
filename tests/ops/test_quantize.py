"""Packed weights, byte by byte from the description of their layout, and how much of a weight they keep.

N outputs, K inputs, G inputs of a group.
"""

import math
import re
import struct

import pytest
import torch
from torch import Tensor

from moesaic.errors import MoesaicError, UsageError
from moesaic.ops import quantize
from moesaic.ops.instruction_set import native_module
from moesaic.ops.quantize import (
    FORMATS,
    INT4_ENDS,
    PackedWeight,
    pack,
    packed_shape,
    require_format,
    squared_error,
    unpack,
)

from .expert_cases import num_threads

KINDS = [(format, size) for format, known in FORMATS.items() for size in known.group_sizes]
SIZES = [(1, 1), (16, 32), (17, 33), (33, 100), (31, 64), (5, 127), (48, 3)]
E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def packer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pack as these tests say."""
    if request.param == "torch":
        monkeypatch.setattr(quantize, "packs", lambda weight: False)
    elif native_module() is None:
        pytest.skip("the native kernels are not built")


def random_weight(rows: int, columns: int, format: str) -> Tensor:
    if format != "mxfp4":
        return torch.randn(rows, columns) * 10 ** float(torch.empty(()).uniform_(-3, 3))
    return mxfp4_weight(rows, columns)


def mxfp4_weight(rows: int, columns: int) -> Tensor:
    """Numbers of the form: a power of two for 32 of a row, times values of E2M1."""
    values = E2M1_VALUES[torch.randint(8, (rows, columns))] * (1 - 2 * torch.randint(2, (rows, columns)))
    scales = torch.randint(-20, 20, (rows, math.ceil(columns / 32))).float().exp2()
    return values * scales.repeat_interleave(32, dim=1)[:, :columns]


def unpacked_by_loop(packed: PackedWeight) -> Tensor:
    """One matrix, a number at a time: 16 factors, then for each quad (or two) 64 bytes, byte 4 o + i."""
    size, bits, table = packed.group_size, FORMATS[packed.format].bits, FORMATS[packed.format].table
    block_bytes = 32 + 16 * size * bits // 8
    data = bytes(packed.data.flatten().tolist())
    groups = math.ceil(packed.columns / size)
    weight = torch.zeros(packed.rows, packed.columns)
    for row in range(packed.rows):
        for column in range(packed.columns):
            block = (row // 16 * groups + column // size) * block_bytes
            output, quad, i = row % 16, column % size // 4, column % 4
            (scale,) = struct.unpack("<f", b"\0\0" + data[block + 2 * output : block + 2 * output + 2])
            if bits == 8:
                value = data[block + 32 + 64 * quad + 4 * output + i] - 128
            else:
                byte = data[block + 32 + 64 * (quad // 2) + 4 * output + i]
                value = table[byte >> 4 if quad % 2 else byte & 15]
            weight[row, column] = value * scale
    return weight


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_bytes_are_where_the_layout_says(format: str, group_size: int, rows: int, columns: int) -> None:
    weight = random_weight(rows, columns, format)
    before = weight.clone()
    packed = pack(weight, format, group_size)
    block_bytes = 32 + 16 * group_size * FORMATS[format].bits // 8
    assert packed.data.shape == (math.ceil(rows / 16), math.ceil(columns / group_size), block_bytes)
    assert packed.data.dtype == torch.uint8
    assert packed.data.is_contiguous()
    restored = unpack(packed)
    assert torch.equal(restored, unpacked_by_loop(packed))
    assert torch.equal(unpack(packed, torch.bfloat16), restored.bfloat16())
    error, total = squared_error(weight, packed)
    assert error == pytest.approx(float((weight - restored).double().square().sum()), rel=1e-6)
    assert total == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_a_stack_is_packed_matrix_by_matrix(format: str, group_size: int) -> None:
    stack = torch.stack([random_weight(33, 70, format) for _ in range(6)]).view(2, 3, 33, 70)
    packed = pack(stack, format, group_size)
    for first in range(2):
        for second in range(3):
            alone = pack(stack[first, second], format, group_size)
            assert torch.equal(packed.of_expert(first).of_expert(second).data, alone.data)
    assert unpack(packed).shape == stack.shape
    transposed = stack.mT.contiguous().mT
    assert torch.equal(pack(transposed, format, group_size).data, packed.data)


@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_many_rows_are_packed_as_few_are(format: str, group_size: int) -> None:
    weight = random_weight(1000, 300, format)
    packed = pack(weight, format, group_size)
    for first in (0, 432, 992):
        part = pack(weight[first : first + 16], format, group_size)
        assert torch.equal(packed.data[first // 16 : first // 16 + 1], part.data)


@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_what_fills_up_the_last_group_has_no_say(format: str, group_size: int) -> None:
    weight = random_weight(40, 2 * group_size + 7, format)
    packed, rest = pack(weight, format, group_size), pack(weight[:, 2 * group_size :].contiguous(), format, group_size)
    assert torch.equal(packed.data[:, 2:], rest.data)
    if format == "int4":  # seven numbers are easier to fit than 32
        error, total = squared_error(weight[:, 2 * group_size :], rest)
        assert error / total < 0.07**2


@pytest.mark.parametrize("group_size", [32, 64])
def test_int8_rounds_to_the_nearest_with_the_smallest_factor_that_cuts_nothing_off(group_size: int) -> None:
    weight = random_weight(35, 200, "int8")
    packed = pack(weight, "int8", group_size)
    scales = packed.data[..., :32].contiguous().view(torch.bfloat16).float().transpose(1, 2).flatten(0, 1)[:35]
    groups = torch.nn.functional.pad(weight, (0, -200 % group_size)).unflatten(1, (-1, group_size))
    largest = groups.abs().amax(-1)
    assert (127 * scales >= largest * (1 - 1e-6)).all()
    below = (scales.view(torch.int32) - 0x10000).view(torch.float32)
    assert (127 * below < largest * (1 + 1e-6)).all()
    error = (unpack(packed) - weight).abs()
    allowed = scales.repeat_interleave(group_size, 1)[:, :200] / 2
    assert (error <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize(("group_size", "largest_error"), [(32, 0.0745), (64, 0.083)])
def test_int4_is_closer_than_equal_steps(group_size: int, largest_error: float) -> None:
    weight = torch.randn(256, 1024)
    error, total = squared_error(weight, pack(weight, "int4", group_size))
    assert math.sqrt(error / total) < largest_error
    groups = weight.view(-1, group_size)
    scales = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
    equal_steps = scales * (groups / scales).round().clamp(-8, 7)
    assert error < 0.76 * float((equal_steps - groups).square().sum())


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_search_for_int4_factors_is_nearly_exhaustive(group_size: int) -> None:
    weight = torch.randn(64, group_size) * torch.rand(64, 1)
    table = torch.tensor(FORMATS["int4"].table).float()
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    best = torch.full((64, 1), math.inf)
    for end in torch.linspace(70, 160, 181).tolist():
        for scale in (largest / end, -largest / end):
            scale = scale.bfloat16().float()
            values = table[(weight.div(scale).unsqueeze(-1) - table).abs().argmin(-1)]
            best = torch.minimum(best, (weight - scale * values).square().sum(1, keepdim=True))
    error, _ = squared_error(weight, pack(weight, "int4", group_size))
    assert error < 1.04 * float(best.sum())
    assert len(INT4_ENDS) < 10


@pytest.mark.parametrize("group_size", [32, 64])
def test_int4_codes_are_the_nearest_of_the_table(group_size: int) -> None:
    weight = random_weight(16, group_size, "int4")
    packed = pack(weight, "int4", group_size)
    scales = packed.data[0, 0, :32].view(torch.bfloat16).float().unsqueeze(1)
    restored = unpack(packed)
    for value in FORMATS["int4"].table:
        other = scales * value
        assert ((weight - restored).abs() <= (weight - other).abs() * (1 + 1e-5) + 1e-6 * scales.abs()).all()


def test_mxfp4_is_exact_or_refused() -> None:
    weight = mxfp4_weight(48, 320)
    weight[0, :32] = 0
    weight[1, :32] = 2.0**-127 * weight[1, :32].sign()  # the smallest factor of the published form
    assert torch.equal(unpack(pack(weight, "mxfp4")), weight)
    assert torch.equal(unpack(pack(weight.bfloat16(), "mxfp4"), torch.bfloat16), weight.bfloat16())
    tiny = weight * 2.0**-100
    tiny[20, 70] = 1.1 * tiny[20, 64:96].abs().max() + 2.0**-110
    with pytest.raises(MoesaicError, match="not of the form"):
        pack(tiny, "mxfp4")
    weight[7, 40] = weight[7, 32:64].abs().max() * 1.37 + 0.1
    with pytest.raises(MoesaicError, match=r"not of the form mxfp4, .*; choose int8 or int4"):
        pack(weight, "mxfp4")


@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_zeros_stay_zeros(format: str, group_size: int) -> None:
    weight = random_weight(20, 3 * group_size, format)
    weight[3], weight[:, :group_size] = 0, 0
    restored = unpack(pack(weight, format, group_size))
    assert (restored[3] == 0).all()
    assert (restored[:, :group_size] == 0).all()
    assert unpack(pack(weight[:0], format, group_size)).shape == (0, 3 * group_size)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_sizes_near_the_ends_of_float32_are_kept(format: str, size: float) -> None:
    weight = torch.randn(32, 64).clamp(-4, 4) * size
    restored = unpack(pack(weight, format))
    assert restored.isfinite().all()
    relative = ((restored - weight) / size).norm() / (weight / size).norm()
    assert relative < {"int8": 0.02, "int4": 0.12}[format]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_numbers_that_are_not_finite_are_refused(format: str, group_size: int, bad: float) -> None:
    weight = random_weight(20, 100, format)
    weight[torch.randint(20, ()), torch.randint(100, ())] = bad
    with pytest.raises(MoesaicError, match="not finite"):
        pack(weight, format, group_size)


@pytest.mark.parametrize(
    ("format", "group_size", "message"),
    [
        ("int3", 32, "weight format 'int3' is not known; choose int8, int4, mxfp4"),
        ("int4", 48, "group size 48 is not possible with int4; choose 32 or 64"),
        ("mxfp4", 64, "group size 64 is not possible with mxfp4; choose 32"),
    ],
)
def test_unknown_formats_and_sizes_are_refused(format: str, group_size: int, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        pack(torch.zeros(1, 1), format, group_size)
    with pytest.raises(UsageError, match=re.escape(message)):
        require_format(format, group_size)


@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_shapes_are_known_without_memory(format: str, group_size: int) -> None:
    packed = pack(torch.empty(3, 40, 70, device="meta"), format, group_size)
    assert packed.data.is_meta
    assert packed.data.shape == (3, *packed_shape(40, 70, format, group_size))
    assert packed.data.dtype == torch.uint8


def test_tables_are_what_the_kernels_take() -> None:
    assert pack(torch.ones(1, 32), "int8").layout[4] == b""
    for format in ("int4", "mxfp4"):
        assert struct.unpack("16b", pack(torch.ones(1, 32), format).layout[4]) == FORMATS[format].table
    assert len(set(FORMATS["int4"].table)) == 16
    mxfp4 = torch.tensor(FORMATS["mxfp4"].table).float() / 2
    assert torch.equal(mxfp4, torch.cat((E2M1_VALUES, -E2M1_VALUES)))


def test_inference_mode_changes_nothing() -> None:
    weight = torch.randn(40, 70)
    with torch.inference_mode(), num_threads(2):
        packed = pack(weight * 1.0, "int4")
        assert torch.equal(unpack(packed), unpack(pack(weight, "int4")))
    assert torch.equal(packed.data, pack(weight, "int4").data)
