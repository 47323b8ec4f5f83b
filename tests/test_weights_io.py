"""Directories appear whole or not at all; safetensors agree with the safetensors library in both directions."""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moesaic.errors import MoesaicError
from moesaic.weights_io import (
    SAFETENSORS_DTYPES,
    WeightDirectory,
    atomic_directory,
    read_json,
    read_safetensors,
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


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert torch.equal(actual[name], tensor), name


def test_written_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = random_tensors()
    digest = write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    assert_same(safetensors.torch.load_file(tmp_path / "a.safetensors"), tensors)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert digest.size == len(data)
    assert digest.sha256 == hashlib.sha256(data).hexdigest()


def test_reading_what_the_library_wrote_gives_memory_of_its_own(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in random_tensors().items()}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path)
    read = read_safetensors(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same(read, tensors)


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


def broken_header(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        broken_header(b"{}", length=2**63),
        broken_header(b"{}", length=2**26),
        broken_header(b"not json"),
        broken_header(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', data=b"\0" * 15),
        broken_header(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', data=b"\0" * 17),
        broken_header(b'{"x":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}', data=b"\0" * 16),
        broken_header(b'{"x":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}', data=b"\0" * 16),
        broken_header(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}', data=b"\0" * 16),
        broken_header(b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}', data=b"\0" * 16),
        broken_header(b'{"x":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', data=b"\0" * 16),
    ],
)
def test_broken_safetensors_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(MoesaicError, match=r"model.safetensors is not a readable safetensors file"):
        WeightDirectory(tmp_path)


@pytest.mark.parametrize(
    "file_name", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 7, ""]
)
def test_weight_map_may_not_leave_the_directory(tmp_path: Path, file_name: object) -> None:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", directory / "sub" / "x.safetensors", directory / "x.bin"):
        write_safetensors(place, {"x": torch.zeros(1)})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file_name}}))
    with pytest.raises(MoesaicError, match="places tensor x"):
        WeightDirectory(directory)


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    write_safetensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}))
    with pytest.raises(MoesaicError, match="lists tensor y"):
        WeightDirectory(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "z": "b.safetensors"}}))
    with pytest.raises(MoesaicError, match="x lies in two files"):
        WeightDirectory(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(MoesaicError, match=r"gone\.safetensors"):
        WeightDirectory(tmp_path)


def test_pickled_weights_are_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MoesaicError, match=r"pickled weights.*save_pretrained"):
        WeightDirectory(tmp_path)


def test_quantised_types_are_refused_by_name(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with WeightDirectory(tmp_path) as weights, pytest.raises(MoesaicError, match=r"x .* has type F8_E4M3"):
        weights.dtype("x")
