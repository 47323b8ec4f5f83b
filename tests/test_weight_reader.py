"""Weights arrive, element by element, in whatever memory is given. Oracle: the safetensors library."""

import itertools
import json
import os
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moesaic import weight_reader
from moesaic.errors import MoesaicError
from moesaic.weight_reader import PLAIN_DTYPES, WeightDirectory, fill, read_safetensors
from moesaic.weights_io import SAFETENSORS_DTYPES, write_safetensors

PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a few elements then pass the buffer in several pieces and are divided into several reads."""
    monkeypatch.setattr(weight_reader, "BUFFER_BYTES", 8 * random.randrange(1, 6))
    monkeypatch.setattr(weight_reader, "PART_BYTES", 8 * random.randrange(2, 20))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every type with odd sizes, an empty one and a scalar."""
    tensors = {
        f"type.{label}": (torch.randn(3, 5 + index) * 50).abs().to(dtype)
        for index, (dtype, label) in enumerate(SAFETENSORS_DTYPES.items())
    }
    return tensors | {"scalar": torch.randn((), dtype=torch.bfloat16), "empty": torch.empty(0, 7)}


def save(tensors: dict[str, torch.Tensor], directory: Path) -> Path:
    path = directory / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    return path


def test_whole_tensors_are_those_of_the_library_in_memory_of_their_own(tmp_path: Path) -> None:
    expected = random_tensors()
    path = save(expected, tmp_path)
    whole_file = read_safetensors(path)
    with WeightDirectory(tmp_path) as weights:
        one_by_one = {name: weights.read(name) for name in weights.names}
        for name, tensor in expected.items():
            assert weights.shape(name) == tensor.shape
            assert weights.stored_type(name) == SAFETENSORS_DTYPES[tensor.dtype]
    path.write_bytes(b"\xff" * path.stat().st_size)
    for actual in (whole_file, one_by_one):
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(as_bits(actual[name]), as_bits(tensor)), name


def random_view(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A view of `shape` with strides in any order and gaps, and the NaN-filled memory that it lies in."""
    order = random.sample(range(len(shape)), len(shape))
    padded = [shape[axis] + random.randrange(3) for axis in order]
    memory = torch.full(padded, torch.nan, dtype=dtype)
    view = memory[tuple(slice(padded[place] - shape[axis], None) for place, axis in enumerate(order))]
    return view.permute([order.index(axis) for axis in range(len(shape))]), memory


def random_split(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with some dimensions divided into two, or joined with the next."""
    sizes = []
    for size in shape:
        factor = random.choice([factor for factor in range(1, size + 1) if size % factor == 0])
        sizes += random.choice([[size], [factor, size // factor]])
    if len(sizes) > len(shape) + 1:
        place = random.randrange(len(sizes) - 1)
        sizes[place : place + 2] = [sizes[place] * sizes[place + 1]]
    return tuple(sizes)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize(("stored", "wanted"), list(itertools.product(PLAIN.values(), repeat=2)))
def test_any_view_of_any_float_type_is_filled_and_nothing_beside_it(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensor = torch.randn(random.randrange(1, 5), random.choice([4, 6]), random.randrange(1, 8)).to(stored)
    save({"other": torch.zeros(3), "x": tensor}, tmp_path)
    with WeightDirectory(tmp_path) as weights:
        for _ in range(4):
            view, memory = random_view(random_split(tuple(tensor.shape)), wanted)
            weights.read_into("x", view)
            assert torch.equal(view, tensor.reshape(view.shape).to(wanted))
            assert memory.isnan().sum() == memory.numel() - tensor.numel()
        contiguous = torch.nn.Parameter(torch.full(tensor.shape, torch.nan, dtype=wanted))
        weights.read_into("x", contiguous)
        assert torch.equal(contiguous, tensor.to(wanted))


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_threads_read_what_one_does(tmp_path: Path, threads: int) -> None:
    tensors = {f"t{index}": torch.randn(random.randrange(9), random.randrange(1, 9)) for index in range(40)}
    names = list(tensors)
    files = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file_name, part in files.items():
        write_safetensors(tmp_path / file_name, {name: tensors[name] for name in part})
    weight_map = {name: file_name for file_name, part in files.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    targets = {
        name: random_view(tuple(tensor.shape), random.choice(PLAIN_DTYPES))[0] for name, tensor in tensors.items()
    }
    with WeightDirectory(tmp_path) as weights:
        fill(weights, targets.items(), threads)
        for name, tensor in tensors.items():
            assert torch.equal(targets[name], tensor.to(targets[name].dtype)), name
        os.truncate(tmp_path / "b.safetensors", (tmp_path / "b.safetensors").stat().st_size - 1)
        with pytest.raises(MoesaicError, match="cut short"):
            fill(weights, targets.items(), threads)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure a peak")
@pytest.mark.parametrize(
    "target",
    [torch.empty(30_000, 512, dtype=torch.bfloat16), torch.empty(512, 30_000).t()],
    ids=["in place", "converted, transposed"],
)
def test_reading_needs_no_memory_beside_the_target(tmp_path: Path, target: torch.Tensor) -> None:
    def memory(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    tensor = torch.randn(30_000, 512).to(torch.bfloat16)
    write_safetensors(tmp_path / "model.safetensors", {"x": tensor})
    target.fill_(1)
    with WeightDirectory(tmp_path) as weights:
        weights.read_into("x", target)
        target.fill_(1)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        weights.read_into("x", target)
        assert memory("VmHWM") - before < 6 * 2**20 < tensor.nbytes / 4
    assert torch.equal(target, tensor.to(target.dtype))


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_a_file_that_shrinks_while_it_is_open_is_named(tmp_path: Path, wanted: torch.dtype) -> None:
    path = save({"x": torch.randn(100, 10)}, tmp_path)
    with WeightDirectory(tmp_path) as weights:
        os.truncate(path, path.stat().st_size - random.randrange(1, 4000))
        with pytest.raises(MoesaicError, match=r"model\.safetensors now ends at byte .* inside tensor x"):
            weights.read_into("x", torch.empty(100, 10, dtype=wanted))


def test_a_target_of_another_size_is_refused(tmp_path: Path) -> None:
    save({"x": torch.randn(4, 6)}, tmp_path)
    with WeightDirectory(tmp_path) as weights, pytest.raises(MoesaicError, match=r"x .* \[4, 6\].* fit \[5, 5\]"):
        weights.read_into("x", torch.empty(5, 5))


def test_a_closed_directory_reads_nothing(tmp_path: Path) -> None:
    save({"x": torch.randn(4, 6)}, tmp_path)
    with WeightDirectory(tmp_path) as weights:
        pass
    with pytest.raises(MoesaicError, match="cannot read tensor x"):
        weights.read("x")
