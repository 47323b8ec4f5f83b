"""The training screen: lines that fit, frames that cost little, and no escape codes where no terminal is."""

import io
import math
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moesaic.train.routing_statistics import RoutingStatistics
from moesaic.train.screen import GREY, MAX_COST, ORANGE, RED, Screen, heat_strip, sparkline


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def train_row(step: int, *, layers: int = 4, experts: int = 16, **changes: Any) -> dict[str, Any]:
    weights = [[random.random() for _ in range(experts)] for _ in range(layers)]
    load = [[weight / sum(layer) for weight in layer] for layer in weights]
    return {
        "kind": "train", "step": step, "tokens": step * 8192, "loss": 2.7 + 3 / step, "lr": 3e-3, "grad_norm": 0.51,
        "tokens_per_second": 12_400.0, "mfu": 0.312, "seconds": 0.2 * step, "aux_loss": 1.0, "z_loss": 0.1,
        "max_vio": 0.42, "max_vio_layers": [0.42] * layers, "dead_experts": 0, "load": load, "dropped": 0.0,
        "experts_per_token": 2.0, "router_entropy": 0.934, "router_logit_rms": 1.523, "router_logit_max": 9.1,
        "skipped": False, **changes,
    }  # fmt: skip


EVALUATION = {"kind": "eval", "step": 100, "val_loss": 2.9873, "bits_per_byte": 1.2711, "max_vio": 0.31}
ROUTING_KEYS = RoutingStatistics(0).row().keys()
DENSE = dict.fromkeys(ROUTING_KEYS)


def live_screen(width: int = 80, height: int = 24, clock: Any = None) -> tuple[Screen, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, height=height, color_system="256")
    return Screen(console, **({"clock": clock} if clock else {})), output


def plain_screen(clock: Any = None) -> tuple[Screen, io.StringIO]:
    output = io.StringIO()
    return Screen(Console(file=output), **({"clock": clock} if clock else {})), output


def visible_lines(output: io.StringIO) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue()).replace("\r", "\n").split("\n")


@pytest.mark.parametrize(("layers", "experts"), [(4, 16), (48, 128), (1, 1), (12, 600)])
@pytest.mark.parametrize("width", [80, 132])
def test_the_live_screen_shows_everything_within_the_terminal(width: int, layers: int, experts: int):
    screen, output = live_screen(width)
    with screen:
        screen.start("sparse, a run with a rather long name " * 4, 1200)
        screen.step(train_row(100, layers=layers, experts=experts))
        screen.evaluation(EVALUATION)
    lines = visible_lines(output)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    numbers = "2.7300|12.4k tokens/s|MFU 31.2 %|rate 3.00e-03|gradient norm 0.510|MaxVio 0.42|0 dead experts|2.9873"
    numbers += "|entropy 0.93|logit RMS 1.52"
    for shown in (
        *numbers.split("|"),
        "step 100 of 1,200",
        "1.2711 bits per byte",
        "left",
        "layer 0 ",
        f"layer {layers - 1} ",
    ):
        assert shown in text
    last_frame = text[text.rindex("sparse, a run") :]
    assert last_frame.rstrip().count("\n") < 24


def test_a_dense_run_shows_no_experts():
    screen, output = live_screen()
    screen.start("dense", 10)
    screen.step(train_row(1) | DENSE)
    screen.stop()
    assert "loss" in output.getvalue()
    assert not re.search("balance|layer|MaxVio|dead|router|entropy|RMS|dropped", output.getvalue())


@pytest.mark.parametrize("make", [live_screen, plain_screen])
@pytest.mark.parametrize(
    ("dropped", "shown"), [(0.0, None), (None, None), (0.0123, "1.2 % dropped"), (1e-5, "under 0.1 % dropped")]
)
def test_dropped_assignments_are_shown_where_there_are_any(make: Any, dropped: float | None, shown: str | None):
    screen, output = make(clock=Clock())
    screen.start("run", 10)
    screen.step(train_row(1, dropped=dropped))
    screen.stop()
    assert ("dropped" in output.getvalue()) == (shown is not None)
    assert shown is None or shown in output.getvalue()


def test_a_router_without_logits_has_no_line_of_its_own():
    screen, output = live_screen()
    screen.start("run", 10)
    screen.step(train_row(1, router_entropy=None, router_logit_rms=None, router_logit_max=None))
    screen.stop()
    assert "MaxVio 0.42" in output.getvalue()
    assert not re.search("router|entropy|RMS", output.getvalue())


def test_long_numbers_of_the_balance_stay_whole_in_80_columns():
    screen, output = live_screen(80)
    screen.start("run", 10)
    large = {"max_vio": 127.44, "dead_experts": 6143, "experts_per_token": 63.25, "dropped": 0.877}
    screen.step(train_row(1, **large, router_logit_rms=123456.789))
    screen.stop()
    assert "MaxVio 127.44   6143 dead experts   63.25 per token   87.7 % dropped" in output.getvalue()
    assert "entropy 0.93   logit RMS 1.23e+05" in output.getvalue()


@pytest.mark.parametrize("make", [live_screen, plain_screen])
@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_skipped_update_is_said_and_kept_out_of_the_trend(make: Any, loss: Any):
    screen, output = make(clock=Clock())
    screen.start("run", 3)
    screen.step(train_row(1))
    screen.step(train_row(3, loss=loss, grad_norm=loss, skipped=True))
    screen.stop()
    assert "skipped" in output.getvalue()
    assert "not finite" in output.getvalue()
    assert list(screen._losses) == [2.7 + 3]


@pytest.mark.parametrize("frame_seconds", [0.0, 0.002, 0.05])
def test_frames_come_at_most_four_times_a_second_and_cost_under_one_percent(frame_seconds: float):
    clock = Clock()
    screen, _ = live_screen(clock=clock)
    frames = 0
    draw = screen._frame

    def slow_frame():
        nonlocal frames
        frames += 1
        clock.now += frame_seconds
        return draw()

    screen._frame = slow_frame  # the work is real; only its price is made up
    screen.start("run", 3000)
    for step in range(1, 3001):
        clock.now += 0.02
        screen.step(train_row(step, layers=1, experts=2))
    seconds = clock.now - 100.0
    screen.stop()
    assert 5 <= frames <= 4 * seconds + 2
    assert (frames - 2) * frame_seconds <= MAX_COST * seconds < 0.01 * seconds


def test_plain_lines_hold_no_escape_codes_and_come_every_five_percent():
    screen, output = plain_screen(clock=Clock())
    with screen:
        screen.start("run", 200)
        for step in range(1, 201):
            screen.step(train_row(step))
        screen.note("step 200: state saved")
        screen.evaluation(EVALUATION)
    lines = output.getvalue().splitlines()
    assert "\x1b" not in output.getvalue()
    assert output.getvalue().isascii()
    steps = [int(found[1]) for line in lines if (found := re.match(r"step +(\d+)/200  loss", line))]
    assert steps[0] == 1
    assert steps[-1] == 200
    assert 20 <= len(steps) <= 22
    assert lines[-2] == "step 200: state saved"
    assert lines[-1].startswith("step 100/200  validation loss 2.9873")


def test_plain_lines_come_every_ten_seconds_of_a_long_run():
    clock = Clock()
    screen, output = plain_screen(clock)
    screen.start("run", 1_000_000)
    for step in range(1, 101):
        clock.now += 1.0
        screen.step(train_row(step))
    assert len(output.getvalue().splitlines()) == 1 + 10


def test_time_left_counts_only_the_steps_of_this_session():
    clock = Clock()
    screen, output = plain_screen(clock)
    screen.start("run", 1000, first_step=900)
    clock.now += 30.0
    screen.step(train_row(910))
    assert "resumed after 900" in output.getvalue()
    assert "left 4:30" in output.getvalue()


def test_a_screen_serves_one_run_after_another_and_gives_the_cursor_back():
    screen, output = live_screen()
    for name in ("first", "second"):
        screen.start(name, 10)
        screen.step(train_row(1))
        screen.note(f"note in {name} with [brackets]")
    screen.stop()
    screen.stop()
    assert "note in first with [brackets]" in output.getvalue()
    assert output.getvalue().count("\x1b[?25l") == output.getvalue().count("\x1b[?25h") == 2


def test_an_error_in_the_loop_gives_the_cursor_back():
    screen, output = live_screen()
    screen.start("run", 10)
    with pytest.raises(KeyboardInterrupt), screen:
        raise KeyboardInterrupt
    assert output.getvalue().rindex("\x1b[?25h") > output.getvalue().rindex("\x1b[?25l")


@given(
    st.integers(1, 300), st.integers(1, 30), st.integers(40, 200), st.integers(1, 20), st.integers(0, 2**32)
)  # fmt: skip
def test_heat_strips_fit(experts: int, layers: int, width: int, max_layers: int, seed: int):
    rng = random.Random(seed)
    load = [[rng.random() for _ in range(experts)] for _ in range(layers)]
    strip = heat_strip(load, width, max_layers)
    rows = [line.plain for line in strip if line.plain.startswith("layer")]
    assert len(rows) == min(layers, max_layers)
    assert all(len(row) <= width for row in rows)
    assert len({len(row) for row in rows}) == 1


def test_a_heat_cell_tells_a_dead_a_fair_and_an_overloaded_expert_apart():
    first, *_ = heat_strip([[0.0, 0.25, 0.5, 0.25]], 80, 1)
    assert re.findall(r"\S", first.plain)[6:] == ["×", "×", "▄", "▄", "█", "█", "▄", "▄"]
    assert {span.style for span in first.spans} == {RED, GREY, ORANGE}


@given(st.lists(st.floats(0, 20), min_size=2, max_size=400), st.integers(1, 40))
def test_sparkline_is_no_wider_than_asked_and_follows_the_values(values: list[float], width: int):
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    descending = sparkline(sorted(values, reverse=True), width)
    assert list(descending) == sorted(descending, reverse=True)
