"""Fine-tuning on two ranks: adapters on copies of a model, and frozen routers in a model that is cut."""

from pathlib import Path

import pytest
import torch

from moesaic.checkpoint.adapters import start_values
from moesaic.checkpoint.load import load
from moesaic.checkpoint.run_state import newest_run_state
from moesaic.config_io import read_train_config
from moesaic.train.run import run_training
from moesaic.train.screen import Screen

from .processes import MODEL, on_ranks

BASE = (
    """
steps = 2
batch_size = 4
sequence_length = 16
evaluation_tokens = 80
device = "cpu"
[data]
source = "{text}"
"""
    + MODEL
)
ADAPT = """
init_from = "{base}"
steps = 3
batch_size = 4
sequence_length = 16
evaluation_tokens = 80
device = "cpu"
[data]
source = "{text}"
"""


def train(config: Path, out: Path, *flags: str) -> None:
    run_training(read_train_config(config, flags, start_values), out, Screen(live=False))


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        (("--lora.rank", "2"), ("--parallel.dp", "2")),
        (("--freeze_router",), ("--parallel.fsdp", "2")),
        (("--freeze_router",), ("--parallel.ep", "2")),
    ],
)
def test_two_ranks_learn_what_one_does(tmp_path: Path, flags: tuple[str, ...], layout: tuple[str, ...]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} is {n * n}. " for n in range(600)))
    base, adapt = tmp_path / "base.toml", tmp_path / "adapt.toml"
    base.write_text(BASE.format(text=text))
    adapt.write_text(ADAPT.format(text=text, base=tmp_path / "base"))
    train(base, tmp_path / "base")
    train(adapt, tmp_path / "alone", *flags)
    on_ranks(2, train, adapt, tmp_path / "spread", *flags, *layout)
    one, other = (newest_run_state(tmp_path / name).load_tensors("model") for name in ("alone", "spread"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4, msg=name)
    one, other = (load(tmp_path / name).state_dict() for name in ("alone", "base"))
    for name, value in one.items():
        if ".router." in name:
            assert torch.equal(other[name], value)
    assert any(not torch.equal(other[name], value) for name, value in one.items())
