"""`moesaic chat`: talk to a model in the terminal."""

import sys

from rich.console import Console

from moesaic.cli.options import ModelOptions, SamplingOptions
from moesaic.errors import MoesaicError

_MODEL, _SAMPLING = ModelOptions(), SamplingOptions()


def chat(model: str, /, *, loading: ModelOptions = _MODEL, sampling: SamplingOptions = _SAMPLING) -> None:
    """Talk to MODEL. A model with a chat template answers; one without continues what you write.

    /clear forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer.

    Parameters
    ----------
    model
        A run directory, a Hugging Face directory, or a hub id.
    """
    from moesaic.engine.generate import Generation, require_causal, stream

    config = sampling.to_config()
    transformer, tokenizer = loading.load(model)
    require_causal(transformer, config)
    console = Console()
    if not tokenizer.has_chat_template:
        console.print("This model has no chat template: it continues what you write.", style="dim")
    console.print("/clear forgets, /quit ends, Ctrl-C stops an answer.", style="dim", highlight=False)
    messages: list[dict[str, str]] = []
    while (line := _ask(console)) not in (None, "/quit"):
        if line == "/clear":
            messages.clear()
            continue
        if not line:
            continue
        if line.startswith("/"):
            console.print(f"{line} is not a command; there are /clear and /quit", style="red", markup=False)
            continue
        messages.append({"role": "user", "content": line})
        generation = Generation(prompt_tokens=0)
        try:
            if tokenizer.has_chat_template:
                prompt_ids = tokenizer.encode(tokenizer.apply_chat_template(messages), parse_special_tokens=True)
            else:
                prompt_ids = tokenizer.encode(line, add_special_tokens=True)
            for piece in stream(transformer, tokenizer, prompt_ids, config, generation):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            console.print(" [stopped]", style="dim", markup=False)
        except MoesaicError as error:
            messages.pop()
            console.print(f"{error}; /clear starts over", style="red", markup=False, highlight=False)
            continue
        print()
        messages.append({"role": "assistant", "content": generation.text})


def _ask(console: Console) -> str | None:
    try:
        return console.input("[bold]> [/bold]" if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
