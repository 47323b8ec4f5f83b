"""What clients may send to /v1/responses. Nothing is kept between requests, so fields that name an earlier one are
refused."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moesaic.server.schemas import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_PARTS,
    Count,
    Harmless,
    Open,
    Probability,
    RoutingFields,
    ServiceFields,
    StreamOptions,
    TemplateVariables,
    TextPart,
)


def _without_thoughts(item: Any) -> Any:
    """Reasoning is for clients to read, whatever it is made of."""
    return {"type": "reasoning"} if isinstance(item, dict) and item.get("type") == "reasoning" else item


class InputItem(Open):
    """A message, a call of a function, or what it gave back; other kinds are refused by name."""

    strip = model_validator(mode="before")(_without_thoughts)
    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None


class ResponseTool(Open):
    """Only functions are tools here; OpenAI's own tools are ignored."""

    type: str
    name: str | None = Field(None, min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Open):
    type: Literal["function"]
    name: str


class TextFormat(Open):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Open):
    format: TextFormat | None = None
    verbosity: Harmless = None


class Reasoning(Open):
    effort: Annotated[str, Field(max_length=32)] | None = None


class ResponseRequest(ServiceFields, RoutingFields):
    """POST /v1/responses."""

    input: str | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: Annotated[list[str], Field(max_length=32)] | None = None
    """`message.output_text.logprobs` adds them; all else would have nothing to add."""
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    """Which is told back."""
    max_tool_calls: Count | None = None
    chat_template_kwargs: TemplateVariables | None = None
