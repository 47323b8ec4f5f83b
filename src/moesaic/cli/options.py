"""What several commands share: which model, how it is sampled from, how progress is shown."""

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moesaic.cli.ranks import load_over_ranks, num_ranks
from moesaic.config import SamplingConfig
from moesaic.errors import UsageError

if TYPE_CHECKING:
    from moesaic.model.transformer import Transformer
    from moesaic.parallel.inference import ExpertShare
    from moesaic.tokenizer import Tokenizer


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    "Type of the weights; auto keeps what is stored, and on a CPU float32 beside packed weights."
    device: str = "auto"
    "auto, cpu, cuda or cuda:N."
    quantization: Literal["int8", "int4", "mxfp4"] | None = None
    "Pack the weights while they are read; `moesaic quantize` does it once for all."
    memory: str | None = None
    "What the process may take, such as 2GiB: experts stay on disk, and are read when tokens need them."
    placement: Path | None = None
    "With --memory, a trace of `moesaic inspect --trace`: the experts that it used most stay in memory."
    backend: str = "auto"
    "How experts are computed; `moesaic doctor` lists the choices."
    offline: Annotated[bool, Parameter(negative="")] = False
    "Take a model of the hub from the local cache, and ask nobody."
    revision: str | None = None
    "Branch, tag or commit of a model on the hub."

    def load(self, model: str) -> "tuple[Transformer, Tokenizer]":
        """MODEL and its tokenizer. torch is imported here, not by `--help`.

        Raises UsageError under torchrun: each rank would do all of it.
        """
        if num_ranks() > 1:
            raise UsageError(f"this command runs in one process, and torchrun started {num_ranks()}; leave it out")
        return self._load(model)

    def load_over_ranks(self, model: str, trace: Path | None = None) -> "tuple[Transformer, Tokenizer]":
        """The same; under torchrun the experts are shared out over all ranks, of which only the first one returns. The
        others compute for it until it ends.

        Raises UsageError before anything is read where `trace` cannot be written.
        """
        if trace is not None:
            from moesaic.analysis.trace_writer import require_place

            require_place(trace)
        if num_ranks() == 1:
            return self._load(model)
        return load_over_ranks(lambda share: self._load(model, share), self.device)

    def _load(self, model: str, share: "ExpertShare | None" = None) -> "tuple[Transformer, Tokenizer]":
        from moesaic.checkpoint.load import load, load_tokenizer
        from moesaic.checkpoint.resolve import resolve_model

        source = resolve_model(model, self.revision, self.offline)
        tokenizer = load_tokenizer(source)
        transformer = load(
            source,
            dtype=self.dtype,
            device=self.device,
            quantization=self.quantization,
            memory=self.memory,
            placement=self.placement,
            backend=self.backend,
            offline=self.offline,
            share=share,
        )
        return transformer, tokenizer


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn."""

    max_tokens: Annotated[int, Parameter(name=["--max-tokens", "--max-new-tokens"])] = 128
    "Stop after this many tokens."
    temperature: float = 0.8
    "0 always takes the most likely token."
    top_p: float = 1.0
    "Draw from the fewest tokens that hold this share of the probability."
    top_k: int = 0
    "Draw from the k most likely tokens; 0 means all."
    seed: int = 0
    "The same seed gives the same text."
    allow_lookahead: Annotated[bool, Parameter(negative="")] = False
    "Generate also where routers look at later tokens (expert_choice, soft), slowly."

    def to_config(self) -> SamplingConfig:
        return SamplingConfig(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            allow_lookahead=self.allow_lookahead,
        )


def this_command() -> str:
    """How to call moesaic again from the same place, ready to paste."""
    program = Path(sys.argv[0])
    if program.name != "moesaic":
        return f"{shlex.quote(sys.executable)} -m moesaic"
    return "moesaic" if shutil.which("moesaic") == str(program) else shlex.quote(str(program))


JsonFlag = Annotated[bool, Parameter(name="--json", negative="")]


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields `progress(label, done, total)`, which draws one bar per label on a terminal and is silent elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        tasks: dict[str, object] = {}

        def progress(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)  # type: ignore[arg-type]

        yield progress


def existing_file(path: Path, what: str) -> Path:
    """Raises UsageError unless `path` is a file."""
    if not path.is_file():
        raise UsageError(f"{what} {path} is not a file; check the path")
    return path
