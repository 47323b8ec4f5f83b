"""`moesaic chat`: talk to a model in the terminal."""

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from moesaic.cli.options import ModelOptions, SamplingOptions
from moesaic.errors import MoesaicError

if TYPE_CHECKING:
    from moesaic.engine.engine import Engine
    from moesaic.engine.generate import Generation

_MODEL, _SAMPLING = ModelOptions(), SamplingOptions()


def chat(model: str, /, *, loading: ModelOptions = _MODEL, sampling: SamplingOptions = _SAMPLING) -> None:
    """Talk to MODEL. A model with a chat template answers; one without continues what you write.

    /clear forgets the conversation, /stats tells speeds and what the experts did, /quit or Ctrl-D ends it, Ctrl-C stops
    an answer.

    Parameters
    ----------
    model
        A run directory, a Hugging Face directory, or a hub id.
    """
    from moesaic.config import EngineConfig
    from moesaic.engine.engine import Engine, is_servable
    from moesaic.engine.generate import Generation, require_causal, stream

    config = sampling.to_config()
    transformer, tokenizer = loading.load_over_ranks(model)
    require_causal(transformer, config)
    # It knows the conversation so far, of which only what is new is computed.
    longest = transformer.config.max_position_embeddings
    options = EngineConfig(max_sequences=1, max_model_tokens=longest)
    engine = Engine(transformer, tokenizer, options) if is_servable(transformer) else None
    generation = Generation(prompt_tokens=0)
    console = Console()
    if not tokenizer.has_chat_template:
        console.print("This model has no chat template: it continues what you write.", style="dim")
    console.print("/clear forgets, /stats tells, /quit ends, Ctrl-C stops an answer.", style="dim", highlight=False)
    messages: list[dict[str, str]] = []
    while (line := _ask(console)) not in (None, "/quit"):
        if line == "/clear":
            messages.clear()
            continue
        if line == "/stats":
            _print_statistics(console, generation, engine)
            continue
        if not line:
            continue
        if line.startswith("/"):
            console.print(f"{line} is not a command; there are /clear, /stats and /quit", style="red", markup=False)
            continue
        messages.append({"role": "user", "content": line})
        generation = Generation(prompt_tokens=0)
        try:
            if tokenizer.has_chat_template:
                prompt_ids = tokenizer.encode(tokenizer.apply_chat_template(messages), parse_special_tokens=True)
            else:
                prompt_ids = tokenizer.encode(line, add_special_tokens=True)
            new_message = tokenizer.has_chat_template
            for piece in stream(
                transformer, tokenizer, prompt_ids, config, generation, engine, new_message=new_message
            ):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            console.print(" [stopped]", style="dim", markup=False)
        except MoesaicError as error:
            messages.pop()
            console.print(f"{error}; /clear starts over", style="red", markup=False, highlight=False)
            continue
        print()
        messages.append({"role": "assistant", "content": generation.text})


def _print_statistics(console: Console, last: "Generation", engine: "Engine | None") -> None:
    """Of the last answer, and of the experts since the start."""
    speed = last.decode_tokens_per_second
    written = "" if speed is None else f", {len(last.token_ids)} written at {speed:.1f} tokens/s"
    lines = [f"last answer: {last.prompt_tokens} tokens read in {last.prefill_seconds:.2f} s{written}"]
    if engine is not None:
        statistics = engine.statistics()
        read = statistics.prompt_tokens + statistics.cached_tokens
        lines.append(f"conversation: {statistics.cached_tokens} of {read} tokens were known and not read again")
        for layer, load in enumerate(statistics.expert_load):
            mean = sum(load) / len(load)
            busiest = max(range(len(load)), key=load.__getitem__)
            if mean:
                violation = f"MaxVio {max(load) / mean - 1:.2f}"
                lines.append(f"layer of experts {layer}: {violation}, the busiest is expert {busiest} of {len(load)}")
        asked = statistics.hits + statistics.misses
        if asked:
            lines.append(
                f"experts on disk: {statistics.hits / asked:.0%} of {asked:,} were in memory, "
                f"{statistics.bytes_read / 2**20:,.0f} MiB read, {statistics.stall_seconds:.1f} s waited"
            )
    console.print("\n".join(lines), style="dim", highlight=False, markup=False)


def _ask(console: Console) -> str | None:
    try:
        return console.input("[bold]> [/bold]" if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
