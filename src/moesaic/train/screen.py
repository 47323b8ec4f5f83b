"""What a person sees while a model trains: a live screen on a terminal, plain lines anywhere else.

Rows are those of metrics.jsonl. Frames are drawn in the training thread, between two steps: at most four per second,
and never so often that drawing takes more than `MAX_COST` of the time.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self, TypeGuard

from rich.console import Console
from rich.live import Live
from rich.text import Text

Row = Mapping[str, Any]

MIN_INTERVAL = 0.25
"""Seconds between two frames."""
MAX_COST = 0.008
"""Largest share of the wall clock that frames may take."""
PLAIN_INTERVAL = 10.0
"""Seconds after which a plain line is due, even when less than `PLAIN_FRACTION` of the run has passed."""
PLAIN_FRACTION = 0.05
TREND_STEPS = 240
"""Latest losses that the sparkline and the trend look at."""

BLOCKS = "▁▂▃▄▅▆▇█"
LABEL_WIDTH = 12

# xterm colours of middle lightness: each keeps a contrast above 3 on white and on black.
BLUE, DULL_BLUE, GREY, TAN, ORANGE, RED = (f"color({code})" for code in (32, 67, 245, 137, 166, 160))


class Screen:
    """Shows one run after another: `start`, then `step` and `evaluation` rows and `note`s, then `stop`.

    `live=None` draws a live screen when `console` is a terminal that can; `live=False` always writes plain lines.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.console = console or Console()
        able = self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.options.ascii_only
        self._wants_live = able if live is None else live
        self._clock = clock
        self._live: Live | None = None
        self._reset("", 0, 0)

    def _reset(self, title: str, total_steps: int, first_step: int) -> None:
        self._title, self._total_steps, self._first_step = title, total_steps, first_step
        self._row: Row = {"step": first_step}
        self._evaluation: Row = {}
        self._losses: deque[float] = deque(maxlen=TREND_STEPS)
        self._started = self._clock()
        self._next_frame = self._next_line = -math.inf
        self._next_line_step = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, title: str, total_steps: int, first_step: int = 0) -> None:
        """Begin a run of `total_steps`, of which `first_step` were done before (a resumed run)."""
        self.stop()
        self._reset(title, total_steps, first_step)
        if self._wants_live:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
            self._refresh()
        else:
            resumed = f", resumed after {first_step:,}" if first_step else ""
            self._print(f"{title}: {total_steps:,} steps{resumed}")

    def step(self, row: Row) -> None:
        """Take the training row of one finished step."""
        self._row = row
        loss = row.get("loss")
        if _is_number(loss) and not row.get("skipped"):
            self._losses.append(loss)
        now = self._clock()
        if self._live is not None:
            if now >= self._next_frame:
                self._refresh()
        elif now >= self._next_line or row["step"] >= min(self._next_line_step, self._total_steps):
            self._next_line = now + PLAIN_INTERVAL
            self._next_line_step = row["step"] + PLAIN_FRACTION * self._total_steps
            self._print(self._plain_step())

    def evaluation(self, row: Row) -> None:
        """Take an evaluation row."""
        self._evaluation = row
        if self._live is None:
            self._print(f"{self._counter(row['step'])}  validation loss {_evaluation_text(row)}")
        elif self._clock() >= self._next_frame:
            self._refresh()

    def note(self, message: str) -> None:
        """Say something that should stay readable: a skipped update, a saved state."""
        if self._live is None:
            self._print(message)
        else:
            self.console.print(Text(message))  # rich prints above the live screen

    def stop(self) -> None:
        """End the run and leave its last frame standing. Does no harm when nothing runs."""
        if self._live is not None:
            self._refresh()
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True, highlight=False)

    def _refresh(self) -> None:
        assert self._live is not None
        began = self._clock()
        self._live.update(self._frame(), refresh=True)
        cost = self._clock() - began
        self._next_frame = began + cost + max(MIN_INTERVAL, cost / MAX_COST)

    def _seconds(self) -> tuple[float, float | None]:
        """Seconds since the start and seconds left (None before the first step)."""
        elapsed = self._clock() - self._started
        done = self._row["step"] - self._first_step
        return elapsed, elapsed / done * (self._total_steps - self._row["step"]) if done > 0 else None

    def _counter(self, step: int) -> str:
        return f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"

    def _plain_step(self) -> str:
        row, (_, left) = self._row, self._seconds()
        parts = [f"{self._counter(row['step'])}  loss {_number(row.get('loss'), '.4f')}"]
        parts += [*_speed_parts(row), *_update_parts(row), *_balance_parts(row), *_router_parts(row)]
        if row.get("skipped"):
            parts.append("update skipped")
        return "  ".join([*parts, f"left {_duration(left)}"])

    def _frame(self) -> Text:
        """The whole live screen as one text, which costs rich least to draw."""
        width = max(40, self.console.width)
        lines = [*self._head(width), Text(), *self._numbers(width)]
        load = self._row.get("load")
        if load:
            rows_left = max(1, self.console.height - len(lines) - 5)
            lines += [Text(), *heat_strip(load, width, rows_left)]
        frame = Text("\n", no_wrap=True, overflow="crop").join(lines)
        frame.no_wrap, frame.overflow = True, "crop"
        return frame

    def _head(self, width: int) -> list[Text]:
        step, total = self._row["step"], max(1, self._total_steps)
        elapsed, left = self._seconds()
        counter = f"step {step:,} of {total:,}"
        title = self._title[: max(1, width - len(counter) - 2)]
        tail = f" {100 * step / total:3.0f} %   {_duration(elapsed)} gone, {_duration(left)} left"
        bar_width = max(8, width - len(tail) - 1)
        filled = min(bar_width, round(bar_width * step / total))
        return [
            Text.assemble((title, "bold"), " " * (width - len(title) - len(counter)), counter),
            Text.assemble(("━" * filled, BLUE), ("─" * (bar_width - filled), GREY), tail),
        ]

    def _numbers(self, width: int) -> list[Text]:
        row = self._row
        loss = Text.assemble((_number(row.get("loss"), ".4f"), "bold"), "  ") if "loss" in row else Text("not yet")
        if row.get("skipped"):
            loss.append("update skipped", RED)
        else:
            loss.append(sparkline(list(self._losses), min(24, width // 3)), BLUE)
            loss.append(_trend(list(self._losses)))
        balance = Text("   ".join(_balance_parts(row)), RED if row.get("dead_experts") else "")
        validation = Text("not yet")
        if self._evaluation:
            validation = Text(f"{_evaluation_text(self._evaluation)}   at step {self._evaluation['step']:,}")
        lines = {
            "loss": loss,
            "validation": validation,
            "speed": Text("   ".join(_speed_parts(row))),
            "update": Text("   ".join(_update_parts(row))),
            "balance": balance,
            "router": Text("   ".join(_router_parts(row))),
        }
        return [Text.assemble((f"{name:<{LABEL_WIDTH}}", GREY), line) for name, line in lines.items() if line.plain]


def heat_strip(load: Sequence[Sequence[float]], width: int, max_layers: int) -> list[Text]:
    """One line per MoE layer, one cell per expert: height and colour say its share against the mean share.

    load: one sequence of shares per layer. Neighbouring experts share a cell when a line has too few columns, and
    layers are left out evenly when there are too few lines.
    """
    num_experts = max(len(shares) for shares in load)
    room = width - LABEL_WIDTH
    per_cell = math.ceil(num_experts / room)
    cells = math.ceil(num_experts / per_cell)
    cell_width = min(3, room // cells)
    shown = _spread(len(load), max_layers)
    lines = []
    for layer in shown:
        shares = load[layer]
        mean = sum(shares) / len(shares) or 1.0
        line = Text.assemble((f"{f'layer {layer}':<{LABEL_WIDTH}}", GREY))
        for start in range(0, len(shares), per_cell):
            group = shares[start : start + per_cell]
            symbol, style = _cell(sum(group) / len(group) / mean)
            line.append((symbol * max(1, cell_width - 1)).ljust(cell_width), style)
        lines.append(line)
    legend = Text.assemble((f"{'load':<{LABEL_WIDTH}}", GREY))
    for relative, name in ((0.0, "none"), (0.5, "half"), (1.0, "the mean"), (1.5, "1.5 x"), (2.0, "2 x or more")):
        legend.append_text(Text.assemble(_cell(relative), f" {name}   "))
    left_out = [f"{per_cell} experts a cell"] if per_cell > 1 else []
    left_out += [f"{len(shown)} of {len(load)} layers"] if len(shown) < len(load) else []
    note = [Text(" " * LABEL_WIDTH + ", ".join(left_out), GREY)] if left_out else []
    return [*lines, legend, *note]


def _cell(relative: float) -> tuple[str, str]:
    """Symbol and style of a share that is `relative` times the mean: half a block is the mean, a full one twice it."""
    if relative <= 0:
        return "×", RED
    symbol = BLOCKS[min(len(BLOCKS), max(1, round(4 * relative))) - 1]
    for limit, style in ((0.6, BLUE), (0.85, DULL_BLUE), (1.18, GREY), (1.5, TAN)):
        if relative < limit:
            return symbol, style
    return symbol, ORANGE


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as at most `width` block characters, each the mean of its stretch, from the lowest to the highest."""
    if len(values) < 2:
        return ""
    width = min(width, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((mean - low) / span * len(BLOCKS)))] for mean in means)


def _trend(losses: Sequence[float]) -> str:
    half = len(losses) // 2
    if half < 5:
        return ""
    change = sum(losses[-half:]) / half - sum(losses[:half]) / half
    return f"  {change:+.3f} in {half} steps"


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of range(count), evenly spread, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return [0] if limit == 1 else [index * (count - 1) // (limit - 1) for index in range(limit)]


def _evaluation_text(row: Row) -> str:
    parts = [_number(row.get("val_loss"), ".4f")]
    if _is_number(row.get("bits_per_byte")):
        parts.append(f"{row['bits_per_byte']:.4f} bits per byte")
    if _is_number(row.get("max_vio")):
        parts.append(f"MaxVio {row['max_vio']:.2f}")
    return "   ".join(parts)


def _speed_parts(row: Row) -> list[str]:
    parts = []
    if _is_number(row.get("tokens_per_second")):
        parts.append(f"{_short(row['tokens_per_second'])} tokens/s")
    if _is_number(row.get("mfu")):
        parts.append(f"MFU {100 * row['mfu']:.1f} %")
    if _is_number(row.get("tokens")):
        parts.append(f"{_short(row['tokens'])} tokens")
    return parts


def _update_parts(row: Row) -> list[str]:
    parts = []
    if _is_number(row.get("lr")):
        parts.append(f"rate {row['lr']:.2e}")
    if "grad_norm" in row:
        parts.append(f"gradient norm {_number(row['grad_norm'], '.3f')}")
    return parts


def _balance_parts(row: Row) -> list[str]:
    parts = []
    if _is_number(row.get("max_vio")):
        parts.append(f"MaxVio {row['max_vio']:.2f}")
    if _is_number(row.get("dead_experts")):
        parts.append(f"{row['dead_experts']} dead expert{'' if row['dead_experts'] == 1 else 's'}")
    if _is_number(row.get("experts_per_token")) and row["experts_per_token"] != int(row["experts_per_token"]):
        parts.append(f"{row['experts_per_token']:.2f} per token")
    if _is_number(row.get("dropped")) and row["dropped"] > 0:
        parts.append(f"{_percent(row['dropped'])} dropped")
    return parts


def _router_parts(row: Row) -> list[str]:
    parts = []
    if _is_number(row.get("router_entropy")):
        parts.append(f"entropy {row['router_entropy']:.2f}")
    if _is_number(row.get("router_logit_rms")):
        parts.append(f"logit RMS {row['router_logit_rms']:.3g}")
    return parts


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any, form: str) -> str:
    return format(value, form) if _is_number(value) else "not finite"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "under 0.1 %"


def _short(value: float) -> str:
    """12400 as `12.4k`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.{2 if value < 10 * size else 1}f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float | None) -> str:
    """Seconds as `m:ss` or `h:mm:ss`; None as `?`."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
