"""Chats over HTTP: what the engine writes, in the form that OpenAI's clients read."""

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.config import SamplingConfig
from moesaic.engine.generate import Generation, stream

from .helpers import CONFIG, NAME, Running, data_events, error_of, make_model, make_tokenizer, serving


def greedy(server: Running, prompt: str, max_tokens: int) -> str:
    generation = Generation(prompt_tokens=0)
    tokenizer = server.service.tokenizer
    ids = tokenizer.encode(prompt, parse_special_tokens=True)
    config = SamplingConfig(max_tokens=max_tokens, temperature=0)
    return "".join(stream(server.service.engine.model, tokenizer, ids, config, generation))


def test_a_chat_is_what_the_model_says_to_the_templates_text(server: Running) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "many"}, {"type": "text", "text": "experts"}]},
    ]
    body = {"model": NAME, "messages": messages, "temperature": 0, "max_completion_tokens": 12, "user": "somebody"}
    answer = server.post("/v1/chat/completions", body).json()
    prompt = "[system]be brief\n[user]many\nexperts\n[assistant]"
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant", "refusal": None, "content": greedy(server, prompt, 12),
    }  # fmt: skip
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "chat.completion"
    assert answer["model"] == NAME
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["total_tokens"] == len(prompt) + 12


def test_a_stream_says_the_same_as_the_whole_answer(server: Running) -> None:
    asked = {"max_tokens": 30, "n": 3, "temperature": 1.0, "seed": 5}
    whole = server.chat(**asked).json()
    response = server.chat(stream=True, stream_options={"include_usage": True}, **asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = data_events(response.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert last["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, choice in enumerate(whole["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(part["delta"].get("content", "") for part in mine) == choice["message"]["content"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert mine[-1]["delta"] == {}
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3


def test_usage_comes_in_streams_only_when_it_is_asked_for(server: Running) -> None:
    *chunks, done = data_events(server.chat(max_tokens=3, stream=True).text)
    assert done == "[DONE]"
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


def test_choice_i_of_a_seed_is_the_choice_of_seed_plus_i(server: Running) -> None:
    asked = {"max_tokens": 20, "temperature": 1.0}
    both = server.chat(n=2, seed=7, **asked).json()["choices"]
    alone = [server.chat(seed=seed, **asked).json()["choices"][0]["message"] for seed in (7, 8)]
    assert [choice["message"] for choice in both] == alone
    unseeded = {server.chat(**asked).json()["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(unseeded) == 3


def test_logprobs_are_those_of_the_model_and_name_bytes_that_are_no_characters(server: Running) -> None:
    answer = server.chat("xyz", max_tokens=6, logprobs=True, top_logprobs=3, seed=1).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    ids = server.service.tokenizer.encode("[user]xyz\n[assistant]")
    for entry in content:
        with torch.inference_mode():
            expected = torch.log_softmax(server.service.engine.model(torch.tensor([ids]))[0, -1].float(), -1)
        (byte,) = entry["bytes"]
        assert entry["logprob"] == pytest.approx(float(expected[byte]), abs=1e-4)
        assert entry["token"] == (chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}")
        top = [(other["bytes"][0] if other["bytes"] else 256, other["logprob"]) for other in entry["top_logprobs"]]
        values = expected.topk(3).values
        assert [logprob for _, logprob in top] == pytest.approx(values.tolist(), abs=1e-4)
        ids.append(byte)
    streamed = data_events(server.chat("xyz", max_tokens=6, logprobs=True, top_logprobs=3, stream=True).text)[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [entry["bytes"] for part in parts if part for entry in part["content"]] == [e["bytes"] for e in content]


def test_routed_experts_cover_prompt_and_answer_but_the_last_token(server: Running) -> None:
    answer = server.chat("route me", max_tokens=5, return_routed_experts=True, logprobs=True).json()
    told = answer["choices"][0]["sgl_ext"]
    content = answer["choices"][0]["logprobs"]["content"]
    ids = server.service.tokenizer.encode("[user]route me\n[assistant]") + [e["bytes"][0] for e in content]
    routings: list = []
    with torch.inference_mode():
        server.service.engine.model(torch.tensor([ids[:-1]]), routings=routings)
    expected = torch.stack([routing.expert_ids.view(-1, 2) for routing in routings], 1)
    experts = np.frombuffer(base64.b64decode(told["routed_experts"]), "<i4").reshape(told["routed_shape"])
    weights = np.frombuffer(base64.b64decode(told["routed_weights"]), "<f4").reshape(told["routed_shape"])
    assert experts.shape == (len(ids) - 1, 2, 2)
    assert np.array_equal(np.sort(experts), np.sort(expected.numpy()))
    assert weights.sum(-1) == pytest.approx(1.0, abs=1e-3)

    later = server.chat("route me", max_tokens=5, return_routed_experts=True, routed_experts_start_len=20).json()
    later_told = later["choices"][0]["sgl_ext"]
    assert later_told["routed_shape"] == [len(ids) - 21, 2, 2]
    assert base64.b64decode(later_told["routed_experts"]) == experts[20:].tobytes()

    chunks = data_events(server.chat("route me", max_tokens=5, return_routed_experts=True, stream=True).text)[:-1]
    parts = [chunk["choices"][0].get("sgl_ext") for chunk in chunks]
    streamed = b"".join(base64.b64decode(part["routed_experts"]) for part in parts if part)
    assert streamed == experts.tobytes()


def test_stop_texts_and_the_end_of_a_sequence_stop(server: Running) -> None:
    whole = server.chat(max_tokens=20).json()["choices"][0]["message"]["content"]
    stop = whole[5:7]
    choice = server.chat(max_tokens=20, stop=[stop, "never written"]).json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"

    first = server.chat(max_tokens=1, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["bytes"][0]
    model = make_model(replace(CONFIG, eos_token_ids=(first,)))
    model.load_state_dict(server.service.engine.model.state_dict())
    with serving(model) as ending:
        choice = ending.chat(max_tokens=5).json()["choices"][0]
        assert choice["message"]["content"] == ""
        assert choice["finish_reason"] == "stop"
        assert ending.chat(max_tokens=5, ignore_eos=True).json()["choices"][0]["finish_reason"] == "length"


def test_without_a_length_an_answer_may_fill_the_context(server: Running) -> None:
    usage = server.chat(ignore_eos=True).json()["usage"]
    assert usage["total_tokens"] == server.service.engine.max_model_tokens == 512


def test_structured_output_is_what_was_asked_for(server: Running) -> None:
    import json

    schema = {
        "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = server.chat(max_tokens=100, n=2, seed=3, temperature=1.0, response_format=form).json()
    for choice in answer["choices"]:
        assert json.loads(choice["message"]["content"]) in ({"a": True}, {"a": False})
        assert choice["finish_reason"] == "stop"
    extras: list[dict[str, Any]] = [{"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}]
    for extra in extras:
        text = server.chat(max_tokens=10, **extra).json()["choices"][0]["message"]["content"]
        assert text in ("yes", "no")
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    assert error_of(server.chat(response_format=wrong), 400)["param"] == "response_format"
    both = server.chat(response_format={"type": "json_object"}, guided_regex="a+")
    assert error_of(both, 400)["param"] == "guided_regex"


def test_template_variables_reach_the_template_and_cannot_replace_its_own() -> None:
    tokenizer = make_tokenizer("{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with serving(tokenizer=tokenizer) as server:
        asked = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"mood": "good"}}
        assert server.post("/tokenize", asked).json()["tokens"] == list(b"gooda")
        for name in ("messages", "tools", "add_generation_prompt", "documents", "__class__.x"):
            response = server.chat(chat_template_kwargs={name: "x"})
            assert error_of(response, 400)["param"] == f"chat_template_kwargs.{name}"
        for variables in ({"a": {"b": 1}}, {"a": "x" * 2000}, {f"a{i}": 1 for i in range(99)}):
            assert error_of(server.chat(chat_template_kwargs=variables), 400)["param"].startswith(
                "chat_template_kwargs"
            )


def test_a_template_that_refuses_is_the_clients_error() -> None:
    with serving(tokenizer=make_tokenizer("{{ raise_exception('roles must alternate') }}")) as server:
        error = error_of(server.chat(), 400)
        assert "roles must alternate" in error["message"]
        assert error["param"] == "messages"
