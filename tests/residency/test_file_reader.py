"""Parts of files, through the page cache and past it, and files that change under the reader."""

import os
from pathlib import Path

import pytest
import torch

from moesaic.errors import MoesaicError
from moesaic.residency import file_reader
from moesaic.residency.file_reader import PAGE, FileReader
from moesaic.safetensors_file import Extent

SIZE = 5 * PAGE + 123
WAYS = pytest.mark.parametrize("direct", [False, True], ids=["through the cache", "past the cache"])


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, bytes]:
    content = bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8).tolist())
    (tmp_path / "weights").write_bytes(content)
    return tmp_path / "weights", content


def read(reader: FileReader, extent: Extent) -> bytes:
    target = torch.zeros(extent.nbytes, dtype=torch.uint8)
    reader.read_into(extent, target)
    return bytes(target.tolist())


@WAYS
@pytest.mark.parametrize(
    ("offset", "count"), [(0, PAGE), (PAGE, 2 * PAGE), (1, 1), (7, 3 * PAGE), (0, SIZE), (PAGE + 1, 0), (SIZE - 5, 5)]
)
def test_any_part_is_read_to_the_byte(file: tuple[Path, bytes], direct: bool, offset: int, count: int) -> None:
    path, content = file
    assert read(FileReader(direct=direct), Extent(path, offset, count)) == content[offset : offset + count]


def test_parts_longer_than_the_staging_memory(file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reader, "STAGING_BYTES", 2 * PAGE)
    path, content = file
    assert read(FileReader(direct=True), Extent(path, 100, SIZE - 100)) == content[100:]


@WAYS
def test_a_file_that_was_cut_short_is_refused(file: tuple[Path, bytes], direct: bool) -> None:
    path, _ = file
    reader, extent = FileReader(direct=direct), Extent(path, 0, SIZE)
    read(reader, extent)
    os.truncate(path, 2 * PAGE)
    with pytest.raises(MoesaicError, match=f"has {2 * PAGE:,} bytes in place of {SIZE:,} while it was in use"):
        read(reader, extent)


@WAYS
def test_an_extent_beyond_the_end_is_refused(file: tuple[Path, bytes], direct: bool) -> None:
    with pytest.raises(MoesaicError, match=r"weights ends at byte .*, and more was there"):
        read(FileReader(direct=direct), Extent(file[0], PAGE, SIZE))


def test_a_file_that_was_written_to_is_refused(file: tuple[Path, bytes]) -> None:
    path, content = file
    reader = FileReader()
    read(reader, Extent(path, 0, 1))
    path.write_bytes(content[::-1])
    os.utime(path, ns=(0, 0))
    with pytest.raises(MoesaicError, match="was written to while it was in use; load the model again"):
        read(reader, Extent(path, 0, 1))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match=r"cannot read .*nothing: No such file"):
        read(FileReader(), Extent(tmp_path / "nothing", 0, 1))


def test_the_probe_decides_and_reads_no_part_twice(file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, seen = FileReader(), list[tuple[bool, int]]()
    real = reader.read_into

    def noted(extent: Extent, target: torch.Tensor) -> None:
        seen.append((reader.direct, extent.offset))
        real(extent, target)

    monkeypatch.setattr(reader, "read_into", noted)
    reader.probe([Extent(file[0], PAGE * index, PAGE) for index in range(4)])
    assert seen == [(False, 0), (False, 2 * PAGE), (True, PAGE), (True, 3 * PAGE)]
