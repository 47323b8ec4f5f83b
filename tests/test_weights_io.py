"""Directories appear whole or not at all; the safetensors library reads what is written."""

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from moesaic.errors import MoesaicError
from moesaic.weight_reader import WeightDirectory
from moesaic.weights_io import (
    SAFETENSORS_DTYPES,
    PlannedTensor,
    atomic_directory,
    read_json,
    write_safetensors,
    write_sharded,
)


def random_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every type, with odd sizes, an empty one, a scalar and views that are not contiguous."""
    tensors = {}
    for index, dtype in enumerate(SAFETENSORS_DTYPES):
        tensors[f"type.{index}"] = (torch.randn(3, 5 + index) * 50).abs().to(dtype)
    tensors["scalar"] = torch.tensor(random.random(), dtype=torch.bfloat16)
    tensors["empty"] = torch.empty(0, 7)
    tensors["transposed"] = torch.randn(4, 6).t()
    tensors["slice"] = torch.randn(8, 4)[::2, 1:]
    return tensors


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Types of 8 bits cannot be compared themselves."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert torch.equal(as_bits(actual[name]), as_bits(tensor)), name


def test_written_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = random_tensors()
    digest = write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    assert_same(safetensors.torch.load_file(tmp_path / "a.safetensors"), tensors)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert digest.size == len(data)
    assert digest.sha256 == hashlib.sha256(data).hexdigest()


def test_shards_hold_every_tensor_once_and_respect_the_limit(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.randn(random.randrange(1, 300)) for index in range(20)}
    limit = 1600
    write_sharded(tmp_path, tensors, max_shard_bytes=limit)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) >= sum(tensor.nbytes for tensor in tensors.values()) / limit
    for shard in shards:
        assert sum(tensor.nbytes for tensor in safetensors.torch.load_file(shard).values()) <= limit
    with WeightDirectory(tmp_path) as weights:
        assert_same({name: weights.read(name) for name in weights.names}, tensors)
        assert weights.shape("t3") == tuple(tensors["t3"].shape)


def planned(tensors: dict[str, torch.Tensor]) -> Iterator[PlannedTensor]:
    for name, tensor in tensors.items():
        yield PlannedTensor(name, tuple(tensor.shape), tensor.dtype, tensor.clone)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200])
def test_planned_tensors_become_the_same_files(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = random_tensors()
    for name, form in (("tensors", tensors), ("planned", planned(tensors))):
        (tmp_path / name).mkdir()
        write_sharded(tmp_path / name, form, max_shard_bytes)
    files = sorted(os.listdir(tmp_path / "tensors"))
    assert files == sorted(os.listdir(tmp_path / "planned"))
    assert len(files) > 3 or max_shard_bytes == 10**9
    for name in files:
        assert (tmp_path / "planned" / name).read_bytes() == (tmp_path / "tensors" / name).read_bytes()


def test_a_planned_tensor_exists_only_while_it_is_written(tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def make() -> torch.Tensor:
        assert all(earlier() is None for earlier in made)
        array = np.zeros((3, 5), dtype=np.float32)
        made.append(weakref.ref(array))
        return torch.from_numpy(array)  # keeps the array alive while anything refers to its memory

    write_sharded(tmp_path, [PlannedTensor(f"t{index}", (3, 5), torch.float32, make) for index in range(8)], 150)
    assert len(made) == 8
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_what_lies_otherwise_in_memory_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.weights_io.PART_BYTES", 100)
    tensors = {"transposed": torch.randn(7, 9, 4).permute(2, 0, 1), "rows": torch.randn(4, 30).t()}
    tensors["copies"] = torch.randn(3, 1).expand(20, 3, 5)
    plan = [PlannedTensor(name, (tensor.numel(),), tensor.dtype, tensor.detach) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "x.safetensors", plan)
    expected = {name: tensor.flatten() for name, tensor in tensors.items()}
    assert_same(safetensors.torch.load_file(tmp_path / "x.safetensors"), expected)


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4), torch.zeros(3, 4, dtype=torch.bfloat16)])
def test_a_planned_tensor_that_becomes_another_is_an_error(tmp_path: Path, tensor: torch.Tensor) -> None:
    plan = PlannedTensor("x", (3, 4), torch.float32, lambda: tensor)
    with pytest.raises(ValueError, match=r"tensor x was planned as torch.float32 \[3, 4\], but is"):
        write_safetensors(tmp_path / "x.safetensors", [plan])


def test_directory_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "state"
    with atomic_directory(target) as directory:
        (directory / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("failure", [RuntimeError("model went away"), KeyboardInterrupt()])
def test_failed_write_keeps_the_old_directory(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "state"
    with atomic_directory(target) as directory:
        (directory / "file").write_text("old")

    def write() -> None:
        with atomic_directory(target) as directory:
            (directory / "file").write_text("new")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert (target / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_successful_write_replaces_the_whole_old_directory(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_directory(tmp_path / "state") as directory:
            (directory / name).write_text(name)
    assert os.listdir(tmp_path / "state") == ["second"]
    assert os.listdir(tmp_path) == ["state"]


def test_leftovers_of_killed_writers_go_and_living_ones_stay(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from moesaic.weights_io import atomic_directory
        with atomic_directory(Path(sys.argv[1])) as directory:
            (directory / "half").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """)
    writers = []
    for name in ("killed", "living"):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / name)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writers.append(writer)
    try:
        assert len(list(tmp_path.glob(".*.writing-*"))) == 2
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        with atomic_directory(tmp_path / "other") as directory:
            (directory / "file").write_text("x")
        leftovers = [path.name for path in tmp_path.glob(".*")]
        assert len(leftovers) == 1
        assert leftovers[0].startswith(".living.writing-")
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def write_tensors_until_full(parent: Path, old: str) -> str:
    """Tries to replace parent/state (holding `old`) by 3 MB and returns the error message."""
    target = parent / "state"
    with atomic_directory(target) as directory:
        (directory / "file").write_text(old)
    tensors = {"x": torch.zeros(750_000)}
    with pytest.raises(MoesaicError) as caught, atomic_directory(target, bytes_needed=3_000_000) as directory:
        write_safetensors(directory / "x.safetensors", tensors)
    assert (target / "file").read_text() == old
    assert os.listdir(parent) == ["state"]
    return str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_leaves_everything_as_it_was(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        message = write_tensors_until_full(tmp_path, old="good state")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert "no space left on device" in message
    assert "3,000,000 bytes needed and 1,0" in message
    assert "\n" not in message


def test_file_size_limit_leaves_everything_as_it_was(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        message = write_tensors_until_full(tmp_path, old="good state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "file too large, 3,000,000 bytes needed" in message


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MoesaicError, match=r"cannot write .*file/state"), atomic_directory(tmp_path / "file" / "state"):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b"[1, 2]", "holds a JSON list"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
        (b'{"a": "' + b" " * 3000 + b'"}', "3,009 bytes"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(MoesaicError, match=message) as caught:
        read_json(path, max_bytes=200_000 if len(content) != 3009 else 1000)
    assert "config.json" in str(caught.value)


def test_keys_may_be_required_to_be_unique(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}')
    assert read_json(path) == {"a": 1, "b": {"c": 3, "d": 2}}
    with pytest.raises(MoesaicError, match=r"config.json is not valid JSON: the key 'c' appears twice"):
        read_json(path, unique=True)
