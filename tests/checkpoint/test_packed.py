"""Packed tensors are read as transformers unpacks them, into any view; what does not fit is refused by name."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moesaic.checkpoint import packed
from moesaic.checkpoint.packed import E2M1, UnpackedWeights, pack_fp8_blocks, pack_mxfp4
from moesaic.errors import MoesaicError
from moesaic.weight_reader import WeightDirectory, fill

E4M3 = torch.float8_e4m3fn
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors are then unpacked in several chunks and divided into several reads."""
    monkeypatch.setattr(packed, "CHUNK_ELEMENTS", random.randrange(1, 200))
    monkeypatch.setattr(packed, "PART_BYTES", 4 * random.randrange(1, 400))


def opened(directory: Path, tensors: dict[str, torch.Tensor], quantization: Any = None) -> UnpackedWeights:
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    return UnpackedWeights(WeightDirectory(directory), quantization)


def read(directory: Path, tensors: dict[str, torch.Tensor], quantization: Any, name: str) -> torch.Tensor:
    """One tensor in float32, read in place and on several threads."""
    with opened(directory, tensors, quantization) as weights:
        target = torch.full(weights.shape(name), torch.nan)
        fill(weights, [(name, target)], threads=random.randrange(1, 4))
        as_bfloat16 = weights.read(name)
    assert torch.equal(as_bfloat16.nan_to_num(7), target.bfloat16().nan_to_num(7))
    return target


def random_fp8(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 100).to(E4M3)


def random_mxfp4(experts: int = 3, outputs: int = 10, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.randint(0, 256, (experts, outputs, groups, 16), dtype=torch.uint8)
    return blocks, torch.randint(90, 160, (experts, outputs, groups), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(8, 16), (9, 19), (3, 5), (1, 1), (4, 9), (3, 8, 16), (2, 9, 19)])
def test_fp8_blocks_with_smaller_last_ones(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = random_fp8(*shape)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 8)) + 0.1
    actual = read(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scale}, FP8, "x.weight")
    assert torch.equal(actual, _dequantize_fp8_weight(weight, scale, [4, 8], torch.float32))


SCALES = {
    "tensor, no dimensions": lambda: torch.rand(()) + 0.1,
    "tensor": lambda: torch.rand(1) + 0.1,
    "channel": lambda: torch.rand(12, 1) + 0.1,
    "blocks of another size": lambda: torch.rand(6, 5) + 0.1,
    "bfloat16": lambda: torch.rand(3, 4).bfloat16() + 0.1,
    "e8m0": lambda: torch.randint(100, 150, (3, 4), dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "e8m0 as bytes": lambda: torch.randint(100, 150, (3, 4), dtype=torch.uint8),
}


@pytest.mark.parametrize("name", ["x.weight_scale_inv", "x.weight_scale"])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_fp8_with_other_scales(tmp_path: Path, scale: Any, name: str) -> None:
    tensors = {"x.weight": random_fp8(12, 20), name: scale()}
    quantization = {"quant_method": "fp8", "weight_block_size": random.choice([None, [4, 5]])}
    expected = Fp8Dequantize(None)._dequantize_one(tensors["x.weight"], tensors[name], torch.float32)
    assert torch.equal(read(tmp_path, tensors, quantization, "x.weight"), expected)


def test_fp8_has_one_scale_per_row_in_one_dimension_too(tmp_path: Path) -> None:
    weight, scale = random_fp8(12, 20), torch.rand(12) + 0.1
    actual = read(tmp_path, {"x.weight": weight, "x.weight_scale": scale}, FP8, "x.weight")
    assert torch.equal(actual, weight.float() * scale[:, None])


def test_every_fp8_number_is_itself(tmp_path: Path) -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(E4M3).view(4, 64)
    actual = read(tmp_path, {"x": weight, "x_scale_inv": torch.ones(1)}, FP8, "x")
    assert torch.equal(actual.isnan(), weight.float().isnan())
    assert torch.equal(actual.nan_to_num(7), weight.float().nan_to_num(7))


def test_fused_fp8_experts_fill_interleaved_and_transposed_views(tmp_path: Path) -> None:
    weight, scale = random_fp8(2, 12, 16), torch.rand(2, 3, 2) + 0.1
    expected = _dequantize_fp8_weight(weight, scale, [4, 8], torch.float32)
    target = torch.empty(2, 16, 6, 2).permute(0, 2, 3, 1)
    with opened(tmp_path, {"experts.gate_up_proj": weight, "experts.gate_up_proj_scale_inv": scale}, FP8) as weights:
        weights.read_into("experts.gate_up_proj", target)
        assert torch.equal(target.reshape(2, 12, 16), expected)
        with pytest.raises(MoesaicError, match=r"experts.gate_up_proj of shape .* cannot fill"):
            weights.read_into("experts.gate_up_proj", torch.empty(2, 8, 24))


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_mxfp4_is_what_transformers_unpacks(tmp_path: Path, wanted: torch.dtype) -> None:
    blocks, _ = random_mxfp4(5, 51, 1)
    scales = torch.arange(255, dtype=torch.uint8)[torch.randperm(255)].view(5, 51, 1)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=wanted)
    with opened(tmp_path, {"x_blocks": blocks, "x_scales": scales}, {"quant_method": "mxfp4"}) as weights:
        target = torch.full(weights.shape("x"), torch.nan, dtype=wanted)
        fill(weights, [("x", target)], threads=random.randrange(1, 4))
    assert torch.equal(target, expected)


def test_mxfp4_scale_255_is_not_a_number(tmp_path: Path) -> None:
    blocks, scales = random_mxfp4()
    scales[1, 2, 1] = 255
    actual = read(tmp_path, {"x_blocks": blocks, "x_scales": scales}, {"quant_method": "mxfp4"}, "x")
    assert actual[1, 32:, 2].isnan().all()
    assert actual.isnan().sum() == 32


def test_mxfp4_gate_and_up_are_told_apart_while_they_are_read(tmp_path: Path) -> None:
    """gpt-oss interleaves them along its last dimension; ours has (E, 2F, D), gate first."""
    blocks, scales = random_mxfp4(experts=3, outputs=10, groups=2)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # (E, D, 2F)
    gate_up = torch.full((3, 10, 64), torch.nan)
    with opened(tmp_path, {"x_blocks": blocks, "x_scales": scales}) as weights:
        weights.read_into("x", gate_up.view(3, 2, 5, 64).permute(0, 3, 2, 1))
        assert torch.equal(gate_up[:, :5], expected[..., 0::2].mT)
        assert torch.equal(gate_up[:, 5:], expected[..., 1::2].mT)
        with pytest.raises(MoesaicError, match=r"x of shape \[3, 64, 10\] cannot fill \[3, 10, 64\]"):
            weights.read_into("x", gate_up)


def test_names_are_those_of_a_plain_checkpoint(tmp_path: Path) -> None:
    blocks, scales = random_mxfp4()
    tensors = {
        "a.weight": random_fp8(8, 8),
        "a.weight_scale_inv": torch.rand(2, 1),
        "a.input_scale": torch.rand(()),
        "a.bias": torch.randn(8),
        "experts.down_proj_blocks": blocks,
        "experts.down_proj_scales": scales,
        "experts.down_proj_bias": torch.randn(3, 10).half(),
        "embed.weight": torch.randn(4, 2).bfloat16(),
        "logit_scale": torch.randn(()),
    }
    with opened(tmp_path, tensors, FP8) as weights:
        shown = {name: (weights.shape(name), weights.stored_type(name), weights.dtype(name)) for name in weights.names}
        assert shown == {
            "a.weight": ((8, 8), "F8_E4M3", torch.bfloat16),
            "a.bias": ((8,), "F32", torch.float32),
            "experts.down_proj": ((3, 64, 10), "MXFP4", torch.bfloat16),
            "experts.down_proj_bias": ((3, 10), "F16", torch.float16),
            "embed.weight": ((4, 2), "BF16", torch.bfloat16),
            "logit_scale": ((), "F32", torch.float32),
        }
        assert {name for name in tensors if name in weights} | {"experts.down_proj"} == set(shown)
        for name in ("a.bias", "embed.weight", "experts.down_proj_bias"):
            assert torch.equal(weights.read(name), tensors[name])


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "awq", "bits": 4},
            "quant_method 'awq'; only fp8, mxfp4 and moesaic are read: use the",
        ),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"load_in_4bit": True}, "quant_method None"),
        ({"quant_method": ["fp8"]}, r"quant_method \['fp8'\]"),
        ([], "is a list, not an object"),
        ("fp8", "is a str, not an object"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size = \[128\] must be"),
        (FP8 | {"weight_block_size": [128, 0]}, "must be two positive whole numbers"),
        (FP8 | {"weight_block_size": "128"}, "must be two positive whole numbers"),
        (FP8 | {"weight_block_size": [128.0, True]}, "must be two positive whole numbers"),
    ],
)
def test_unknown_quantisation_is_refused_by_name(tmp_path: Path, quantization: Any, message: str) -> None:
    safetensors.torch.save_file({"x": torch.randn(2)}, tmp_path / "model.safetensors")
    open_files = len(os.listdir("/proc/self/fd"))
    stored = WeightDirectory(tmp_path)
    with pytest.raises(MoesaicError, match=message) as caught:
        UnpackedWeights(stored, quantization)
    assert str(caught.value).isprintable()
    assert len(os.listdir("/proc/self/fd")) == open_files


U8 = torch.uint8
BAD_TENSORS = {
    "grid too small": {"x": random_fp8(9, 8), "x_scale_inv": torch.ones(2, 1)},
    "grid of the wrong experts": {"x": random_fp8(2, 8, 8), "x_scale_inv": torch.ones(3, 2, 1)},
    "grid without experts": {"x": random_fp8(2, 8, 8), "x_scale_inv": torch.ones(2, 1)},
    "grid of four dimensions": {"x": random_fp8(8, 8), "x_scale_inv": torch.ones(1, 1, 2, 1)},
    "empty grid": {"x": random_fp8(8, 8), "x_scale_inv": torch.ones(0, 1)},
    "scales are whole numbers": {"x": random_fp8(8, 8), "x_scale_inv": torch.ones(2, 1, dtype=torch.int32)},
    "scales of a vector": {"x": random_fp8(8), "x_scale_inv": torch.ones(1)},
    "blocks of three dimensions": {"x_blocks": torch.ones(3, 2, 16, dtype=U8), "x_scales": torch.ones(3, 2, dtype=U8)},
    "blocks of 8 bytes": {"x_blocks": torch.ones(3, 2, 1, 8, dtype=U8), "x_scales": torch.ones(3, 2, 1, dtype=U8)},
    "scales of another shape": {
        "x_blocks": torch.ones(3, 2, 1, 16, dtype=U8),
        "x_scales": torch.ones(3, 2, 2, dtype=U8),
    },
    "scales are floats": {"x_blocks": torch.ones(3, 2, 1, 16, dtype=U8), "x_scales": torch.ones(3, 2, 1)},
    "plain and packed": {
        "x": torch.ones(3, 32, 2),
        "x_blocks": torch.ones(3, 2, 1, 16, dtype=U8),
        "x_scales": torch.ones(3, 2, 1, dtype=U8),
    },
}


@pytest.mark.parametrize("tensors", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_contradict_their_scales_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(MoesaicError, match=r"\bx(_scale_inv|_blocks|_scales)?\b.* in |both x and x_blocks"):
        opened(tmp_path, tensors, FP8)


@pytest.mark.parametrize(
    "tensors",
    [{"x": random_fp8(4, 4)}, {"x": torch.ones(2, dtype=torch.int8)}, {"x": torch.ones(2, dtype=torch.int64)}],
    ids=["F8_E4M3", "I8", "I64"],
)
def test_types_without_scales_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with opened(tmp_path, tensors, FP8) as weights:
        kind = weights.stored_type("x")
        with pytest.raises(MoesaicError, match=f"tensor x in .* has type {kind}"):
            weights.dtype("x")


def test_a_row_too_long_to_unpack_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MAX_ROW_ELEMENTS", 20)
    with pytest.raises(MoesaicError, match=r"tensor x in .* has rows of 21 numbers"):
        opened(tmp_path, {"x": random_fp8(1, 21), "x_scale_inv": torch.ones(1)}, FP8)


def test_tensors_without_elements_are_read(tmp_path: Path) -> None:
    blocks, scales = random_mxfp4(experts=0)
    tensors = {"x": random_fp8(0, 8), "x_scale_inv": torch.ones(0, 1), "y_blocks": blocks, "y_scales": scales}
    with opened(tmp_path, tensors, FP8) as weights:
        assert [weights.read(name).shape for name in "xy"] == [(0, 8), (0, 64, 10)]


def test_packed_mxfp4_is_the_nearest_and_stays_what_it_was(tmp_path: Path) -> None:
    tensor = torch.randn(3, 64, 10) * torch.exp2(torch.randint(-20, 20, (3, 64, 10)))
    tensor[0, :32, 0] = 0
    tensor[0, :8, 1] = torch.tensor([6.0, 0.25, -0.75, 1.25, 1.75, -2.5, 3.5, 5.0])  # ties under scale 1
    tensor[0, 8:32, 1] = 0
    blocks, scales = pack_mxfp4(tensor)
    actual = read(tmp_path, {"x_blocks": blocks, "x_scales": scales}, None, "x")
    assert actual[0, :8, 1].tolist() == [6, 0, -1, 1, 2, -2, 4, 4]
    steps = torch.exp2(scales.double() - 127).repeat_interleave(32, dim=-1).mT  # (E, in, out)
    candidates = torch.tensor(E2M1, dtype=torch.float64) * steps[..., None]
    nearest = (candidates - tensor.double()[..., None]).abs().amin(-1)
    assert torch.equal((actual.double() - tensor).abs(), nearest)
    largest = tensor.mT.unflatten(-1, (-1, 32)).abs().amax(-1)
    in_steps = largest.double() / torch.exp2(scales.double() - 127)
    assert ((in_steps >= 4) & (in_steps < 8) | (largest == 0)).all()
    again = pack_mxfp4(actual)
    assert torch.equal(read(tmp_path, dict(zip(("x_blocks", "x_scales"), again, strict=True)), None, "x"), actual)


@pytest.mark.parametrize("shape", [(8, 16), (9, 19), (2, 9, 3)])
def test_packed_fp8_is_near_and_stays_what_it_was(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape) * torch.exp2(torch.randint(-10, 10, shape))
    tensor[..., :4, :8] = 0
    weight, factors = pack_fp8_blocks(tensor, (4, 8))
    actual = read(tmp_path, {"x": weight, "x_scale_inv": factors}, FP8, "x")
    step = factors.repeat_interleave(4, -2)[..., : shape[-2], :].repeat_interleave(8, -1)[..., : shape[-1]]
    # Three bits of mantissa; 2 ** -9 is the smallest number beside 0.
    assert ((actual - tensor).abs() <= torch.maximum(tensor.abs() * 2**-4, step * 2**-10) * 1.001).all()
    assert (weight.float().abs().amax() == 448) | (tensor == 0).all()
    assert torch.equal(pack_fp8_blocks(actual, (4, 8))[0].float(), weight.float())
