"""Saved states: bitwise round trip, and any damage to any file is noticed and survived."""

import math
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesaic.checkpoint.run_state import find_problem, list_steps, newest_run_state, save_run_state
from moesaic.errors import MoesaicError, UsageError


def random_state(seed: int, size: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator)
    return {
        "model.layers.0.weight": weight,
        "model.layers.0.bias": torch.randn(size, generator=generator).bfloat16(),
        "optimizer.layers.0.weight.exp_avg": weight * 1e-20,
        "optimizer.steps": torch.tensor(seed, dtype=torch.int64),
        "random.torch": generator.get_state(),
    }


def assert_holds(run: Path, step: int, seed: int) -> None:
    state = newest_run_state(run)
    assert state.step == step
    assert state.extra == {"seed": seed}
    for full_name, tensor in random_state(seed).items():
        group, _, name = full_name.partition(".")
        loaded = state.load_tensors(group)[name]
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)


def save(run: Path, step: int, *, keep: int = 10) -> None:
    """The seed of a test state is its step."""
    save_run_state(run, step, random_state(step), {"seed": step}, keep=keep)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def delete(path: Path) -> None:
    path.unlink()


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + random.choice([b"\n", b" ", b"\0"]))


FILES = ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json"]


def test_newest_state_comes_back_bitwise(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 100)
    assert_holds(tmp_path, 100, seed=100)
    assert newest_run_state(tmp_path).warnings == ()
    assert sorted(os.listdir(tmp_path / "states" / "step-00000100")) == sorted(FILES)
    assert newest_run_state(tmp_path).load_tensors("ema") == {}


def test_extra_keeps_every_float(tmp_path: Path) -> None:
    extra = {"loss": 0.1 + 0.2, "worst": math.inf, "big": 2**63, "text": "naïve \N{SNOWMAN}", "nested": [{"a": None}]}
    save_run_state(tmp_path, 1, random_state(1), extra)
    assert newest_run_state(tmp_path).extra == extra


@pytest.mark.parametrize("file_name", FILES)
@pytest.mark.parametrize("damage", [flip_byte, truncate, delete, append])
def test_any_damage_falls_back_to_the_older_state(
    tmp_path: Path, file_name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path / "whole", 10)
    save(tmp_path / "whole", 20)
    for trial in range(10 if damage is not delete else 1):
        run = tmp_path / f"damaged-{trial}"
        shutil.copytree(tmp_path / "whole", run)
        damage(run / "states" / "step-00000020" / file_name)
        assert_holds(run, 10, seed=10)
        (warning,) = newest_run_state(run).warnings
        assert "step 20" in warning
        assert file_name in warning
        assert "going back to step 10" in warning


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    save(tmp_path, 10)
    manifest = tmp_path / "states" / "step-00000010" / "manifest.json"
    original = manifest.read_bytes()
    for position in range(len(original)):
        data = bytearray(original)
        data[position] ^= 1 << (position % 8)
        manifest.write_bytes(data)
        assert find_problem(manifest.parent), f"byte {position}"
    manifest.write_bytes(original)
    assert find_problem(manifest.parent) is None


def test_state_under_another_step_is_not_believed(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    os.rename(tmp_path / "states" / "step-00000010", tmp_path / "states" / "step-00000030")
    assert newest_run_state(tmp_path).step == 20


def test_all_damaged_names_each(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
        truncate(tmp_path / "states" / f"step-{step:08d}" / "model.safetensors")
    with pytest.raises(MoesaicError, match=r"step 3 .*model\.safetensors.*step 2 .*step 1 ") as caught:
        newest_run_state(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_saved_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no saved state"):
        newest_run_state(tmp_path)


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=2)
    assert list(list_steps(tmp_path)) == [4, 5]


def test_retention_counts_only_good_states(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_byte(tmp_path / "states" / "step-00000003" / "optimizer.safetensors")
    save(tmp_path, 4, keep=2)
    assert list(list_steps(tmp_path)) == [2, 3, 4]  # 3 is damaged, so 2 is the second good one


@pytest.mark.parametrize("keep", [1, 2])
def test_resuming_below_a_damaged_state(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    flip_byte(tmp_path / "states" / "step-00000020" / "model.safetensors")
    save(tmp_path, 15, keep=keep)
    assert list(list_steps(tmp_path)) == [10, 15][-keep:]
    assert_holds(tmp_path, 15, seed=15)


def test_saving_again_replaces_the_damaged_state_of_that_step(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    delete(tmp_path / "states" / "step-00000020" / "manifest.json")
    save(tmp_path, 20)
    assert_holds(tmp_path, 20, seed=20)
    assert list(list_steps(tmp_path)) == [10, 20]


def test_unrelated_entries_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "states" / "notes.txt").write_text("mine")
    (tmp_path / "states" / "step-best").mkdir()
    save(tmp_path, 2, keep=1)
    assert sorted(os.listdir(tmp_path / "states")) == ["notes.txt", "step-00000002", "step-best"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_while_saving_keeps_the_old_states(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        save(tmp_path, 1)
        big = {"model.weight": torch.randn(400, 400)}
        big["optimizer.weight"] = big["model.weight"]
        with pytest.raises(MoesaicError, match=r"1,280,000 bytes needed and .*free"):
            save_run_state(tmp_path, 2, big, {}, keep=1)
        assert os.listdir(tmp_path / "states") == ["step-00000001"]
        assert_holds(tmp_path, 1, seed=1)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
