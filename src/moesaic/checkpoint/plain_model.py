"""A plain model on disk, a run or a Hugging Face directory, of which only what is asked for need be in memory."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.families import family_for_export
from moesaic.checkpoint.hf_directory import HFDirectory
from moesaic.checkpoint.load import empty_model, load, load_tokenizer
from moesaic.checkpoint.resolve import ModelSource
from moesaic.checkpoint.save import with_eos_of
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.ops import DTYPES
from moesaic.weights_io import PlannedTensor

COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tiktoken.model", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What belongs to a model besides config and weights, and is carried over as it is."""

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class PlainModel:
    config: ModelConfig
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    """Of its tensors, by the names that our model gives them."""
    read: Callable[[Sequence[str]], Mapping[str, Tensor]]
    joined: Callable[[str], Sequence[str]]
    """Which tensors must be read together with one, itself among them."""
    carry: Callable[[Path], None]
    """Puts into a directory what belongs to the model besides config and weights."""
    hf_config: Callable[[], dict[str, Any]]
    """The keys of config.json. Raises MoesaicError when no family can express a run's model."""


@contextmanager
def open_plain(source: ModelSource, dtype: str) -> Iterator[PlainModel]:
    """`dtype` as for `load`. A run directory is held in memory as a whole.

    Raises UsageError when the model is quantised, MoesaicError for files without the model they promise.
    """
    if source.kind == "run":
        yield _plain_run(source, dtype)
        return
    with HFDirectory(source.directory) as stored:
        if stored.quantization is not None:
            raise UsageError(
                f"{source.directory} is quantised ({stored.quantization.scheme}); name the model that it was made from"
            )
        like = empty_model(stored.config).state_dict()
        stored.check(like)
        wanted = DTYPES.get(dtype) or stored.dtype

        def read(names: Sequence[str]) -> Mapping[str, Tensor]:
            return stored.read({name: like[name] for name in names}, wanted, torch.device("cpu"))

        yield PlainModel(
            config=stored.config,
            dtype=wanted,
            dtypes=stored.dtypes(like, wanted),
            read=read,
            joined=stored.joined,
            carry=partial(_copy_companions, source.directory),
            hf_config=lambda: stored.values,
        )


def _plain_run(source: ModelSource, dtype: str) -> PlainModel:
    model, tokenizer = load(source.directory, dtype=dtype, device="cpu"), load_tokenizer(source.directory)
    state = model.state_dict()
    config = with_eos_of(model.config, tokenizer)
    return PlainModel(
        config=config,
        dtype=model.embed_tokens.weight.dtype,
        dtypes={name: tensor.dtype for name, tensor in state.items()},
        read=lambda _: state,
        joined=lambda name: [name],
        carry=tokenizer.save,
        hf_config=lambda: family_for_export(config).config_to_hf(config),
    )


def _copy_companions(source: Path, target: Path) -> None:
    for file in [file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()]:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        try:
            opened = file.open("rb")
        except OSError as error:  # else it would pass for an error of writing
            raise MoesaicError(f"cannot read {file}: {error.strerror}; it belongs to the model") from error
        with opened as content, copy.open("wb") as written:
            shutil.copyfileobj(content, written)


def reporting(tensors: Sequence[PlannedTensor], progress: Progress) -> list[PlannedTensor]:
    """The same tensors; `progress` hears of each when it is made."""
    numbers = count(1)

    def made(tensor: PlannedTensor) -> Tensor:
        progress("tensors", next(numbers), len(tensors))
        return tensor.data()

    return [replace(tensor, data=partial(made, tensor)) for tensor in tensors]
