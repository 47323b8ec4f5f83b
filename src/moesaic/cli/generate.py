"""`moesaic generate`: continue a prompt."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from moesaic.cli.options import JsonFlag, ModelOptions, SamplingOptions
from moesaic.errors import UsageError

_MODEL, _SAMPLING = ModelOptions(), SamplingOptions()


def generate(
    model: str,
    /,
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
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
    json_output
        One JSON object with text, token_ids and speeds.
    """
    from moesaic.engine.generate import Generation, stream
    from moesaic.ops.device import peak_bytes
    from moesaic.residency.residency import residency_of

    sampling_config = sampling.to_config()
    transformer, tokenizer = loading.load(model)
    generation = Generation(prompt_tokens=0)
    text = _read_stdin() if prompt == "-" else prompt
    prompt_ids = tokenizer.encode(text, add_special_tokens=True)
    for piece in stream(transformer, tokenizer, prompt_ids, sampling_config, generation):
        if not json_output:
            print(piece, end="", flush=True)
    residency = residency_of(transformer)
    if not json_output:
        print()
        if residency is not None and sys.stderr.isatty():
            print(f"experts: {residency.statistics}", file=sys.stderr)
        return
    report = {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "prompt_tokens": generation.prompt_tokens,
        "prefill_tokens_per_second": generation.prefill_tokens_per_second,
        "decode_tokens_per_second": generation.decode_tokens_per_second,
        "peak_bytes": peak_bytes(),
    }
    if residency is not None:
        statistics = residency.statistics
        report |= {
            "hit_rate": statistics.hit_rate,
            "bytes_read": statistics.bytes_read,
            "expert_cache": [asdict(layer) for layer in residency.cache.statistics],
        }
    print(json.dumps(report))


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 at byte {error.start}; convert it with iconv") from None
