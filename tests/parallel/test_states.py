"""States in pieces: any layout of ranks writes what any other, or one process, loads, bit by bit."""

import math
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from moesaic.checkpoint import run_state
from moesaic.checkpoint.run_state import Crew, find_problem, list_steps, newest_run_state, save_pieces, save_run_state
from moesaic.checkpoint.state_pieces import StateTensors
from moesaic.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from moesaic.errors import MoesaicError
from moesaic.parallel.ranks import Ranks, make_ranks
from moesaic.parallel.shard import Part, own_parts, read_parts, spread
from moesaic.train.optimizer import load_optimizer_tensors, make_optimizers, optimizer_tensors
from moesaic.train.saving import StateWriter

from .processes import on_ranks
from .test_expert_parallel import BASE, build
from .whole import whole_tensors

LAYOUTS = {(4, 1, 1): 4, (2, 1, 2): 4, (1, 1, 4): 4, (1, 2, 2): 4, (1, 1, 2): 2, (1, 1, 1): 1}


def made(layout: tuple[int, int, int], seed: int) -> tuple[Any, Any, Ranks]:
    dp, fsdp, ep = layout
    config = ParallelConfig(dp=dp, fsdp=fsdp, ep=ep)
    ranks = make_ranks(config) if math.prod(layout) > 1 else Ranks()
    model = build(BASE, seed, torch.float32)
    spread(model, ranks, config)
    return model, make_optimizers(model, OptimizerConfig()), ranks


def state_of(layout: tuple[int, int, int], run: Path, seed: int, background: bool) -> tuple[dict[str, Tensor], int]:
    """What a fresh model with random moments holds, whole, and the bytes that this rank wrote of it."""
    model, optimizers, ranks = made(layout, seed)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.detach() * 0.5  # different everywhere
        optimizer.step()
        optimizer.zero_grad()
    weights, moments = model.state_dict(), optimizer_tensors(optimizers, model)
    parts = {
        **{f"model.{name}": part for name, part in own_parts(model, weights, ranks).items()},
        **{f"optimizer.{name}": part for name, part in own_parts(model, moments, ranks).items()},
    }
    writer = StateWriter(run, ranks, CheckpointConfig(background=background))
    writer.save(1, parts, {"seed": seed}, lambda step: None)
    with torch.no_grad():
        for parameter in model.parameters():
            if background:
                parameter.zero_()  # what is written must not change with the model
    writer.finish(lambda step: None)
    weights = weights if not background else {}
    whole = whole_tensors(model, {**weights, **moments}, ranks)
    return {key: value.clone() for key, value in whole.items()}, sum(part.tensor.nbytes for part in parts.values())


def loaded(layout: tuple[int, int, int], run: Path, seed: int) -> dict[str, Tensor]:
    """Into a model of other weights; whole again."""
    model, optimizers, ranks = made(layout, seed + 1)
    state = newest_run_state(run)
    with state.open_tensors("model") as stored:
        model.load_state_dict(read_parts(model, stored.shapes, stored.read_rows, ranks))
    with state.open_tensors("optimizer") as stored:
        load_optimizer_tensors(optimizers, model, read_parts(model, stored.shapes, stored.read_rows, ranks))
    whole = whole_tensors(model, {**model.state_dict(), **optimizer_tensors(optimizers, model)}, ranks)
    return {key: value.clone() for key, value in whole.items()}


def run_on(layout: tuple[int, int, int], function: Any, *arguments: Any) -> list[Any]:
    count = math.prod(layout)
    return on_ranks(count, function, layout, *arguments) if count > 1 else [function(layout, *arguments)]


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_what_every_other_saved(layout: tuple[int, int, int], tmp_path: Path, seed: int) -> None:
    """Experts 6 on 4 ranks: 2, 2, 1, 1. All moments and steps too; and as one process has them."""
    (expected, written), *others = run_on(layout, state_of, tmp_path, seed, False)
    state = newest_run_state(tmp_path)
    assert_equal(state.load_tensors("model") | state.load_tensors("optimizer"), expected)
    whole_bytes = sum(value.nbytes for value in expected.values())
    assert written + sum(other for _, other in others) == whole_bytes  # each row once
    if others:
        assert max(written, *(other for _, other in others)) < whole_bytes / len(others) + 12_000
    targets = [(2, 1, 2), (1, 2, 2), (1, 1, 1)] if layout == (4, 1, 1) else [(4, 1, 1)]
    for target in targets:
        for got in run_on(target, loaded, tmp_path, seed)[:1]:
            assert_equal(got, expected)


def test_what_is_written_in_the_background_is_the_state_of_its_step(tmp_path: Path, seed: int) -> None:
    run_on((1, 1, 2), state_of, tmp_path / "later", seed, True)
    run_on((1, 1, 2), state_of, tmp_path / "at once", seed, False)
    later, at_once = (newest_run_state(tmp_path / name).load_tensors("model") for name in ("later", "at once"))
    assert_equal(later, at_once)


def test_a_state_is_seen_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a thread still writes, the older state is the newest; the next save waits for it."""
    go, began = Event(), Event()
    write = run_state.write_safetensors

    def slowly(*arguments: Any) -> Any:
        began.set()
        assert go.wait(20)
        return write(*arguments)

    writer = StateWriter(tmp_path, Ranks(), CheckpointConfig(background=True))
    part, reported = Part(torch.randn(3, 2), 0, 3), []
    writer.save(1, {"model.x": part}, {}, reported.append)
    writer.finish(reported.append)
    monkeypatch.setattr(run_state, "write_safetensors", slowly)
    writer.save(2, {"model.x": replace(part, tensor=part.tensor + 1)}, {}, reported.append)
    assert began.wait(20)
    assert (newest_run_state(tmp_path).step, reported) == (1, [1])
    go.set()
    writer.save(3, {"model.x": part}, {}, reported.append)
    assert reported == [1, 2]
    writer.finish(reported.append)
    assert (list(list_steps(tmp_path)), reported) == ([2, 3], [1, 2, 3])


def test_a_failed_write_is_reported_later_and_older_states_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StateWriter(tmp_path, Ranks(), CheckpointConfig(background=True))
    part = Part(torch.randn(3, 2), 0, 3)
    writer.save(1, {"model.x": part}, {}, lambda step: None)
    writer.finish(lambda step: None)

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_state, "write_safetensors", full)
    writer.save(2, {"model.x": part}, {}, lambda step: None)
    with pytest.raises(MoesaicError, match="no space left on device"):
        writer.finish(lambda step: None)
    assert not writer.failed
    assert list(list_steps(tmp_path)) == [1]


def join_or_fail(run: Path, fails: int) -> str:
    """A save by ranks one of which has something that no file can hold."""
    ranks = make_ranks(ParallelConfig())
    dtype = torch.complex64 if ranks.index == fails else torch.float32
    parts = {"model.x": Part(torch.zeros(2, dtype=dtype), 2 * ranks.index, 4)}
    try:
        save_pieces(run, 2, parts, {}, Crew(ranks.store(), ranks.index, ranks.count))
    except MoesaicError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("fails", [0, 1])
def test_a_rank_that_cannot_write_is_named_on_all_of_them(fails: int, tmp_path: Path) -> None:
    save_run_state(tmp_path, 1, {"model.x": torch.zeros(4)}, {})
    first, second = on_ranks(2, join_or_fail, tmp_path, fails)
    assert first == second
    assert "model" in first
    assert "complex64" in first
    assert (f"rank {fails} on" in first) == (fails == 1)
    assert list(list_steps(tmp_path)) == [1]


def test_a_missing_piece_is_damage(tmp_path: Path) -> None:
    crew = Crew(HashStore(), 0, 1)
    save_pieces(tmp_path, 1, {"model.x": Part(torch.zeros(2, 3), 2, 4)}, {}, crew)  # rows 2 and 3 of 4 alone
    directory = list_steps(tmp_path)[1]
    assert find_problem(directory) is None
    with pytest.raises(MoesaicError, match=r"pieces of x .* are not whole"):
        StateTensors(directory, "model")
    (directory / "model-00000-of-00001.safetensors").unlink()
    assert find_problem(directory) == "model-00000-of-00001.safetensors is missing"
