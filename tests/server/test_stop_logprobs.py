"""Log-probabilities end where a stop string has cut the text, in every form of answer; usage counts all tokens."""

from typing import Any

import pytest

from .helpers import Running, data_events

ASKED = {"temperature": 1.0, "seed": 5, "ignore_eos": True, "logit_bias": {str(byte): 100 for byte in range(97, 101)}}
"""Letters from a to d, one a token."""


def completion(server: Running, stream: bool, **fields: Any) -> tuple[str, list[str], list[int], int]:
    """Text, tokens with log-probabilities, their offsets, and the number of tokens generated."""
    asked = ASKED | {"max_tokens": 40, "logprobs": 2, "stream": stream} | fields
    if not stream:
        answer = server.complete("x", **asked).json()
        choice = answer["choices"][0]
        told = choice["logprobs"]
        return choice["text"], told["tokens"], told["text_offset"], answer["usage"]["completion_tokens"]
    *chunks, last, _ = data_events(server.complete("x", stream_options={"include_usage": True}, **asked).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    return "".join(choice["text"] for choice in choices), tokens, offsets, last["usage"]["completion_tokens"]


def chat(server: Running, stream: bool, **fields: Any) -> tuple[str, list[str], int]:
    asked = ASKED | {"max_tokens": 40, "logprobs": True, "top_logprobs": 1, "stream": stream} | fields
    if not stream:
        answer = server.chat("x", **asked).json()
        choice = answer["choices"][0]
        tokens = [each["token"] for each in choice["logprobs"]["content"]]
        return choice["message"]["content"], tokens, answer["usage"]["completion_tokens"]
    *chunks, last, _ = data_events(server.chat("x", stream_options={"include_usage": True}, **asked).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    tokens = [each["token"] for choice in choices for each in (choice["logprobs"] or {}).get("content", [])]
    return text, tokens, last["usage"]["completion_tokens"]


def response(server: Running, stream: bool, **fields: Any) -> tuple[str, list[str], int]:
    asked = {"input": "x", "temperature": 1.0, "seed": 5, "ignore_eos": True, "max_output_tokens": 40}
    answer = server.post("/v1/responses", asked | {"top_logprobs": 1, "stream": stream} | fields)
    whole = data_events(answer.text)[-1]["response"] if stream else answer.json()
    part = whole["output"][0]["content"][0]
    return part["text"], [each["token"] for each in part["logprobs"]], whole["usage"]["output_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_behind_a_stop_string_have_no_log_probabilities(server: Running, stream: bool) -> None:
    text, tokens, offsets, count = completion(server, stream)
    assert (len(text), len(tokens), count) == (40, 40, 40)
    assert offsets == list(range(40))
    said, _, _ = chat(server, stream)
    for start in (0, 7):
        stop = text[start : start + 4]
        cut = text.index(stop)
        assert completion(server, stream, stop=[stop, "never"]) == (
            text[:cut], list(text[:cut]), list(range(cut)), cut + 4,
        )  # fmt: skip
        stop = said[start : start + 4]
        cut = said.index(stop)
        assert chat(server, stream, stop=stop) == (said[:cut], list(said[:cut]), cut + 4)


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_stop_string_every_token_is_told(server: Running, stream: bool) -> None:
    """Bytes that are no whole characters too, also at the end of the text."""
    bias = {"logit_bias": {str(byte): 100 for byte in (0xE2, 0x82, 0xAC, 97)}, "stop": "never"}
    for seed in range(4):
        _, tokens, _, count = completion(server, stream, **bias, seed=seed)
        assert len(tokens) == count == 40
        _, tokens, count = chat(server, stream, **bias, seed=seed)
        assert len(tokens) == count == 40
        _, tokens, count = response(server, stream, seed=seed)
        assert len(tokens) == count == 40


def test_streams_tell_a_token_no_later_than_its_text(server: Running) -> None:
    asked = ASKED | {"max_tokens": 40, "logprobs": 0, "stream": True, "stop": "abcdabcdabcd"}
    chunks = data_events(server.complete("x", **asked).text)[:-1]
    text, tokens = "", ""
    for chunk in chunks:
        text += chunk["choices"][0]["text"]
        tokens += "".join(chunk["choices"][0]["logprobs"]["tokens"])
        assert tokens == text
        assert chunk["choices"][0]["logprobs"]["tokens"] or chunk["choices"][0]["finish_reason"]
    assert len(text) > 20
