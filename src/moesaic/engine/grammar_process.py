"""Grammars of strangers are compiled here first, in a process that may fail.

llguidance counts what most grammars cost, but a chain of a few thousand references overflows its stack, which would
end this program, and some schemas keep it busy for minutes. So each new grammar is compiled once by a process of its
own (this file, run as a program) that has limits of memory, time and stack; what comes through is safe to compile.
Where the system has no such limits (not Linux), only the time is limited.
"""

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moesaic.caged_process import ask_caged, end_caged, start_caged
from moesaic.errors import MoesaicError

MAX_SECONDS = 2.0
"""Of processor time, for one grammar; a usual one takes milliseconds."""
MAX_MEMORY = 256 * 2**20
"""Beside what the process has before."""

_STACK = 2**20  # threads that compile have at least twice that
_MAX_WAIT = 10.0  # seconds on the clock: a busy machine takes longer than MAX_SECONDS
_START_SECONDS = 60.0
_KEPT_VERDICTS = 1024
_STEPS = 16
_MAX_REPLY = 2**20  # bytes


def limits() -> Any:
    """What a grammar may cost llguidance, at its start and for each token."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=200_000,
        step_max_items=20_000,
        max_lexer_states=100_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def lexicon(tokens: list[bytes], end_id: int) -> Any:
    """llguidance's view of a vocabulary: the bytes of each id, and the one id that ends a text."""
    from llguidance import LLTokenizer

    return LLTokenizer(_Tokens(tokens, end_id))  # type: ignore[arg-type]


class _Tokens:
    """What LLTokenizer asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokens: list[bytes], end_id: int) -> None:
        self.tokens = tokens
        self.eos_token_id = end_id

    def __call__(self, text: str) -> list[int]:
        """Only grammars that force tokens ask for this; each byte's own token is always right."""
        return [self.tokens.index(bytes([byte])) for byte in text.encode()]


class GrammarProcess:
    """The process, from its first use on. Safe for threads, which take turns; it ends with this object.

    `tokens` are those that grammars may name, by id: special ones.
    """

    def __init__(self, tokens: Mapping[int, bytes], vocab_size: int) -> None:
        self.tokens = tokens
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], object] = lambda: None
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    def verdict(self, grammar: str) -> str:
        """Why the grammar cannot be used; empty if it can. What the process said is kept for the next time."""
        key = hashlib.sha256(grammar.encode()).digest()
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
                return self._verdicts[key]
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                verdict = self._ask(json.dumps(grammar), _MAX_WAIT)
            except BaseException:  # an answer that comes later would be taken for that of the next call
                self._stop()
                self._process = None
                raise
            if self._process is not None and self._process.poll() is None:  # else it may be the machine's fault
                self._verdicts[key] = verdict
            if len(self._verdicts) > _KEPT_VERDICTS:
                self._verdicts.popitem(last=False)
            return verdict

    def _start(self) -> None:
        self._stop()
        # Further arenas take address space, which is limited.
        process = start_caged("moesaic.engine.grammar_process", MALLOC_ARENA_MAX="1")
        self._process, self._stop = process, weakref.finalize(self, end_caged, process)
        names = {str(token_id): token.hex() for token_id, token in self.tokens.items()}
        if self._ask(json.dumps({"tokens": names, "vocab_size": self._vocab_size}), _START_SECONDS):
            command = f"{sys.executable} -m moesaic.engine.grammar_process"
            raise MoesaicError(f"grammars cannot be checked, because {command} does not start; try it")

    def _ask(self, request: str, seconds: float) -> str:
        """The answer to one line, one line too, or how the process ended instead."""
        assert self._process is not None
        answer, late = ask_caged(self._process, request, seconds, _MAX_REPLY)
        if answer is not None and not late:
            return json.loads(answer)
        return _ending(self._process.wait(), late)


def _ending(status: int, late: bool) -> str:
    if late or status == -getattr(signal, "SIGPROF", 0):
        return f"it takes longer than {MAX_SECONDS:g} s to compile"
    if status in (-getattr(signal, "SIGSEGV", 0), -getattr(signal, "SIGBUS", 0)):
        return "its parts refer to each other in too long a chain"
    return f"it needs more than {MAX_MEMORY // 2**20} MiB of memory to compile"


def _serve() -> None:
    """The program of the process: a line with the special tokens, then a grammar for each line."""
    requests = map(json.loads, sys.stdin.buffer)
    setup = next(requests)
    tokens = [b""] * setup["vocab_size"]
    for token_id, token in setup["tokens"].items():
        tokens[int(token_id)] = bytes.fromhex(token)
    tokens += [bytes([byte]) for byte in range(256)] + [b""]  # bytes stand for all text
    vocabulary = lexicon(tokens, len(tokens) - 1)
    _limit_process()
    threading.stack_size(_STACK)
    _reply("")
    for grammar in requests:
        verdict: list[str] = []
        worker = threading.Thread(target=lambda grammar=grammar, into=verdict: into.append(_try(vocabulary, grammar)))
        with _limited_time():
            worker.start()
            worker.join()
        _reply(verdict[0] if verdict else "it makes the library fail")


def _reply(text: str) -> None:
    sys.stdout.write(json.dumps(text) + "\n")
    sys.stdout.flush()


def _try(vocabulary: Any, grammar: str) -> str:
    """Compiles, and follows the grammar for a few bytes."""
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits())
    for step in range(_STEPS):
        allowed = matcher.compute_bitmask()
        if matcher.is_error() or matcher.is_stopped():
            break
        ids = [8 * place + bit for place, byte in enumerate(allowed) if byte for bit in range(8) if byte >> bit & 1]
        matcher.consume_token(ids[(7 * step) % len(ids)])
    return matcher.get_error()


def _limit_process() -> None:
    with contextlib.suppress(ImportError, OSError):  # Windows has none of these
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MAX_MEMORY
        for name, limit in {"RLIMIT_AS": memory, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0}.items():
            with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system has every limit
                resource.setrlimit(getattr(resource, name), (limit, limit))


@contextlib.contextmanager
def _limited_time():
    """Ends the process after MAX_SECONDS of processor time, by a signal that nothing in it can miss."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0.0)


if __name__ == "__main__":
    _serve()
