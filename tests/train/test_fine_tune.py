"""Runs that start from a model: all of it trained, without the routers, or adapters beside it."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moesaic.checkpoint.adapters import start_values
from moesaic.checkpoint.load import load, load_tokenizer
from moesaic.checkpoint.quantize import quantize
from moesaic.checkpoint.run_state import list_steps, newest_run_state
from moesaic.checkpoint.save import export_model
from moesaic.config import (
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
)
from moesaic.config_io import read_train_config
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.lora import Adapter
from moesaic.train.run import run_training
from moesaic.train.screen import Screen
from moesaic.train.trainer import Trainer

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    moe=MoEConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, router="sigmoid_topk"),
)


def quiet() -> Screen:
    return Screen(live=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, and beside it another text."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("\n\n".join(f"{n} times {n} is {n * n}." for n in range(2000)))
    (folder / "other.txt").write_text("\n\n".join(f"under {n} lies {n - 1}, over it {n + 1}!" for n in range(2000)))
    config = TrainConfig(
        model=MODEL,
        data=DataConfig(source=str(folder / "text.txt"), tokenizer="bpe:300"),
        balance=BalanceConfig(bias_update_rate=0.01),
        steps=6,
        batch_size=4,
        sequence_length=32,
        evaluation_tokens=256,
    )
    run_training(config, folder / "run", quiet())
    return folder / "run"


def fine_tuning(base: Path, text: Path | None = None, **changes: object) -> TrainConfig:
    config = TrainConfig(
        model=load(base).config,
        init_from=str(base),
        data=DataConfig(source=str(text or base.parent / "other.txt"), tokenizer=str(base)),
        balance=BalanceConfig(bias_update_rate=0.01),
        checkpoint=CheckpointConfig(save_every=3),
        lora=LoRAConfig(rank=4, targets=("experts", "attention")),
        steps=6,
        batch_size=4,
        sequence_length=32,
        evaluation_tokens=256,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def start(toml: Path, flags: list[str], out: Path) -> Trainer:
    return run_training(read_train_config(toml, flags, start_values), out, quiet())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def tokens() -> Tensor:
    return torch.randint(0, 300, (2, 24))


def copy_of(base: Path, folder: Path) -> Path:
    shutil.copytree(base.parent, folder, ignore=lambda _, names: [name for name in names if name == ".lock"])
    return folder / "run"


def test_a_run_of_adapters_keeps_them_alone_and_loads_as_a_whole_model(base: Path, tmp_path: Path) -> None:
    config = fine_tuning(base)
    trainer = run_training(config, tmp_path / "run", quiet())
    before, ids_BL = load(base).state_dict(), tokens()
    names = {name.replace("parametrizations.", "").replace(".original", "") for name in trainer.model.state_dict()}
    assert before.keys() <= names
    for name, value in trainer.model.state_dict().items():
        if ".original" in name:
            plain = name.replace("parametrizations.", "").replace(".original", "")
            assert torch.equal(value, before[plain]), name
    state = newest_run_state(tmp_path / "run")
    saved, moments = state.load_tensors("model"), state.load_tensors("optimizer")
    adapters = {name for name, _ in trainer.model.named_parameters() if name.endswith((".A", ".B"))}
    assert saved.keys() == adapters | {f"layers.{layer}.feed_forward.router.expert_bias" for layer in (0, 1)}
    assert {name.rsplit("/", 1)[0] for name in moments} == adapters

    loaded = load(tmp_path / "run")
    assert not any(isinstance(module, Adapter) for module in loaded.modules())
    assert torch.equal(loaded(ids_BL), trainer.model.eval()(ids_BL))
    assert not torch.allclose(loaded(ids_BL), load(base)(ids_BL), atol=1e-3)
    changed = {name for name, value in loaded.state_dict().items() if not torch.equal(value, before[name])}
    matrices = ("experts.gate_up", "experts.down", "_proj.weight", "expert_bias")
    assert changed == {name for name in before if name.endswith(matrices)}
    assert load_tokenizer(tmp_path / "run").fingerprint == load_tokenizer(base).fingerprint
    assert load(tmp_path / "run", quantization="int8")(ids_BL).shape == (2, 24, 300)
    export_model(loaded, load_tokenizer(tmp_path / "run"), tmp_path / "exported")
    torch.testing.assert_close(load(tmp_path / "exported")(ids_BL), loaded(ids_BL), rtol=0, atol=1e-5)


def test_adapters_of_adapters_and_resumed_ones_are_bitwise_the_same(base: Path, tmp_path: Path) -> None:
    config = fine_tuning(base)
    run_training(config, tmp_path / "first", quiet())
    lora = LoRAConfig(rank=2, targets=("router", "lm_head"))
    again = fine_tuning(tmp_path / "first", base.parent / "other.txt", lora=lora, seed=3)
    straight = run_training(again, tmp_path / "second", quiet())
    shutil.copytree(tmp_path / "second", tmp_path / "cut")
    shutil.rmtree(list_steps(tmp_path / "cut")[6])
    resumed = run_training(again, tmp_path / "cut", quiet(), resume=True)
    assert same(resumed.model.state_dict(), straight.model.state_dict())
    assert same(load(tmp_path / "cut").state_dict(), load(tmp_path / "second").state_dict())
    one, other = (
        newest_run_state(tmp_path / name).load_tensors("optimizer") for name in ("cut", "second")
    )  # fmt: skip
    assert same(one, other)
    with pytest.raises(UsageError, match=r"another config \(lora differ\)"):
        run_training(replace(again, lora=LoRAConfig(rank=3)), tmp_path / "cut", quiet(), resume=True)


def test_a_killed_run_of_adapters_goes_on_as_if_nothing_had_happened(base: Path, tmp_path: Path) -> None:
    toml = tmp_path / "adapt.toml"
    toml.write_text(
        f'init_from = "{base}"\nsteps = 16\nbatch_size = 4\nsequence_length = 32\nevaluation_tokens = 256\n'
        f'[data]\nsource = "{base.parent / "other.txt"}"\n[lora]\nrank = 4\n[checkpoint]\nsave_every = 2\nkeep = 9\n'
    )
    command = [sys.executable, "-m", "moesaic", "train", str(toml), "--plain", "--out", str(tmp_path / "cut")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while max(list_steps(tmp_path / "cut"), default=0) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    config = read_train_config(toml, [], start_values)
    run_training(config, tmp_path / "cut", quiet(), resume=True)
    screen = Screen(Console(file=io.StringIO(), width=200), live=False)
    run_training(config, tmp_path / "straight", screen)
    count, frozen = 2 * 5 * 4 * ((32 + 32) + (16 + 32)), sum(each.numel() for each in load(base).parameters())
    told = f"trains {count:,} parameters of adapters, rank 4 on experts: {count / frozen:.2%} of the {frozen:,} that"
    assert told in screen.console.file.getvalue()  # type: ignore[attr-defined]
    assert same(load(tmp_path / "cut").state_dict(), load(tmp_path / "straight").state_dict())


def test_adapters_belong_to_the_weights_that_they_were_trained_on(base: Path, tmp_path: Path) -> None:
    mine = copy_of(base, tmp_path / "mine")
    config = fine_tuning(mine)
    run_training(config, tmp_path / "run", quiet())
    mine.rename(tmp_path / "gone")
    with pytest.raises(MoesaicError, match=r"mine/run, which is not there .*put it back"):
        load(tmp_path / "run")
    (tmp_path / "gone").rename(mine)
    load(tmp_path / "run")
    shutil.rmtree(list_steps(mine)[6])
    with pytest.raises(MoesaicError, match="whose weights have changed since; put the old ones back"):
        load(tmp_path / "run")
    with pytest.raises(MoesaicError, match="whose weights have changed since"):
        run_training(config, tmp_path / "run", quiet(), resume=True)


def test_adapters_on_bfloat16_are_merged_in_its_type(base: Path, tmp_path: Path) -> None:
    """And the sums are rounded once."""
    export_model(load(base, dtype="bfloat16"), load_tokenizer(base), tmp_path / "hf")
    config = fine_tuning(tmp_path / "hf", base.parent / "other.txt", balance=BalanceConfig())
    trainer = run_training(config, tmp_path / "run", quiet())
    assert trainer.model.embed_tokens.weight.dtype == torch.float32
    loaded, stored = load(tmp_path / "run"), load(tmp_path / "hf")
    for name, value in loaded.state_dict().items():
        assert value.dtype == stored.state_dict()[name].dtype, name
    experts, adapted = loaded.moe_layers[1].experts, trainer.model.moe_layers[1].experts
    assert torch.equal(experts.down, adapted.down.bfloat16())
    assert not torch.equal(experts.down, stored.moe_layers[1].experts.down)
    ids_BL, wide = tokens(), load(tmp_path / "run", dtype="float32")
    assert torch.equal(wide(ids_BL), trainer.model.eval()(ids_BL))
    narrow = load(tmp_path / "run", dtype="bfloat16").state_dict()
    assert same(narrow, loaded.state_dict())


def test_a_full_fine_tune_starts_at_the_model_and_may_leave_its_routers(base: Path, tmp_path: Path) -> None:
    config = fine_tuning(base, lora=None, freeze_router=True, balance=BalanceConfig())
    before = load(base).state_dict()
    trainer = run_training(config, tmp_path / "run", quiet())
    first = list_steps(tmp_path / "run")[min(list_steps(tmp_path / "run"))]
    assert first.name == "step-00000003"  # of the two that are kept
    after = load(tmp_path / "run").state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if ".router." in name
    }
    moments = newest_run_state(tmp_path / "run").load_tensors("optimizer")
    assert not any(".router." in name for name in moments)
    shutil.rmtree(list_steps(tmp_path / "run")[6])
    resumed = run_training(config, tmp_path / "run", quiet(), resume=True)
    assert same(resumed.model.state_dict(), trainer.model.state_dict())

    untouched = fine_tuning(base, lora=None, steps=1)
    started: list[dict[str, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", lambda self, *_: started.append(self.model.state_dict()))
        run_training(untouched, tmp_path / "start", quiet())
    assert same(started[0], before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_from", "{base}x"], "neither a run directory"),
        (["--model.hidden_size", "64"], "model.hidden_size is 64, but .* has 32; leave .model. out"),
        (["--model.moe.num_experts", "8"], "model.moe.num_experts is 8, but .* has 5"),
        (["--data.tokenizer", "bytes"], r"bytes has 257 entries and is not that of .* \(300\)"),
        (["--data.tokenizer", "bpe:300"], "bpe:300, a new one"),
        (["--lora.targets", "['shared_experts']"], "not in this model; choose of experts, attention, lm_head, router"),
        (["--lora.rank", "40"], "set at most"),
        (["--optimizer.name", "muon"], "use adamw"),
        (["--parallel.fsdp", "2"], "parallel.ep is 1 and parallel.fsdp 2"),
        (["--freeze_router", "--lora.targets", "['router']"], "leave one of them out"),
        (["--freeze_router", "--balance.bias_update_rate", "0.1"], "set the rate to 0"),
        (["--init_from="], "name it with init_from"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_data_is_prepared(
    base: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    toml = tmp_path / "adapt.toml"
    text = f'init_from = "{base}"\nsteps = 2\nbatch_size = 2\nsequence_length = 32\n[lora]\nrank = 2\n[data]\n'
    text += 'source = "nothing"\n'
    if "--init_from=" in flags:
        text += '[model]\npreset = "demo-sparse"\n'
    toml.write_text(text)
    given = [flag.format(base=base) for flag in flags]
    with pytest.raises(UsageError, match=message):
        start(toml, given, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_packed_models_are_refused(base: Path, tmp_path: Path) -> None:
    quantize(base, tmp_path / "packed", "int8")
    with pytest.raises(UsageError, match=r"is quantised \(int8\), and packed weights cannot be trained"):
        start_values(str(tmp_path / "packed"))
