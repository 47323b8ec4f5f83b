"""`moesaic demo`: train a sparse model and its dense twin, compare them, let the sparse one speak."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from moesaic.accounting import count_parameters, training_flops_per_token
from moesaic.cli.options import progress_bars, this_command
from moesaic.config import TrainConfig
from moesaic.config_io import read_run_config, to_mapping
from moesaic.errors import UsageError
from moesaic.recipes import DEFAULT_MINUTES, demo_config

if TYPE_CHECKING:
    from moesaic.analysis.comparison import Comparison
    from moesaic.train.trainer import Trainer

PROMPTS = ("def ", "import ", "class Test", "The ")
LARGEST_DIFFERENCE = 0.02
"""Of active parameters and FLOPs per token between the twins."""


def demo(
    *,
    minutes: float = DEFAULT_MINUTES,
    out: Path = Path("runs/demo"),
    seed: int = 0,
    data: str = "stdlib",
    plain: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train a sparse model and its dense twin on local text, compare them, and talk to the sparse one.

    The twins have equal active parameters and FLOPs per token, see the same tokens and follow the same schedule.
    An interrupted demo goes on where it stopped when it is called again.

    Parameters
    ----------
    minutes
        Scales the number of steps; the default takes about this long on two cores.
    out
        Where both runs, summary.json, report.html and the plots go.
    seed
        Of initial weights and of the order of the data.
    data
        Text to train on: stdlib (the running Python's standard library), or a file or folder.
    plain
        Lines instead of a live screen, also on a terminal.
    """
    if not 0 < minutes < 60 * 24 * 7:
        raise UsageError(f"--minutes is {minutes}; give a number above 0, such as 2")
    configs = {name: demo_config(name, minutes=minutes, seed=seed, source=data) for name in ("dense", "sparse")}
    _require_twins(configs)
    _require_same_demo(configs, out)

    from moesaic.analysis.report import write_report
    from moesaic.checkpoint.save import require_no_model

    require_no_model(out)

    console = Console()
    trainers = {}
    for name, config in configs.items():
        trainers[name] = _train(config, out / name, out / "data", console, plain)
        if trainers[name].stop_requested and trainers[name].step < config.steps:
            console.print("stopped; call moesaic demo again with the same options to go on", highlight=False)
            return 130
    comparison = _compare(trainers)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(comparison.summary(), indent=1) + "\n", encoding="utf-8")
    report = write_report(out, comparison)
    _show(comparison, report, out, console)
    return 0


def _train(config: TrainConfig, run: Path, data: Path, console: Console, plain: bool) -> "Trainer":
    from moesaic.checkpoint.run_state import list_steps
    from moesaic.train.run import run_training
    from moesaic.train.screen import Screen

    return run_training(
        config,
        run,
        Screen(console, live=False if plain else None),
        resume=bool(list_steps(run)),
        progress=progress_bars(console),
        data_directory=data,
    )


def _require_same_demo(configs: dict[str, TrainConfig], out: Path) -> None:
    """An unfinished or finished demo in `out` goes on only with the options that it was started with."""
    for name, config in configs.items():
        if (out / name / "config.json").exists() and read_run_config(out / name) != config:
            another = shlex.quote(f"{out}-2")
            raise UsageError(f"{out} holds a demo with other options; name another with --out {another}, or remove it")


def _require_twins(configs: dict[str, TrainConfig]) -> None:
    """Equal work per token is what makes the comparison one; the accounting proves it before anything is trained."""
    sparse, dense = configs["sparse"], configs["dense"]
    pairs = {
        "active parameters": [count_parameters(config.model).active for config in (sparse, dense)],
        "FLOPs per token": [
            training_flops_per_token(config.model, config.sequence_length) for config in (sparse, dense)
        ],
    }
    for what, (of_sparse, of_dense) in pairs.items():
        if abs(of_sparse / of_dense - 1) > LARGEST_DIFFERENCE:
            raise UsageError(f"the twins differ in {what}: sparse {of_sparse:,.0f}, dense {of_dense:,.0f}")


def _compare(trainers: dict[str, "Trainer"]) -> "Comparison":
    from moesaic.analysis.comparison import Comparison, RunCurve
    from moesaic.engine.generate import generate
    from moesaic.train.metrics import read_metrics

    sparse = trainers["sparse"]
    curves = {
        name: RunCurve.of_run(name, trainer.config, read_metrics(trainer.run_directory / "metrics.jsonl"))
        for name, trainer in trainers.items()
    }
    domains = sparse.data.domains
    load_CME = sparse.evaluate(num_domains=len(domains)).load
    samples = [
        (prompt, generate(sparse.model, sparse.data.tokenizer, prompt, max_tokens=96, temperature=0.7, top_p=0.95))
        for prompt in PROMPTS
    ]
    return Comparison(
        sparse=curves["sparse"],
        dense=curves["dense"],
        domains=domains,
        domain_load=load_CME.transpose(0, 1).tolist(),
        samples=samples,
        config={name: to_mapping(trainer.config) for name, trainer in trainers.items()},
        hardware=_hardware(),
    )


def _hardware() -> dict[str, object]:
    import os
    import platform

    import torch

    from moesaic.ops.device import device_name, resolve_device
    from moesaic.ops.instruction_set import instruction_set

    return {
        "processor": device_name(resolve_device("auto")),
        "instruction set": instruction_set(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _show(comparison: "Comparison", report: Path, out: Path, console: Console) -> None:
    summary = comparison.summary()
    table = Table(title="sparse against its dense twin", title_justify="left")
    table.add_column("")
    for side in ("sparse", "dense"):
        table.add_column(side, justify="right")
    for label, key, form in (
        ("validation loss (nats per token)", "val_loss", ".4f"),
        ("bits per byte", "bits_per_byte", ".4f"),
        ("tokens per second", "tokens_per_second", ",.0f"),
        ("training seconds", "seconds", ".0f"),
        ("seconds to the dense model's final loss", "seconds_to_dense_loss", ".0f"),
        ("parameters, total", "parameters_total", ","),
        ("parameters, active per token", "parameters_active", ","),
        ("MaxVio", "max_vio", ".2f"),
    ):
        values = [summary[side][key] for side in ("sparse", "dense")]
        table.add_row(label, *("-" if value is None else format(value, form) for value in values))
    console.print(table)
    for prompt, completion in comparison.samples[:2]:
        console.print(prompt, end="", style="bold", markup=False, highlight=False)
        console.print(completion.rstrip() + "\n", markup=False, highlight=False)
    run, exported = (shlex.quote(str(out / name)) for name in ("sparse", "sparse-hf"))
    console.print(
        f"report: {report}\nnext:\n"
        f"  {this_command()} chat {run}\n"
        f"  {this_command()} generate {run} --prompt 'def read_' --max-tokens 100\n"
        f"  {this_command()} export {run} {exported}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
