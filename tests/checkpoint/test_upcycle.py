"""An upcycled model computes what the dense one does, in transformers too, and learns; what cannot be is refused."""

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesaic.checkpoint.load import load, load_tokenizer
from moesaic.checkpoint.plain_model import COMPANIONS
from moesaic.checkpoint.save import export_model
from moesaic.checkpoint.upcycle import Upcycling, upcycle
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer
from moesaic.weight_reader import WeightDirectory

from .family_cases import HEAD, LLAMA3, SIZES
from .helpers import BASE, CONFIGS, load_theirs, logit_difference, make_run, random_tokens, save_hf_model

WIDE_ROUTER: dict[str, Any] = {"initializer_range": 0.5}
"""Keeps the scores of experts, and so of groups, well apart."""
DENSE: dict[str, tuple[transformers.PreTrainedConfig, str]] = {
    "qwen3": (transformers.Qwen3Config(**SIZES, **HEAD, **WIDE_ROUTER), "qwen3_moe"),
    "llama": (transformers.LlamaConfig(**SIZES, **WIDE_ROUTER, rope_parameters=LLAMA3), "mixtral"),
    "mistral": (
        transformers.MistralConfig(**SIZES, **WIDE_ROUTER, sliding_window=7, tie_word_embeddings=True), "mixtral",
    ),
    "qwen2": (transformers.Qwen2Config(**SIZES, **WIDE_ROUTER), "qwen2_moe"),
    "olmo2": (transformers.Olmo2Config(**SIZES, **WIDE_ROUTER), "flex_olmo"),
}  # fmt: skip
COPY = Upcycling(num_experts=5, top_k=2)
GRANULAR = Upcycling(num_experts=12, top_k=8, method="granular", granularity=4)
ODD = Upcycling(num_experts=9, top_k=3, method="granular", granularity=3)
"""3 is no power of two, so that the last projection is rounded; a token visits one group."""
WAYS = {"copy": COPY, "granular": GRANULAR, "granular, odd": ODD}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DENSE)
def test_the_sparse_model_computes_what_the_dense_one_does(tmp_path: Path, name: str, way: str) -> None:
    config, family = DENSE[name]
    how = WAYS[way]
    dense = save_hf_model(config, tmp_path / "dense")
    made = upcycle(tmp_path / "dense", tmp_path / "out", how)
    ours, theirs = load(tmp_path / "out"), load_theirs(tmp_path / "out")
    assert made.family == theirs.config.model_type == family
    assert made.dense == load(tmp_path / "dense").config
    assert ours.config.moe is not None
    assert ours.config.moe.num_experts == how.num_experts
    assert ours.config.moe.moe_intermediate_size == 48 // how.granularity
    assert logit_difference(ours, dense) < 1e-4
    assert logit_difference(ours, theirs) < 1e-4
    layer = ours.moe_layers[1]
    first, *others = layer.router.get_parameter("weight").detach().unflatten(0, (-1, how.granularity)).unbind(1)
    assert torch.unique(first, dim=0).shape == first.shape  # groups differ, experts of one do not
    assert all(torch.equal(first, other) for other in others)


def test_tokens_visit_whole_groups(tmp_path: Path) -> None:
    save_hf_model(DENSE["qwen3"][0], tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "out", GRANULAR)
    model, routings = load(tmp_path / "out"), []
    with torch.no_grad():
        model(random_tokens(), routings=routings)
    visits = torch.zeros(3)
    for routing in routings:
        experts_TK = routing.expert_ids.view(-1, 8)
        groups_T2 = (experts_TK // 4).sort(dim=-1).values[:, ::4]
        expected_T24 = groups_T2.unsqueeze(-1) * 4 + torch.arange(4)
        assert torch.equal(experts_TK.sort(dim=-1).values, expected_T24.flatten(1))
        visits += torch.bincount(groups_T2.flatten(), minlength=3)
    assert (visits > 0).all()


@pytest.mark.parametrize("way", ["copy", "granular"])
def test_training_makes_the_experts_differ_and_moves_the_routers(tmp_path: Path, way: str) -> None:
    save_hf_model(DENSE["olmo2"][0], tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "out", WAYS[way])
    model = load(tmp_path / "out").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens, losses = random_tokens(), []
    for _ in range(6):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    granularity = WAYS[way].granularity
    for index, layer in enumerate(model.moe_layers):
        router_weight = layer.router.get_parameter("weight")
        assert router_weight.grad is not None
        assert router_weight.grad.abs().max() > 0
        assert not torch.equal(router_weight, before[f"layers.{index}.feed_forward.router.weight"])
        same_shard = layer.experts.down.detach()[::granularity]
        assert not torch.equal(same_shard[0], same_shard[1])
        same_group = layer.experts.gate_up.detach()[:2]
        assert not torch.equal(same_group[0], same_group[1])


def test_noise_has_the_asked_size_and_a_seed(tmp_path: Path) -> None:
    save_hf_model(DENSE["qwen3"][0], tmp_path / "dense")
    noisy = replace(COPY, noise=0.1, seed=7)
    for name, how in {"plain": COPY, "noisy": noisy, "again": noisy, "other": replace(noisy, seed=8)}.items():
        upcycle(tmp_path / "dense", tmp_path / name, how)
    plain, other = load(tmp_path / "plain").state_dict(), load(tmp_path / "other").state_dict()
    noisy_tensors = load(tmp_path / "noisy").state_dict()
    weights = "model.safetensors"
    assert (tmp_path / "noisy" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    for leaf in ("experts.gate_up", "experts.down"):
        name = f"layers.1.feed_forward.{leaf}"
        added = noisy_tensors[name] - plain[name]
        assert float(added.std() / plain[name].std()) == pytest.approx(0.1, rel=0.1)
        assert len({tuple(expert.flatten()[:4].tolist()) for expert in added}) == 5
        assert not torch.equal(added, other[name] - plain[name])
    router = "layers.1.feed_forward.router.weight"
    assert not torch.equal(noisy_tensors[router], other[router])
    attention = "layers.1.attention.q_proj.weight"
    assert torch.equal(noisy_tensors[attention], plain[attention])


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_the_type_of_the_weights_is_kept_or_chosen(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    dense = transformers.AutoModelForCausalLM.from_config(DENSE["qwen3"][0], dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "out", ODD, dtype=dtype)
    model = load(tmp_path / "out")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {expected}
    gate = dense.state_dict()["model.layers.2.mlp.gate_proj.weight"]
    down = dense.state_dict()["model.layers.2.mlp.down_proj.weight"]
    experts = model.moe_layers[2].experts
    for expert in range(9):
        rows = slice(expert % 3 * 16, expert % 3 * 16 + 16)
        assert torch.equal(experts.gate_up[expert, :16], gate[rows].to(expected))
        assert torch.equal(experts.down[expert], down[:, rows].to(expected) * 3)


def test_what_belongs_to_the_model_is_carried_over_as_it_is(tmp_path: Path) -> None:
    save_hf_model(DENSE["llama"][0], tmp_path / "dense")
    contents = {}
    for pattern in COMPANIONS:
        name = pattern.replace("*", "tools")
        contents[name] = json.dumps({"temperature": 0.25, "eos_token_id": 11, "of": name}).encode()
        (tmp_path / "dense" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "dense" / name).write_bytes(contents[name])
    (tmp_path / "dense" / "README.md").write_text("of the dense model")
    upcycle(tmp_path / "dense", tmp_path / "out", COPY)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    found = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in files}
    assert found.keys() == contents.keys() | {"config.json", "model.safetensors"}
    assert {name: found[name] for name in contents} == contents
    assert load(tmp_path / "out").config.eos_token_ids == (11,)


LAYER_NORMS = replace(
    ModelConfig(**BASE, norm="layer", rms_norm_eps=1e-5, qk_norm="none"),
    head_dim=8,
    clip_qkv=20.0,
    initializer_range=0.5,
)


@pytest.mark.parametrize(
    ("config", "family"),
    [(replace(CONFIGS["dense"], initializer_range=0.0, eos_token_ids=()), "qwen3_moe"), (LAYER_NORMS, "dbrx")],
    ids=["one tensor per expert", "all experts in one tensor"],
)
@pytest.mark.parametrize("how", [replace(COPY, num_experts=6), replace(GRANULAR, granularity=2)])
def test_a_run_becomes_sparse_too(tmp_path: Path, config: ModelConfig, family: str, how: Upcycling) -> None:
    config = replace(config, vocab_size=257)
    dense = make_run(tmp_path / "run", config)
    assert upcycle(tmp_path / "run", tmp_path / "out", how).family == family
    sparse, tokens = load(tmp_path / "out"), random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(sparse(tokens), dense(tokens), atol=1e-4, rtol=0)
    assert logit_difference(sparse, load_theirs(tmp_path / "out")) < 1e-4
    assert load_tokenizer(tmp_path / "out").to_json() == byte_tokenizer().to_json()
    assert sparse.config.eos_token_ids == (config.eos_token_ids or (256,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 6}, "top_k is 6 but num_experts is 5; a token can visit at most 5"),
        ({"num_experts": 0}, "num_experts is 0; it must be"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"method": "distil"}, "method 'distil' is not known; choose copy or granular"),
        ({"granularity": 2}, "granularity is 2, but method copy does not cut the MLP; use method granular"),
        ({"method": "granular"}, "cuts the MLP into 1 shard; set granularity to 2 or more"),
        (
            {"method": "granular", "granularity": 2},
            "num_experts is 5 and top_k 2, but with granularity 2 both are multiples of it",
        ),
        (
            {"method": "granular", "granularity": 4, "num_experts": 8, "top_k": 6},
            "num_experts is 8 and top_k 6, but with granularity 4",
        ),
    ],
)
def test_impossible_wishes_are_refused_with_their_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Upcycling(**{"num_experts": 5, "top_k": 2, **options})


@pytest.mark.parametrize(
    ("config", "how", "message"),
    [
        (DENSE["qwen3"][0], replace(GRANULAR, granularity=5, num_experts=10, top_k=5),
         "granularity is 5, which does not divide the intermediate_size 48 of qwen3"),
        (transformers.LlamaConfig(**SIZES, mlp_bias=True), COPY,
         "nearest is mixtral, in which moe.projection_bias = True would become False"),
        (transformers.MixtralConfig(**SIZES, num_local_experts=6), COPY, "mixtral has 6 experts already"),
    ],
    ids=["granularity", "biases", "sparse"],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(
    tmp_path: Path, config: transformers.PreTrainedConfig, how: Upcycling, message: str
) -> None:
    save_hf_model(config, tmp_path / "dense")
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        upcycle(tmp_path / "dense", tmp_path / "out", how)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["dense"]


def test_nothing_is_overwritten_and_no_half_is_left(tmp_path: Path) -> None:
    save_hf_model(DENSE["qwen3"][0], tmp_path / "dense")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    with pytest.raises(UsageError, match="exists and is not empty"):
        upcycle(tmp_path / "dense", tmp_path / "thesis", COPY)
    with pytest.raises(UsageError, match="dtype 'int3' is not known; choose auto, float32 or bfloat16"):
        upcycle(tmp_path / "dense", tmp_path / "out", COPY, dtype="int3")

    def interrupt(label: str, done: int, total: int | None) -> None:
        if done == 20:
            assert sorted(os.listdir(tmp_path))[0].startswith(".out.writing-")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(tmp_path / "dense", tmp_path / "out", COPY, progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == ["dense", "thesis"]
    os.truncate(tmp_path / "dense" / "model.safetensors", 20_000)
    with pytest.raises(MoesaicError, match=r"model\.safetensors"):
        upcycle(tmp_path / "dense", tmp_path / "out", COPY)


def test_progress_counts_every_tensor_once(tmp_path: Path) -> None:
    save_hf_model(DENSE["qwen3"][0], tmp_path / "dense")
    seen: list[tuple[str, int, int | None]] = []
    upcycle(tmp_path / "dense", tmp_path / "out", COPY, progress=lambda *counted: seen.append(counted))
    with WeightDirectory(tmp_path / "out") as weights:
        total = len(weights.names)
    assert seen == [("tensors", number, total) for number in range(1, total + 1)]


UPCYCLE = """
    import sys
    from pathlib import Path
    from moesaic.checkpoint.upcycle import Upcycling, upcycle

    def memory(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    how = Upcycling(num_experts=4, top_k=2, method="granular", granularity=2)
    dense, small, out = map(Path, sys.argv[1:])
    upcycle(small, out / "small", how)  # what is only made once
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    upcycle(dense, out / "sparse", how)
    print(memory("VmHWM") - before)
"""


def test_memory_holds_one_layer_of_many(tmp_path: Path) -> None:
    config = replace(ModelConfig(**BASE), hidden_size=512, intermediate_size=1536)
    dense_bytes = 0
    for name, layers in (("small", 1), ("dense", 12)):
        model = Transformer(replace(config, num_hidden_layers=layers)).bfloat16()
        for parameter in model.parameters():
            parameter.data.fill_(0.25)
        export_model(model, None, tmp_path / name)
        dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    arguments = [str(tmp_path / name) for name in ("dense", "small", "out")]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(UPCYCLE), *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    layer_bytes = dense_bytes / 12
    assert int(result.stdout) < 2 * layer_bytes + 16 * 2**20 < dense_bytes / 2
