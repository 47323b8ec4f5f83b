"""Text to token ids and back: bytes, a BPE trained here, or any tokenizer.json.

One class covers all three, on the `tokenizers` library (imported when first needed). The byte tokenizer is a
byte-level BPE without merges, so what `Tokenizer.save` writes is always a tokenizer.json that transformers reads.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.chat_template import ChatTemplate, named_templates, read_text, template_files
from moesaic.errors import UsageError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
"""Ends every document in the tokenizers made here."""

_KNOWN_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
_MIN_BPE_VOCABULARY = 257
_STANDARD_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONVERTIBLE = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "vocab.json", "vocab.txt",
)  # fmt: skip
"""Files of older kinds of tokenizer, from which transformers makes a tokenizer.json."""
_MAX_TOKEN_ID = 2**22
"""Some ten times the largest vocabulary there is; tables are as long as the largest id."""
_MAX_TOKENIZER_BYTES = 2**28
_MAX_SETTINGS_BYTES = 2**24


class Tokenizer:
    """Ids for text and text for ids, with what a model needs to know about both.

    `settings` is the content of tokenizer_config.json; it names the special tokens and may hold a chat template.
    Raises UsageError where its values have wrong types, and for a vocabulary that is empty or has absurd ids.
    """

    def __init__(self, rust_tokenizer: "tokenizers.Tokenizer", settings: Mapping[str, Any] | None = None) -> None:
        self._rust = rust_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        self._lock = threading.Lock()
        self._settings = dict(settings or {})
        self._vocabulary: dict[str, int] = self._rust.get_vocab(with_added_tokens=True)
        self._structure: dict[str, Any] = json.loads(self._rust.to_str())
        self.vocab_size: int = max(self._vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= _MAX_TOKEN_ID:
            raise UsageError(
                f"tokenizer.json has {len(self._vocabulary):,} tokens with ids up to {self.vocab_size - 1:,}; "
                f"it needs one at least and ids below {_MAX_TOKEN_ID:,}"
            )
        self._special_names = _special_names(self._settings)
        templates = named_templates(self._settings.get("chat_template"))
        self._templates = {name: ChatTemplate(source) for name, source in templates.items()}
        self.eos_id = self._special_id("eos_token") if "eos_token" in self._special_names else self._guess_eos_id()
        self.bos_id = self._special_id("bos_token")

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special_tokens: bool = False) -> list[int]:
        """The ids of `text`.

        By default text is only text: `<|endoftext|>` typed by somebody is thirteen characters. A prompt takes
        `add_special_tokens`, which runs the tokenizer's own template (a leading <s>, say); the output of a chat
        template takes `parse_special_tokens`, which turns the names of special tokens into their ids.
        """
        try:
            text_bytes = text.encode("utf-8")
        except UnicodeEncodeError as error:  # command-line bytes that were not UTF-8 arrive like this
            raise UsageError(f"character {error.start} of the text cannot be written as UTF-8; remove it") from error
        if self._is_bytes and not parse_special_tokens:
            return list(text_bytes)
        with self._lock, _no_ids_refused():  # the flag belongs to the shared Rust object
            self._rust.encode_special_tokens = not parse_special_tokens
            # As a batch of one: unlike `encode` it lets other threads run, and finds no offsets that nobody wants.
            return self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel over the cores."""
        if self._is_bytes:
            return [list(text.encode("utf-8")) for text in texts]
        with self._lock, _no_ids_refused():
            self._rust.encode_special_tokens = True
            return [encoding.ids for encoding in self._rust.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._rust.decode(list(ids), skip_special_tokens=True)

    def decoder(self, after: Sequence[int] = ()) -> "StreamDecoder":
        """A decoder that takes one id at a time, of a text that goes on after the ids `after`."""
        return StreamDecoder(self, after)

    def token_bytes(self) -> list[int]:
        """For each id of the vocabulary how many bytes of UTF-8 text it stands for; 0 for special tokens.

        Exact for byte-level tokenizers. SentencePiece kinds count a word boundary as one space, which is exact but
        for text that their normaliser changes.
        """
        added = {token["id"]: token for token in self._structure.get("added_tokens", [])}
        one_character_one_byte = _uses(self._structure.get("decoder"), "ByteLevel")
        sizes = [0] * self.vocab_size
        for token, token_id in self._vocabulary.items():
            if token_id in added:
                sizes[token_id] = 0 if added[token_id]["special"] else len(token.encode("utf-8"))
            elif one_character_one_byte:
                sizes[token_id] = len(token)
            elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
                sizes[token_id] = 1
            else:
                sizes[token_id] = len(token.removeprefix("##").replace("\u2581", " ").encode("utf-8"))
        return sizes

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
        directory.mkdir(parents=True, exist_ok=True)
        # Not the library's own save, which raises bare Exception on a full disk.
        (directory / "tokenizer.json").write_text(self._rust.to_str(pretty=True), encoding="utf-8")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.eos_id is not None:
            settings["eos_token"] = self._rust.id_to_token(self.eos_id)
        text = json.dumps(settings | self._settings, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def to_json(self) -> str:
        """The tokenizer.json text: two tokenizers are the same when these are equal."""
        return self._rust.to_str()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides its ids: two tokenizers with equal fingerprints are the same."""
        return hashlib.sha256(f"{self.to_json()}\n{self.eos_id} {self.bos_id}".encode()).hexdigest()

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._templates

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """One text from `messages` with keys `role` and `content`, ready for the assistant's answer.

        Uses the chat template that came with the tokenizer, in a process where it can do no harm: the one named
        tool_use, if there is one and `tools` are given, else the default one. Without one, plain `role: content` lines.
        `variables` are further ones that a template knows, such as enable_thinking; all values are JSON values.

        Raises UsageError when the template is broken, refuses the messages, or takes too much time or memory.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            return _plain_lines(messages) + ("assistant:" if add_generation_prompt else "")
        given = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        # Programs write content=None or tool_calls=None where there is none; templates look for a missing key.
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return self._templates[name].render(self._special_names | variables | given | {"messages": present})

    @property
    def tool_template(self) -> str:
        """The source of the chat template that renders `tools`; empty without one."""
        templates = named_templates(self._settings.get("chat_template"))
        return templates.get("tool_use") or templates.get("default", "")

    def name_of(self, token_id: int) -> str:
        """As the vocabulary has it. Raises UsageError where there is no such token."""
        name = self._rust.id_to_token(token_id)
        if name is None:
            raise UsageError(f"the tokenizer has no token {token_id}; it has ids below {self.vocab_size}")
        return name

    def special_id(self, name: str) -> int | None:
        """Of the special token that is called so; None where there is none."""
        added = self._structure.get("added_tokens", [])
        return next((token["id"] for token in added if token["special"] and token["content"] == name), None)

    @functools.cached_property
    def _is_bytes(self) -> bool:
        """Whether id b is byte b for all 256 of them, with nothing to merge: then encoding needs no library."""
        model = self._structure["model"]
        only_special_added = all(token["special"] for token in self._structure["added_tokens"])
        only_bytes = model["type"] == "BPE" and not model["merges"] and model["vocab"] == byte_alphabet()
        alone = self._structure["normalizer"] is None and self._structure["post_processor"] is None
        return only_bytes and only_special_added and alone

    def _special_id(self, role: str) -> int | None:
        return self._vocabulary.get(self._special_names.get(role, ""))

    def _guess_eos_id(self) -> int | None:
        """A bare tokenizer.json does not say which token ends a text; the usual names do."""
        specials = {token["content"]: token["id"] for token in self._structure["added_tokens"] if token["special"]}
        return next((specials[name] for name in _KNOWN_EOS if name in specials), None)


class StreamDecoder:
    """Text as ids arrive. Text that later bytes may still change is held back until it is whole.

    The pieces of `push` and the last one of `flush` add up to `decode` of all ids; where byte tokens of a SentencePiece
    tokenizer are not UTF-8, only the number of U+FFFD may differ. After other ids: to what those do not have
    alone, the first space too.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        last = list(after[-64:])  # more than the special tokens that may stand before a text
        if len(after) > len(last):  # from a whole character on: after a part of one, some decoders see none at all
            last = next((last[i:] for i in range(4) if not tokenizer.decode(last[i:]).startswith("\ufffd")), last)
        self._context, self._pending, self._goes_on = last, list[int](), bool(last)

    def push(self, token_id: int) -> str:
        """The text that became certain with this id, often one token's, sometimes empty."""
        self._pending.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # an incomplete character decodes to U+FFFD
            return ""
        self._context = self._context + self._pending if self._goes_on else self._pending
        self._pending, self._goes_on = [], False
        return text

    def flush(self) -> str:
        """What is still held back, when no more ids come."""
        text = self._new_text()
        self._context, self._pending, self._goes_on = [], [], False
        return text

    def _new_text(self) -> str:
        """Decoded after the piece before it, since some tokenizers drop the first space of a text."""
        known = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)
        while self._goes_on and not text.startswith(known):  # a U+FFFD at its end has become a character
            known = known[:-1]
        return text[len(known) :]


def byte_tokenizer() -> Tokenizer:
    """Id b is byte b; id 256 ends a document."""
    import tokenizers

    rust = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_alphabet(), merges=[]))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.add_special_tokens([END_OF_TEXT])
    return Tokenizer(rust)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries, the same for the same texts; id 0 ends a document.

    Little text yields fewer entries, since a pair must occur twice to be merged.
    """
    import tokenizers

    if vocab_size < _MIN_BPE_VOCABULARY:
        raise UsageError(
            f"a BPE of {vocab_size} entries cannot hold the 256 bytes and the end of text; use bpe:512 or more"
        )
    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    rust.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    rust.train_from_iterator(texts, trainer)
    return Tokenizer(rust)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of a directory that holds one, or of a run directory.

    Raises UsageError when there is none or it cannot be read.
    """
    import tokenizers

    file = _find_tokenizer_file(Path(os.path.expanduser(path)))
    text = read_text(file, _MAX_TOKENIZER_BYTES)
    try:
        rust = tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and BaseException where its Rust code panics
        raise UsageError(f"{file} is not a readable tokenizer.json: {error}") from error
    settings_file = file.with_name("tokenizer_config.json")
    settings = _read_settings(settings_file) if settings_file.exists() else {}
    try:
        templates = template_files(file.parent)
        if "default" not in templates:
            templates = named_templates(settings.get("chat_template")) | templates
        if templates:
            named = [{"name": name, "template": template} for name, template in templates.items()]
            settings["chat_template"] = templates["default"] if set(templates) == {"default"} else named
        return Tokenizer(rust, settings)
    except UsageError as error:
        raise UsageError(f"the tokenizer in {file.parent}: {error}") from error


def bpe_size(spec: str) -> int | None:
    """N of a `bpe:N` tokenizer spec, None for any other spec."""
    kind, _, size = spec.partition(":")
    if kind != "bpe":
        return None
    if not size.isdecimal() or int(size) < _MIN_BPE_VOCABULARY:
        raise UsageError(f"tokenizer {spec!r} needs a size of {_MIN_BPE_VOCABULARY} or more; use bpe:2048")
    return int(size)


def tokenizer_vocab_size(spec: str) -> int:
    """Vocabulary size of a `data.tokenizer` value: `bytes`, `bpe:N` or a path."""
    if spec == "bytes":
        return byte_tokenizer().vocab_size
    return bpe_size(spec) or load_tokenizer(spec).vocab_size


def _find_tokenizer_file(path: Path) -> Path:
    candidates = [path] if path.is_file() else [path / "tokenizer.json", path / "data" / "tokenizer.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    other = next((name for name in _CONVERTIBLE if (path / name).is_file()), None)
    if other is not None:
        script = "import sys, transformers as t; d = sys.argv[1]; t.AutoTokenizer.from_pretrained(d).save_pretrained(d)"
        raise UsageError(
            f"{path} has {other} but no tokenizer.json, the one form that is read; make it of the other with: "
            f"pip install transformers sentencepiece && python -c {shlex.quote(script)} {shlex.quote(str(path))}"
        )
    if path.is_dir():
        raise UsageError(f"{path} holds no tokenizer.json; copy there the one that belongs to the model")
    raise UsageError(f"no tokenizer at {path}; name `bytes`, `bpe:2048`, a tokenizer.json or a directory with one")


def _read_settings(file: Path) -> dict[str, Any]:
    text = read_text(file, _MAX_SETTINGS_BYTES)
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON: {error}; download it again") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{file} is not a JSON object but a {type(settings).__name__}; download it again")
    return settings


def _special_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Role and text of each special token: bos_token, eos_token ..., and those of this tokenizer alone."""
    own = settings.get("extra_special_tokens")
    roles = {key: value for key, value in settings.items() if key.endswith("_token") and not isinstance(value, bool)}
    names: dict[str, str] = {}
    for role, value in (roles | (own if isinstance(own, dict) else {})).items():
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            names[role] = name
        elif value is not None and role in _STANDARD_ROLES:
            raise UsageError(
                f"tokenizer_config.json: {role} is {value!r:.100}; it must be a text, or an object with one"
            )
    return names


def _plain_lines(messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)
    except KeyError as error:
        raise UsageError(f"a chat message has no {error}; it needs role and content") from error


@contextlib.contextmanager
def _no_ids_refused() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises bare Exception, for a word without an id, say
        raise UsageError(f"the tokenizer has no ids for a text: {error}") from error


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: each byte as one printable character, in byte order. Do not change the result."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins: Iterator[int] = iter(range(256, 512))
    return {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}


def _uses(decoder: Mapping[str, Any] | None, kind: str) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == kind or any(_uses(inner, kind) for inner in decoder.get("decoders", []))
