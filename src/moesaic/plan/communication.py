"""Seconds of collectives, from the bytes that a device sends and the links of its group."""

from moesaic.plan.cluster import Cluster
from moesaic.plan.efficiency import TrainingLosses


def all_to_all_seconds(
    token_bytes: float, top_k: float, max_nodes: float, cluster: Cluster, group: int, losses: TrainingLosses
) -> float:
    """Every device sends `token_bytes` of tokens to `top_k` experts each, which lie evenly over the group.

    Between nodes a token travels once to each node that has one of its experts, at most `max_nodes` of them, and inside
    nodes once to each expert (as DeepEP does); both overlap.
    """
    if group == 1:
        return 0.0
    inside = min(group, cluster.node_size)
    on_links = token_bytes * top_k * (inside - 1) / inside / link_rate(cluster, losses)
    nodes = group / inside
    visited = min(nodes * (1 - (1 - 1 / nodes) ** top_k), max_nodes) * (nodes - 1) / nodes
    on_network = token_bytes * visited / network_rate(cluster, losses)
    return max(on_links, on_network) + cluster.delay(group)


def all_reduce_seconds(size: float, cluster: Cluster, group: int, stride: int, losses: TrainingLosses) -> float:
    """A ring over the group, inside nodes first: scatter the sums, then gather them."""
    return 2 * gather_seconds(size, cluster, group, stride, losses)


def gather_seconds(size: float, cluster: Cluster, group: int, stride: int, losses: TrainingLosses) -> float:
    """Everybody has a share of `size` bytes and gets the whole; or, the other way, the sum of a share.

    A ring crosses nodes at one place of each, so a node's devices together bring the network's rate to it.
    """
    if group == 1:
        return 0.0
    inside = max(1, cluster.node_size // stride)
    moved = size * (group - 1) / group
    seconds = moved / link_rate(cluster, losses) if inside > 1 else 0.0
    if group > inside:
        nodes = group / inside
        seconds += size * (nodes - 1) / nodes / (network_rate(cluster, losses) * inside)
    return seconds + cluster.delay(group * stride)


def link_rate(cluster: Cluster, losses: TrainingLosses) -> float:
    """Bytes/s that collectives reach inside a node. What was measured is what they reach."""
    return cluster.device.link * (1.0 if cluster.device.kind == "calibrated" else losses.link)


def network_rate(cluster: Cluster, losses: TrainingLosses) -> float:
    """The same between nodes."""
    return cluster.device.network * (1.0 if cluster.device.kind == "calibrated" else losses.network)
