"""Every file of a run, flipped or cut short: noticed, worked around or refused, and never loaded silently wrong."""

import random
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.load import load, load_tokenizer
from moesaic.config import CheckpointConfig, DataConfig, ModelConfig, MoEConfig, TrainConfig
from moesaic.errors import MoesaicError
from moesaic.train.run import run_training
from moesaic.train.screen import Screen

TEXT = "\n\n".join(f"{number} and {number} make {2 * number}." for number in range(1500))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A finished run, its states at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "text.txt").write_text(TEXT)
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, router="sigmoid_topk")
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            moe=moe,
        ),
        data=DataConfig(source=str(folder / "text.txt"), tokenizer="bpe:300"),
        checkpoint=CheckpointConfig(save_every=4),
        steps=8,
        batch_size=4,
        sequence_length=32,
        evaluation_tokens=256,
    )
    run_training(config, folder / "run", Screen(live=False))
    return config, folder / "run"


def newest(run: Path) -> Path:
    return max((run / "states").iterdir())


def files_of(run: Path) -> list[Path]:
    """All but the lock and the older state, which may stay damaged."""
    older = min((run / "states").iterdir())
    found = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return [path for path in sorted(found) if older not in path.parents]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[random.randrange(len(content)) :]
    else:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def weights(run: Path) -> dict[str, Tensor]:
    return load(run).state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_no_damaged_file_changes_what_is_loaded_or_what_a_resumed_run_becomes(
    finished: tuple[TrainConfig, Path], tmp_path: Path, how: str
) -> None:
    config, run = finished
    expected, tokens = weights(run), load_tokenizer(run).encode(TEXT[:500])
    older = tmp_path / "older"
    shutil.copytree(run, older)
    shutil.rmtree(newest(older))
    acceptable = [expected, weights(older)]
    names = [path.relative_to(run) for path in files_of(run)]
    assert {"config.json", "tokenizer.json", "metrics.jsonl"} <= {str(name) for name in names}
    assert len(names) >= 12
    resumed = []
    for name in names:
        victim = tmp_path / str(name).replace("/", "-")
        shutil.copytree(run, victim)
        damage(victim / name, how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(MoesaicError):
                assert any(equal(weights(victim), state) for state in acceptable), name
                assert load_tokenizer(victim).encode(TEXT[:500]) == tokens, name
            with suppress(MoesaicError):
                run_training(config, victim, Screen(live=False), resume=True)
                resumed.append(name)
                assert equal(weights(victim), expected), name
                assert load_tokenizer(victim).encode(TEXT[:500]) == tokens, name
    assert len(resumed) >= len(names) - 3, "most damage is survived, not only refused"
