"""A played step against the analytic model, which it must equal where nobody is late."""

import random
import time
from itertools import pairwise

import numpy as np
import pytest

from moesaic.plan.cluster import parse_cluster
from moesaic.plan.inference import InferenceTask
from moesaic.plan.layout import parse_layout
from moesaic.plan.simulate import _pipeline, _popularity, simulate_decode, simulate_training
from moesaic.plan.subject import find_subject
from moesaic.plan.training import TrainingTask


def task(max_vio: float = 0.0) -> TrainingTask:
    return TrainingTask(tokens=1e12, batch_tokens=1024 * 4096, sequence=4096, max_vio=max_vio)


@pytest.mark.parametrize("text", ["dp=64,ep=8", "dp=8,ep=8,pp=8", "dp=4,ep=8,tp=2,pp=8", "dp=16,ep=8,pp=4,vp=2"])
def test_without_disturbance_a_step_takes_what_the_model_says(text: str) -> None:
    cluster = parse_cluster("64xH100")
    played = simulate_training(
        find_subject("mixtral-8x7b"), cluster, parse_layout(text, 64), task(), jitter=0.0, seed=random.randrange(99)
    )
    assert played.seconds == pytest.approx(played.analytic, rel=0.01)
    assert played.waiting == pytest.approx(0.0, abs=1e-9)
    assert played.ranks == 64


def test_stragglers_and_uneven_experts_make_others_wait() -> None:
    subject, cluster = find_subject("deepseek-v3"), parse_cluster("512xH800")
    layout = parse_layout("dp=64,ep=64,pp=8", 512)
    seed = random.randrange(1000)
    calm = simulate_training(subject, cluster, layout, task(), 0.0, seed)
    jittery = simulate_training(subject, cluster, layout, task(), 0.05, seed)
    uneven = simulate_training(subject, cluster, layout, task(1.0), 0.0, seed)
    assert calm.waiting < jittery.waiting
    assert calm.waiting < uneven.waiting
    assert calm.seconds < min(jittery.seconds, uneven.seconds)
    # The analytic model's imbalance is what the loads that were drawn bring about, roughly.
    assert uneven.seconds == pytest.approx(uneven.analytic, rel=0.1)


def test_ten_thousand_ranks_are_played_in_seconds() -> None:
    subject, cluster = find_subject("deepseek-v3"), parse_cluster("10240xH800")
    layout = parse_layout("dp=640,ep=64,pp=16", 10240)
    big = TrainingTask(tokens=1e12, batch_tokens=10240 * 4096, sequence=4096, max_vio=0.5)
    start = time.perf_counter()
    played = simulate_training(subject, cluster, layout, big)
    assert time.perf_counter() - start < 10
    assert played.ranks == 10240


def test_a_decoded_token_is_played_over_all_ranks() -> None:
    subject, cluster = find_subject("deepseek-v3"), parse_cluster("32xH800")
    layout = parse_layout("ep=32", 32)
    wanted = InferenceTask(phase="decode", batch=2048, precision="float8")
    calm = simulate_decode(subject, cluster, layout, wanted, jitter=0.0)
    assert calm.seconds == pytest.approx(calm.analytic, rel=1e-6)
    assert simulate_decode(subject, cluster, layout, wanted, jitter=0.1).waiting > calm.waiting


def test_segments_of_a_rank_follow_each_other() -> None:
    layout = parse_layout("dp=64,ep=8", 64)
    played = simulate_training(find_subject("mixtral-8x7b"), parse_cluster("64xH100"), layout, task(0.5))
    by_rank: dict[int, list[tuple[float, float]]] = {}
    for one in played.segments:
        by_rank.setdefault(one.rank, []).append((one.start, one.end))
    assert len(by_rank) == 8
    for spans in by_rank.values():
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))


@pytest.mark.parametrize(("stages", "micro"), [(1, 5), (4, 4), (4, 16), (8, 3)])
def test_a_pipeline_of_equal_stages_has_the_known_length(stages: int, micro: int) -> None:
    """(M + P - 1) times a forward and a backward pass."""
    forward, backward = random.uniform(0.5, 2), random.uniform(0.5, 2)
    ends = _pipeline(np.full((3, stages, 2), forward), np.full((3, stages, 2), backward), micro)
    assert ends == pytest.approx(np.full(2, (micro + stages - 1) * (forward + backward)))


def test_loads_have_the_imbalance_that_was_asked_for() -> None:
    rng = np.random.default_rng(random.randrange(2**31))
    wanted = random.uniform(0.1, 3)
    load_E = _popularity(rng, find_subject("deepseek-v3"), wanted)
    assert load_E.mean() == pytest.approx(1.0)
    assert load_E.max() - 1 == pytest.approx(wanted, rel=0.01)
