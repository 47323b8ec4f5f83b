"""An answer's text as messages: as it is, or with the calls of tools that are found in it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesaic.engine.request import FinishReason
from moesaic.errors import UsageError
from moesaic.server.context import Context
from moesaic.server.errors import ApiError, refuse
from moesaic.server.sampling import build_constraints
from moesaic.server.schemas import Tool
from moesaic.server.tool_calls import Pieces, ToolCallParser, read_tools
from moesaic.server.tool_grammars import tool_constraint

if TYPE_CHECKING:
    from moesaic.engine.constraint import Constraint


class Tools:
    """What tools a request offers, and whether one has to be called.

    `choice` is none, auto, required or, with `named`, the name of a tool. Raises ApiError where they cannot be used.
    """

    def __init__(
        self, context: Context, tools: Sequence[Tool], choice: str | None, parallel: bool | None, *, named: bool = False
    ) -> None:
        self._parallel = parallel is not False
        self._choice = choice or "auto"
        self.offered = bool(tools) and (named or choice != "none")
        self.forced = self.offered and (named or choice == "required")
        if not tools and (named or choice == "required"):
            raise refuse("tool_choice", "it asks for a call, and there are no tools; send some")
        self.visible_ids: Sequence[int] = ()
        if not self.offered:
            return
        form = context.tool_form
        if form is None:
            raise refuse("tools", "the chat template of this model has no place for tools; leave them out")
        self._form = form
        try:
            self._tools = read_tools([tool.model_dump() for tool in tools])
        except UsageError as error:
            raise ApiError(400, str(error), param="tools") from None
        if named and choice not in {tool.name for tool in self._tools}:
            raise refuse("tool_choice", f"there is no tool {self._choice[:100]!r}; choose one that is sent in tools")
        self.visible_ids = context.tool_ids

    def reply(self) -> "Reply":
        """A new one for each text."""
        return Reply(ToolCallParser(self._form, self._tools), self._parallel) if self.offered else Reply()

    async def constraints(self, context: Context, count: int) -> "list[Constraint | None]":
        """One for each text; only where a call is forced."""
        return await build_constraints(
            context,
            "tools",
            lambda compiler: tool_constraint(
                self._tools, self._choice, self._form, compiler, parallel=self._parallel
            ),
            count,
        )  # fmt: skip


class Reply:
    """One text on its way to the client, as parts of OpenAI's messages."""

    def __init__(self, parser: ToolCallParser | None = None, parallel: bool = True) -> None:
        self._parser, self._parallel = parser, parallel
        self._called = False

    def push(self, text: str) -> list[dict[str, Any]]:
        """What became certain, as deltas of a message."""
        if self._parser is None:
            return [{"content": text}] if text else []
        return self._deltas(self._parser.push(text)) if text else []

    def finish(self) -> list[dict[str, Any]]:
        """What was held back."""
        return self._deltas(self._parser.flush()) if self._parser is not None else []

    def whole(self, text: str) -> dict[str, Any]:
        """The message of a text that is complete."""
        deltas = [*self.push(text), *self.finish()]
        content = "".join(delta.get("content", "") for delta in deltas)
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        for call in calls:
            del call["index"]
        return {"content": content or None, "tool_calls": calls} if calls else {"content": content}

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        return "tool_calls" if self._called and reason == "stop" else reason

    def _deltas(self, pieces: Pieces) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = [{"content": pieces.content}] if pieces.content else []
        for call in pieces.calls:
            if self._parallel or not self._called:
                deltas.append({"tool_calls": [call.delta()]})
            self._called = True
        return deltas
