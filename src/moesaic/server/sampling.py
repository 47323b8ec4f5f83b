"""How texts are to be drawn, and what they must be, from the fields of a request."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moesaic.config import SamplingConfig
from moesaic.errors import UsageError
from moesaic.server.context import Context
from moesaic.server.errors import ApiError, refuse
from moesaic.server.large_json import check_counts
from moesaic.server.schemas import GenerationFields, ResponseFormat

if TYPE_CHECKING:
    from moesaic.engine.constraint import Constraint, ConstraintCompiler, GrammarConstraint

_SEEDS = 2**63
_LEAST_TOP_P = 1e-9
"""top_p 0 is the most likely token alone."""


@dataclass(frozen=True)
class Structure:
    """What a text must be, and the field that said so."""

    param: str
    kind: str
    """A method of ConstraintCompiler: json_object, json_schema, regex, choice or grammar."""
    value: Any = None


class DrawingFields(Protocol):
    """Fields of all requests that make texts."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    ignore_eos: bool | None


def sampling_of(fields: DrawingFields, max_tokens: int, vocab_size: int) -> SamplingConfig:
    """OpenAI's defaults: temperature 1 and all tokens. Without a seed every request gets one of its own."""
    given = {
        name: value
        for name in ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos")
        if (value := getattr(fields, name, None)) is not None
    }
    stop = getattr(fields, "stop", None) or ()
    return SamplingConfig(
        max_tokens=max_tokens,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else max(fields.top_p, _LEAST_TOP_P),
        top_k=max(fields.top_k or 0, 0),
        seed=random.randrange(_SEEDS) if fields.seed is None else fields.seed % _SEEDS,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logit_bias=_biases(getattr(fields, "logit_bias", None) or {}, vocab_size),
        **given,
    )


def seed_of_choice(seed: int, choice: int) -> int:
    return (seed + choice) % _SEEDS


def _biases(biases: dict[str, float], vocab_size: int) -> dict[int, float]:
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise refuse("logit_bias", f"{key[:40]!r} is not a token id; there are 0 to {vocab_size - 1}")
    return {int(key): bias for key, bias in biases.items()}


def structure_of(fields: GenerationFields) -> Structure | None:
    """Raises ApiError where more than one field says it."""
    found = [structure for structure in _structures(fields) if structure is not None]
    if len(found) > 1:
        raise refuse(found[1].param, f"{found[0].param} says already what the text must be; send one of them")
    return found[0] if found else None


def _structures(fields: GenerationFields) -> list[Structure | None]:
    found: list[Structure | None] = [structure_of_format(getattr(fields, "response_format", None))]
    if fields.guided_json is not None:
        found.append(Structure("guided_json", "json_schema", fields.guided_json))
    for kind in ("regex", "choice", "grammar"):
        if (value := getattr(fields, f"guided_{kind}")) is not None:
            found.append(Structure(f"guided_{kind}", kind, value))
    if (asked := fields.structured_outputs) is not None:
        values = {"json_schema": asked.json_, "regex": asked.regex, "choice": asked.choice, "grammar": asked.grammar}
        kinds = [Structure("structured_outputs", kind, value) for kind, value in values.items() if value is not None]
        if asked.json_object:
            kinds.append(Structure("structured_outputs", "json_object"))
        if not kinds:
            raise refuse("structured_outputs", "it is empty; give json, regex, choice, grammar or json_object")
        found += kinds
    return found


def structure_of_format(asked: ResponseFormat | None, param: str = "response_format") -> Structure | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return Structure(param, "json_object")
    schema = asked.json_schema.schema_ if asked.json_schema is not None else None
    if schema is None:
        raise refuse(param, "json_schema needs a schema: {'type': 'json_schema', 'json_schema': {'schema': …}}")
    return Structure(param, "json_schema", schema)


async def compile_constraints(context: Context, structure: Structure | None, count: int) -> "list[Constraint | None]":
    """One for each text, compiled where nobody waits for it."""
    if structure is None:
        return [None] * count
    return await build_constraints(context, structure.param, lambda compiler: _compile(compiler, structure), count)


async def build_constraints(
    context: Context, param: str, build: "Callable[[ConstraintCompiler], GrammarConstraint]", count: int
) -> "list[Constraint | None]":
    """Raises ApiError, with `param`, for what cannot be compiled."""

    def build_all() -> "list[Constraint | None]":
        first = build(context.compiler())
        return [first, *(first.copy() for _ in range(count - 1))]

    try:
        return await context.grammars.run(build_all)
    except UsageError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from None


def _compile(compiler: "ConstraintCompiler", structure: Structure) -> "GrammarConstraint":
    value = structure.value
    if structure.kind == "json_object":
        return compiler.json_object()
    if structure.kind == "json_schema" and isinstance(value, str):
        check_counts(value.encode("utf-8", "replace"))
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the schema is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise UsageError("the schema is not a JSON object")
    return getattr(compiler, structure.kind)(value)
