"""What kind of text a token is, from its bytes alone."""

import re
from collections.abc import Mapping

import numpy as np

TOKEN_TYPES = (
    "space + letters", "letters", "digits", "punctuation", "space", "line break", "part of a character", "mixed",
    "special",
)  # fmt: skip
_SPECIAL = re.compile(rb"<\|.*\|>|</?s>|<(?:pad|unk|bos|eos|mask)>")


def token_type(token: bytes) -> int:
    """A position in TOKEN_TYPES. Names such as `<|endoftext|>` and `</s>` are special, and so is nothing at all."""
    return TOKEN_TYPES.index(_name(token))


def types_of(token_ids: np.ndarray, vocabulary: Mapping[int, bytes]) -> np.ndarray:
    """(T,) ids -> (T,) positions in TOKEN_TYPES, int64; ids without bytes are special."""
    ids, inverse_T = np.unique(token_ids, return_inverse=True)
    types = np.array([token_type(vocabulary.get(int(token_id), b"")) for token_id in ids], np.int64)
    return types[inverse_T]


def _name(token: bytes) -> str:
    if not token or _SPECIAL.fullmatch(token):
        return "special"
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return "part of a character"
    if text.isspace():
        return "line break" if "\n" in text or "\r" in text else "space"
    word = text.strip()
    if word.isalpha():
        return "space + letters" if text[0].isspace() else "letters"
    if word.isnumeric():
        return "digits"
    return "mixed" if any(character.isalnum() for character in word) else "punctuation"
