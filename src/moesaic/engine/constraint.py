"""Text that has to be JSON, or follow a schema, a regular expression or a grammar: which tokens may come next.

llguidance does the work (imported when first needed). Grammars come from strangers, so they are bounded: in length
here, in what compiling may cost by `grammar_process`, and for each token by the limits of the library and a budget of
processor time.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from moesaic.engine.grammar_process import GrammarProcess, lexicon, limits
from moesaic.errors import MoesaicError, UsageError
from moesaic.ops.device import resident_bytes
from moesaic.tokenizer import Tokenizer, byte_alphabet

MAX_GRAMMAR = 2**18
"""Characters of a schema, regular expression, grammar or list of choices."""
MAX_CHOICES = 10_000

_SPECIAL = b"\xff"
"""Begins the bytes of what is no text but a token of its own; no UTF-8 text has this byte."""
_START_SECONDS, _TOKEN_SECONDS = 1.0, 0.02
"""Processor time that all masks of a text may take: so much, and so much more for each token."""
_MAX_MEMORY = 2**27
"""What a text may add to the memory of the program, with all that its grammar remembers of it."""
_SLOW_SECONDS = 0.001
"""A mask that takes longer may also take memory, which is looked at from then on."""
_MAX_MESSAGE = 300
# Masks alone decide: tokens that a grammar leaves no choice of are not computed ahead, which for long constants would
# take the square of their length.
_NO_FORCING = '%llguidance {"no_forcing": true}'
# One space, or a new line and an indentation. Without a bound a model can write spaces until it is cut off.
_JSON_OPTIONS = {"whitespace_pattern": r" |\n[ \t]{0,64}"}

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BIAS = np.where(_BITS == 1, np.float32(0), np.float32(-np.inf))
"""For each byte of a bit mask what it adds to eight logits."""


class Constraint(Protocol):
    """What one text has to be; used by one thread at a time."""

    @property
    def finished(self) -> bool:
        """Nothing more is allowed, only the end."""
        ...

    def mask(self, bias_V: torch.Tensor) -> None:
        """Writes -inf into `bias_V`, float32 (V,), where a token is not allowed next, and touches nothing else.

        Raises MoesaicError when that takes too much.
        """
        ...

    def accept(self, token_id: int) -> None:
        """The text goes on with this token. Raises MoesaicError when that is not allowed, or takes too much."""
        ...


class ConstraintCompiler:
    """Makes constraints for one tokenizer and model. Safe for threads.

    A new grammar is compiled twice, first in a process of its own: usually in a few milliseconds, at worst in some
    four seconds, so call it from a thread that may wait. All methods raise UsageError with the reason where a grammar
    is wrong, matches no text, or takes too much time or memory.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(sorted({token_id for token_id in eos_ids if 0 <= token_id < vocab_size}))
        self._lock = threading.Lock()
        self._prepared: tuple[Any, GrammarProcess] | None = None

    def json_object(self) -> "GrammarConstraint":
        """Any JSON object."""
        return self._compile(_json_grammar({"type": "object"}), "json_object", check=False)

    def json_schema(self, schema: dict[str, Any]) -> "GrammarConstraint":
        """JSON that the schema allows, with properties in the order of the schema."""
        if not isinstance(schema, dict):
            raise UsageError(f"a JSON schema is a {type(schema).__name__}; it must be an object")
        return self._compile(_json_grammar(schema), "the JSON schema")

    def regex(self, pattern: str) -> "GrammarConstraint":
        """Text that matches the pattern as a whole; Rust's syntax, without look-around and references."""
        _require_text(pattern, "the regular expression")
        return self._compile(f"start: {regex_rule(pattern)}\n{_NO_FORCING}", "the regular expression")

    def grammar(self, text: str, what: str = "the grammar") -> "GrammarConstraint":
        """Text of a Lark grammar, in llguidance's dialect; it begins with the rule `start`. Errors call it `what`."""
        _require_text(text, what)
        if text.lstrip().startswith("{"):
            raise UsageError(f"{what} is JSON; write it in Lark's syntax, such as: start: /[a-z]+/")
        return self._compile(f"{text}\n{_NO_FORCING}", what)

    def choice(self, choices: list[str]) -> "GrammarConstraint":
        """One of these texts."""
        if not choices or not all(isinstance(text, str) and text for text in choices):
            raise UsageError("choices must be a list of texts that are not empty, one at least")
        if len(choices) > MAX_CHOICES:
            raise UsageError(f"there are {len(choices):,} choices, and at most {MAX_CHOICES:,} are accepted")
        literals = " | ".join(map(literal, choices))
        return self._compile(f"start: CHOICE\nCHOICE: {literals}\n{_NO_FORCING}", "the list of choices")

    def special_id(self, text: str) -> int | None:
        """The id of the special token of this name, which a grammar may refer to as <[id]>."""
        _, process = self._prepare()
        wanted = _SPECIAL + text.encode()
        return next((token_id for token_id, token in process.tokens.items() if token == wanted), None)

    def _compile(self, grammar: str, what: str, check: bool = True) -> "GrammarConstraint":
        if len(grammar) > MAX_GRAMMAR:
            raise UsageError(
                f"{what} has {len(grammar):,} characters, and at most {MAX_GRAMMAR:,} are accepted; make it shorter"
            )
        _require_unicode(grammar, what)
        vocabulary, process = self._prepare()
        if check and (reason := process.verdict(grammar)):
            raise _refusal(what, reason)
        from llguidance import LLMatcher

        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits())
        matcher.compute_bitmask()
        if matcher.is_error():
            raise _refusal(what, matcher.get_error())
        if matcher.is_stopped():
            raise UsageError(f"{what} allows no text that this model can write; change it")
        return GrammarConstraint(matcher, self._vocab_size, self._eos_ids)

    def _prepare(self) -> tuple[Any, GrammarProcess]:
        _prepare_import()
        with self._lock:
            if self._prepared is None:
                tokens, special = token_bytes(self._tokenizer, self._vocab_size, self._eos_ids)
                # The end has an id of its own behind the vocabulary, which stands for all that may end a text.
                self._prepared = (lexicon([*tokens, b""], self._vocab_size), GrammarProcess(special, self._vocab_size))
            return self._prepared


class GrammarConstraint:
    """A Constraint on llguidance's matcher, whose token `vocab_size` is the end."""

    def __init__(self, matcher: Any, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._words = np.zeros(vocab_size // 32 + 1, dtype=np.uint32)  # a bit for each token, and one for the end
        self._bias = np.empty((4 * len(self._words), 8), dtype=np.float32)
        self._tokens = 0
        self._seconds = 0.0
        self._bytes = 0
        self._slow = False
        self._finished = False

    @property
    def finished(self) -> bool:
        return self._finished

    def copy(self) -> "GrammarConstraint":
        """Another one for another text, which has to be the same from here on; used by the same thread."""
        twin = GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._eos_ids)
        twin._finished = self._finished
        return twin

    def mask(self, bias_V: torch.Tensor) -> None:
        started = time.thread_time()
        resident = resident_bytes() if self._slow else 0
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._slow:
            self._bytes += max(0, resident_bytes() - resident)
        seconds = time.thread_time() - started
        self._seconds += seconds
        self._slow = seconds > _SLOW_SECONDS
        self._require_alive()
        np.take(_BIAS, self._words.view(np.uint8), axis=0, out=self._bias, mode="clip")
        bias = self._bias.reshape(-1)
        if bias[self._vocab_size] == 0:
            bias[list(self._eos_ids)] = 0
        bias_V += torch.from_numpy(bias)[: self._vocab_size].to(bias_V.device)

    def accept(self, token_id: int) -> None:
        self._tokens += 1
        if token_id in self._eos_ids and (self._finished or self._matcher.is_accepting()):
            self._finished = True
            return
        if self._finished:
            raise MoesaicError(f"structured output was complete, and token {token_id} came after it")
        started = time.thread_time()
        self._matcher.consume_token(token_id)
        self._seconds += time.thread_time() - started
        self._require_alive()
        self._finished = self._matcher.is_stopped()

    def _require_alive(self) -> None:
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            raise MoesaicError(
                f"structured output failed after {self._tokens:,} tokens: {reason}; simplify its grammar"
            )
        if self._bytes > _MAX_MEMORY:
            raise MoesaicError(
                f"structured output took {self._bytes // 2**20:,} MiB for {self._tokens:,} tokens, and may take "
                f"{_MAX_MEMORY // 2**20} MiB; simplify its grammar"
            )
        allowed = _START_SECONDS + _TOKEN_SECONDS * self._tokens
        if self._seconds > allowed:
            raise MoesaicError(
                f"structured output took {self._seconds:.1f} s of processor time for {self._tokens:,} tokens, and may "
                f"take {allowed:.1f} s; simplify its grammar"
            )


def literal(text: str) -> str:
    """The text as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """JSON of the schema as a part of a rule of a Lark grammar. Raises UsageError when it is no JSON itself."""
    whole = schema if isinstance(schema, Mapping) else {"allOf": [schema]}
    try:
        return "%json " + json.dumps({**whole, "x-guidance": _JSON_OPTIONS}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a JSON schema must be made of JSON values: {error}") from error


def regex_rule(pattern: str) -> str:
    """The regular expression as a part of a rule of a Lark grammar."""
    _prepare_import()
    from llguidance import regex_to_lark

    return "/" + regex_to_lark(pattern.replace("\n", r"\n")) + "/"


def token_bytes(tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> tuple[list[bytes], dict[int, bytes]]:
    """The UTF-8 text of each id below `vocab_size`, and those among them that are special.

    Ids that stand for no text have none, or are special: these begin with a byte that no text has. Raises UsageError
    for tokenizers whose texts are not those of their tokens, one after the other.
    """
    structure = json.loads(tokenizer.to_json())
    to_bytes = _byte_reader(structure.get("decoder"))
    vocabulary = structure["model"]["vocab"]
    entries = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
    tokens = [b""] * vocab_size
    for text, token_id in entries:
        if token_id < vocab_size:
            tokens[token_id] = to_bytes(text)
    special: dict[int, bytes] = {}
    for token in structure["added_tokens"]:
        token_id, content = token["id"], token["content"].encode()
        if token_id >= vocab_size:
            continue
        tokens[token_id] = content
        if token["special"] or token_id in eos_ids:
            tokens[token_id] = special[token_id] = _SPECIAL + content
    for token_id in set(eos_ids) - special.keys():
        tokens[token_id] = b""  # never text, even where it looks like it
    return tokens, special


def _byte_reader(decoder: Mapping[str, Any] | None) -> Any:
    kinds = _decoders(decoder)
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()

        def read(text: str) -> bytes:
            if all(character in alphabet for character in text):
                return bytes(alphabet[character] for character in text)
            return text.encode()

        return read
    if "Metaspace" in kinds or {"Replace", "Fuse"} <= kinds.keys():
        space = kinds.get("Metaspace", {}).get("replacement", "\u2581")
        hexadecimal = "ByteFallback" in kinds

        def read(text: str) -> bytes:
            if hexadecimal and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes.fromhex(text[3:5])
            return text.replace(space, " ").encode()

        return read
    raise UsageError(
        f"structured output needs a byte-level or SentencePiece tokenizer, and this one decodes by "
        f"{', '.join(kinds) or 'nothing'}; leave response_format and tool_choice out"
    )


def _decoders(decoder: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    if decoder is None:
        return {}
    kinds = {decoder["type"]: decoder}
    for inner in decoder.get("decoders", []):
        kinds |= _decoders(inner)
    return kinds


def _json_grammar(schema: Mapping[str, Any]) -> str:
    return f"start: {json_rule(schema)}\n{_NO_FORCING}"


def _require_text(text: str, what: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{what} is empty; write one")
    _require_unicode(text, what)


def _require_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} has a character that cannot be written as UTF-8; remove it") from error


def _prepare_import() -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise UsageError("structured output needs llguidance; install it: pip install 'moesaic[serve]'") from error


def _refusal(what: str, reason: str) -> UsageError:
    return UsageError(f"{what} cannot be used: {_one_line(reason)}; change or simplify it")


def _one_line(message: str) -> str:
    """What the library says, without excerpts, and without where in our own grammar that is."""
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    lines = message.split("\n")
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    for ours in ("failed to compile JSON schema: ", "error: "):
        line = line.partition(ours)[2] or line
    shown = "".join(character if character.isprintable() else " " for character in line)
    return " ".join(shown.split())[:_MAX_MESSAGE].rstrip(".")
