"""A sparse model beside its dense twin: what both runs recorded, and the numbers that follow from it.

Every number of the report and of summary.json is derived here, from the rows of metrics.jsonl, so that no two places
can disagree.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from moesaic.accounting import count_parameters, training_flops_per_token
from moesaic.config import TrainConfig
from moesaic.errors import MoesaicError

Row = Mapping[str, Any]

LEVEL_MARGIN = 0.02
"""Nats per token below which one run each says little: margins of the demo spread by 0.005 to 0.05 over seeds."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place in a run: where its validation loss first reached some value."""

    step: float
    tokens: float
    flops: float
    seconds: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """One training run. Raises MoesaicError when it has no evaluation with a finite loss."""

    name: str
    rows: Sequence[Row]
    """The rows of metrics.jsonl, training and evaluation, in the order of their steps."""
    parameters_total: int
    parameters_active: int
    flops_per_token: float
    """Training FLOPs per token, forward and backward."""

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise MoesaicError(
                f"run {self.name!r} has {len(self.rows)} rows but no evaluation with a finite val_loss, "
                "so there is nothing to compare; train for more steps or set evaluate_every lower"
            )

    @classmethod
    def of_run(cls, name: str, config: TrainConfig, rows: Sequence[Row]) -> "RunCurve":
        """The curve of a run of this config; parameters and FLOPs come from the accounting."""
        count = count_parameters(config.model)
        return cls(
            name=name,
            rows=rows,
            parameters_total=count.total,
            parameters_active=count.active,
            flops_per_token=training_flops_per_token(config.model, config.sequence_length),
        )

    @cached_property
    def evaluations(self) -> list[Row]:
        return [row for row in self.rows if row.get("kind") == "eval" and finite(row.get("val_loss")) is not None]

    @cached_property
    def training(self) -> list[Row]:
        """Training rows whose update was made and whose loss is finite."""
        rows = (row for row in self.rows if row.get("kind") == "train" and not row.get("skipped"))
        return [row for row in rows if finite(row.get("loss")) is not None]

    @property
    def val_loss(self) -> float:
        """The last validation loss, in nats per token."""
        return float(self.evaluations[-1]["val_loss"])

    @property
    def bits_per_byte(self) -> float | None:
        return finite(self.evaluations[-1].get("bits_per_byte"))

    @property
    def max_vio(self) -> float | None:
        """MaxVio over the last evaluation; None for a dense model."""
        return finite(self.evaluations[-1].get("max_vio"))

    @property
    def tokens(self) -> int:
        return self.evaluations[-1]["tokens"]

    @property
    def seconds(self) -> float:
        """Training time, evaluation excluded."""
        return float(self.evaluations[-1]["seconds"])

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole run."""
        return self.tokens / self.seconds if self.seconds > 0 else None

    def reached(self, loss: float) -> Point | None:
        """Where the validation loss first was `loss` or lower, linear between evaluations; None if it never was."""
        before: Row | None = None
        for row in self.evaluations:
            if row["val_loss"] <= loss:
                return self._between(before or row, row, loss)
            before = row
        return None

    def _between(self, before: Row, after: Row, loss: float) -> Point:
        drop = before["val_loss"] - after["val_loss"]
        share = (before["val_loss"] - loss) / drop if drop > 0 else 1.0
        step, tokens, seconds = (before[key] + share * (after[key] - before[key]) for key in _PLACE)
        return Point(step=step, tokens=tokens, flops=tokens * self.flops_per_token, seconds=seconds, loss=loss)


_PLACE = ("step", "tokens", "seconds")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A sparse run, its dense twin, and what the sparse model's experts do."""

    sparse: RunCurve
    dense: RunCurve
    domains: Sequence[str] = ()
    domain_load: Sequence[Sequence[Sequence[float]]] = ()
    """[MoE layer][domain][expert]: assignments of the domain's tokens. Shares do as well and weigh domains alike."""
    samples: Sequence[tuple[str, str]] = ()
    """(prompt, completion) pairs written by the sparse model."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The exact configuration, JSON-able; usually {"sparse": to_mapping(...), "dense": to_mapping(...)}."""
    hardware: Mapping[str, Any] = field(default_factory=dict)
    """What the runs ran on, as names and values to print."""

    @property
    def gain(self) -> float:
        """Nats per token by which the sparse model is better; negative when it is worse."""
        return self.dense.val_loss - self.sparse.val_loss

    @cached_property
    def dense_reached(self) -> Point:
        """Where the dense model itself first had its final loss: the last step, or earlier if the loss rose again."""
        point = self.dense.reached(self.dense.val_loss)
        assert point is not None
        return point

    @cached_property
    def sparse_reached(self) -> Point | None:
        """Where the sparse model first had the dense model's final loss; None if it never had."""
        return self.sparse.reached(self.dense.val_loss)

    @property
    def reached_at_first_evaluation(self) -> bool:
        """Whether `sparse_reached` is only a bound: sparse was there when it was first looked at."""
        return self.sparse_reached is not None and self.sparse_reached.step == self.sparse.evaluations[0]["step"]

    @property
    def outcome(self) -> Literal["win", "level", "loss"]:
        if abs(self.gain) < LEVEL_MARGIN:
            return "level"
        return "win" if self.gain > 0 else "loss"

    def ratio(self, key: Literal["tokens", "flops", "seconds"]) -> float | None:
        """What the sparse model needed to reach the dense model's final loss, as a multiple of what the dense did."""
        if self.sparse_reached is None:
            return None
        dense = getattr(self.dense_reached, key)
        return getattr(self.sparse_reached, key) / dense if dense > 0 else None

    def summary(self) -> dict[str, Any]:
        """The content of summary.json: keys `sparse`, `dense` and `sample`; unknown numbers are None."""
        sides = {
            side: {
                "name": run.name,
                "val_loss": run.val_loss,
                "bits_per_byte": run.bits_per_byte,
                "tokens": run.tokens,
                "tokens_per_second": run.tokens_per_second,
                "seconds": run.seconds,
                "seconds_to_dense_loss": reached.seconds if reached else None,
                "parameters_total": run.parameters_total,
                "parameters_active": run.parameters_active,
                "flops_per_token": run.flops_per_token,
                "max_vio": run.max_vio,
            }
            for side, run, reached in (
                ("sparse", self.sparse, self.sparse_reached),
                ("dense", self.dense, self.dense_reached),
            )
        }
        return {**sides, "sample": "".join(self.samples[0]) if self.samples else ""}


def relative_load(counts: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """How much more a domain uses an expert than all domains together do, from `counts` [domain][expert].

    1 means as much as overall, 2 twice as much. None where a domain has no tokens or an expert no assignments.
    """
    overall = [sum(column) for column in zip(*counts, strict=True)]
    everything = sum(overall)
    rows = []
    for row in counts:
        total = sum(row)
        rows.append([
            count * everything / (total * expert) if total > 0 and expert > 0 else None
            for count, expert in zip(row, overall, strict=True)
        ])  # fmt: skip
    return rows


def finite(value: Any) -> float | None:
    """`value` as a float when it is a finite number, else None."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None
