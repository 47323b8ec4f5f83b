"""Runs texts through a model in passes, their keys and values in shuffled blocks.

S tokens of a text, V vocabulary.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.model.paged_kv import NewTokens, PagedKV
from moesaic.model.transformer import Transformer
from moesaic.ops.native_step import BLOCK_TOKENS

Part = tuple[int, int, int]
"""Number of a text, and which of its tokens: from .. to - 1."""


def random_passes(lengths: Sequence[int], most: int) -> list[list[Part]]:
    """All tokens of the texts, in each pass those of some texts, at most so many of each."""
    done, passes = [0] * len(lengths), []
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        left = [number for number, length in enumerate(lengths) if done[number] < length]
        parts = []
        for number in random.sample(left, random.randint(1, len(left))):
            start = done[number]
            done[number] = min(lengths[number], start + random.choice((1, random.randint(1, most))))
            parts.append((number, start, done[number]))
        passes.append(parts)
    return passes


def shuffled_blocks(lengths: Sequence[int]) -> tuple[list[list[int]], int]:
    """Blocks of each text, and how many there are: some are nobody's."""
    counts = [-(-length // BLOCK_TOKENS) for length in lengths]
    numbers = torch.randperm(sum(counts) + 2)
    return [blocks.tolist() for blocks in numbers.split([*counts, 2])[:-1]], len(numbers)


def unwritten(config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> PagedKV:
    """NaN stands wherever nobody has written."""
    kv = PagedKV(config, num_blocks, dtype, torch.device("cpu"))
    kv.keys.fill_(math.nan)
    kv.values.fill_(math.nan)
    return kv


@torch.no_grad()
def paged_logits(
    model: Transformer,
    texts: Sequence[Tensor],
    passes: Sequence[Sequence[Part]],
    prompt_lengths: Sequence[int] | None = None,
    **options: Any,
) -> list[Tensor]:
    """Of texts (S,), each (S, V). `prompt_lengths` None: all of a text is a prompt."""
    blocks, num_blocks = shuffled_blocks([len(text) for text in texts])
    kv = unwritten(model.config, num_blocks, model.embed_tokens.weight.dtype)
    prompts = [len(text) for text in texts] if prompt_lengths is None else prompt_lengths
    results: list[list[Tensor]] = [[] for _ in texts]
    for parts in passes:
        batch = kv.batch([NewTokens(blocks[n], start, end - start, prompts[n]) for n, start, end in parts])
        tokens = torch.cat([texts[n][start:end] for n, start, end in parts])
        logits = model(tokens[None], kv=batch, **options)[0]
        for (n, start, end), some in zip(parts, logits.split([end - start for _, start, end in parts]), strict=True):
            assert sum(map(len, results[n])) == start
            assert len(some) == end - start
            results[n].append(some)
    return [torch.cat(some) for some in results]


def alone(texts: Sequence[Tensor]) -> list[list[Part]]:
    """Each in a pass of its own."""
    return [[(number, 0, len(text))] for number, text in enumerate(texts)]
