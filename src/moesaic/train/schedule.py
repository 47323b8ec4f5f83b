"""Learning-rate schedules, as a factor on every group's peak rate."""

import math

from moesaic.config import ScheduleConfig


def rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Factor for the update number `step` (0-based) of `total_steps`.

    Linear warm-up, then: `wsd` (warm-up, stable, decay; arXiv 2404.06395) stays at 1 and falls linearly at the end,
    `cosine` falls along half a cosine, `constant` stays at 1. The last update of the falling ones is just above
    `final_factor`.
    """
    warmup_steps = round(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.name == "constant":
        return 1.0
    falling_steps = total_steps - warmup_steps
    if config.name == "wsd":
        falling_steps = max(1, round(config.decay_fraction * total_steps))
    remaining = min(1.0, (total_steps - step) / max(1, falling_steps))
    if config.name == "cosine":
        remaining = 0.5 * (1 - math.cos(math.pi * remaining))
    return config.final_factor + (1 - config.final_factor) * remaining
