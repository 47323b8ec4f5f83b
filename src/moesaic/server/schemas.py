"""What clients may send: OpenAI's fields, and those of vLLM and SGLang that this server knows. Null means not given."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_CHOICES = 16
MAX_STOPS = 16
"""OpenAI takes 4; tasks of lm-evaluation-harness have up to 7."""
MAX_LOGPROBS = 20
MAX_PROMPTS = 256
MAX_PARTS = 4096
"""Pieces of one message's text."""
MAX_TOOLS = 128
MAX_BIASES = 1024
MAX_MESSAGES = 16384

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Harmless = Any | None


class Body(BaseModel):
    """No field is ignored that could change the answer: unknown ones are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Open(BaseModel):
    """Parts of requests that may grow fields which do not matter here."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class ServiceFields(Body):
    """Fields of OpenAI's service that change nothing where there is no such service."""

    model: str | None = Field(None, max_length=1000)
    user: Harmless = None
    metadata: Harmless = None
    store: Harmless = None
    service_tier: Harmless = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_options: Harmless = None
    prompt_cache_retention: Harmless = None
    verbosity: Harmless = None


class StructuredOutputs(Body):
    """vLLM's extra: what the text must be; exactly one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    """A JSON schema."""
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=1024)
    grammar: str | None = None
    json_object: bool | None = None


def _few_biases(biases: Any) -> Any:
    """Counted before each is looked at."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"it has {len(biases):,} tokens; at most {MAX_BIASES:,} are accepted")
    return biases


Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingFields(Body):
    """How texts are drawn, where OpenAI's and vLLM's names for it are the same in chats and completions."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1 keep all tokens."""
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_few_biases)] | None = None
    """Keys are token ids."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None


class StreamOptions(Open):
    include_usage: bool | None = None
    continuous_usage_stats: Harmless = None
    include_obfuscation: Harmless = None


class RoutingFields(Body):
    """SGLang's extra."""

    return_routed_experts: bool | None = None
    routed_experts_start_len: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """Leave out those of so many tokens at the beginning."""


class GenerationFields(ServiceFields, SamplingFields, RoutingFields):
    """What chats and completions share."""

    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Only as `n`."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: str | None = None
    add_special_tokens: bool | None = None


class JsonSchema(Open):
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Open):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)
        ]
    )
    """A text, token ids, or several of either."""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Literal[""] | None = None
    """Nothing is written before a given end."""
    response_format: ResponseFormat | None = None


class TextPart(Open):
    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Open):
    name: str = Field(max_length=256)
    arguments: str


class ToolCall(Open):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Open):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Open):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Open):
    type: Literal["function"]
    function: Function


class FunctionName(Open):
    name: str


class NamedTool(Open):
    type: Literal["function"]
    function: FunctionName


Plain = str | int | float | bool | None
TemplateVariables = Annotated[dict[str, Plain], Field(max_length=32)]
"""Flat, so that no template has to work on something large."""


class PromptFields(Body):
    """How a chat becomes a prompt."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None


class ChatRequest(GenerationFields, PromptFields):
    """POST /v1/chat/completions."""

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    """A variable of the chat template, if it knows one of this name."""
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, max_length=4)] | None = None
    prediction: Harmless = None
    """A guess of the answer, which would only make it faster."""


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES
    )
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
