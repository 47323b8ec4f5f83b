"""Which experts get copies, and where all of them go, from measured load.

The expert-parallel load balancer of DeepSeek-V3 (arXiv 2412.19437, section 3.4; github.com/deepseek-ai/EPLB), in its
hierarchical form.

M layers, E experts, R physical experts (copies included), N nodes.
"""

import torch
from torch import Tensor

from moesaic.errors import UsageError


def place_replicas(load: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Tensor:
    """Load (M, E) -> (M, R) int64: the expert that each physical place computes, places in the order of the GPUs.

    Groups of neighbouring experts are packed onto nodes, so that a token whose experts are in few groups visits few
    nodes; on its node the busiest expert per copy gets the next copy; copies are packed onto the node's GPUs.

    Raises UsageError when groups, nodes, GPUs and places do not divide.
    """
    num_experts = load.shape[-1]
    for whole, name, part, part_name in (
        (num_experts, "experts", num_groups, "groups"),
        (num_groups, "groups", num_nodes, "nodes"),
        (num_gpus, "GPUs", num_nodes, "nodes"),
        (num_replicas, "places", num_gpus, "GPUs"),
    ):
        if whole % part:
            raise UsageError(f"{whole} {name} cannot be divided over {part} {part_name}; choose a multiple of {part}")
    if num_replicas < num_experts:
        raise UsageError(f"{num_replicas} places are fewer than the {num_experts} experts; give at least as many")
    return torch.tensor(
        [_place_layer(row, num_replicas, num_groups, num_nodes, num_gpus) for row in load.double().tolist()]
    )


def _place_layer(load: list[float], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> list[int]:
    size = len(load) // num_groups
    group_loads = [sum(load[group * size : (group + 1) * size]) for group in range(num_groups)]
    places: list[int] = []
    for groups in _pack(group_loads, num_nodes):
        experts = [group * size + member for group in groups for member in range(size)]
        copies = _copies([load[expert] for expert in experts], num_replicas // num_nodes)
        counts = [copies.count(index) for index in range(len(experts))]
        copy_loads = [load[experts[index]] / counts[index] for index in copies]
        for gpu in _pack(copy_loads, num_gpus // num_nodes):
            places += [experts[copies[copy]] for copy in gpu]
    return places


def _pack(loads: list[float], num_packs: int) -> list[list[int]]:
    """Equally many items in each pack, the heaviest first, each into the lightest pack that has room."""
    room = len(loads) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sums = [0.0] * num_packs
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        pack = min((index for index in range(num_packs) if len(packs[index]) < room), key=lambda index: sums[index])
        packs[pack].append(item)
        sums[pack] += loads[item]
    return packs


def _copies(loads: list[float], num_places: int) -> list[int]:
    """The item of each place: all once, then again and again the one with the most load per copy."""
    copies, counts = list(range(len(loads))), [1] * len(loads)
    while len(copies) < num_places:
        busiest = max(range(len(loads)), key=lambda item: loads[item] / counts[item])
        copies.append(busiest)
        counts[busiest] += 1
    return copies
