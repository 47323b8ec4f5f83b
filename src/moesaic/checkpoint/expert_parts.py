"""Where single experts lie in a Hugging Face directory: its layout, read expert by expert.

E experts, R rows, C columns of one of an expert's matrices.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.checkpoint.families.layout import StoredTensor
from moesaic.checkpoint.hf_directory import HFDirectory
from moesaic.errors import UsageError
from moesaic.residency.expert_readers import Part


def expert_parts(directory: HFDirectory, name: str, like: Tensor) -> list[list[Part]]:
    """By expert, what fills its matrix in our tensor `name`, a stack (E, R, C) like `like`, on the meta device.

    Raises UsageError for tensors that are quantised, or in which an expert's numbers do not follow each other.
    """
    stack_ERC = torch.empty(like.shape, device="meta")
    found: list[list[Part]] = [[] for _ in range(len(like))]
    for stored in directory.stored([name]):
        for expert, part in _parts_of(directory, stored, name, stack_ERC):
            found[expert].append(part)
    size = stack_ERC[0].numel()
    if any(sum(math.prod(part.shape) for part in parts) != size for parts in found):
        raise _unreadable(directory, name)
    return found


def _parts_of(directory: HFDirectory, stored: StoredTensor, name: str, stack: Tensor) -> Iterator[tuple[int, Part]]:
    """What of one tensor on disk belongs to the stack, expert by expert."""
    extent, dtype = directory.weights.extent(stored.name), directory.weights.dtype(stored.name)
    size, first = stack[0].numel(), 0
    for region in stored.regions:
        view = region.view(stack) if region.ours == name else None
        if view is None:
            raise _unreadable(directory, name)
        whole_stack = view.ndim > 1 and view.shape[0] == len(stack) and view.stride(0) == size
        for place in view if whole_stack else [view]:
            expert, offset = divmod(int(place.storage_offset()), size)
            steps = zip(place.shape, place.stride(), strict=True)
            if offset + sum((length - 1) * stride for length, stride in steps) >= size:
                raise _unreadable(directory, name)
            here = extent.elements(first, place.numel(), dtype.itemsize)
            yield expert, Part(here, dtype, tuple(place.shape), tuple(place.stride()), offset)
            first += place.numel()


def _unreadable(directory: HFDirectory, name: str) -> UsageError:
    return UsageError(
        f"the experts of {directory.directory} cannot be read one by one ({name}); write them with "
        "`moesaic quantize MODEL OUT --scheme int4` and name OUT"
    )
