"""Tokens on disk and batches from them.

`prepare_data` turns text into two flat files of token ids once; training and validation read them memory-mapped.

B batch, L sequence length.
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.config import DataConfig
from moesaic.config_io import to_mapping
from moesaic.errors import MoesaicError, UsageError
from moesaic.tokenizer import Tokenizer, bpe_size, byte_tokenizer, load_tokenizer, train_bpe
from moesaic.train.sources import MAX_HELD_OUT_BYTES, Document, documents
from moesaic.train.token_file import (
    TokenFile,
    TokensByDomain,
    TokenWriter,
    batches_of_text,
    encode_documents,
    id_type,
)
from moesaic.weights_io import atomic_directory, read_json, sha256_of, write_json

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and how much there is when that is known."""

_BPE_TRAINING_CHARACTERS = 4 * 2**20
_FEWEST_VALIDATION_WINDOWS = 8
_CHECKED_FILES = ("tokenizer.json", "tokenizer_config.json", "train.bin", "validation.bin")


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and validates on."""

    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    domains: tuple[str, ...]
    """Names of the validation's domains; a domain id is a position here."""


def prepare_data(
    config: DataConfig,
    directory: Path,
    *,
    tokens_needed: int,
    sequence_length: int,
    progress: Progress | None = None,
) -> PreparedData:
    """Tokenise `config.source` into `directory`, or reuse what lies there when it is the same and undamaged.

    Writes tokenizer.json, train.bin, validation.bin (ids as little-endian uint16 or uint32) and data.json, all or
    nothing. Reads no more of the source than `tokens_needed` training ids and the validation take. Warns, with the
    reason, when something was there and had to be made again.

    Raises UsageError when the source is missing, empty or shorter than one sequence, MoesaicError when it is not
    UTF-8, when the disk is full, or when damaged data cannot be made again because the source has changed.
    """
    tokens_needed = min(tokens_needed, config.max_tokens or tokens_needed)
    identity = {
        "config": to_mapping(config),
        "tokenizer_file": _tokenizer_fingerprint(config.tokenizer),
        "tokens_needed": tokens_needed,
    }
    old = _read_record(directory)
    difference = _difference(directory, old, identity)
    if difference:
        if directory.exists():
            warnings.warn(f"preparing the data in {directory} again: {difference}", stacklevel=2)
        _refuse_foreign_files(directory)
        with atomic_directory(directory) as temporary:
            new = _build(config, temporary, identity, sequence_length, progress or _silent)
            if old and old["identity"] == identity and _ids_differ(old, new):
                raise MoesaicError(
                    f"{directory} is damaged ({difference}) and {config.source} has changed since it was made; "
                    f"start anew on the new text with: rm -r {directory}"
                )
    return _open(config, directory, sequence_length)


def tokenize_for_evaluation(
    tokenizer: Tokenizer,
    source: str,
    *,
    text_field: str = "text",
    max_bytes: int = MAX_HELD_OUT_BYTES,
) -> tuple[TokenFile, tuple[str, ...]]:
    """All of `source`, up to `max_bytes` of text, as an in-memory TokenFile with its domains' names."""
    collected = TokensByDomain(tokenizer)
    for batch in batches_of_text(documents(source, text_field=text_field)):
        for document, ids in zip(batch, encode_documents(tokenizer, batch), strict=True):
            collected.add(document.domain, ids)
        if collected.text_bytes >= max_bytes:
            break
    return collected.token_file(), collected.domains()


class TrainBatches:
    """Batches of training windows as a pure function of the step, so a run resumes from its step number alone.

    Windows have sequence_length + 1 ids and stride sequence_length, so every id but the first is a target once per
    epoch (a last part shorter than a window is not used). Each epoch has an order of its own, drawn from (seed, epoch);
    a batch may straddle two epochs.
    """

    def __init__(self, token_file: TokenFile, sequence_length: int, batch_size: int, seed: int) -> None:
        self.num_windows = (len(token_file) - 1) // sequence_length
        _require_window(self.num_windows, sequence_length, len(token_file), "the training data")
        self._tokens = token_file.tokens
        self._length = sequence_length
        self._batch_size = batch_size
        # Two epochs at most meet in one batch, unless the data is smaller than a batch.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(_epoch_order, self.num_windows, seed))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of 0-based `step`, each (B, L) int64."""
        first = step * self._batch_size
        windows = [self._window(index) for index in range(first, first + self._batch_size)]
        ids_BL1 = torch.from_numpy(np.stack(windows).astype(np.int64))
        return ids_BL1[:, :-1], ids_BL1[:, 1:]

    def _window(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, self.num_windows)
        start = int(self._order(epoch)[position]) * self._length
        return self._tokens[start : start + self._length + 1]


def validation_batches(
    token_file: TokenFile, sequence_length: int, batch_size: int, max_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs (B, L), targets (B, L) and domain ids (B,), all int64; the last batch may be smaller.

    The windows are spread evenly over the file, so every domain keeps its share when `max_tokens` is less than all.
    Each window lies inside one domain.
    """
    windows = token_file.windows(sequence_length)
    _require_window(len(windows), sequence_length, len(token_file), "the validation data")
    count = max(1, min(len(windows), max_tokens // sequence_length))
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    for first in range(0, count, batch_size):
        batch = chosen[first : first + batch_size]
        ids = np.stack([token_file.tokens[start : start + sequence_length + 1] for start, _ in batch])
        ids_BL1 = torch.from_numpy(ids.astype(np.int64))
        yield ids_BL1[:, :-1], ids_BL1[:, 1:], torch.tensor([domain_id for _, domain_id in batch])


def _build(
    config: DataConfig,
    directory: Path,
    identity: dict[str, Any],
    sequence_length: int,
    progress: Progress,
) -> dict[str, Any]:
    """Fill `directory`: training ids as they are read, validation ids grouped by domain, tokenizer, data.json.

    Returns the content of data.json.
    """
    tokenizer = _make_tokenizer(config, progress)
    validation = TokensByDomain(tokenizer)
    fewest_validation_tokens = _FEWEST_VALIDATION_WINDOWS * (sequence_length + 1)
    with (directory / "train.bin").open("wb") as file:
        train = TokenWriter(file, tokenizer, identity["tokens_needed"])
        for batch in batches_of_text(_training_and_validation(config)):
            batch = [document for document in batch if document.held_out or not train.is_full]
            for document, ids in zip(batch, encode_documents(tokenizer, batch), strict=True):
                if document.held_out:
                    validation.add(document.domain, ids)
                else:
                    train.add(ids)
            progress("tokenising", train.count, identity["tokens_needed"])
            if train.is_full and (config.validation or validation.count >= fewest_validation_tokens):
                break
    _require_text(config, train.count, validation.count)
    validation_file = validation.token_file()
    validation_file.tokens.tofile(directory / "validation.bin")
    tokenizer.save(directory)
    record = {
        "identity": identity,
        "dtype": id_type(tokenizer).name,
        "train": {"tokens": train.count, "text_bytes": train.text_bytes},
        "validation": {
            "tokens": validation.count,
            "text_bytes": validation.text_bytes,
            "runs": validation_file.runs,
        },
        "domains": validation.domains(),
        "sha256": {name: sha256_of(directory / name) for name in _CHECKED_FILES},
    }
    write_json(directory / "data.json", record | {"checksum": _checksum(record)})
    return record


def _training_and_validation(config: DataConfig) -> Iterator[Document]:
    """Every document that matters, marked as held out or not; a separate validation source comes first."""
    if config.validation:
        size = 0
        for document in documents(config.validation, text_field=config.text_field):
            yield Document(document.text, document.domain, document.name, held_out=True)
            size += len(document.text)
            if size >= MAX_HELD_OUT_BYTES:
                break
    fraction = 0.0 if config.validation else config.validation_fraction
    yield from documents(config.source, text_field=config.text_field, validation_fraction=fraction)


def _make_tokenizer(config: DataConfig, progress: Progress) -> Tokenizer:
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    vocab_size = bpe_size(config.tokenizer)
    if vocab_size is None:
        return load_tokenizer(config.tokenizer)
    progress("training the tokenizer", 0, None)
    texts = (document.text for document in _training_and_validation(config) if not document.held_out)
    return train_bpe(_first_characters(texts, _BPE_TRAINING_CHARACTERS), vocab_size)


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            break


def _open(config: DataConfig, directory: Path, sequence_length: int) -> PreparedData:
    record = read_json(directory / "data.json")
    ids_type = np.dtype(record["dtype"]).newbyteorder("<")
    train, validation = (
        TokenFile(
            np.memmap(directory / f"{part}.bin", ids_type, mode="r"),
            record[part]["text_bytes"],
            tuple((start, domain_id) for start, domain_id in record[part].get("runs", [])),
        )
        for part in ("train", "validation")
    )
    _require_window((len(train) - 1) // sequence_length, sequence_length, len(train), "the training data")
    in_validation = "the validation data" if config.validation else f"the part of {config.source} held for validation"
    _require_window(len(validation.windows(sequence_length)), sequence_length, len(validation), in_validation)
    return PreparedData(load_tokenizer(directory), train, validation, tuple(record["domains"]))


def _read_record(directory: Path) -> dict[str, Any] | None:
    """The content of data.json; None when it is missing or damaged."""
    try:
        record = read_json(directory / "data.json")
    except MoesaicError:
        return None
    checksum = record.pop("checksum", None)
    return record if checksum == _checksum(record) else None


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode("utf-8")).hexdigest()


def _ids_differ(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(old["sha256"][name] != new["sha256"][name] for name in ("train.bin", "validation.bin"))


_WORDS = {"tokenizer_file": "tokenizer file", "tokens_needed": "number of tokens"}
"""Of an identity."""


def _difference(directory: Path, old: dict[str, Any] | None, identity: dict[str, Any]) -> str:
    """Why what lies in `directory` cannot be reused; empty when it can."""
    if old is None:
        return "data.json is missing or damaged"
    for key, value in identity.items():
        if old["identity"].get(key) != value:
            return f"it was made with another {_WORDS.get(key, key)}"
    for name in _CHECKED_FILES:
        if not (directory / name).is_file() or sha256_of(directory / name) != old["sha256"].get(name):
            return f"{name} is missing or damaged"
    return ""


def _refuse_foreign_files(directory: Path) -> None:
    """Replacing the directory must not delete what somebody else keeps there."""
    if directory.is_dir():
        foreign = sorted(path.name for path in directory.iterdir() if path.name not in (*_CHECKED_FILES, "data.json"))
        if foreign:
            raise UsageError(f"{directory} holds {foreign[0]}, which is not prepared data; name another folder")


def _tokenizer_fingerprint(spec: str) -> str | None:
    """SHA-256 of the tokenizer that a path leads to; `bytes` and `bpe:N` follow from the config alone."""
    if spec == "bytes" or bpe_size(spec):
        return None
    return hashlib.sha256(load_tokenizer(spec).to_json().encode("utf-8")).hexdigest()


def _epoch_order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_windows)


def _require_text(config: DataConfig, train_tokens: int, validation_tokens: int) -> None:
    if train_tokens == 0:
        raise UsageError(f"{config.source} holds 0 tokens of text to train on; name a source with text")
    if validation_tokens == 0:
        raise UsageError(
            f"{config.validation or config.source} holds 0 tokens for validation beside {train_tokens} for training; "
            "set data.validation to a second source"
        )


def _require_window(num_windows: int, sequence_length: int, num_tokens: int, what: str) -> None:
    if num_windows < 1:
        raise UsageError(
            f"sequence_length is {sequence_length}, which needs {sequence_length + 1} tokens in a row, "
            f"but {what} holds {num_tokens} tokens; lower sequence_length or add text"
        )


def _silent(label: str, done: int, total: int | None) -> None:
    pass
