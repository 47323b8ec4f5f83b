"""`moesaic generate`: continue a prompt."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moesaic.cli.options import JsonFlag, ModelOptions, SamplingOptions
from moesaic.errors import UsageError

if TYPE_CHECKING:
    from moesaic.residency.residency import Residency

_MODEL, _SAMPLING = ModelOptions(), SamplingOptions()


def generate(
    model: str,
    /,
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    trace: Path | None = None,
    loading: ModelOptions = _MODEL,
    sampling: SamplingOptions = _SAMPLING,
    json_output: JsonFlag = False,
) -> None:
    """Continue PROMPT with MODEL, to standard output.

    Parameters
    ----------
    model
        A run directory, a Hugging Face directory, or a hub id.
    prompt
        Text to continue; - reads it from standard input.
    trace
        Keep the routing of prompt and answer in this folder, for `moesaic inspect FOLDER`.
    json_output
        One JSON object with text, token_ids and speeds.
    """
    from moesaic.cli.tracing import traced_engines
    from moesaic.engine.generate import Generation, stream
    from moesaic.ops.device import peak_bytes
    from moesaic.residency.residency import residency_of

    sampling_config = sampling.to_config()
    transformer, tokenizer = loading.load_over_ranks(model, trace)
    generation, residency, slots = Generation(prompt_tokens=0), residency_of(transformer), 0
    text = _read_stdin() if prompt == "-" else prompt
    prompt_ids = tokenizer.encode(text, add_special_tokens=True)
    with traced_engines(trace, model, transformer, tokenizer) as make_engine:
        for piece in stream(transformer, tokenizer, prompt_ids, sampling_config, generation, make_engine=make_engine):
            slots = 0 if residency is None else residency.plan.slots  # while it writes there are fewer than later
            if not json_output:
                print(piece, end="", flush=True)
    if not json_output:
        print()
        if residency is not None and sys.stderr.isatty():
            print(f"experts: {residency.statistics}", file=sys.stderr)
            if residency.record is not None:
                print(f"placement: {residency.record.forecast(slots)}", file=sys.stderr)
        return
    report = {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "prompt_tokens": generation.prompt_tokens,
        "prefill_tokens_per_second": generation.prefill_tokens_per_second,
        "decode_tokens_per_second": generation.decode_tokens_per_second,
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(report | ({} if residency is None else _of_experts(residency, slots))))


def _of_experts(residency: "Residency", slots: int) -> dict[str, Any]:
    return {
        "hit_rate": residency.statistics.hit_rate,
        "bytes_read": residency.statistics.bytes_read,
        "expected_hit_rate": residency.record and residency.record.placed_hits(slots),
        "expert_cache": [asdict(layer) for layer in residency.cache.statistics],
    }


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 at byte {error.start}; convert it with iconv") from None
