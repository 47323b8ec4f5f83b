"""Searched layouts against a plain look at all of them."""

import random
import time

import pytest

from moesaic.errors import UsageError
from moesaic.plan.cluster import parse_cluster
from moesaic.plan.inference import InferenceTask, estimate_inference
from moesaic.plan.layout import Layout, check_layout
from moesaic.plan.search import MAX_OPTIONS, inference_options, training_options
from moesaic.plan.subject import find_subject
from moesaic.plan.training import TrainingTask, estimate_training

TASK = TrainingTask(tokens=1e12, batch_tokens=1024 * 4096, sequence=4096)


def test_the_first_option_is_the_fastest_that_fits_of_random_layouts() -> None:
    subject, cluster = find_subject("mixtral-8x7b"), parse_cluster("64xH100")
    best = training_options(subject, cluster, TASK)[0].estimate
    assert best.memory.fits
    tried = 0
    while tried < 200:
        tp, pp = random.choice((1, 2, 4, 8)), random.choice((1, 2, 4, 8))
        ep = random.choice((1, 2, 4, 8))
        if 64 % (tp * pp) or (64 // pp) % ep:
            continue
        layout = Layout(dp=64 // tp // pp, ep=ep, pp=pp, tp=tp, micro=random.choice((1, 2)))
        check_layout(layout, subject.config, 64)
        tried += 1
        other = estimate_training(subject, cluster, layout, TASK)
        assert not other.memory.fits or other.tokens_per_second <= best.tokens_per_second * (1 + 1e-9)


def test_no_option_is_beaten_in_everything() -> None:
    options = training_options(find_subject("qwen3-235b-a22b"), parse_cluster("256xH100"), TASK)
    assert 1 < len(options) <= MAX_OPTIONS
    merits = [(one.estimate.tokens_per_second, -one.estimate.memory.total) for one in options]
    for mine in merits:
        assert not any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in merits)
    assert len({one.estimate.layout for one in options}) == len(options)
    assert all(one.reason for one in options)
    for one in options:
        check_layout(one.estimate.layout, find_subject("qwen3-235b-a22b").config, 256)


def test_what_fits_nowhere_says_so() -> None:
    (option,) = training_options(find_subject("kimi-k2"), parse_cluster("8xH100"), TASK)
    assert not option.estimate.memory.fits
    assert "nothing fits" in option.reason
    assert option.estimate.bound.startswith("memory")


def test_a_given_layout_is_the_only_option_and_is_checked() -> None:
    subject, cluster = find_subject("mixtral-8x7b"), parse_cluster("8xH100")
    (option,) = training_options(subject, cluster, TASK, Layout(dp=8, ep=8))
    assert option.estimate.layout == Layout(dp=8, ep=8)
    with pytest.raises(UsageError, match="ep is 16"):
        training_options(subject, cluster, TASK, Layout(dp=8, ep=16))
    with pytest.raises(UsageError, match="raise --batch-tokens"):
        training_options(subject, parse_cluster("1000000xH100"), TASK)


def test_decoding_is_searched_too() -> None:
    subject, cluster = find_subject("mixtral-8x7b"), parse_cluster("8xH100")
    task = InferenceTask(phase="decode", batch=64)
    options = inference_options(subject, cluster, task)
    best = options[0].estimate.tokens_per_second
    for tp, ep in ((1, 8), (2, 8), (4, 4), (8, 8)):
        other = estimate_inference(subject, cluster, Layout(dp=8 // tp, ep=ep, tp=tp), task)
        assert other.tokens_per_second <= best * (1 + 1e-9)
    shortest = min(one.estimate.seconds_per_step for one in options)
    assert any("shortest" in one.reason for one in options) or shortest == options[0].estimate.seconds_per_step


def test_thousands_of_devices_are_searched_in_seconds() -> None:
    start = time.perf_counter()
    training_options(find_subject("deepseek-v3"), parse_cluster("16384xH100"), TrainingTask(
        tokens=15e12, batch_tokens=64e6, sequence=4096
    ))  # fmt: skip
    assert time.perf_counter() - start < 10
