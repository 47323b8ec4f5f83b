"""Reading a quantised model within a budget of memory: its experts stay on disk."""

from dataclasses import replace

import torch

from moesaic.checkpoint.hf_directory import HFDirectory
from moesaic.errors import UsageError
from moesaic.model.experts import Experts
from moesaic.model.transformer import Transformer
from moesaic.ops.device import resident_bytes
from moesaic.residency.expert_cache import ExpertCache, StoredExperts
from moesaic.residency.file_reader import FileReader
from moesaic.residency.memory_plan import ACTIVATIONS, SLACK_BYTES, activation_bytes, make_plan
from moesaic.residency.residency import PREFILL_TOKENS, LayerStore, Residency
from moesaic.residency.stored_embedding import StoredEmbedding
from moesaic.weight_reader import WeightDirectory

EMBEDDING = "embed_tokens.weight"
PROBED_EXPERTS = 8


def load_within(model: Transformer, stored: HFDirectory, dtype: torch.dtype, budget: int) -> None:
    """Fills `model`, quantised and on the meta device, so that all of it stays within `budget` bytes.

    Raises UsageError where that is impossible, with the numbers.
    """
    weights = stored.weights
    assert isinstance(weights, WeightDirectory)
    like = model.state_dict()
    stored.check(like)
    layers = _stored_experts(model, weights)
    reader = FileReader()
    for extent in (extent for layer in layers for extent in layer.extents.values()):
        reader.open(extent)
    if hasattr(model, "lm_head"):  # else the head multiplies with all of the embedding
        extent, (rows, columns) = weights.extent(EMBEDDING), like[EMBEDDING].shape
        embedding = StoredEmbedding(extent, (rows, columns), weights.dtype(EMBEDDING), dtype)
        setattr(model, EMBEDDING.partition(".")[0], embedding)
    dtypes = stored.dtypes(like, dtype)
    resident = model.state_dict()
    parts = {
        "the process": resident_bytes() + SLACK_BYTES,
        "weights of all but the experts": sum(
            tensor.numel() * dtypes[name].itemsize for name, tensor in resident.items()
        ),
        ACTIVATIONS: activation_bytes(model.config, PREFILL_TOKENS, logits=1),
    }
    some = layers[0]
    experts = some.expert_bytes, some.num_experts * len(layers)
    plan = make_plan(budget, parts, *experts)
    most_slots = make_plan(budget, {**parts, ACTIVATIONS: 0}, *experts).slots
    model.load_state_dict(stored.read(resident, dtype, torch.device("cpu")), assign=True)
    cache = ExpertCache(_with_biases(layers, model), most_slots, reader)
    cache.resize(plan.slots)
    _probe(reader, layers)
    residency = Residency(plan, cache, model.config, dtype)
    for number, layer in enumerate(model.moe_layers):
        layer.experts.store = LayerStore(residency, number)


def _stored_experts(model: Transformer, weights: WeightDirectory) -> list[StoredExperts]:
    """By layer; the modules have none of their own after it."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            extents = {leaf: weights.extent(f"{name}.{leaf}") for leaf in ("gate_up", "down")}
            layers.append(StoredExperts(module.move_out(), extents))
    if len({(layer.weights.format, layer.num_experts, layer.expert_bytes) for layer in layers}) > 1:
        raise UsageError("the layers have experts of different sizes, which a budget does not serve; leave memory out")
    return layers


def _with_biases(layers: list[StoredExperts], model: Transformer) -> list[StoredExperts]:
    """Now that the modules have theirs in memory."""

    def filled(stored: StoredExperts, experts: Experts) -> StoredExperts:
        biases = {name: getattr(experts, name) for name in ("gate_up_bias", "down_bias")}
        return replace(stored, weights=replace(stored.weights, **biases))

    return [filled(stored, layer.experts) for stored, layer in zip(layers, model.moe_layers, strict=True)]


def _probe(reader: FileReader, layers: list[StoredExperts]) -> None:
    """Reads in the way that is faster for some experts of each layer."""
    numbers = range(0, layers[0].num_experts, max(1, layers[0].num_experts // PROBED_EXPERTS))
    stacks = [(layer.extents["gate_up"], layer.num_experts) for layer in layers[:4]]
    reader.probe([extent.part(number, count) for number in numbers for extent, count in stacks])
