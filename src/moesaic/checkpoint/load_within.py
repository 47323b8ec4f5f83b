"""Reading a model within a budget of memory: its experts stay on disk.

A quantised directory has them as they are used. Those of a Hugging Face directory are used as they are stored, or
packed when they are read; packed ones are kept in a file of their own, for when they have left memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.checkpoint.expert_parts import expert_parts
from moesaic.checkpoint.hf_directory import HFDirectory
from moesaic.errors import UsageError
from moesaic.model.experts import Experts
from moesaic.model.transformer import Transformer
from moesaic.ops import PLAIN, ExpertWeights
from moesaic.ops.device import resident_bytes
from moesaic.residency.expert_cache import READERS, ExpertCache, LayerOnDisk
from moesaic.residency.expert_readers import AssembledExperts, StoredExperts
from moesaic.residency.file_reader import FileReader
from moesaic.residency.foresight import look_ahead, look_ahead_bytes
from moesaic.residency.memory_plan import ACTIVATIONS, SLACK_BYTES, activation_bytes, make_plan, shown
from moesaic.residency.residency import PREFILL_TOKENS, LayerStore, Residency
from moesaic.residency.spill_file import SpillFile, spill_folder
from moesaic.residency.stored_embedding import StoredEmbedding
from moesaic.safetensors_file import Extent

EMBEDDING = "embed_tokens.weight"
PROBED_EXPERTS = 32

Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Names of the model's tensors -> these, in memory."""


def load_within(
    model: Transformer, stored: HFDirectory, plain: Mapping[str, Tensor], read: Read, dtype: torch.dtype, budget: int
) -> None:
    """Fills `model`, on the meta device, so that all of it stays within `budget` bytes.

    `plain` is the model's state before it was quantised, if it was; `read` gives those of its tensors that stay in
    memory.

    Raises UsageError where that is impossible, with the numbers.
    """
    reader = FileReader()
    layers = _layers_on_disk(model, stored, plain, dtype, reader)
    some = layers[0]
    packs = stored.quantization is None and some.weights.format != PLAIN
    num_readers = torch.get_num_threads() if packs else READERS
    if hasattr(model, "lm_head"):  # else the head multiplies with all of the embedding
        _leave_embedding_on_disk(model, stored, plain[EMBEDDING].shape, dtype)
    resident = model.state_dict()
    dtypes = stored.dtypes(plain, dtype)
    kept = sum(_nbytes(tensor, dtypes.get(name, dtype)) for name, tensor in resident.items())
    process = resident_bytes() + SLACK_BYTES
    kept += look_ahead_bytes(some.num_experts, model.config.hidden_size, len(layers))
    parts = {
        "the process": process,
        "weights of all but the experts": kept,
        ACTIVATIONS: activation_bytes(model.config, PREFILL_TOKENS, logits=1),
    }
    if isinstance(some.reader, AssembledExperts):
        parts["buffers of readers"] = num_readers * some.reader.buffer_bytes
    experts = some.expert_bytes, some.num_experts * len(layers)
    plan = make_plan(budget, parts, *experts)
    most_slots = make_plan(budget, {**parts, ACTIVATIONS: 0}, *experts).slots
    if packs:
        largest = max(_numbers_read_for(name, stored, plain) for name in resident) * stored.dtype.itemsize
        require_room_to_pack(process, kept, largest, budget)
    _open(reader, layers)
    model.load_state_dict(read(list(resident)), assign=True)
    model.requires_grad_(False)
    cache = ExpertCache(_with_biases(layers, model), most_slots, num_readers)
    cache.resize(plan.slots)
    residency = Residency(plan, cache, model.config, dtype)
    for number, (layer, ahead) in enumerate(zip(model.moe_layers, look_ahead(model.blocks), strict=True)):
        layer.experts.store = LayerStore(residency, number, ahead)


def _layers_on_disk(
    model: Transformer, stored: HFDirectory, plain: Mapping[str, Tensor], dtype: torch.dtype, reader: FileReader
) -> list[LayerOnDisk]:
    """In their order; the modules have no experts of their own after it."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    weights = {name: module.move_out(dtype) for name, module in modules.items()}
    if len({(one.format, one.gate_up.data[0].shape, one.down.data[0].shape) for one in weights.values()}) > 1:
        raise UsageError("the layers have experts of different sizes, which a budget does not serve; leave memory out")
    if stored.quantization is None:
        return _assembled(stored, plain, weights, reader)
    return [LayerOnDisk(one, _as_stored(stored, name, one, reader)) for name, one in weights.items()]


def _open(reader: FileReader, layers: Sequence[LayerOnDisk]) -> None:
    """The files of all experts, which are then read in the way that is faster for some of them."""
    for layer in layers:
        for extent in layer.reader.extents():
            reader.open(extent)
    reader.probe(_sample([extent for layer in layers[:4] for extent in layer.reader.single_reads()]))


def _as_stored(stored: HFDirectory, name: str, weights: ExpertWeights, reader: FileReader) -> StoredExperts:
    stacks = {leaf: stored.weights.extent(f"{name}.{leaf}") for leaf in ("gate_up", "down")}
    return StoredExperts(reader, stacks, weights.num_experts)


def _assembled(
    stored: HFDirectory, plain: Mapping[str, Tensor], weights: Mapping[str, ExpertWeights], reader: FileReader
) -> list[LayerOnDisk]:
    some = next(iter(weights.values()))
    spilled = None
    if some.format != PLAIN:
        record_bytes = sum(stack.data[0].nbytes for stack in (some.gate_up, some.down))
        spilled = SpillFile(spill_folder(), record_bytes)
    layers: list[LayerOnDisk] = []
    for number, (name, one) in enumerate(weights.items()):
        parts = {leaf: expert_parts(stored, f"{name}.{leaf}", plain[f"{name}.{leaf}"]) for leaf in ("gate_up", "down")}
        experts = AssembledExperts(reader, parts, stored.dtype, spilled, number * one.num_experts)
        layers.append(LayerOnDisk(one, experts))
    return layers


def _leave_embedding_on_disk(model: Transformer, stored: HFDirectory, shape: torch.Size, dtype: torch.dtype) -> None:
    (tensor,) = stored.stored([EMBEDDING])
    embedding = StoredEmbedding(
        stored.weights.extent(tensor.name), (shape[0], shape[1]), stored.weights.dtype(tensor.name), dtype
    )
    setattr(model, EMBEDDING.partition(".")[0], embedding)


def _numbers_read_for(name: str, stored: HFDirectory, plain: Mapping[str, Tensor]) -> int:
    """Those of a tensor that are in memory while it is packed, and of what lies in one on disk with it."""
    together = stored.joined(name if name in plain else EMBEDDING)  # a head that is tied to it
    return sum(plain[one].numel() for one in together) * min(len(together), 2)


def require_room_to_pack(process: int, packed: int, largest: int, budget: int) -> None:
    """What is not of the experts is packed tensor by tensor while the model is loaded, the largest of them included."""
    needed = process + packed + largest
    if needed > budget:
        raise UsageError(
            f"memory {shown(budget)} is too little to pack this model while it is loaded: {shown(process)} the process "
            f"+ {shown(packed)} packed weights + {shown(largest)} the largest before it is packed; quantise it once "
            f"with `moesaic quantize MODEL OUT` and name OUT, or try memory {-(-needed // 2**26) * 64}MiB"
        )


def _with_biases(layers: list[LayerOnDisk], model: Transformer) -> list[LayerOnDisk]:
    """Now that the modules have theirs in memory."""

    def filled(layer: LayerOnDisk, experts: Experts) -> LayerOnDisk:
        biases = {name: getattr(experts, name) for name in ("gate_up_bias", "down_bias")}
        return replace(layer, weights=replace(layer.weights, **biases))

    return [filled(layer, module.experts) for layer, module in zip(layers, model.moe_layers, strict=True)]


def _nbytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return tensor.nbytes if tensor.dtype == torch.uint8 else tensor.numel() * dtype.itemsize


def _sample(extents: Iterable[Extent]) -> list[Extent]:
    """Some of them, from all over the files."""
    every = list(extents)
    return every[:: max(1, len(every) // PROBED_EXPERTS)][:PROBED_EXPERTS]
