"""A pruned directory is the model with the kept experts alone, here and in transformers, or it is not there at all."""

import json
import os
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesaic.analysis.record import record_routing
from moesaic.checkpoint.load import load, load_tokenizer
from moesaic.checkpoint.packed import pack_mxfp4
from moesaic.checkpoint.prune import prune
from moesaic.checkpoint.quantize import quantize
from moesaic.checkpoint.reduce_experts import fewest_experts, with_experts
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer
from moesaic.weight_reader import read_safetensors
from moesaic.weights_io import write_safetensors

from .family_cases import FAMILY_CASES, GPT_OSS
from .helpers import BASE, CONFIGS, load_theirs, logit_difference, make_run, random_model, random_tokens, save_hf_model

SPARSE = ["olmoe", "qwen3_moe every second layer, slides, yarn", "qwen2_moe", "mixtral", "glm4_moe",
          "deepseek_v2 groups, yarn, no query latent", "deepseek_v3", "gpt_oss", "granitemoe", "dbrx", "phimoe",
          "llama4_text", "minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe"]  # fmt: skip


def sparse_layers(config: ModelConfig) -> list[int]:
    return [index for index in range(config.num_hidden_layers) if config.is_moe_layer(index)]


def random_choice(config: ModelConfig) -> dict[int, list[int]]:
    """Experts of each layer, as many of each group, of a number that is drawn too."""
    moe = config.moe
    assert moe is not None
    size = moe.num_experts // moe.n_group
    keep = random.randrange(fewest_experts(moe), moe.num_experts, moe.n_group) // moe.n_group
    return {
        layer: sorted(
            group * size + expert for group in range(moe.n_group) for expert in random.sample(range(size), keep)
        )
        for layer in sparse_layers(config)
    }


def by_hand(model: Transformer, kept: Mapping[int, Sequence[int]]) -> Transformer:
    """A model made of the kept experts alone."""
    config = model.config
    assert config.moe is not None
    keep = len(next(iter(kept.values())))
    made = Transformer(replace(config, moe=replace(config.moe, num_experts=keep))).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        of_experts = ".feed_forward.experts." in name or ".feed_forward.router." in name
        state[name] = torch.stack([tensor[e] for e in kept[int(name.split(".")[1])]]) if of_experts else tensor
    made.load_state_dict(state)
    return made


def assert_same(one: Transformer, other: Transformer) -> None:
    assert one.config == other.config
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(one(tokens), other(tokens))


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_left_is_the_model_with_these_experts_alone(tmp_path: Path, name: str) -> None:
    save_hf_model(FAMILY_CASES[name], tmp_path / "plain")
    model = load(tmp_path / "plain")
    kept = random_choice(model.config)
    made = prune(tmp_path / "plain", tmp_path / "pruned", kept, max_shard_bytes=20_000)
    loaded = load(tmp_path / "pruned")
    assert_same(loaded, by_hand(model, kept))
    assert logit_difference(loaded, load_theirs(tmp_path / "pruned")) < 1e-4
    assert len(list((tmp_path / "pruned").glob("model-*.safetensors"))) > 1
    assert made.family == model.config.model_type
    sizes = [
        sum(tensor.nbytes for file in (tmp_path / directory).glob("*.safetensors")
            for tensor in read_safetensors(file).values())
        for directory in ("plain", "pruned")
    ]  # fmt: skip
    assert [made.nbytes_before, made.nbytes] == sizes


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "granitemoe", "llama4_text", "minimax_m2"]
)
def test_experts_that_no_token_visits_are_not_missed(tmp_path: Path, name: str) -> None:
    save_hf_model(FAMILY_CASES[name], tmp_path / "plain")
    model = load(tmp_path / "plain")
    moe = model.config.moe
    assert moe is not None
    keep = max(moe.num_experts - 2, moe.num_experts_per_tok)
    tokens = random_tokens()[:1, : keep // moe.num_experts_per_tok]
    with torch.no_grad(), record_routing(model) as trace:
        before = model(tokens)
    kept = {}
    for layer, routing in zip(sparse_layers(model.config), trace, strict=True):
        visited = sorted(set(routing.expert_ids.flatten().tolist()))
        others = [expert for expert in range(moe.num_experts) if expert not in visited]
        kept[layer] = visited + random.sample(others, keep - len(visited))
    prune(tmp_path / "plain", tmp_path / "pruned", kept)
    with torch.no_grad():
        after = load(tmp_path / "pruned")(tokens)
    assert torch.allclose(after, before, atol=1e-5)


def test_a_run_becomes_a_pruned_directory(tmp_path: Path) -> None:
    for name in ("sigmoid, shared, partial rope", "softmax"):
        config = replace(CONFIGS[name], vocab_size=257, eos_token_ids=())
        if name == "softmax":  # qwen3_moe has no such factor: it goes into the experts
            assert config.moe is not None
            config = replace(config, moe=replace(config.moe, routed_scaling_factor=1.7))
        model = make_run(tmp_path / f"run {name}", config)
        kept = random_choice(config)
        prune(tmp_path / f"run {name}", tmp_path / name, kept)
        loaded, hand = load(tmp_path / name), by_hand(model, kept)
        tokens = random_tokens()
        with torch.no_grad():
            assert torch.allclose(loaded(tokens), hand(tokens), atol=1e-4)
        assert loaded.config.eos_token_ids == (256,)
        assert load_tokenizer(tmp_path / name).to_json() == byte_tokenizer().to_json()


def test_types_and_companions_stay(tmp_path: Path) -> None:
    save_hf_model(FAMILY_CASES["deepseek_v3"], tmp_path / "plain")
    tensors = {
        name: tensor if "mlp.gate." in name else tensor.bfloat16()
        for name, tensor in read_safetensors(tmp_path / "plain" / "model.safetensors").items()
    }
    write_safetensors(tmp_path / "plain" / "model.safetensors", tensors)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    byte_tokenizer().save(tmp_path / "plain")
    (tmp_path / "plain" / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.5}')
    model = load(tmp_path / "plain")
    kept = random_choice(model.config)
    prune(tmp_path / "plain", tmp_path / "pruned", kept)
    written = read_safetensors(tmp_path / "pruned" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {name: tensors[name].dtype for name in written}
    assert load(tmp_path / "pruned").config.eos_token_ids == (7, 9)
    for file in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "pruned" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    wide = prune(tmp_path / "plain", tmp_path / "wide", kept, dtype="float32")
    assert wide.dtype == load(tmp_path / "wide").embed_tokens.weight.dtype == torch.float32


def test_published_mxfp4_experts_are_written_plain(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    save_hf_model(transformers.GptOssConfig(**{**GPT_OSS, **sizes}), tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    tensors = read_safetensors(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack_mxfp4(tensors.pop(name))
    write_safetensors(file, tensors)
    model = load(tmp_path / "published")
    kept = random_choice(model.config)
    prune(tmp_path / "published", tmp_path / "pruned", kept)
    assert_same(load(tmp_path / "pruned"), by_hand(model, kept))
    quantize(tmp_path / "pruned", tmp_path / "packed", "mxfp4")  # exact, or it would refuse


MIXED = MoEConfig(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, router="sigmoid_topk")
GROUPED = replace(MIXED, num_experts=12, n_group=4, topk_group=2)


def test_how_many_can_stay_is_said_with_numbers() -> None:
    small_groups = replace(GROUPED, num_experts=8)
    plain, grouped, small = (replace(ModelConfig(**BASE), moe=moe) for moe in (MIXED, GROUPED, small_groups))
    for config, keep, message in (
        (plain, 2, "keep is 2, but a token visits 3 experts; keep 3 or more"),
        (plain, 8, "keep is 8 and each layer has 8 experts; keep from 3 to 7"),
        (plain, 0, "keep is 0, but a token visits 3 experts"),
        (grouped, 9, "keep is 9, but the experts are in 4 groups of equally many; keep 8 or 12"),
        (grouped, 4, "keep is 4, but a token visits 3 experts of 2 of 4 groups; keep 8 or more"),
        (grouped, 12, "keep is 12 and each layer has 12 experts; keep from 8 to 8"),
        (small, 4, "each layer has 8 experts and a token visits 3 experts of 2 of 4 groups; none can go"),
        (CONFIGS["dense"], 3, "this model has no experts; name a sparse model"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            with_experts(config, keep)
    for config, possible in ((plain, range(3, 8)), (grouped, [8])):
        found = []
        for keep in range(1, 12):
            try:
                changed = with_experts(config, keep)
            except UsageError:
                continue
            assert changed.moe is not None
            assert changed.moe.num_experts == keep
            found.append(keep)
        assert found == list(possible)
    # The rule is the config's own: one step below, such a model cannot be.
    assert plain.moe is not None
    with pytest.raises(UsageError):
        replace(plain.moe, num_experts=2)
    with pytest.raises(UsageError):
        replace(GROUPED, num_experts=4)


def test_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = random_model(replace(ModelConfig(**BASE), moe=replace(GROUPED, first_k_dense_replace=1)))
    export_model(model, None, tmp_path / "plain")
    good = {1: [0, 1, 3, 4, 6, 7, 9, 10], 2: [0, 2, 3, 5, 6, 8, 9, 11]}
    for kept, message in (
        ({**good, 0: good[1]}, "layer 0 has no experts; those that do are 1, 2"),
        ({1: good[1]}, "nothing says which experts layer 2 keeps; name some for 1, 2"),
        ({**good, 2: [*good[2][:7], 12]}, "layer 2 is to keep expert 12, but has experts 0 to 11"),
        ({**good, 2: [*good[2][:7], -1]}, "layer 2 is to keep expert -1"),
        ({**good, 2: [*good[2][:7], 0]}, "layer 2 is to keep an expert twice: 0, 0, 2"),
        ({**good, 2: good[2][:4]}, "layer 2 is to keep 4 experts and layer 1 8, but a config.json has one number"),
        ({**good, 2: list(range(8))}, "layer 2 is to keep 3, 3, 2, 0 experts of its 4 groups of 3"),
        ({}, "keep is 0"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            prune(tmp_path / "plain", tmp_path / "out", kept)
    assert os.listdir(tmp_path) == ["plain"]
    prune(tmp_path / "plain", tmp_path / "out", good)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = random_model(CONFIGS["softmax"])
    export_model(model, None, tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", "int8")
    export_model(random_model(CONFIGS["dense"]), None, tmp_path / "dense")
    kept = random_choice(model.config)
    chosen = MoEConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, router="expert_choice")
    make_run(tmp_path / "run", replace(ModelConfig(**BASE), vocab_size=257, moe=chosen))
    out, before = tmp_path / "out", sorted(os.listdir(tmp_path))
    for call, error, message in (
        (lambda: prune(tmp_path / "packed", out, kept), UsageError, "packed is quantised (int8); name the model that"),
        (lambda: prune(tmp_path / "dense", out, kept), UsageError, "qwen3 has no experts; name a sparse model"),
        (
            lambda: prune(tmp_path / "run", out, kept),
            MoesaicError,
            "no Hugging Face family has the router expert_choice",
        ),
        (lambda: prune(tmp_path / "plain", tmp_path / "dense", kept), UsageError, "dense exists and is not empty"),
        (lambda: prune(tmp_path / "plain", tmp_path / "plain" / "a", kept), UsageError, "lies inside the model"),
        (lambda: prune(tmp_path / "plain", out, kept, dtype="int8"), UsageError, "dtype 'int8' is not known"),
        (lambda: prune(tmp_path / "nothing", out, kept), UsageError, "nothing is neither a run directory"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()
    assert sorted(os.listdir(tmp_path)) == before


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    model = random_model(CONFIGS["softmax"])
    export_model(model, None, tmp_path / "plain")

    def interrupt(*counted: Any) -> None:
        if counted[1] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path / "plain", tmp_path / "out", random_choice(model.config), progress=interrupt)
    assert os.listdir(tmp_path) == ["plain"]


PEAK = """
    import sys
    from pathlib import Path
    from moesaic.checkpoint.merge import Cluster, merge
    from moesaic.checkpoint.prune import prune

    def memory(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    plain, small, out = map(Path, sys.argv[1:])
    kept = {layer: [0, 2, 5, 7, 8, 9, 12, 14] for layer in range(12)}
    pairs = [Cluster((2 * pair, 2 * pair + 1), (0.7, 0.3)) for pair in range(8)]
    clusters = {layer: pairs for layer in kept}
    prune(small, out / "small", {0: kept[0]})  # what is only made once
    merge(small, out / "small merged", {0: clusters[0]})
    for make in (lambda: prune(plain, out / "pruned", kept), lambda: merge(plain, out / "merged", clusters)):
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        made = make()
        print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("layout", ["one tensor per expert", "fused"])
def test_memory_holds_one_layer_beyond_what_is_written(tmp_path: Path, layout: str) -> None:
    moe = MoEConfig(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=160)
    config = replace(ModelConfig(**BASE), hidden_size=256, moe=moe)
    if layout == "fused":
        config = replace(config, model_type="granitemoe", qk_norm="none", moe=replace(moe, router="topk_softmax"))
    for name, layers in (("small", 1), ("plain", 12)):
        export_model(random_model(replace(config, num_hidden_layers=layers)), None, tmp_path / name)
    layer_bytes = 16 * 3 * 160 * 256 * 4
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(PEAK),
        *(str(tmp_path / name) for name in ("plain", "small", "out")),
    ]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is let go is given back at once
    peaks = [int(line) for line in subprocess.check_output(command, text=True, env=environment).split()]
    pruning, merging = peaks
    written = layer_bytes // 2
    assert pruning < layer_bytes + written
    assert merging < layer_bytes + written + layer_bytes // 2  # and some copies of the two that become one
    assert (tmp_path / "plain" / "model.safetensors").stat().st_size > 6 * max(peaks)
