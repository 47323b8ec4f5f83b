"""What is asked of the engine, and what comes back, a step's worth at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moesaic.config import SamplingConfig
from moesaic.errors import MoesaicError

if TYPE_CHECKING:
    from moesaic.engine.constraint import Constraint

FinishReason = Literal["stop", "length", "cancelled", "error"]


class OverloadedError(MoesaicError):
    """The queue is full, or the engine takes no more requests; asking again later may help."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to be generated. With the same `sampling` it is the same text, whatever else is computed beside it."""

    prompt_ids: Sequence[int]
    sampling: SamplingConfig
    logprobs: int | None = None
    """Tell each token's log-probability, and those of so many of the most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    routed_experts: bool = False
    """Tell the experts of each token."""
    routed_from: int = 0
    """Of tokens from this number on, counted from the first of the prompt; what is not told may be known already."""
    visible_ids: Sequence[int] = ()
    """Special tokens that are to be seen in the text, such as those around a tool call."""
    new_message: bool = False
    """The text begins a message of its own; otherwise it goes on with the prompt's, with its first space."""
    constraint: "Constraint | None" = None
    """What the text has to be; new for each request."""


@dataclass(frozen=True)
class Logprob:
    """Of a token before temperature, penalties and masks."""

    value: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and theirs, best first."""


@dataclass(frozen=True)
class TokenRouting:
    """The experts that computed one token: experts[layer][k] and weights[layer][k], K of each layer of experts."""

    experts: list[list[int]]
    weights: list[list[float]]


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    logprob: Logprob | None = None
    routing: TokenRouting | None = None
    """Of the pass that read the token before it and chose this one."""


@dataclass(frozen=True)
class PromptReport:
    """What is known of a prompt once it was read."""

    num_tokens: int
    cached_tokens: int
    """Of which keys and values were there already."""
    logprobs: list[Logprob | None] | None = None
    """One for each token; the first has none."""
    routing: list[TokenRouting] | None = None
    """One for each token from `Request.routed_from` on, but the last, which chooses the first generated token."""


@dataclass(frozen=True)
class Delta:
    """What one step added to a text. Text that may become part of a stop string, or of a longer character, comes later
    than its tokens."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    num_told: int = 0
    """So many more of the tokens, from the first on, begin in the text so far. In the end all do, but those behind the
    place where a stop string has cut it."""
    prompt: PromptReport | None = None
    """With the first tokens."""
    finish_reason: FinishReason | None = None
    """`stop`: an end-of-sequence token, a stop string or the end of what a constraint allows; `length`: max_tokens. The
    last delta has one, and no other."""
    error: MoesaicError | None = None
    """Why the reason is `error`."""

    def __add__(self, later: "Delta") -> "Delta":
        """Both as one, for who has not read the first when the other comes."""
        return Delta(
            text=self.text + later.text,
            tokens=self.tokens + later.tokens,
            num_told=self.num_told + later.num_told,
            prompt=self.prompt or later.prompt,
            finish_reason=later.finish_reason,
            error=later.error,
        )


@dataclass
class EngineStatistics:
    """Since the start, and now; a copy that nobody changes."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    """That were computed; cached ones are not, nor what a text that gave way computes again."""
    cached_tokens: int = 0
    """The others of the prompts: each token counts once."""
    generated_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Requests by finish reason."""
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    """By texts that are not finished."""
    step_seconds: float = 0.0
    """Of all steps together."""
    model_seconds: float = 0.0
    """Of these, in the model."""
    expert_load: list[list[int]] = field(default_factory=list)
    """Layers of experts x experts: how many tokens each computed."""
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_seconds: float = 0.0
    """Of the experts on disk, where they are there."""
