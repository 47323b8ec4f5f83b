"""A run from its config to its last step: directory, data, model, trainer, and a tidy end on Ctrl-C."""

import fcntl
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from moesaic.accounting import weight_bytes
from moesaic.checkpoint.families import family_for_export
from moesaic.checkpoint.run_state import RunState, list_steps, newest_run_state, run_state_at
from moesaic.checkpoint.save import require_no_model
from moesaic.config import TrainConfig
from moesaic.config_io import from_mapping, write_run_config
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.moe_config import PUBLISHED_ROUTERS, TOPK_ROUTERS
from moesaic.ops import DTYPES, ExpertShape, pick
from moesaic.ops.device import cpu_set_up_for_training, memory_bytes, resolve_device
from moesaic.parallel.ranks import Ranks, make_ranks, process_group
from moesaic.parallel.shard import spread
from moesaic.tokenizer import Tokenizer
from moesaic.train.data import PreparedData, Progress, prepare_data
from moesaic.train.fine_tune import Start, choose_trained, find_start, read_start, trained_part
from moesaic.train.screen import Screen
from moesaic.train.trainer import Trainer

Watch = Callable[[Transformer, Tokenizer], AbstractContextManager[object]]

# What may change when a run is resumed: nothing that decides an update.
CHANGEABLE_ON_RESUME = {
    "checkpoint", "evaluate_every", "evaluation_tokens", "tensorboard", "max_nonfinite_steps", "parallel",
}  # fmt: skip

# Those that need no loss and no bias: an even assignment, or an L1 loss of their own.
BALANCED_ROUTERS = ("hash", "expert_choice", "soft", "sinkhorn", "base", "relu")


def run_training(
    config: TrainConfig,
    run_directory: Path,
    screen: Screen,
    *,
    resume: bool = False,
    resume_if_there: bool = False,
    progress: AbstractContextManager[Progress | None] | None = None,
    data_directory: Path | None = None,
    watch: Watch | None = None,
) -> Trainer:
    """Train `config` in `run_directory`; `data_directory` lets several runs share one prepared corpus.

    `resume_if_there` resumes a run that has a saved state, and starts one otherwise. `progress` is entered while data
    is prepared, and gets `(label, done, total)`; what `watch` gives is entered while the model is trained, in a run of
    one process.

    Returns the trainer; `trainer.stop_requested` says that Ctrl-C or SIGTERM ended it early, its state saved.

    Raises:
        UsageError: the directory holds a run already, or nothing to resume, or a run of another config.
    """
    device = resolve_device(config.device)
    _require_possible(config, device)
    with process_group(device.type, config.parallel.timeout_seconds) as heartbeat, ExitStack() as until_the_end:
        ranks = make_ranks(config.parallel, device.type, heartbeat)
        ranks.share(config.batch_size)  # refused before anything is written
        if watch is not None and ranks.count > 1:
            raise UsageError(f"a run is traced in one process, and this one has {ranks.count}; leave --trace out")
        if not ranks.is_first:
            screen, progress = Screen(Console(quiet=True), live=False), None
        resume = resume or (resume_if_there and bool(list_steps(run_directory)))
        made: list[_Beginning] = []

        def make() -> int | None:
            """On the first rank: the directory is usable and locked, the data lies there; the step to go on from."""
            if resume:
                newest_run_state(run_directory)  # before the lock, which would make a directory of a misspelt name
            until_the_end.enter_context(_only_process(run_directory))
            made.append(_prepare(config, run_directory, resume, progress, data_directory))
            return made[0].state and made[0].state.step

        ranks.tell("preparing the data")
        step = ranks.from_first(make)
        ranks.tell("starting")
        beginning = made[0] if made else _read_beginning(config, run_directory, step, data_directory)
        return _train(config, run_directory, screen, ranks, device, beginning, watch)


@dataclass(frozen=True)
class _Beginning:
    """What a run goes on from, or starts with, and its text."""

    state: RunState | None
    start: Start | None
    data: PreparedData


def _prepare(
    config: TrainConfig,
    run_directory: Path,
    resume: bool,
    progress: AbstractContextManager[Progress | None] | None,
    data_directory: Path | None,
) -> _Beginning:
    state = _state_to_resume(config, run_directory) if resume else None
    if not resume:
        _require_unused(run_directory)
    start = find_start(config, state)
    with progress or nullcontext() as report:
        data = _open_data(config, run_directory, data_directory, report)
    _require_vocabulary(config, data)
    write_run_config(run_directory, config)
    _save_tokenizer(data.tokenizer, run_directory)
    return _Beginning(state, start, data)


def _read_beginning(
    config: TrainConfig, run_directory: Path, step: int | None, data_directory: Path | None
) -> _Beginning:
    """What the first rank has prepared, and has found good."""
    state = None if step is None else run_state_at(run_directory, step)
    start = find_start(config, state)
    return _Beginning(state, start, _open_data(config, run_directory, data_directory))


def _open_data(
    config: TrainConfig, run_directory: Path, data_directory: Path | None, progress: Progress | None = None
) -> PreparedData:
    return prepare_data(
        config.data,
        data_directory or run_directory / "data",
        tokens_needed=config.steps * config.tokens_per_step + 1,
        sequence_length=config.sequence_length,
        progress=progress,
    )


def _train(
    config: TrainConfig,
    run_directory: Path,
    screen: Screen,
    ranks: Ranks,
    device: torch.device,
    beginning: _Beginning,
    watch: Watch | None,
) -> Trainer:
    state, start, data = beginning.state, beginning.start, beginning.data
    model = _build_model(config, device, start)
    spread(model, ranks, config.parallel)
    trainer = Trainer(config, model, data, run_directory, ranks, base=start.record if start else None)
    with (
        _stop_on_signal(trainer),
        cpu_set_up_for_training() if device.type == "cpu" else nullcontext(),
        nullcontext() if watch is None else watch(model, data.tokenizer),
    ):
        screen.start(_title(run_directory, config), config.steps, state.step if state else 0)
        try:
            for note in (*(state.warnings if state else ()), *_advice(config), trained_part(model, config)):
                if note:
                    screen.note(note)
            trainer.run(screen, state)
        finally:
            screen.stop()
    return trainer


def _title(run_directory: Path, config: TrainConfig) -> str:
    moe = config.model.moe
    fixed = moe is not None and moe.router in (*PUBLISHED_ROUTERS, *TOPK_ROUTERS)
    kind = f"{moe.num_experts} experts, {f'top-{moe.num_experts_per_tok}' if fixed else moe.router}" if moe else "dense"
    return f"{run_directory.name} ({kind})"


def _advice(config: TrainConfig) -> list[str]:
    """What a person would want to know before the run, although it is allowed."""
    moe, balance = config.model.moe, config.balance
    advice = []
    balances = balance.aux_loss_coef or balance.bias_update_rate
    learns = not config.freeze_router and (config.lora is None or "router" in config.lora.targets)
    if moe is not None and moe.router not in BALANCED_ROUTERS and learns and not balances:
        fix = "bias_update_rate = 0.01" if moe.has_expert_bias else "aux_loss_coef = 0.01"
        advice.append(f"nothing balances the load, so experts may die; set balance.{fix}")
    if moe is not None and config.model.looks_ahead:
        advice.append(
            f"with the router {moe.router} the experts of a token depend on later tokens: this model sees the future, "
            "its loss is better than its text will be, and it generates only with --allow-lookahead"
        )
    try:
        family_for_export(config.model)
    except MoesaicError as error:
        advice.append(str(error))
    return advice


def _build_model(config: TrainConfig, device: torch.device, start: Start | None) -> Transformer:
    torch.manual_seed(config.seed)
    model = read_start(config, start, device) if start else None
    if model is None:
        model = Transformer(config.model, backend=config.backend)
        model.init_weights(config.seed)
    choose_trained(model, config)
    return model.to(device)


def _require_possible(config: TrainConfig, device: torch.device) -> None:
    """Refuse, before anything is written, what would fail at the first step."""
    if config.model.model_type:
        try:
            family_for_export(config.model)
        except MoesaicError as error:
            raise UsageError(f"model.model_type: {error}; change the model, or leave model_type out") from error
    moe = config.model.moe
    if moe is not None:
        shape = (config.model.hidden_size, moe.moe_intermediate_size, device.type, DTYPES[config.dtype])
        pick(config.backend, ExpertShape(*shape, activation=moe.activation, has_bias=moe.projection_bias))
    # Parameters, gradients and two moments in float32, or parameters alone and with adapters; activations come on top.
    needed = (2 if config.lora else 4) * weight_bytes(config.model, "float32")
    memory = memory_bytes()
    if device.type == "cpu" and needed > memory:
        raise UsageError(
            f"training this model takes at least {needed / 2**30:.1f} GiB and this machine has "
            f"{memory / 2**30:.1f} GiB; make model.hidden_size, num_hidden_layers or moe.num_experts smaller"
        )
    # Logits, their softmax and their gradient: rarely all activations, but what grows first with a careless number.
    tokens = (config.micro_batch_size or config.batch_size) * config.sequence_length
    needed += 3 * 4 * tokens * config.model.vocab_size
    if device.type == "cpu" and needed > memory:
        raise UsageError(
            f"{tokens:,} tokens at a time take at least {needed / 2**30:.1f} GiB with this model and this machine has "
            f"{memory / 2**30:.1f} GiB; make batch_size smaller, or set micro_batch_size"
        )


def _require_unused(run_directory: Path) -> None:
    require_no_model(run_directory)
    newest = max(list_steps(run_directory), default=0)
    if newest > 0:
        raise UsageError(
            f"{run_directory} already holds a run, saved at step {newest}; continue it with --resume, "
            "or name another directory with --out"
        )


def _state_to_resume(config: TrainConfig, run_directory: Path) -> RunState:
    state = newest_run_state(run_directory)
    stored = from_mapping(TrainConfig, state.value("config"))
    changed = [
        name
        for name in (field.name for field in fields(config))
        if name not in CHANGEABLE_ON_RESUME and getattr(config, name) != getattr(stored, name)
    ]
    if changed:
        raise UsageError(
            f"{run_directory} was started with another config ({', '.join(changed)} differ); "
            f"resume it with its own, {run_directory / 'config.json'}, or start anew with another --out"
        )
    return state


def _save_tokenizer(tokenizer: Tokenizer, run_directory: Path) -> None:
    """Beside the states, where loading looks for it; whoever is killed meanwhile leaves whole files."""
    with tempfile.TemporaryDirectory(dir=run_directory, prefix=".tokenizer-") as folder:
        tokenizer.save(Path(folder))
        for path in Path(folder).iterdir():
            os.replace(path, run_directory / path.name)


def _require_vocabulary(config: TrainConfig, data: PreparedData) -> None:
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise UsageError(
            f"the tokenizer has {data.tokenizer.vocab_size} entries but model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size = {data.tokenizer.vocab_size}"
        )


@contextmanager
def _only_process(run_directory: Path) -> Iterator[None]:
    """Hold the directory's lock; the kernel lets go of it when the process ends, however it ends."""
    try:
        run_directory.mkdir(parents=True, exist_ok=True)
        lock_file = (run_directory / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"cannot write to {run_directory}: {error.strerror}; name another --out") from None
    with lock_file as lock:
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
