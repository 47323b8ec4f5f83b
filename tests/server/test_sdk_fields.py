"""Every parameter that openai-python documents is taken, or refused by name; what changes nothing here is taken."""

from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseParams

from .helpers import NAME, Running, error_of

PLAIN: dict[str, Any] = {
    "frequency_penalty": 0, "logit_bias": {"5": 1}, "max_completion_tokens": 2, "max_tokens": 2, "metadata": {"a": "b"},
    "modalities": ["text"], "n": 1, "parallel_tool_calls": True, "prediction": {"type": "content", "content": "guess"},
    "presence_penalty": 0.5, "prompt_cache_key": "k", "prompt_cache_options": {"mode": "auto"}, "best_of": 1,
    "prompt_cache_retention": "24h", "reasoning_effort": "low", "response_format": {"type": "text"}, "suffix": "",
    "safety_identifier": "me", "seed": 3, "service_tier": "auto", "stop": "zz", "store": False, "temperature": 1,
    "stream_options": {"include_usage": True, "include_obfuscation": False}, "tool_choice": "auto", "top_p": 1,
    "user": "me", "verbosity": "low", "background": False, "include": ["reasoning.encrypted_content"], "echo": False,
    "instructions": "be short", "max_output_tokens": 2, "max_tool_calls": 3, "truncation": "disabled", "tools": [],
    "reasoning": {"effort": "low", "summary": "auto"}, "text": {"format": {"type": "text"}, "verbosity": "low"},
    "top_logprobs": 1, "previous_response_id": None, "conversation": None, "audio": None, "functions": None,
}  # fmt: skip
ROUTES: list[tuple[str, type, dict[str, Any]]] = [
    ("/v1/chat/completions", ChatParams, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
    ("/v1/completions", CompletionParams, {"prompt": "a", "max_tokens": 2}),
    ("/v1/responses", ResponseParams, {"input": "a", "max_output_tokens": 2}),
]


@pytest.mark.parametrize(("path", "parameters", "body"), ROUTES)
def test_documented_fields_are_taken_or_refused_by_name(
    server: Running, path: str, parameters: type, body: dict[str, Any]
) -> None:
    names = set(parameters.__annotations__) - set(body)
    for name in sorted(names & set(PLAIN)):
        more = {"logprobs": True} if name == "top_logprobs" and "messages" in body else {}
        answer = server.post(path, {"model": NAME} | body | more | {name: PLAIN[name]})
        assert answer.status_code == 200, (name, answer.text)
    together = {name: PLAIN[name] for name in names & set(PLAIN)} | body
    together |= {"logprobs": True} if "messages" in body else {}
    assert server.post(path, together).status_code == 200
    for name in names - set(PLAIN) - {"model", "logprobs"}:
        assert error_of(server.post(path, body | {name: {"a": "b"}}), 400)["param"].startswith(name)


def test_items_that_come_back_are_taken_as_they_are(server: Running) -> None:
    """A client sends what it got, thoughts of other servers too."""
    said = server.post("/v1/responses", {"input": "a", "max_output_tokens": 2, "reasoning": {"effort": "low"}}).json()
    assert said["reasoning"]["effort"] == "low"
    thoughts = {
        "type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "so"}],
        "content": [{"type": "reasoning_text", "text": "hm"}], "encrypted_content": None, "status": "completed",
    }  # fmt: skip
    asked = [{"role": "user", "content": "a"}, thoughts, *said["output"], {"role": "user", "content": "b"}]
    assert server.post("/v1/responses", {"input": asked, "max_output_tokens": 2}).status_code == 200
    many = {str(number): "x" for number in range(17)}
    assert error_of(server.post("/v1/responses", {"input": "a", "metadata": many}), 400)["param"] == "metadata"
