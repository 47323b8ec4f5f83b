"""Experts read one by one from the directories that every family publishes, against the model in memory."""

import re
import resource
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig

from moesaic.checkpoint import load_within as loading
from moesaic.checkpoint.families import family_of
from moesaic.checkpoint.load import load
from moesaic.checkpoint.packed import pack_mxfp4
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.residency.memory_plan import MemoryPlan, make_plan
from moesaic.residency.residency import residency_of
from moesaic.weight_reader import read_safetensors
from moesaic.weights_io import write_safetensors

from .family_cases import FAMILY_CASES, GPT_OSS
from .helpers import random_tokens, save_hf_model
from .test_families import write_layout

SPARSE = [
    name
    for name, config in FAMILY_CASES.items()
    if family_of(config.model_type).config_from_hf(config.to_dict()).moe is not None
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moesaic"


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Transformer]:
    """Loads with three slots for all layers together."""

    def few(*arguments: object) -> MemoryPlan:
        return replace(make_plan(*arguments), slots=3)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "make_plan", few)
    return lambda directory, **options: load(directory, memory="64GiB", device="cpu", **options)


def experts_read(model: Transformer) -> int:
    residency = residency_of(model)
    assert residency is not None
    return residency.statistics.misses


@pytest.mark.parametrize("name", SPARSE)
@torch.inference_mode()
def test_every_family_runs_from_its_own_files(name: str, tmp_path: Path, within: Callable[..., Transformer]) -> None:
    save_hf_model(FAMILY_CASES[name], tmp_path / "saved")
    in_memory, tokens = load(tmp_path / "saved"), random_tokens()
    expected = in_memory(tokens)
    for choice in range(2):
        out = tmp_path / f"layout{choice}"
        write_layout(tmp_path / "saved", in_memory, out, choice)
        on_disk = within(out)
        difference = (on_disk(tokens) - expected).abs().max()
        assert difference < 1e-4, difference
        assert experts_read(on_disk) > 3


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "qwen2_moe"])
@torch.inference_mode()
def test_packed_on_the_way_they_are_what_they_are_in_memory(
    name: str, scheme: str, tmp_path: Path, within: Callable[..., Transformer]
) -> None:
    save_hf_model(FAMILY_CASES[name], tmp_path)
    in_memory, on_disk = load(tmp_path, quantization=scheme, device="cpu"), within(tmp_path, quantization=scheme)
    for tokens in (random_tokens(), random_tokens()[:, :1]):
        assert torch.equal(on_disk(tokens), in_memory(tokens))


@torch.inference_mode()
def test_packed_experts_are_packed_once(tmp_path: Path, within: Callable[..., Transformer], own_cache: Path) -> None:
    save_hf_model(FAMILY_CASES["mixtral"], tmp_path)
    model, tokens = within(tmp_path, quantization="int4"), random_tokens()
    residency = residency_of(model)
    assert residency is not None
    read = []
    for _ in range(2):
        before = residency.statistics.bytes_read
        model(tokens)
        read.append(residency.statistics.bytes_read - before)
    assert read[1] < read[0] / 2  # 4 bits in place of 32
    assert list(own_cache.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("what", ["no folder", "disk full"])
@torch.inference_mode()
def test_without_room_for_packed_experts_they_are_packed_again(
    what: str, tmp_path: Path, within: Callable[..., Transformer], own_cache: Path
) -> None:
    save_hf_model(FAMILY_CASES["mixtral"], tmp_path)
    tokens = random_tokens()
    expected = load(tmp_path, quantization="int4", device="cpu")(tokens)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if what == "no folder":
            own_cache.parent.write_text("a file")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            model = within(tmp_path, quantization="int4")
            assert torch.equal(model(tokens), expected)
            assert torch.equal(model(tokens), expected)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reason = "File exists|Not a directory" if what == "no folder" else "File too large"
    messages = [str(one.message) for one in told if "packed experts" in str(one.message)]
    assert len(messages) == 1
    assert re.match(rf"packed experts are not kept in {own_cache} \(({reason})\); they will be", messages[0])


def test_what_is_quantised_otherwise_is_refused_with_a_way_out(tmp_path: Path) -> None:
    save_hf_model(GptOssConfig(**{**GPT_OSS, "hidden_size": 64, "intermediate_size": 32}), tmp_path)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack_mxfp4(tensors.pop(name))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UsageError, match=r"is quantised \(MXFP4\).*moesaic quantize MODEL OUT"):
        load(tmp_path, memory="64GiB", device="cpu")


@torch.inference_mode()
def test_weights_that_are_not_finite_fail_the_pass_by_name(tmp_path: Path, within: Callable[..., Transformer]) -> None:
    model = save_hf_model(FAMILY_CASES["mixtral"], tmp_path)
    for name, tensor in model.state_dict().items():
        if "experts" in name and "down" in name:
            tensor[0].fill_(torch.nan)
    model.save_pretrained(tmp_path)
    on_disk = within(tmp_path, quantization="int8")
    with pytest.raises(MoesaicError, match=r"down of expert 0 in .*safetensors: it holds numbers that are not finite"):
        on_disk(random_tokens())


def test_packing_needs_room_for_the_largest_tensor() -> None:
    loading.require_room_to_pack(process=2**28, packed=2**27, largest=2**27, budget=2**29)
    with pytest.raises(UsageError, match=r"memory 512 MiB is too little .* 129 MiB the largest .* try memory 576MiB"):
        loading.require_room_to_pack(process=2**28, packed=2**27, largest=2**27 + 2**20, budget=2**29)


def test_gradients_are_refused(tmp_path: Path, within: Callable[..., Transformer]) -> None:
    save_hf_model(FAMILY_CASES["mixtral"], tmp_path)
    model = within(tmp_path).requires_grad_(True)
    with pytest.raises(UsageError, match="experts on disk are for inference"):
        model(random_tokens())
