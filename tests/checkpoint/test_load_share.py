"""Every rank reads its experts, the first one all else as well, and together they have the model."""

from pathlib import Path

import pytest
import torch

from moesaic.checkpoint.load import load
from moesaic.checkpoint.quantize import quantize
from moesaic.errors import UsageError
from moesaic.model.mixed_precision import HotBudget
from moesaic.model.transformer import Transformer
from moesaic.parallel.inference import ExpertShare

from .family_cases import FAMILY_CASES
from .helpers import save_hf_model
from .test_quantize_hot import FAMILIES, record


def assert_parts_of(directory: Path, count: int, quantization: str | None = None) -> list[Transformer]:
    whole = load(directory, quantization=quantization)
    shares = [ExpertShare(rank, count) for rank in range(count)]
    parts = [load(directory, quantization=quantization, share=share) for share in shares]
    states = [part.state_dict() for part in parts]
    for name, tensor in whole.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(states[0][name], tensor), name
            assert all(state[name].is_meta for state in states[1:]), name
            continue
        own = [state[name] for state in states]
        assert torch.equal(torch.cat(own), tensor), name
        assert sum(part.untyped_storage().nbytes() for part in own) == tensor.nbytes, name
    moe = whole.config.moe
    assert moe is not None
    for layers in zip(*(part.moe_layers for part in parts), strict=True):
        assert sum(layer.experts.num_experts for layer in layers) == moe.num_experts
    return parts


@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_together_have_what_one_process_has(tmp_path: Path, name: str, quantization: str | None) -> None:
    save_hf_model(FAMILY_CASES[name], tmp_path)
    assert_parts_of(tmp_path, 3, quantization)


def test_packed_experts_of_two_precisions_are_shared_out(tmp_path: Path) -> None:
    save_hf_model(FAMILY_CASES["mixtral"], tmp_path / "plain")
    config = load(tmp_path / "plain").config
    assert config.moe is not None
    budget = HotBudget(record(tmp_path, config.num_moe_layers, config.moe.num_experts), share=0.4)
    hot = quantize(tmp_path / "plain", tmp_path / "packed", "int4", hot=budget).quantization.hot
    parts = assert_parts_of(tmp_path / "packed", 2)
    for index, numbers in enumerate(hot):
        first, last = ExpertShare(1, 2).bounds(config.moe.num_experts)
        assert parts[1].moe_layers[index].experts.hot == tuple(
            number - first for number in numbers if first <= number < last
        )


def test_what_ranks_cannot_share_is_refused_with_the_numbers(tmp_path: Path) -> None:
    save_hf_model(FAMILY_CASES["mixtral"], tmp_path / "sparse")
    moe = load(tmp_path / "sparse").config.moe
    assert moe is not None
    with pytest.raises(UsageError, match="memory is for one process, and there are 2 ranks"):
        load(tmp_path / "sparse", memory="1GiB", share=ExpertShare(0, 2))
    with pytest.raises(UsageError, match=f"a layer has {moe.num_experts} experts; .*nproc-per-node {moe.num_experts} "):
        load(tmp_path / "sparse", share=ExpertShare(0, moe.num_experts + 1))
    save_hf_model(FAMILY_CASES["qwen3"], tmp_path / "dense")
    with pytest.raises(UsageError, match="2 ranks, and the model has no experts"):
        load(tmp_path / "dense", share=ExpertShare(0, 2))
