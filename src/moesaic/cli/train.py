"""`moesaic train`: a run from a TOML config and flags."""

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from moesaic.cli.options import progress_bars, this_command
from moesaic.config_io import read_train_config
from moesaic.errors import UsageError


def train(
    config: Path,
    /,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    plain: Annotated[bool, Parameter(negative="")] = False,
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
    plain
        Lines instead of a live screen, also on a terminal.
    """
    train_config = read_train_config(config, overrides)
    run_directory = out or _default_directory(config)

    # Imported late: the errors above should not wait for torch.
    from moesaic.checkpoint.families import has_family
    from moesaic.train.run import run_training
    from moesaic.train.screen import Screen

    console = Console()
    trainer = run_training(
        train_config,
        run_directory,
        Screen(console, live=False if plain else None),
        resume=resume,
        progress=progress_bars(console),
    )
    if trainer.stop_requested and trainer.step < train_config.steps:
        stored_config, quoted_out = (shlex.quote(str(path)) for path in (run_directory / "config.json", run_directory))
        console.print(
            f"stopped at step {trainer.step}; go on with: {this_command()} train {stored_config} "
            f"--out {quoted_out} --resume",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        return 130
    run, exported = shlex.quote(str(run_directory)), shlex.quote(f"{run_directory}-hf")
    export = f"\n  {this_command()} export {run} {exported}"
    asking = " --allow-lookahead" if train_config.model.looks_ahead else ""
    console.print(
        f"done: {run_directory}\n  {this_command()} generate {run} --prompt 'def '{asking}"
        f"{export if has_family(train_config.model) else ''}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _default_directory(config: Path) -> Path:
    if config.name == "config.json":
        raise UsageError(f"{config} is the config of a run; name its directory with --out {config.parent}")
    return Path("runs") / config.stem
