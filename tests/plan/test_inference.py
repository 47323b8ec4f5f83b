"""Decoding and prefill against arithmetic by hand."""

import random
from dataclasses import replace

import pytest

from moesaic.plan.cluster import parse_cluster
from moesaic.plan.efficiency import InferenceLosses
from moesaic.plan.inference import InferenceTask, estimate_inference
from moesaic.plan.layout import Layout
from moesaic.plan.subject import find_subject
from moesaic.plan.work import kv_numbers, weights_read

PERFECT = InferenceLosses(memory=1.0, unpacking=1.0, layer=0.0, gemm=1.0)


def test_one_text_is_decoded_as_fast_as_its_bytes_are_read() -> None:
    subject, cluster = find_subject("mixtral-8x7b"), parse_cluster("1xH200")
    context = random.randint(1, 10_000)
    task = InferenceTask(phase="decode", context=context, precision="bfloat16")
    found = estimate_inference(subject, cluster, Layout(), task, PERFECT)
    read = 2 * (weights_read(subject, 1) + kv_numbers(subject, context))
    assert found.bytes_read == pytest.approx(read)
    assert found.tokens_per_second == pytest.approx(4.8e12 / read)
    assert found.seconds_per_step == pytest.approx(read / 4.8e12)
    assert found.experts_in == "device"


def test_a_long_prompt_is_read_at_the_peak() -> None:
    subject, cluster = find_subject("llama-3-8b"), parse_cluster("1xH100")
    task = InferenceTask(phase="prefill", context=8192)
    found = estimate_inference(subject, cluster, Layout(), task, PERFECT)
    flops = 2 * (subject.total - 2 * subject.config.vocab_size * 4096) * 8192 + 4 * 32 * 4096 * 8192**2 / 2
    flops -= 2 * 3 * 4096 * 14336 * 8191  # of the last layer, whose feed-forward only the last token needs
    assert found.seconds_per_step == pytest.approx(flops / 989e12, rel=0.02)


def test_more_texts_are_faster_together_and_slower_each() -> None:
    subject, cluster = find_subject("qwen3-30b-a3b"), parse_cluster("1xH100")
    steps, speeds = [], []
    for batch in (1, 4, 16, 64):
        found = estimate_inference(subject, cluster, Layout(), InferenceTask(phase="decode", batch=batch))
        steps.append(found.seconds_per_step)
        speeds.append(found.tokens_per_second)
    assert steps == sorted(steps)
    assert speeds == sorted(speeds)


def test_experts_that_do_not_fit_go_to_the_host_or_to_disk() -> None:
    subject = find_subject("mixtral-8x7b")
    task = InferenceTask(phase="decode", precision="int4")
    on_disk = estimate_inference(subject, parse_cluster("laptop:16GiB:ddr5:nvme"), Layout(), task)
    assert (on_disk.experts_in, on_disk.bound) == ("disk", "disk")
    assert on_disk.memory.fits
    hosted = estimate_inference(subject, parse_cluster("1xRTX-4080:host64GiB:ddr5"), Layout(), task)
    assert hosted.experts_in == "host"
    assert hosted.seconds["experts on the host"] > hosted.seconds["reading weights"]
    nowhere = estimate_inference(subject, parse_cluster("laptop:1GiB"), Layout(), task)
    assert not nowhere.memory.fits
    assert nowhere.bound.startswith("memory")


def test_misses_of_the_cache_are_read_from_disk() -> None:
    subject, cluster = find_subject("mixtral-8x7b"), parse_cluster("laptop:16GiB:ddr5:nvme")
    task = InferenceTask(phase="decode", precision="int4")
    for rate in (0.0, 0.5, 1.0):
        found = estimate_inference(subject, cluster, Layout(), replace(task, hit_rate=rate))
        experts = 32 * 2 * 3 * 4096 * 14336 * 4.5 / 8
        assert found.seconds["disk"] == pytest.approx(experts * (1 - rate) / 3.5e9)
    slow = estimate_inference(subject, parse_cluster("laptop:16GiB:ddr5:hdd"), Layout(), task)
    assert slow.tokens_per_second < estimate_inference(subject, cluster, Layout(), task).tokens_per_second / 5


def test_mxfp4_models_keep_other_weights_in_bfloat16() -> None:
    subject = find_subject("gpt-oss-20b")
    task = InferenceTask(phase="decode", precision="mxfp4")
    found = estimate_inference(subject, parse_cluster("1xH100"), Layout(), task)
    # 13.76 GB are the published files.
    assert found.memory.parts["experts"] + found.memory.parts["dense weights"] == pytest.approx(13.76e9, rel=0.01)
