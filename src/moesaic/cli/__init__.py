"""The `moesaic` command: one file per subcommand, loaded when it is called.

A user's mistake is one line on stderr and exit code 2, a failure one line and exit code 1; Ctrl-C is 130.
"""

import os
import re
import sys
import warnings
from collections.abc import Sequence

from cyclopts import App
from cyclopts.exceptions import CycloptsError
from rich.console import Console

from moesaic import __version__
from moesaic.errors import MoesaicError, let_first_rank_speak

_FLAG_NAME = re.compile(r"^--[\w.-]+")

app = App(
    name="moesaic",
    version=__version__,
    help="Train, load, run and explain mixture-of-experts language models on the machine you have.",
    suppress_keyboard_interrupt=False,  # it would exit without a word
)
# Name, function and one line of help, in the order in which one meets them; the file is read when it is called.
for position, (name, function, about) in enumerate(
    (
        ("demo", "demo", "Train a sparse model and its dense twin on local text, and compare them."),
        ("train", "train", "Train a model as a TOML config says."),
        ("generate", "generate", "Continue a prompt."),
        ("chat", "chat", "Talk to a model."),
        ("serve", "serve", "Serve a model over HTTP, as OpenAI's API."),
        ("eval", "evaluate", "Perplexity, bits per byte and balance on a text file."),
        ("inspect", "inspect", "What the experts do on your text, as a page."),
        ("export", "export", "Write a run as a Hugging Face directory."),
        ("upcycle", "upcycle", "Make a sparse model of a dense one, with the same logits."),
        ("quantize", "quantize", "Pack a model's weights into 8 or 4 bits."),
        ("prune", "prune", "Leave out the experts that matter least."),
        ("merge", "merge", "Make one expert of several that are alike."),
        ("plan", "plan", "What a model would cost on a cluster, from its config alone."),
        ("launch", "launch", "Print a job file that trains on many machines."),
        ("bench", "bench", "Run a benchmark of the source checkout."),
        ("doctor", "doctor", "What this machine has, and which backend it gets."),
    )
):
    app.command(f"moesaic.cli.{name}:{function}", name=name, help=about, sort_key=position)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    warnings.showwarning = _one_line_warning
    try:
        status = app(
            _with_dashes(sys.argv[1:] if arguments is None else arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        _fail(f"{error} See moesaic {' '.join(error.command_chain or ())} --help".replace("  ", " "), 2)
    except MoesaicError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has left; keep the interpreter from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _with_dashes(arguments: Sequence[str]) -> list[str]:
    """`--max_tokens` and `--max-tokens` are the same flag. What follows --prompt is text and stays as it is."""
    return [
        argument if before == "--prompt" else _FLAG_NAME.sub(lambda name: name[0].replace("_", "-"), argument)
        for before, argument in zip(["", *arguments], arguments, strict=False)
    ]


def _fail(message: str, code: int) -> None:
    let_first_rank_speak()
    message = " ".join(message.split())
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
