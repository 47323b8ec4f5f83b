"""Clients that people have: OpenAI's package, with all that it checks, and langchain's."""

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

from moesaic.config import EngineConfig

from .helpers import NAME, TEMPLATE, Running, make_tokenizer, serving

KEY = "a-key"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": PARAMETERS}}
MESSAGES: Any = [{"role": "user", "content": "many small experts"}]


class Weather(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a random model would write further fields without end
    sky: Literal["clear", "grey"]
    windy: bool


@pytest.fixture(scope="module")
def tools_server(request: pytest.FixtureRequest) -> Iterator[Running]:
    torch.manual_seed(request.config.option.seed)
    tokenizer = make_tokenizer(TEMPLATE + "{# calls are written in <tool_call> #}")
    with serving(tokenizer=tokenizer, config=EngineConfig(max_model_tokens=2048), api_keys=[KEY]) as running:
        yield running


@pytest.fixture(scope="module")
def client(tools_server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tools_server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "moesaic"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("another")


def test_chats_whole_and_streamed(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=20, temperature=0)
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content != ""
    assert whole.usage is not None
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 20)


def test_sixteen_at_once_asynchronously(tools_server: Running) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{tools_server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model=NAME, messages=[{"role": "user", "content": str(number % 4)}], max_tokens=12, temperature=0,
                    stream=True,
                )  # fmt: skip
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, range(16)))

    texts = asyncio.run(ask())
    assert texts == texts[:4] * 4


def test_calls_of_tools(client: OpenAI) -> None:
    asked: Any = {"model": NAME, "messages": MESSAGES, "tools": [WEATHER], "max_tokens": 300, "temperature": 0}
    named: Any = {"type": "function", "function": {"name": "weather"}}
    choice = client.chat.completions.create(**asked, tool_choice=named).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")

    with client.chat.completions.stream(**asked, tool_choice=named) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed is not None
    assert streamed[0].function.arguments == call.function.arguments

    told = [*MESSAGES, choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "grey"}]
    answer = client.chat.completions.create(**asked | {"messages": told, "max_tokens": 5}, tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "length"


def test_structured_output_as_a_class(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=NAME, messages=MESSAGES, response_format=Weather, max_tokens=200, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_responses_whole_and_streamed(client: OpenAI) -> None:
    asked: Any = {"model": NAME, "input": "many small experts", "max_output_tokens": 20, "temperature": 0}
    whole = client.responses.create(**asked, instructions="be brief", store=False)
    assert whole.status == "incomplete"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 20
    with client.responses.stream(**asked, instructions="be brief") as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip

    parsed = client.responses.parse(model=NAME, input="the sky", text_format=Weather, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Weather)
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    called = client.responses.create(
        **asked | {"max_output_tokens": 300}, tools=[{"type": "web_search"}, tool], tool_choice="required",
        parallel_tool_calls=False,
    )  # fmt: skip
    (item,) = called.output
    assert item.type == "function_call"
    assert item.name == "weather"
    again: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        item.model_dump(),
        {"type": "function_call_output", "call_id": item.call_id, "output": "grey"},
    ]
    assert client.responses.create(**asked | {"input": again}).output_text
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(**asked, previous_response_id=whole.id)


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=["a", "b"], max_tokens=4, logprobs=2, echo=True, n=2)
    assert len(answer.choices) == 4
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].text.startswith("a")


def test_errors_become_the_clients_own(tools_server: Running, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    stranger = OpenAI(base_url=f"{tools_server.url}/v1", api_key="guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.skipif(importlib.util.find_spec("langchain_openai") is None, reason="needs moesaic[clients]")
def test_langchain(tools_server: Running) -> None:
    from langchain_openai import ChatOpenAI  # pyright: ignore[reportMissingImports]

    options: Any = {"base_url": f"{tools_server.url}/v1", "api_key": KEY, "model": NAME, "max_retries": 0}
    model = ChatOpenAI(**options, temperature=0, max_completion_tokens=20)
    whole = model.invoke("many small experts")
    assert "".join(str(chunk.content) for chunk in model.stream("many small experts")) == whole.content != ""
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 20
    longer = ChatOpenAI(**options, temperature=0, max_completion_tokens=300)
    (call,) = longer.bind_tools([WEATHER], tool_choice="weather").invoke("hi").tool_calls  # type: ignore[attr-defined]
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Rome", "Oslo")
    for method in ("json_schema", "function_calling"):
        assert isinstance(longer.with_structured_output(Weather, method=method).invoke("the sky"), Weather)
