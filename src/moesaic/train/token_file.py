"""Token ids on disk and on their way there.

T tokens of a file.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from moesaic.tokenizer import Tokenizer
from moesaic.train.sources import Document

_CHARACTERS_PER_ENCODING = 2**20


@dataclass(frozen=True)
class TokenFile:
    """A flat file of token ids with end-of-text ids between documents; of its domains where they are known."""

    tokens: np.ndarray
    """(T,) unsigned ids, memory-mapped when they come from a file."""
    text_bytes: int
    """Bytes of UTF-8 text that the ids stand for."""
    runs: tuple[tuple[int, int], ...] = ()
    """(start, domain id) of each stretch of one domain, in order; empty when domains were not kept."""

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, sequence_length: int) -> list[tuple[int, int]]:
        """(start, domain id) of every window of sequence_length + 1 ids that lies inside one domain."""
        ends = [start for start, _ in self.runs[1:]] + [len(self)]
        return [
            (window, domain_id)
            for (start, domain_id), end in zip(self.runs, ends, strict=True)
            for window in range(start, end - sequence_length, sequence_length)
        ]


def batches_of_text(stream: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents with about as much text as one parallel encoding takes."""
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += len(document.text)
        if size >= _CHARACTERS_PER_ENCODING:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_documents(tokenizer: Tokenizer, batch: list[Document]) -> Iterator[np.ndarray]:
    """The ids of each document with the end-of-text id after them."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for ids in tokenizer.encode_batch([document.text for document in batch]):
        yield np.array(ids + end, dtype=np.uint32)


class TokenWriter:
    """Writes ids until `limit` of them are there, and counts them and their text."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, limit: int) -> None:
        self._file = file
        self._id_type = id_type(tokenizer)
        self._byte_sizes = np.array(tokenizer.token_bytes())
        self._limit = limit
        self.count = 0
        self.text_bytes = 0

    @property
    def is_full(self) -> bool:
        return self.count >= self._limit

    def add(self, ids: np.ndarray) -> None:
        ids = ids[: self._limit - self.count]
        self._file.write(ids.astype(self._id_type).tobytes())
        self.count += len(ids)
        self.text_bytes += int(self._byte_sizes[ids].sum())


class TokensByDomain:
    """Validation ids, gathered by domain; there are few enough to keep in memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._id_type = id_type(tokenizer)
        self._byte_sizes = np.array(tokenizer.token_bytes())
        self._pieces: dict[str, list[np.ndarray]] = {}
        self.count = 0
        self.text_bytes = 0

    def add(self, domain: str, ids: np.ndarray) -> None:
        self._pieces.setdefault(domain, []).append(ids)
        self.count += len(ids)
        self.text_bytes += int(self._byte_sizes[ids].sum())

    def domains(self) -> tuple[str, ...]:
        return tuple(sorted(self._pieces))

    def token_file(self) -> TokenFile:
        """One run per domain, in the order of `domains`."""
        stretches = [np.concatenate(self._pieces[domain]) for domain in self.domains()]
        starts = np.cumsum([0, *(len(stretch) for stretch in stretches)]).tolist()
        tokens = np.concatenate([np.empty(0, np.uint32), *stretches]).astype(self._id_type)
        return TokenFile(tokens, self.text_bytes, tuple((start, domain) for domain, start in enumerate(starts[:-1])))


def id_type(tokenizer: Tokenizer) -> np.dtype:
    """The smallest of the two types that files use, both little-endian."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
