"""Chat templates: programs that come with downloaded models, run where they can do no harm.

A template is Jinja code of somebody unknown. jinja2's sandbox keeps it from reaching Python, but not from running for
hours or filling the memory. So it is rendered by a process of its own (this file, run as a program), which has limits
of memory and time, an empty environment and one pipe in and one out; a template that is late loses its process.
Where the system has no limit on the memory of a process (not Linux), only the time is limited.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from moesaic.caged_process import ask_caged, close_pipes, end_caged, start_caged
from moesaic.errors import MoesaicError, UsageError

MAX_SECONDS = 5.0
MAX_MEMORY = 512 * 2**20
MAX_TEMPLATE = 2**20
"""Characters of a template; published ones have at most some ten thousand."""
MAX_TEXT = 2**24
"""Characters of what a template may write, several times the longest context of a model."""

_START_SECONDS = 60.0
_MAX_REPLY = 8 * MAX_TEXT  # bytes: every character may take four, or six where JSON escapes it
_MAX_MESSAGE = 300


class ChatTemplate:
    """One template and, from its first use on, the process that renders it.

    Safe for threads, which take turns, and across a fork, after which the child starts a process of its own. The
    process ends with this object, and with this program however that ends.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise UsageError(
                f"the chat template has {len(source):,} characters, and at most {MAX_TEMPLATE:,} are accepted; "
                "replace it with a shorter chat_template.jinja"
            )
        self._source = source
        self._begin_anew()
        if hasattr(os, "register_at_fork"):  # everywhere but on Windows
            this = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: (template := this()) and template._leave_to_parent())

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for `variables`, which must be JSON values. The first call takes a tenth of a second longer.

        Raises UsageError when they are not, and when the template is broken, refuses them, takes longer than 5 s, needs
        more than 512 MiB, or writes more than 16 million characters.
        """
        try:
            request = json.dumps(dict(variables))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"chat messages and template variables must be JSON values: {error}") from error
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                reply = self._ask(request)
            except BaseException:  # an answer that comes later would be taken for that of the next call
                self._stop()
                raise
        if "error" in reply:
            raise _failure(reply["error"])
        return reply["text"]

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], object] = lambda: None

    def _leave_to_parent(self) -> None:
        """In a forked child: what was inherited belongs to the parent, which may be in the middle of a call."""
        if self._process is not None:
            self._stop.detach()  # type: ignore[attr-defined]
            close_pipes(self._process)
            self._process.returncode = 0  # not a child of this process: never waited for, never signalled
        self._begin_anew()

    def _start(self) -> None:
        self._stop()
        process = start_caged("moesaic.chat_template")
        self._process, self._stop = process, weakref.finalize(self, end_caged, process)
        try:
            _exchange(process, json.dumps(MAX_SECONDS), _START_SECONDS)
        except UsageError as error:
            command = f"{sys.executable} -m moesaic.chat_template"
            raise MoesaicError(
                f"chat templates cannot be rendered, because {command} does not start; try it"
            ) from error
        reply = self._ask(json.dumps(self._source))
        if "error" in reply:
            raise _failure(reply["error"])

    def _ask(self, request: str) -> dict[str, str]:
        assert self._process is not None
        return _exchange(self._process, request, MAX_SECONDS)


def named_templates(value: object) -> dict[str, str]:
    """Templates by name from the `chat_template` of a tokenizer_config.json: one text, or a list of named ones.

    Raises UsageError for anything else.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    templates: dict[str, str] = {}
    for entry in value if isinstance(value, list) else [value]:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise UsageError("chat_template is neither a text nor a list of objects with the texts name and template")
        templates[name] = template
    return templates


def template_files(directory: Path) -> dict[str, str]:
    """Templates by name from chat_template.jinja, which is "default", and additional_chat_templates/NAME.jinja."""
    files = {file.stem: file for file in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    return {name: read_text(file, 4 * MAX_TEMPLATE) for name, file in files.items()}


def read_text(file: Path, max_bytes: int) -> str:
    """The text of a UTF-8 file. Raises UsageError, naming it, when it is too large or not that."""
    try:
        if not file.is_file():
            raise UsageError(f"{file} is not a file; remove it")
        if (size := file.stat().st_size) > max_bytes:
            raise UsageError(f"{file} has {size:,} bytes; a file of this kind has at most {max_bytes:,}")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 at byte {error.start}; download it again") from error
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error


def _exchange(process: "subprocess.Popen[bytes]", request: str, seconds: float) -> dict[str, str]:
    """One line to the process and its answer, one line too. Raises UsageError when there is none in time."""
    answer, late = ask_caged(process, request, seconds, _MAX_REPLY)
    if late:
        raise _failure(f"it took longer than {seconds:g} s")
    if answer is None:
        raise _failure(f"it made its process end, which may use {MAX_MEMORY // 2**20} MiB of memory")
    return json.loads(answer.decode("utf-8", "surrogatepass"))


def _failure(reason: str) -> UsageError:
    shown = "".join(character if character.isprintable() else " " for character in reason)
    shown = " ".join(shown.split())[:_MAX_MESSAGE].rstrip(".")
    return UsageError(
        f"the chat template of this tokenizer failed: {shown}; "
        "change the messages, or mend or replace its chat_template.jinja"
    )


def _serve() -> None:
    """The program of the process: a line with MAX_SECONDS, one with the template, then variables for each text."""
    environment = _environment()
    _limit_process()
    requests = map(json.loads, sys.stdin.buffer)
    seconds = next(requests)
    _reply("", None)
    template, error = _attempt(seconds, environment.from_string, next(requests))
    _reply("", error)
    for variables in requests:
        _reply(*_attempt(seconds, _render, template, variables))


def _reply(text: str, error: str | None) -> None:
    line = json.dumps({"text": text} if error is None else {"error": error}, ensure_ascii=False) + "\n"
    sys.stdout.buffer.write(line.encode("utf-8", "surrogatepass"))
    sys.stdout.buffer.flush()


def _attempt(seconds: float, work: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """What `work` returns and None, or "" and why it does not."""
    _allow_processor_time(seconds)
    try:
        return work(*arguments), None
    except MemoryError:
        return "", f"it needs more than {MAX_MEMORY // 2**20} MiB of memory"
    except RecursionError:
        return "", "it is nested too deep"
    except Exception as error:
        return "", str(error)[:MAX_TEMPLATE] or type(error).__name__


def _render(template: Any, variables: Mapping[str, Any]) -> str:
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_TEXT:
            raise ValueError(f"it writes more than {MAX_TEXT:,} characters")
    return "".join(pieces)


def _limit_process() -> None:
    with contextlib.suppress(ImportError):  # Windows has none of these
        import resource

        limits = {"RLIMIT_AS": MAX_MEMORY, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0}
        for name, limit in limits.items():
            with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system has every limit
                resource.setrlimit(getattr(resource, name), (limit, limit))


def _allow_processor_time(seconds: float) -> None:
    """Ends a request even when whoever would end it in time is gone."""
    with contextlib.suppress(ImportError):
        import resource

        total = math.ceil(time.process_time() + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (total, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _environment() -> Any:
    """What templates on the hub are written for: jinja2 with the functions, filters and blocks of transformers."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks text that a model wrote, for training; here it is text like any other."""

        tags = {"generation"}  # noqa: RUF012 (the form that jinja2 asks for)

        def parse(self, parser: Any) -> Scope:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class PublicNamespace(Namespace):
        """Without names that mean something to Python."""

        def __setitem__(self, name: str, value: object) -> None:
            if name.startswith("_"):
                raise TemplateError(f"a namespace may not hold {name}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **values: Any) -> PublicNamespace:
        made = PublicNamespace()
        for name, value in dict(*args, **values).items():
            made[str(name)] = value
        return made

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = namespace
    return environment


if __name__ == "__main__":
    _serve()
