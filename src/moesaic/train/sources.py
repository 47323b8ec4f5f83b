"""Documents from wherever text lies: the standard library, files, folders, JSONL, parquet, the Hugging Face hub.

`documents` reads lazily and in one pass. Every document says whether it is held out for validation:

- `stdlib`: whole files, chosen by a hash of their path (see `stdlib_corpus`);
- a text file: its last part;
- everything else: as many documents of each domain, evenly spread, as keep the held-out share at the fraction.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from moesaic.errors import MoesaicError, UsageError
from moesaic.train import stdlib_corpus

MAX_HELD_OUT_BYTES = 16 * 2**20
"""Validation never takes more than this from a source."""

_DOCUMENT_BYTES = 16 * 2**10  # a text file is cut at the first blank line after this many bytes,
_MAX_DOCUMENT_BYTES = 64 * 2**10  # or here when none comes
_SNIFFED_BYTES = 8192
_MAX_FILE_DOMAINS = 12  # more files than this at the top of a folder make one domain together
_ROWS_PER_READ = 256


@dataclass(frozen=True)
class Document:
    """A piece of text that ends with an end-of-text token of its own."""

    text: str
    domain: str
    name: str
    held_out: bool = False


def documents(source: str, *, text_field: str = "text", validation_fraction: float = 0.0) -> Iterator[Document]:
    """The documents of `source` (a `data.source` value), `validation_fraction` of their text held out.

    Held-out documents of `stdlib` and of a single text file come first; elsewhere they come as the pass meets them.
    Raises UsageError for a source that is not there or lacks the text field, MoesaicError for text that is not UTF-8.
    """
    if source == "stdlib":
        for part in stdlib_corpus.read(validation_fraction):
            yield Document(part.text, part.domain, part.name, part.held_out)
        return
    if source.startswith("hub:"):
        yield from _hold_out(_hub_documents(source, text_field), validation_fraction)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _hold_out(_folder_documents(path, text_field), validation_fraction)
    elif not path.exists():
        raise UsageError(f"no data at {path}; name a file, a folder, hub:NAME or stdlib")
    elif path.suffix in _RECORD_READERS:
        yield from _hold_out(_RECORD_READERS[path.suffix](path, text_field, path.stem), validation_fraction)
    else:
        yield from _text_file_with_tail_held_out(path, validation_fraction)


def _hold_out(stream: Iterable[Document], fraction: float) -> Iterator[Document]:
    """Mark documents as held out so that each domain's share of bytes stays near `fraction` throughout.

    A domain's first document is for training, its second is held out, and then whenever the share has fallen
    below the fraction; so a domain of two documents or more is always in both parts.
    """
    seen: Counter[str] = Counter()
    held_out: Counter[str] = Counter()
    for document in stream:
        domain, size = document.domain, len(document.text.encode("utf-8"))
        due = seen[domain] > 0 and held_out[domain] < fraction * (seen[domain] + size)
        take = due and held_out.total() + size <= MAX_HELD_OUT_BYTES
        seen[domain] += size
        held_out[domain] += size if take else 0
        yield replace(document, held_out=take)


def _text_file_with_tail_held_out(path: Path, fraction: float) -> Iterator[Document]:
    size = path.stat().st_size
    tail = min(int(size * fraction), MAX_HELD_OUT_BYTES)
    with _opened(path) as file:
        cut = _line_start(file, size - tail) if tail else size
        for document in _chunks(file, path, path.stem, start=cut, end=size):
            yield replace(document, held_out=True)
        yield from _chunks(file, path, path.stem, start=0, end=cut)


def _line_start(file: BinaryIO, position: int) -> int:
    """The first start of a line at or after `position`, or of a character when the line is long."""
    file.seek(position)
    rest_of_line = file.readline(_MAX_DOCUMENT_BYTES)
    if rest_of_line.endswith(b"\n"):
        return position + len(rest_of_line)
    continuation_bytes = next((i for i, byte in enumerate(rest_of_line[:4]) if byte & 0xC0 != 0x80), 0)
    return position + continuation_bytes


def _chunks(file: BinaryIO, path: Path, domain: str, start: int, end: int) -> Iterator[Document]:
    """Documents whose texts add up to bytes [start, end) of the file, a name for each by its byte offset."""
    file.seek(start)
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = start
    while position < end:
        chunk = _read_chunk(file, end - position)
        if not chunk:
            break
        undecoded = len(decoder.getstate()[0])  # bytes of a character that the chunk before began
        try:
            text = decoder.decode(chunk, final=position + len(chunk) >= end)
        except UnicodeDecodeError as error:
            offset = position - undecoded + error.start
            raise MoesaicError(
                f"{path} is not UTF-8 at byte {offset} (0x{error.object[error.start]:02x}); "
                "convert it with: iconv -f latin1 -t utf-8"
            ) from error
        yield Document(text, domain, f"{path.name}@{position}")
        position += len(chunk)


def _read_chunk(file: BinaryIO, limit: int) -> bytes:
    lines: list[bytes] = []
    size = 0
    limit = min(limit, _MAX_DOCUMENT_BYTES)
    while size < limit:
        line = file.readline(limit - size)
        lines.append(line)
        size += len(line)
        if not line or (size >= _DOCUMENT_BYTES and not line.strip()):
            break
    return b"".join(lines)


def _json_lines(path: Path, text_field: str, domain: str) -> Iterator[Document]:
    with _opened(path) as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                text = _record_text(_parse_json_line(line, offset, path, number), text_field, f"{path} line {number}")
                if text:
                    yield Document(text, domain, f"{path.name}:{number}")
            offset += len(line)


def _parse_json_line(line: bytes, offset: int, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MoesaicError(f"{path} is not UTF-8 at byte {offset + error.start} (line {number})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{path} line {number} is not JSON ({error}); every line must hold one object") from error
    if not isinstance(record, dict):
        raise UsageError(
            f"{path} line {number} is a JSON {type(record).__name__}; every line must hold one object, "
            f"which jq -c '.[]' {path} makes of an array"
        )
    return record


def _parquet_rows(path: Path, text_field: str, domain: str) -> Iterator[Document]:
    parquet = _import_extra("pyarrow.parquet")
    import pyarrow

    try:
        table = parquet.ParquetFile(path)
        if text_field not in table.schema_arrow.names:
            raise _no_field(str(path), text_field, table.schema_arrow.names)
        number = 0
        for rows in table.iter_batches(batch_size=_ROWS_PER_READ, columns=[text_field]):
            for value in rows.column(0).to_pylist():
                number += 1
                text = _record_text({text_field: value}, text_field, f"{path} row {number}")
                if text:
                    yield Document(text, domain, f"{path.name}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise MoesaicError(f"{path} cannot be read as parquet: {error}") from error
    except UnicodeDecodeError as error:
        raise MoesaicError(f"{path} holds text that is not UTF-8 near row {number + 1}") from error


def _record_text(record: dict[str, Any], text_field: str, where: str) -> str | None:
    """The text of one record; None where the field is null."""
    if text_field not in record:
        raise _no_field(where, text_field, list(record))
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{where} has a {type(text).__name__} in field {text_field!r}; it must be text")
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise MoesaicError(f"{where} holds half of a surrogate pair at character {error.start}; remove it") from error
    return text


def _no_field(where: str, text_field: str, found: list[str]) -> UsageError:
    return UsageError(
        f"{where} has no field {text_field!r}; it has {', '.join(found) or 'none'}. Set data.text_field to one of them"
    )


_RECORD_READERS: dict[str, Callable[[Path, str, str], Iterator[Document]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet_rows,
}


def _folder_documents(folder: Path, text_field: str) -> Iterator[Document]:
    """Every text and record file in path order, binary and hidden ones left out.

    The domain is the first sub-folder; files at the top are a domain each while they are few.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    if not files:
        raise UsageError(f"the folder {folder} holds no files (hidden ones are not read); name one that does")
    files_at_top = sum(path.parent == folder for path in files)
    for path in files:
        if path.parent != folder:
            domain = path.relative_to(folder).parts[0]
        else:
            domain = path.stem if files_at_top <= _MAX_FILE_DOMAINS else folder.resolve().name
        reader = _RECORD_READERS.get(path.suffix)
        if reader and (path.suffix != ".json" or _first_line_is_record(path)):
            yield from reader(path, text_field, domain)
        elif not _is_binary(path):
            with _opened(path) as file:
                yield from _chunks(file, path, domain, start=0, end=path.stat().st_size)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _first_line_is_record(path: Path) -> bool:
    """In a folder a .json file may be JSON lines or, like a package.json, a text among others."""
    with _opened(path) as file:
        line = file.readline()
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _is_binary(path: Path) -> bool:
    with _opened(path) as file:
        return b"\0" in file.read(_SNIFFED_BYTES)


def _hub_documents(source: str, text_field: str) -> Iterator[Document]:
    """`hub:NAME[:CONFIG][@SPLIT]`, streamed; the split is `train` unless given."""
    datasets = _import_extra("datasets")
    name, _, split = source.removeprefix("hub:").partition("@")
    name, _, config = name.partition(":")
    domain = config or name.rpartition("/")[2]
    for number, row in enumerate(_streamed_rows(datasets, source, name, config, split or "train"), start=1):
        text = _record_text(row, text_field, f"{source} row {number}")
        if text:
            yield Document(text, domain, f"{source}:{number}")


def _streamed_rows(datasets: Any, source: str, name: str, config: str, split: str) -> Iterator[Any]:
    """The rows of a hub data set; the network may fail at the first or at any later one."""
    try:
        yield from datasets.load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # the library raises a dozen kinds, among them its own and the network's
        raise MoesaicError(f"the data set {source} cannot be read: {' '.join(str(error).split())}") from error


def _import_extra(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"this data source needs {module.partition('.')[0]}; install it with: pip install 'moesaic[data]'"
        ) from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
