"""What we export, transformers loads: same logits, same tokens, nothing missing. What no family can say is refused."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesaic.checkpoint.load import load, load_tokenizer
from moesaic.checkpoint.save import export_model, new_directory
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.tokenizer import byte_tokenizer
from moesaic.weight_reader import WeightDirectory

from .helpers import CONFIGS, load_theirs, logit_difference, random_model, randomize


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_and_we_read_it_back(tmp_path: Path, name: str) -> None:
    ours = random_model(CONFIGS[name])
    model_type = export_model(ours, None, tmp_path / "out")
    theirs = load_theirs(tmp_path / "out")
    expected_type = {"dense": "qwen3", "softmax": "qwen3_moe", "sigmoid": "glm4_moe"}
    assert theirs.config.model_type == model_type == expected_type[name.replace(",", "").split()[0]]
    assert logit_difference(ours, theirs) < 1e-4

    again = load(tmp_path / "out")
    assert again.config.model_type == model_type
    ignored: dict[str, Any] = {"initializer_range": 0.0, "model_type": "", "moe": None, "intermediate_size": 1}
    assert replace(again.config, **ignored) == replace(ours.config, **ignored)
    assert again.state_dict().keys() == ours.state_dict().keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key


@pytest.mark.parametrize(("factor", "exact"), [(2.0, True), (2.5, False)])
def test_scaling_that_qwen3_moe_cannot_say_goes_into_the_experts(tmp_path: Path, factor: float, exact: bool) -> None:
    softmax = CONFIGS["softmax"]
    assert softmax.moe is not None
    ours = random_model(replace(softmax, moe=replace(softmax.moe, routed_scaling_factor=factor)))
    export_model(ours, None, tmp_path / "out")
    assert logit_difference(ours, load_theirs(tmp_path / "out")) < 1e-4
    down = load(tmp_path / "out").state_dict()["layers.1.feed_forward.experts.down"]
    restored = down / factor
    original = ours.state_dict()["layers.1.feed_forward.experts.down"]
    assert torch.equal(restored, original) or not exact
    torch.testing.assert_close(restored, original)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("full", "exists and is not empty; name a new directory"),
        ("/", "exists and is not empty; name a new directory"),
        ("file", "cannot be a directory, because .*/file is a file"),
        ("file/a/b", "cannot be a directory, because .*/file is a file"),
        ("loop", "leads to itself|loop"),
        ("/proc", "exists and is not empty"),
    ],
)
def test_where_nothing_can_be_new(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=message) as caught:
        new_directory(tmp_path / path)
    assert "rm " not in str(caught.value)


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    with pytest.raises(UsageError, match=r"mount point, .* name a directory in it: .*/disk/model"):
        new_directory(tmp_path / "disk")


def test_links_are_followed_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("later")
    for name, target in (("link", "empty"), ("dangling", "later"), ("~/home", "home"), ("no/../plain", "plain")):
        export_model(random_model(CONFIGS["dense"]), None, Path(name) if name[0] == "~" else tmp_path / name)
        assert (tmp_path / target / "config.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty", "home", "later", "link", "plain"]
    assert (tmp_path / "link").is_symlink()


EXPORT = """
import sys
from pathlib import Path
import torch
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.transformer import Transformer

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def model(layers):
    sizes = dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=layers)
    moe = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256)
    if sys.argv[2] == "gpt_oss":
        sizes |= dict(attention_sinks=True, attention_bias=True, attention_output_bias=True, qk_norm="none")
        moe |= dict(router="topk_softmax", router_bias=True, activation="clamped_swiglu", projection_bias=True)
    else:
        moe |= dict(routed_scaling_factor=2.5)
    made = Transformer(ModelConfig(hidden_size=256, **sizes, moe=MoEConfig(**moe, norm_topk_min=1e-20)))
    for parameter in made.parameters():
        parameter.data.fill_(0.25)
    return made

out = Path(sys.argv[1])
export_model(model(1), None, out / "small")  # what is only made once
large = model(16)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
assert export_model(large, None, out / "large") == sys.argv[2]
print(memory("VmHWM") - before, sum(parameter.nbytes for parameter in large.parameters()))
"""


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_what_is_transposed_or_scaled_takes_the_memory_of_one_tensor(tmp_path: Path, family: str) -> None:
    result = subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path), family], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak, model_bytes = map(int, result.stdout.split())
    with WeightDirectory(tmp_path / "large") as weights:
        largest = max(4 * math.prod(weights.shape(name)) for name in weights.names)
    assert peak < 1.1 * largest + 24 * 2**20 < model_bytes / 3


def test_shards_and_bfloat16(tmp_path: Path) -> None:
    ours = random_model(CONFIGS["sigmoid"]).bfloat16()
    for moe in ours.moe_layers:
        moe.router.float()
    export_model(ours, None, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert load_theirs(tmp_path / "out").dtype == torch.bfloat16
    again = load(tmp_path / "out")
    for key, tensor in again.state_dict().items():
        expected = ours.state_dict()[key]
        assert tensor.dtype == expected.dtype, key
        assert torch.equal(tensor, expected), key


def test_transformers_reads_the_tokenizer_and_generates_the_same(tmp_path: Path) -> None:
    config = replace(CONFIGS["sigmoid, shared, partial rope"], vocab_size=257)
    ours = random_model(config)
    tokenizer = byte_tokenizer()
    export_model(ours, tokenizer, tmp_path / "out")
    text = "naïve \N{SNOWMAN}\n\tdef f(x): return x<|endoftext|>"
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode(text) == tokenizer.encode(text)
    assert their_tokenizer.decode(tokenizer.encode(text)) == text
    assert their_tokenizer.eos_token_id == tokenizer.eos_id == 256
    assert load(tmp_path / "out").config.eos_token_ids == (256,)

    theirs: Any = load_theirs(tmp_path / "out")
    prompt = torch.tensor([tokenizer.encode("Once")])
    generated = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = prompt
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat((tokens, ours(tokens)[:, -1:].argmax(-1)), dim=1)
    assert generated.tolist() == tokens.tolist()


def test_published_spellings_are_written(tmp_path: Path) -> None:
    """Names that vLLM and llama.cpp's converter look for, beside those of transformers 5."""
    export_model(random_model(CONFIGS["softmax, dense first"]), None, tmp_path / "softmax")
    softmax = json.loads((tmp_path / "softmax" / "config.json").read_text())
    assert softmax["num_experts"] == 5
    assert softmax["mlp_only_layers"] == [0, 1]
    assert softmax["rope_theta"] == softmax["rope_parameters"]["rope_theta"] == 10000.0
    export_model(random_model(CONFIGS["sigmoid, shared, partial rope"]), None, tmp_path / "sigmoid")
    sigmoid = json.loads((tmp_path / "sigmoid" / "config.json").read_text())
    assert (sigmoid["n_group"], sigmoid["topk_group"], sigmoid["num_nextn_predict_layers"]) == (1, 1, 0)
    assert sigmoid["partial_rotary_factor"] == sigmoid["rope_parameters"]["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("name", "changes", "moe_changes", "message"),
    [
        ("dense", {"partial_rotary_factor": 0.5}, {}, "nearest is qwen3, in which partial_rotary_factor = 0.5 would"),
        ("softmax", {"norm_placement": "post"}, {}, "qwen3_moe, in which norm_placement = 'post' would become 'pre'"),
        ("softmax", {}, {"n_shared_experts": 2}, "shared_expert_intermediate_size = 48 would become 0"),
        ("sigmoid", {}, {"num_experts": 1, "num_experts_per_tok": 1}, "at least 2 experts"),
    ],
)
def test_what_a_family_cannot_say_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, object], moe_changes: dict[str, object], message: str
) -> None:
    config = CONFIGS[name]
    moe = replace(config.moe, **moe_changes) if config.moe else None
    config: ModelConfig = replace(config, moe=moe, **changes)
    with pytest.raises(MoesaicError, match=message):
        export_model(random_model(config), None, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_what_means_nothing_to_a_router_does_not_keep_it_from_its_family(tmp_path: Path) -> None:
    config = CONFIGS["softmax"]
    assert config.moe is not None
    moe = replace(config.moe, router="topk_softmax", norm_topk_prob=False, swiglu_limit=3.0)
    model = random_model(replace(config, qk_norm="none", moe=moe))
    assert export_model(model, None, tmp_path / "out") == "granitemoe"
    assert logit_difference(model, load_theirs(tmp_path / "out")) < 1e-4


def test_existing_directories_are_not_overwritten(tmp_path: Path) -> None:
    model = random_model(CONFIGS["dense"])
    (tmp_path / "thesis").mkdir()
    export_model(model, None, tmp_path / "thesis")  # empty: welcome
    before = (tmp_path / "thesis" / "model.safetensors").read_bytes()
    randomize(model)
    with pytest.raises(UsageError, match="exists and is not empty"):
        export_model(model, None, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "model.safetensors").read_bytes() == before
