"""A run from its config to its last step: directory, data, model, trainer, and a tidy end on Ctrl-C."""

import fcntl
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from types import FrameType

from moesaic.checkpoint.run_state import RunState, list_steps, newest_run_state
from moesaic.config import TrainConfig
from moesaic.config_io import read_run_config, write_run_config
from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.ops.device import prepare_cpu_for_training, resolve_device
from moesaic.train.data import PreparedData, prepare_data
from moesaic.train.screen import Screen
from moesaic.train.trainer import Trainer

# What may change when a run is resumed: nothing that decides an update.
CHANGEABLE_ON_RESUME = {"checkpoint", "evaluate_every", "evaluation_tokens", "tensorboard", "max_nonfinite_steps"}

Progress = Callable[[str, int, int | None], None]


def run_training(
    config: TrainConfig,
    run_directory: Path,
    screen: Screen,
    *,
    resume: bool = False,
    progress: AbstractContextManager[Progress | None] | None = None,
    data_directory: Path | None = None,
) -> Trainer:
    """Train `config` in `run_directory`; `data_directory` lets several runs share one prepared corpus.

    `progress` is entered while data is prepared, and gets `(label, done, total)`.

    Returns the trainer; `trainer.stop_requested` says that Ctrl-C or SIGTERM ended it early, its state saved.

    Raises:
        UsageError: the directory holds a run already, or nothing to resume, or a run of another config.
    """
    with _only_process(run_directory):
        state = _state_to_resume(config, run_directory) if resume else _require_unused(run_directory)
        with progress or nullcontext() as report:
            data = prepare_data(
                config.data,
                data_directory or run_directory / "data",
                tokens_needed=config.steps * config.tokens_per_step + 1,
                sequence_length=config.sequence_length,
                progress=report,
            )
        _require_vocabulary(config, data)
        write_run_config(run_directory, config)
        data.tokenizer.save(run_directory)
        trainer = Trainer(config, _build_model(config), data, run_directory)
        with _stop_on_signal(trainer):
            screen.start(_title(run_directory, config), config.steps, state.step if state else 0)
            try:
                for warning in state.warnings if state else ():
                    screen.note(warning)
                trainer.run(screen, state)
            finally:
                screen.stop()
    return trainer


def _title(run_directory: Path, config: TrainConfig) -> str:
    moe = config.model.moe
    kind = f"{moe.num_experts} experts, top-{moe.num_experts_per_tok}" if moe else "dense"
    return f"{run_directory.name} ({kind})"


def _build_model(config: TrainConfig) -> Transformer:
    device = resolve_device(config.device)
    if device.type == "cpu":
        prepare_cpu_for_training()
    model = Transformer(config.model, backend=config.backend)
    model.init_weights(config.seed)
    return model.to(device)


def _require_unused(run_directory: Path) -> None:
    steps = list_steps(run_directory)
    if steps:
        raise UsageError(
            f"{run_directory} already holds a run, saved at step {max(steps)}; continue it with --resume, "
            "or name another directory with --out"
        )


def _state_to_resume(config: TrainConfig, run_directory: Path) -> RunState:
    state = newest_run_state(run_directory)
    stored = read_run_config(run_directory)
    changed = [
        field.name
        for field in fields(config)
        if field.name not in CHANGEABLE_ON_RESUME and getattr(config, field.name) != getattr(stored, field.name)
    ]
    if changed:
        raise UsageError(
            f"{run_directory} was started with another config ({', '.join(changed)} differ); "
            f"resume it with {run_directory / 'config.json'}, or start anew with another --out"
        )
    return state


def _require_vocabulary(config: TrainConfig, data: PreparedData) -> None:
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise UsageError(
            f"the tokenizer has {data.tokenizer.vocab_size} entries but model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size = {data.tokenizer.vocab_size}"
        )


@contextmanager
def _only_process(run_directory: Path) -> Iterator[None]:
    """Hold the directory's lock; the kernel lets go of it when the process ends, however it ends."""
    run_directory.mkdir(parents=True, exist_ok=True)
    with (run_directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is training in {run_directory}; name another --out") from None
        yield


@contextmanager
def _stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after the current step; a second one ends it at once."""

    def request_stop(number: int, frame: FrameType | None) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
