"""Training times against arithmetic by hand, and against what must follow from a change."""

import random
from dataclasses import replace

import pytest

from moesaic.errors import UsageError
from moesaic.plan.cluster import parse_cluster
from moesaic.plan.communication import all_reduce_seconds, all_to_all_seconds, gather_seconds
from moesaic.plan.efficiency import TRAINING
from moesaic.plan.layout import Layout
from moesaic.plan.subject import find_subject
from moesaic.plan.training import TrainingTask, estimate_training
from moesaic.plan.work import training_work

TASK = TrainingTask(tokens=1e12, batch_tokens=512 * 4096, sequence=4096)
PERFECT = replace(
    TRAINING, gemm=1.0, half_width=0.0, scores=1.0, dense_traffic=0.0, expert_traffic=0.0, launch=0.0, exposed=0.0
)


def test_a_perfect_device_computes_at_its_peak() -> None:
    """Nothing is lost but what the head, the optimizer and the sums of gradients take."""
    subject, cluster = find_subject("mixtral-8x7b"), parse_cluster("1xH100")
    found = estimate_training(subject, cluster, Layout(), TASK, PERFECT)
    flops = 3 * training_work(subject, 4096).total * TASK.batch_tokens
    assert sum(found.seconds[name] for name in ("dense products", "expert products", "attention scores")) < found.step
    assert found.step == pytest.approx(flops / 989e12, rel=0.02)
    assert found.mfu == pytest.approx(1.0, rel=0.02)
    assert found.model_flops == pytest.approx(flops / TASK.batch_tokens)


def test_bubbles_follow_the_formula() -> None:
    subject, cluster = find_subject("mixtral-8x7b"), parse_cluster("8xH100")
    for stages, parts in ((4, 1), (8, 1), (8, 2)):
        layout = Layout(dp=8 // stages, pp=stages, vp=parts)
        found = estimate_training(subject, cluster, layout, TASK)
        names = ("dense products", "expert products", "attention scores", "memory traffic", "launches", "all-to-all",
                 "tensor parallel", "head", "expert imbalance")  # fmt: skip
        busy = sum(found.seconds.get(name, 0.0) for name in names)
        assert found.micro_batches == 512 // layout.dp
        assert found.seconds["pipeline bubble"] == pytest.approx(busy * (stages - 1) / found.micro_batches / parts)


def test_worse_conditions_never_help() -> None:
    subject, cluster = find_subject("deepseek-v3"), parse_cluster("256xH800")
    layout = Layout(dp=32, ep=32, pp=8)
    speed = estimate_training(subject, cluster, layout, TASK).tokens_per_second
    slower = {
        "imbalance": (cluster, layout, replace(TASK, max_vio=random.uniform(0.5, 3))),
        "network": (parse_cluster("256xH800:ib50"), layout, TASK),
        "recompute": (cluster, replace(layout, recompute="full"), TASK),
        "downtime": (cluster, layout, replace(TASK, downtime=0.2)),
    }
    for what, (machines, cut, task) in slower.items():
        assert estimate_training(subject, machines, cut, task).tokens_per_second < speed, what
    faster = estimate_training(subject, cluster, layout, replace(TASK, precision="float8"))
    assert faster.tokens_per_second > speed


def test_hours_days_and_speed_agree() -> None:
    found = estimate_training(find_subject("olmoe-1b-7b"), parse_cluster("8xH100"), Layout(dp=8, ep=8), TASK)
    assert found.days * 86400 * found.tokens_per_second == pytest.approx(TASK.tokens)
    assert found.device_hours == pytest.approx(found.days * 24 * 8)
    assert found.step * found.tokens_per_second == pytest.approx(TASK.batch_tokens)


def test_a_batch_too_small_for_the_replicas_is_refused() -> None:
    with pytest.raises(UsageError, match="--batch-tokens"):
        estimate_training(find_subject("llama-2-7b"), parse_cluster("2048xH100"), Layout(dp=2048), TASK)


def test_collectives_move_the_bytes_that_they_must() -> None:
    cluster = replace(parse_cluster("64xH100"), latency=1e-12)
    losses = replace(TRAINING, link=1.0, network=1.0)
    size = random.uniform(1e8, 1e9)
    assert gather_seconds(size, cluster, 8, 1, losses) == pytest.approx(size * 7 / 8 / 450e9, rel=1e-3)
    assert all_reduce_seconds(size, cluster, 8, 1, losses) == pytest.approx(2 * size * 7 / 8 / 450e9, rel=1e-3)
    # Inside a node every one of 4 rows of a token leaves, but for the share that stays.
    inside = all_to_all_seconds(size, 4, 4, cluster, 8, losses)
    assert inside == pytest.approx(4 * size * 7 / 8 / 450e9, rel=1e-3)
    # One row over 8 nodes: it leaves the node seven times in eight.
    across = all_to_all_seconds(size, 1, 1, cluster, 64, losses)
    assert across == pytest.approx(size * 7 / 8 / 50e9, rel=1e-3)
    # A token goes to no more nodes than its router allows.
    limited, free = (all_to_all_seconds(size, 8, nodes, cluster, 64, losses) for nodes in (4, 8))
    assert limited < free <= 8 * across
    assert all_to_all_seconds(size, 4, 4, cluster, 1, losses) == 0
