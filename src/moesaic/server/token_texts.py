"""Single tokens as text: what log-probabilities are told for."""

import json
import re
from typing import Any

from moesaic.tokenizer import Tokenizer, byte_alphabet


class TokenTexts:
    """The bytes of each token, also where they are only a part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        structure: dict[str, Any] = json.loads(tokenizer.to_json())
        alphabet = byte_alphabet() if '"ByteLevel"' in json.dumps(structure.get("decoder")) else None
        self._bytes: dict[int, bytes] = {}
        vocabulary = structure["model"]["vocab"]
        # Unigram models list [token, score] in the order of their ids.
        named = (
            vocabulary.items()
            if isinstance(vocabulary, dict)
            else ((entry[0], token_id) for token_id, entry in enumerate(vocabulary))
        )
        for token, token_id in named:
            self._bytes[token_id] = _token_bytes(token, alphabet)
        for token in structure.get("added_tokens", []):
            self._bytes[token["id"]] = token["content"].encode()

    def bytes_of(self, token_id: int) -> bytes:
        """Empty for ids of the model that the tokenizer does not have."""
        return self._bytes.get(token_id, b"")

    def text_of(self, token_id: int) -> str:
        """`bytes:\\xe4` where the token is a part of a character, as OpenAI has it; special tokens by their names."""
        token = self.bytes_of(token_id)
        try:
            return token.decode("utf-8") or ("" if token_id in self._bytes else f"token_id:{token_id}")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _token_bytes(token: str, alphabet: dict[str, int] | None) -> bytes:
    if alphabet is not None and all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.removeprefix("##").replace("\u2581", " ").encode("utf-8", "replace")
