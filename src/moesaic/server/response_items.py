"""What a response of /v1/responses is made of, messages and calls of functions, and the events of their growth."""

import uuid
from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]


class Items:
    """Takes message deltas in the form of chats, and tells events; `output` has the items that are complete."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []
        self._call: int | None = None

    def push(self, deltas: Sequence[dict[str, Any]], logprobs: list[dict[str, Any]]) -> list[Event]:
        events: list[Event] = []
        self._waiting += logprobs  # tokens may come before their text
        for delta in deltas:
            if delta.get("content"):
                events += self._say(delta["content"])
            for call in delta.get("tool_calls") or ():
                events += self._take_call(call)
        return events

    def close(self, status: str) -> list[Event]:
        """Ends the open item, `completed` or `incomplete`; a response without any gets an empty message."""
        events = [] if self._open or self.output else self._begin_message()
        return events + self._complete(status)

    def _say(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != "message":
            events += self._complete() + self._begin_message()
        self._pieces.append(text)
        logprobs, self._waiting = self._waiting, []
        self._logprobs += logprobs
        told = {"type": "response.output_text.delta", **self._place(), "delta": text, "logprobs": logprobs}
        return [*events, told]

    def _begin_message(self) -> list[Event]:
        self._open = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        return [
            self._added(),
            {"type": "response.content_part.added", **self._place(), "part": _text_part("", [])},
        ]

    def _take_call(self, call: dict[str, Any]) -> list[Event]:
        events: list[Event] = []
        function = call.get("function", {})
        if self._call != call["index"]:
            events += self._complete()
            self._call = call["index"]
            self._open = {
                "id": f"fc_{uuid.uuid4().hex}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": call.get("id") or f"call_{uuid.uuid4().hex}",
                "name": function.get("name", ""),
                "arguments": "",
            }
            events.append(self._added())
        if arguments := function.get("arguments"):
            self._pieces.append(arguments)
            place = self._place()
            del place["content_index"]
            events.append({"type": "response.function_call_arguments.delta", **place, "delta": arguments})
        return events

    def _complete(self, status: str = "completed") -> list[Event]:
        item = self._open
        if item is None:
            return []
        text, place = "".join(self._pieces), self._place()
        if item["type"] == "message":
            part = _text_part(text, self._logprobs + self._waiting)
            done = {**item, "status": status, "content": [part]}
            events: list[Event] = [
                {"type": "response.output_text.done", **place, "text": text, "logprobs": self._logprobs},
                {"type": "response.content_part.done", **place, "part": part},
            ]
        else:
            done = {**item, "status": status, "arguments": text}
            del place["content_index"]
            events = [
                {
                    "type": "response.function_call_arguments.done",
                    **place,
                    "name": item["name"],
                    "arguments": text,
                }
            ]
        events.append({"type": "response.output_item.done", "output_index": len(self.output), "item": done})
        self.output.append(done)
        self._open, self._pieces, self._logprobs, self._waiting = None, [], [], []
        return events

    def _added(self) -> Event:
        return {"type": "response.output_item.added", "output_index": len(self.output), "item": dict(self._open or {})}

    def _place(self) -> dict[str, Any]:
        item_id = self._open["id"] if self._open else ""
        return {"item_id": item_id, "output_index": len(self.output), "content_index": 0}


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
