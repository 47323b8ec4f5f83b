"""No file makes reading fail in another way than with a MoesaicError. Oracle: the safetensors library."""

import json
import os
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import MoesaicError
from moesaic.safetensors_file import TYPE_BITS, parse_header
from moesaic.weight_reader import WeightDirectory
from moesaic.weights_io import write_safetensors


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def file_bytes(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(kind: str = "F32", shape: str = "[4]", offsets: str = "[0,16]", name: str = "x") -> str:
    return f'"{name}":{{"dtype":"{kind}","shape":{shape},"data_offsets":{offsets}}}'


BROKEN_HEADERS = {
    "unknown type": entry(kind="F99"),
    "type is a list": '"x":{"dtype":["F32"],"shape":[4],"data_offsets":[0,16]}',
    "shape and bytes differ": entry(shape="[5]"),
    "negative shape": entry(shape="[-4]"),
    "two negative sizes": entry(shape="[-2,-2]"),
    "fraction in shape": entry(shape="[4.0]"),
    "truth value in shape": entry(shape="[4,true]"),
    "shape overflows 64 bits": entry(shape="[4294967296,4294967296,4]", offsets="[0,0]"),
    "terabytes": entry(shape="[1099511627776]", offsets="[0,4398046511104]"),
    "empty with strides beyond 64 bits": entry()
    + ","
    + entry(shape="[0,4611686018427387904,4]", offsets="[0,0]", name="y"),
    "range reversed": entry(offsets="[16,0]"),
    "negative range": entry(offsets="[-16,0]"),
    "outside the file": entry(offsets="[16,32]"),
    "overlap": entry(offsets="[0,16]") + "," + entry(shape="[2]", offsets="[8,16]", name="y"),
    "same bytes twice": entry() + "," + entry(name="y"),
    "gap": entry(shape="[1]", offsets="[0,4]") + "," + entry(shape="[2]", offsets="[8,16]", name="y"),
    "gap at the start": entry(shape="[3]", offsets="[4,16]"),
    "bytes left over": entry(shape="[3]", offsets="[0,12]"),
    "name twice": entry(shape="[2]", offsets="[0,8]") + "," + entry(shape="[2]", offsets="[8,16]"),
    "key twice": '"x":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}',
    "no shape": '"x":{"dtype":"F32","data_offsets":[0,16]}',
    "three offsets": entry(offsets="[0,8,16]"),
    "entry is a number": '"x":3',
    "name that is not printable": entry(name="x\\u001b[31m"),
    "name that is half a character": entry(name="x\\ud800"),
    "part of a byte": entry(kind="F4", shape="[31]"),
}


@pytest.mark.parametrize("header", BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: str) -> None:
    encoded = b"{" + header.encode() + b"}"
    with pytest.raises(ValueError, match=r"."):
        parse_header(encoded, 8 + len(encoded) + 16)
    assert_refused(tmp_path, file_bytes(encoded, b"\0" * 16))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        file_bytes(b"{}", length=2**63),
        file_bytes(b"{}", length=2**26),
        file_bytes(b"not json"),
        file_bytes(b"[]"),
        file_bytes(b"[" * 100_000),
        file_bytes(b'{"x":' * 100_000),
        file_bytes(b'{"x":"\xff"}'),
        file_bytes(b'{"__metadata__":{"a":' + b"9" * 10_000 + b"}}"),
    ],
)
def test_what_is_not_safetensors_at_all_is_refused(tmp_path: Path, content: bytes) -> None:
    assert_refused(tmp_path, content)


def test_types_that_are_not_plain_are_named(tmp_path: Path) -> None:
    entries = entry("F4", "[4]", "[0,2]", "fp4") + "," + entry("F8_E4M3", "[2]", "[2,4]", "fp8")
    (tmp_path / "model.safetensors").write_bytes(file_bytes(f"{{{entries}}}".encode(), b"\0" * 4))
    with WeightDirectory(tmp_path) as weights:
        assert (weights.stored_type("fp4"), weights.stored_type("fp8")) == ("F4", "F8_E4M3")
        for name in weights.names:
            with pytest.raises(MoesaicError, match=rf"{name} .* has type {weights.stored_type(name)}"):
                weights.dtype(name)
        with pytest.raises(MoesaicError, match=r"fp4 .* has type F4, which is not supported"):
            weights.read("fp4")


def test_truth_values_are_true_or_false_whatever_the_byte(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}}'
    (tmp_path / "model.safetensors").write_bytes(file_bytes(header, b"\0\1\7"))
    with WeightDirectory(tmp_path) as weights:
        assert as_bits(weights.read("x")).tolist() == [0, 1, 1]


def assert_refused(directory: Path, content: bytes) -> None:
    """In one printable line, with no file left open, and without memory for what the header claims."""
    (directory / "model.safetensors").write_bytes(content)
    open_files = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    with pytest.raises(MoesaicError, match=r"model.safetensors is not a readable safetensors file") as caught:
        WeightDirectory(directory)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert peak < 2**20


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(MoesaicError, match="not a regular file"):
        WeightDirectory(tmp_path)


def open_all(directory: Path) -> dict[str, torch.Tensor] | None:
    """Every tensor, or None where a MoesaicError refused the files; any other exception is a failure."""
    try:
        with WeightDirectory(directory) as weights:
            return {
                name: weights.read(name)
                for name in weights.names
                if weights.stored_type(name) in ("F64", "F32", "F16", "BF16")
            }
    except MoesaicError:
        return None


VALID_HEADER = (
    b'{"__metadata__":{"format":"pt"},'
    b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}'
)
MUTATION = st.tuples(st.sampled_from(["flip", "delete", "insert", "copy"]), st.integers(0, 400), st.integers(0, 400))


def mutated(content: bytes, mutations: list[tuple[str, int, int]]) -> bytes:
    for kind, place, value in mutations:
        place %= len(content) + 1
        if kind == "flip":
            content = (
                content[:place]
                + bytes(byte ^ (1 << value % 8) for byte in content[place : place + 1])
                + content[place + 1 :]
            )
        elif kind == "delete":
            content = content[:place] + content[place + 1 + value % 8 :]
        elif kind == "insert":
            content = content[:place] + b'0123456789-.e[]{},:" \\'[value % 22 :][:1] + content[place:]
        else:
            content = content[:place] + content[value : value + 40] + content[place:]
    return content


@given(st.lists(MUTATION, min_size=1, max_size=4), st.booleans(), st.binary(min_size=32, max_size=32))
@settings(max_examples=150)
def test_mutated_files_are_read_as_the_library_reads_them_or_refused(
    mutations: list[tuple[str, int, int]], header_only: bool, data: bytes
) -> None:
    content = (
        file_bytes(mutated(VALID_HEADER, mutations), data)
        if header_only
        else mutated(file_bytes(VALID_HEADER, data), mutations)
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        path.write_bytes(content)
        actual = open_all(Path(directory))
        if actual is not None:
            expected = safetensors.torch.load_file(path)
            for name, tensor in actual.items():
                assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
                assert torch.equal(as_bits(tensor), as_bits(expected[name]))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-20, 40)
    | st.integers()
    | st.floats()
    | st.sampled_from(["F32", "U8", "F4", "x"])
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.fixed_dictionaries({"dtype": inner, "shape": inner, "data_offsets": inner})
    ),
    max_leaves=12,
)


@given(st.binary(max_size=60) | st.builds(lambda value: json.dumps(value).encode(), JSON), st.integers(0, 200))
def test_any_header_is_parsed_or_refused(header: bytes, file_bytes: int) -> None:
    try:
        entries = parse_header(header, file_bytes)
    except (ValueError, RecursionError):
        return
    ends = [8 + len(header)]
    for parsed in entries.values():
        assert parsed.offset == ends[-1]
        ends.append(parsed.offset + TYPE_BITS[parsed.type] * torch.Size(parsed.shape).numel() // 8)
    assert ends[-1] == file_bytes


@given(
    st.binary(max_size=60)
    | st.builds(lambda value: json.dumps({"weight_map": value}).encode(), JSON)
    | st.builds(
        lambda value: json.dumps({"weight_map": value}).encode(),
        st.dictionaries(
            st.sampled_from(["a", "b", "c"]), st.sampled_from(["1.safetensors", "2.safetensors"]) | st.text()
        ),
    )
)
def test_any_index_is_followed_or_refused(index: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "model.safetensors.index.json").write_bytes(index)
        files = {"1.safetensors": {"a": torch.randn(2)}, "2.safetensors": {"b": torch.randn(3)}}
        for file_name, tensors in files.items():
            write_safetensors(directory / file_name, tensors)
        actual = open_all(directory)
        if actual is not None:
            named = set(json.loads(index)["weight_map"].values())
            expected = {key: tensor for file_name in named for key, tensor in files[file_name].items()}
            assert actual.keys() == expected.keys()
            assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    "file_name", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 7, "", "x\n.safetensors"]
)
def test_weight_map_may_not_leave_the_directory(tmp_path: Path, file_name: object) -> None:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", directory / "sub" / "x.safetensors", directory / "x.bin"):
        write_safetensors(place, {"x": torch.zeros(1)})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file_name}}))
    with pytest.raises(MoesaicError, match="places tensor x") as caught:
        WeightDirectory(directory)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ('{"x": "a.safetensors", "y": "a.safetensors"}', "lists tensor y in a.safetensors, which does not hold it"),
        ('{"x": "a.safetensors", "z": "b.safetensors"}', "x lies in two files"),
        ('{"x": "a.safetensors", "z": "a.safetensors", "q": "c.safetensors"}', "lists tensor z in a.safetensors"),
        ('{"x": "a.safetensors", "x": "b.safetensors"}', "the key 'x' appears twice"),
        ('{"x": "gone.safetensors"}', r"gone\.safetensors is missing; download"),
        ("{}", "has no weight_map"),
        ("[]", "has no weight_map"),
    ],
)
def test_index_and_files_must_agree(tmp_path: Path, weight_map: str, message: str) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    write_safetensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)})
    write_safetensors(tmp_path / "c.safetensors", {"z": torch.zeros(1)})
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MoesaicError, match=message):
        WeightDirectory(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_pickled_weights_are_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MoesaicError, match=r"pickled weights.*save_pretrained"):
        WeightDirectory(tmp_path)
