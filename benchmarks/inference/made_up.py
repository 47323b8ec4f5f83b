"""Requests that a program makes up from the description of the API, right and wrong ones, and what is wrong with the
answers."""

import copy
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from schemathesis import GenerationMode

HANG_SECONDS = 60.0
ERROR_FIELDS = {"message", "type", "param", "code"}
_TEXT = {"type": "string", "minLength": 1, "maxLength": 16}
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": _TEXT},
    "required": ["role", "content"],
}
_MODEST: dict[str, Any] = {
    "prompt": _TEXT,
    "input": _TEXT,
    "instructions": _TEXT,
    "messages": {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 2},
    "tokens": {"type": "array", "items": {"enum": [0, 65, 195]}},
    "logit_bias": {"type": "object", "properties": {"7": {"const": 1.5}}, "additionalProperties": False},
}
_CONTRADICTING = (
    "structured_outputs", "response_format", "guided_", "tool", "best_of", "top_logprobs", "chat_template_kwargs",
)  # fmt: skip
"""Fields that contradict each other, or the model, more often than not."""


_ENDS = ('"response.completed"', '"response.incomplete"')


@dataclass
class Answers:
    """To many requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    streams: int = 0
    """Of those that succeeded."""
    slowest: float = 0.0
    """Seconds."""
    faults: list[str] = field(default_factory=list)
    """5xx but 503, no answer, and errors of another shape than OpenAI's."""

    @property
    def count(self) -> int:
        return self.statuses.total()

    @property
    def succeeded(self) -> int:
        return self.statuses[200]


def ask_made_up(url: str, description: dict[str, Any], model: str, count: int, seed: int) -> Answers:
    """About `count` requests: wrong ones, right ones, and right ones that ask for little, as streams and whole."""
    answers = Answers()
    kinds = [
        (GenerationMode.NEGATIVE, description),
        (GenerationMode.POSITIVE, description),
        (GenerationMode.POSITIVE, modest(description, model, stream=True)),
        (GenerationMode.POSITIVE, modest(description, model, stream=False)),
    ]
    session = requests.Session()
    session.trust_env = False
    for number, (mode, described) in enumerate(kinds):
        operations = [one for one in _operations(described) if one.body or mode is GenerationMode.POSITIVE]
        # What has no body has few different requests.
        shares = [40 if operation.body else 1 for operation in operations]
        for operation, share in zip(operations, shares, strict=True):
            examples = max(1, round(count / len(kinds) * share / sum(shares)))

            def ask(case: schemathesis.Case) -> None:
                _judge(case, url, session, answers)

            limits = settings(
                max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            )  # fmt: skip
            hypothesis_seed(seed + number)(limits(given(case=operation.as_strategy(mode))(ask)))()
    return answers


def modest(description: dict[str, Any], model: str, *, stream: bool) -> dict[str, Any]:
    """The same for requests that have a chance: of the model that is there, of short texts, without fields that
    exclude each other."""
    narrow = copy.deepcopy(description)
    for schema in narrow["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if not fields.keys() & _MODEST.keys() or "model" not in fields:
            continue
        for name in list(fields):
            if name.startswith(_CONTRADICTING):
                del fields[name]
            elif name in _MODEST:
                fields[name] = _MODEST[name]
            elif '"integer"' in json.dumps(fields[name]):
                fields[name] = {"enum": [1, 2, 8]}  # not 1.0, which is one for JSON schemas and none for the server
        fields["model"] = {"const": model}
        if "stream" in fields:
            fields["stream"] = {"const": stream}
        if "prompt" in fields:
            fields.pop("messages", None)
        always = {"model", "stream", "prompt", "messages", "input", "tokens", "max_tokens", "max_output_tokens"}
        schema["required"] = sorted(always & fields.keys())
    return narrow


def _operations(description: dict[str, Any]) -> Iterator[Any]:
    for result in schemathesis.openapi.from_dict(description).get_all_operations():
        yield result.ok()  # type: ignore[union-attr]


def _judge(case: schemathesis.Case, url: str, session: requests.Session, answers: Answers) -> None:
    start = time.perf_counter()
    try:
        # By hand: schemathesis itself asks again where a connection breaks, and reads only the beginning of streams.
        response = session.request(**case.as_transport_kwargs(base_url=url), timeout=HANG_SECONDS)
    except requests.RequestException as error:
        answers.statuses[0] += 1
        answers.faults.append(f"{case.method} {case.path}: {type(error).__name__}: {error}")
        return
    answers.slowest = max(answers.slowest, time.perf_counter() - start)
    answers.statuses[response.status_code] += 1
    if (fault := _fault(response)) is not None:
        asked = f"{case.method} {case.path} {str(response.request.body)[:2000]}"
        answers.faults.append(f"{fault}: {asked}: {response.text[:300]} … {response.text[-300:]}")
    answers.streams += response.status_code == 200 and _is_stream(response)


def _fault(response: requests.Response) -> str | None:
    if response.status_code >= 500 and response.status_code != 503:
        return f"status {response.status_code}"
    if response.status_code >= 400:
        return None if _is_error(response.text) else "an error of another shape"
    if _is_stream(response):
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        if any(event.startswith('{"error"') for event in events):
            return "an error in a stream"
        if not events or not (events[-1] == "[DONE]" or any(end in events[-1] for end in _ENDS)):
            return "a stream without an end"
    return None


def _is_stream(response: requests.Response) -> bool:
    return response.headers.get("content-type", "").startswith("text/event-stream")


def _is_error(text: str) -> bool:
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(error, dict) and set(error) == ERROR_FIELDS and isinstance(error["message"], str)
