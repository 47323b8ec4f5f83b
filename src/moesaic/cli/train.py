"""`moesaic train`: a run from a TOML config and flags."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from moesaic.cli.options import progress_bars, this_command
from moesaic.config_io import read_train_config
from moesaic.errors import UsageError

if TYPE_CHECKING:
    from moesaic.train.trainer import Trainer


def train(
    config: Path,
    /,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    resume_if_there: Annotated[bool, Parameter(negative="")] = False,
    plain: Annotated[bool, Parameter(negative="")] = False,
    trace: Path | None = None,
) -> int:
    """Train a model as CONFIG says.

    Any key of the config is also a flag: --steps 500, --optimizer.lr 1e-3, --model.moe.num-experts 32. Ctrl-C saves the
    state and stops; --resume goes on from there as if nothing had happened.

    Parameters
    ----------
    config
        TOML file; examples/ has some to start from. With --resume also RUN/config.json.
    out
        Run directory; runs/NAME-OF-CONFIG unless given.
    resume
        Continue the run in --out from its newest verified state.
    resume_if_there
        The same where there is a saved state, and a new run otherwise: for what starts by itself again and again.
    plain
        Lines instead of a live screen, also on a terminal.
    trace
        Keep the routing of all tokens that are trained on, and of each evaluation, in this folder, for
        `moesaic inspect FOLDER`: 6 bytes for each token, layer and expert of it.
    """
    train_config = read_train_config(config, overrides, start_values)
    if trace is not None and train_config.model.moe is None:
        raise UsageError(f"{config} is of a dense model, which has no routing; leave --trace out")
    run_directory = out or _default_directory(config)

    # Imported late: the errors above should not wait for torch.
    from moesaic.cli.tracing import training_watch
    from moesaic.train.run import run_training
    from moesaic.train.screen import Screen

    console = Console()
    trainer = run_training(
        train_config,
        run_directory,
        Screen(console, live=False if plain else None),
        resume=resume,
        resume_if_there=resume_if_there,
        progress=progress_bars(console),
        watch=None if trace is None else training_watch(trace, str(run_directory)),
    )
    return _say_what_is_next(trainer, console)


def _say_what_is_next(trainer: "Trainer", console: Console) -> int:
    """The exit status: 130 for a run that was stopped."""
    from moesaic.checkpoint.families import has_family

    config, directory = trainer.config, trainer.run_directory
    run, stored_config = shlex.quote(str(directory)), shlex.quote(str(directory / "config.json"))
    if trainer.stop_requested and trainer.step < config.steps:
        line = (
            f"stopped at step {trainer.step}; go on with: {this_command()} train {stored_config} --out {run} --resume"
        )
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        return 130
    if trainer.ranks.is_first:
        asking = " --allow-lookahead" if config.model.looks_ahead else ""
        lines = [f"done: {directory}", f"  {this_command()} generate {run} --prompt 'def '{asking}"]
        if has_family(config.model):
            lines.append(f"  {this_command()} export {run} {shlex.quote(f'{directory}-hf')}")
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0


def start_values(init_from: str) -> Mapping[str, Any]:
    """Of a model; torch is imported for it alone."""
    from moesaic.checkpoint.adapters import start_values as read_start_values

    return read_start_values(init_from)


def _default_directory(config: Path) -> Path:
    if config.name == "config.json":
        raise UsageError(f"{config} is the config of a run; name its directory with --out {config.parent}")
    return Path("runs") / config.stem
