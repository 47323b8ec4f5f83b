"""Layouts that can be, and that cannot; and the bytes they leave on a device."""

import random

import pytest

from moesaic.config import ModelConfig
from moesaic.config_io import from_mapping
from moesaic.errors import UsageError
from moesaic.plan.layout import Layout, check_layout, parse_layout
from moesaic.plan.memory import GRADIENT_BYTES, MASTER_BYTES, inference_memory, training_memory
from moesaic.plan.subject import find_subject
from moesaic.presets import PRESETS

MIXTRAL = from_mapping(ModelConfig, PRESETS["mixtral-8x7b"])
DENSE = from_mapping(ModelConfig, PRESETS["llama-2-7b"])


def test_what_is_left_of_the_cluster_becomes_copies() -> None:
    layout = parse_layout("ep=8, tp=2,pp=4,recompute=full", 64)
    assert (layout.dp, layout.tp, layout.pp, layout.ep, layout.recompute) == (8, 2, 4, 8, "full")
    assert layout.world == 64
    assert layout.expert_copies == 2
    assert str(layout) == "dp8 ep8 pp4 tp2"
    assert str(Layout()) == "one device"


@pytest.mark.parametrize("text", ["ep=0", "ep", "xp=2", "tp=two", "recompute=some", "dp=-1", "ep=1.5"])
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--parallel"):
        parse_layout(text, 8)


@pytest.mark.parametrize(
    ("layout", "config", "words"),
    [
        (Layout(dp=3), MIXTRAL, "= 3 devices, but the cluster has 8"),
        (Layout(dp=8, ep=3), MIXTRAL, "8 experts"),
        (Layout(dp=2, ep=8, pp=4), MIXTRAL, "must divide dp x fsdp x tp = 2"),
        (Layout(dp=8, ep=2), DENSE, "dense"),
        (Layout(pp=8, vp=5), MIXTRAL, "has 32"),
    ],
)
def test_impossible_layouts_are_refused_with_the_numbers(layout: Layout, config: ModelConfig, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_layout(layout, config, 8)


def test_heads_are_dealt_evenly() -> None:
    with pytest.raises(UsageError, match="32 heads"):
        check_layout(Layout(tp=3), MIXTRAL, 3)


def test_one_device_holds_every_byte_of_the_state() -> None:
    subject = find_subject("mixtral-8x7b")
    memory = training_memory(subject, Layout(recompute="full"), 128, 1e12, "bfloat16")
    for part, size in (("weights", 2.0), ("gradients", GRADIENT_BYTES), ("optimizer", MASTER_BYTES)):
        assert memory.parts[part] == pytest.approx(size * subject.total)
    assert memory.total == sum(memory.parts.values())


@pytest.mark.parametrize("text", ["dp=8,ep=8", "dp=2,ep=4,tp=4", "dp=4,ep=4,pp=2", "fsdp=8,ep=8", "fsdp=8"])
def test_devices_together_hold_every_byte_at_least_once(text: str) -> None:
    """And copies of what is not cut."""
    subject = find_subject("mixtral-8x7b")
    layout = parse_layout(text, 8)
    memory = training_memory(subject, layout, 128, 1e12, "bfloat16")
    assert memory.parts["optimizer"] * 8 == pytest.approx(MASTER_BYTES * subject.total, rel=0.02)
    assert memory.parts["gradients"] * 8 >= GRADIENT_BYTES * subject.total * 0.99
    if "fsdp" in text:
        assert memory.parts["gradients"] * 8 == pytest.approx(GRADIENT_BYTES * subject.total, rel=0.02)


def test_recomputing_and_cutting_need_less() -> None:
    subject = find_subject("llama-2-7b")
    layouts = (Layout(), Layout(recompute="selective"), Layout(recompute="full"), Layout(tp=2, recompute="full"))
    sizes = [training_memory(subject, one, 4096, 1e12, "bfloat16").parts["activations"] for one in layouts]
    assert sizes == sorted(sizes, reverse=True)


def test_the_cache_grows_with_texts_and_their_length() -> None:
    subject = find_subject("mixtral-8x7b")
    batch, context = random.randint(1, 64), random.randint(1, 5000)
    memory = inference_memory(subject, Layout(), batch, context, 1, 1e12, 2.0, 2.0)
    assert memory.parts["keys and values"] == 2 * 32 * 2 * 8 * 128 * batch * context
    assert memory.parts["dense weights"] + memory.parts["experts"] == pytest.approx(2 * subject.total)
    cut = inference_memory(subject, Layout(tp=4, ep=4), batch, context, 1, 1e12, 2.0, 2.0)
    assert cut.parts["experts"] == memory.parts["experts"] / 4
    assert cut.parts["keys and values"] == memory.parts["keys and values"] / 4
