"""Every family against transformers: what it saves, we load, and the other way round.

Rows are tiny random models of tests/checkpoint/family_cases.py. Logits have order 1 and all is float32.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from moesaic.analysis.record import record_routing
from moesaic.checkpoint.families import FAMILIES
from moesaic.checkpoint.hf_directory import HFDirectory
from moesaic.checkpoint.load import load
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig
from moesaic.model.kv_cache import KVCache
from moesaic.model.transformer import Transformer
from tests.model.paged import paged_logits, random_passes

from .family_cases import FAMILY_CASES
from .helpers import load_theirs, random_tokens, save_hf_model

TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 1e-4
"""Of the largest entry of a parameter's gradient."""
GRADIENT_FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss"]


@pytest.fixture(params=FAMILY_CASES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, transformers.PreTrainedModel]:
    """A directory as transformers saves it, and the model in it."""
    return tmp_path, save_hf_model(FAMILY_CASES[request.param], tmp_path)


def test_every_family_has_a_row() -> None:
    assert {config.model_type for config in FAMILY_CASES.values()} == set(FAMILIES)


@torch.no_grad()
def test_logits_and_chosen_experts_are_those_of_transformers(saved: tuple[Path, transformers.PreTrainedModel]) -> None:
    directory, theirs = saved
    ours, tokens = load(directory), random_tokens()
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    with recorded_choices(theirs) as chosen, record_routing(ours) as trace:
        expected, logits = theirs(tokens).logits, ours(tokens)
    assert 0.3 < expected.std() < 30  # logits that a difference would show in
    assert largest_difference(logits, expected) < TOLERANCE
    assert len(chosen) == len(trace)
    for theirs_TK, layer in zip(chosen, trace, strict=True):
        assert torch.equal(theirs_TK.sort(-1).values, layer.expert_ids.sort(-1).values)


@torch.no_grad()
def test_decoding_with_the_cache_equals_the_full_forward(saved: tuple[Path, transformers.PreTrainedModel]) -> None:
    ours = load(saved[0])
    if rope_depends_on_length(ours.config):
        pytest.skip("the rotary frequencies depend on how long the sequence is when a key is computed")
    tokens = random_tokens()
    kv = KVCache(ours.config, batch_size=2, capacity=tokens.shape[1])
    steps = [ours(chunk, kv=kv) for chunk in tokens.split([23, 1, 1, 2, 1, tokens.shape[1] - 28], dim=1)]
    assert largest_difference(torch.cat(steps, dim=1), ours(tokens)) < TOLERANCE


@torch.no_grad()
def test_passes_over_texts_in_blocks_equal_the_full_forward(saved: tuple[Path, transformers.PreTrainedModel]) -> None:
    ours, tokens = load(saved[0]), random_tokens()
    lengths = [len(text) for text in tokens]
    logits = paged_logits(ours, list(tokens), random_passes(lengths, 30), prompt_lengths=lengths)
    assert largest_difference(torch.stack(logits), ours(tokens)) < TOLERANCE


@torch.no_grad()
def test_left_padding_changes_nothing(saved: tuple[Path, transformers.PreTrainedModel]) -> None:
    """A batch of a padded and a whole sequence, prefilled and decoded, against each sequence alone."""
    ours, tokens, padding = load(saved[0]), random_tokens(), 9
    length = tokens.shape[1]
    short = tokens[0, : length - padding]
    batch = torch.stack((torch.cat((torch.zeros(padding, dtype=torch.int64), short)), tokens[1]))
    positions = torch.arange(length).repeat(2, 1)
    positions[0] -= padding
    kv = KVCache(ours.config, batch_size=2, capacity=length)
    split = length - 3
    padded = torch.cat(
        [ours(batch[:, :split], positions[:, :split], kv), ours(batch[:, split:], positions[:, split:], kv)], dim=1
    )
    alone = ours(short[None]), ours(tokens[1:])
    if rope_depends_on_length(ours.config):
        padded = ours(batch, positions)  # one length for all, so only the longest sequence is comparable
    else:
        assert largest_difference(padded[0, padding:], alone[0][0]) < TOLERANCE
    assert largest_difference(padded[1], alone[1][0]) < TOLERANCE


@torch.no_grad()
def test_what_we_write_is_what_we_read(saved: tuple[Path, transformers.PreTrainedModel]) -> None:
    """Tensor for tensor, bit for bit; and transformers computes the same from it."""
    directory, theirs = saved
    ours = load(directory)
    out = directory / "ours"
    assert export_model(ours, None, out) == ours.config.model_type
    before, after = stored_tensors(directory), stored_tensors(out)
    assert before.keys() == after.keys()
    with HFDirectory(directory) as stored:
        does_nothing = stored.layout.fillers
    assert all(torch.equal(before[name], after[name]) for name in before if name not in does_nothing)
    tokens = random_tokens()
    again = load_theirs(out)
    assert largest_difference(again(tokens).logits, theirs(tokens).logits) < TOLERANCE
    assert load(out).config == ours.config


@torch.no_grad()
def test_both_layouts_of_the_experts_are_read(saved: tuple[Path, transformers.PreTrainedModel]) -> None:
    """Written in each of its alternative layouts, sharded so that experts span files, a model stays the same."""
    directory, _ = saved
    ours = load(directory)
    with HFDirectory(directory) as stored:
        alternatives = {len(one) for one in stored.layout.tensors}
    if alternatives == {1}:
        assert ours.config.moe is None
        return
    for choice in range(max(alternatives)):
        out = directory / f"layout{choice}"
        write_layout(directory, ours, out, choice)
        again = load(out)
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("model_type", GRADIENT_FAMILIES)
def test_gradients_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    theirs = save_hf_model(FAMILY_CASES[model_type], tmp_path)
    ours, tokens = load(tmp_path).train(), random_tokens()
    for model in (theirs.train(), ours):
        logits: Any = model(tokens)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    with torch.no_grad():  # theirs, seen through the layout as ours: written as a checkpoint of gradients
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected = load(tmp_path / "gradients").state_dict()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        scale = expected[name].abs().max()
        assert scale > 0, name
        assert largest_difference(gradient, expected[name]) < GRADIENT_TOLERANCE * scale, name


def rope_depends_on_length(config: ModelConfig) -> bool:
    scaling = config.rope_scaling
    return scaling is not None and scaling.rope_type in ("dynamic", "longrope") and scaling.alpha is None


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def write_layout(directory: Path, ours: Transformer, out: Path, choice: int) -> None:
    """The directory again, with each tensor in its alternative number `choice`, in small shards."""
    out.mkdir()
    (out / "config.json").write_bytes((directory / "config.json").read_bytes())
    state, tensors = ours.state_dict(), {}
    with HFDirectory(directory) as stored:
        for alternatives in stored.layout.tensors:
            for one in alternatives[min(choice, len(alternatives) - 1)]:
                tensors[one.name] = torch.cat(one.views(state)).reshape(one.shape(state)).contiguous()
    names, weight_map = sorted(tensors), {}
    for shard in range(4):
        file_name = f"model-{shard}.safetensors"
        part = {name: tensors[name] for name in names[shard::4]}
        safetensors.torch.save_file(part, out / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


class recorded_choices:
    """The expert ids (T, K) that each sparse layer of a transformers model chooses, seen from outside.

    Experts are called with them, but for Llama 4, whose experts see every token: its router gives all scores, of which
    those of other experts are 0.
    """

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model
        self.chosen: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        self.handles = []
        for module in self.model.modules():
            name = type(module).__name__
            if name == "Llama4Router":
                self.handles.append(module.register_forward_hook(self._keep_scored))
            elif name.endswith("Experts") and name != "Llama4TextExperts":
                self.handles.append(module.register_forward_pre_hook(self._keep, with_kwargs=True))
        return self.chosen

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dtype == torch.int64]
        self.chosen.append(ids[0].detach())

    def _keep_scored(self, module: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        self.chosen.append(outputs[0].detach().topk(module.top_k).indices)
