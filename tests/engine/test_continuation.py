"""Texts that go on after a prompt, against decoding prompt and text together."""

import random

import pytest
import tokenizers
import torch

import moesaic
from moesaic.config import EngineConfig, ModelConfig, SamplingConfig
from moesaic.engine.engine import Engine
from moesaic.engine.generate import Generation, stream
from moesaic.engine.request import Request
from moesaic.engine.text import TextAssembly
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import Tokenizer, byte_tokenizer

from .helpers import run

WORDS = ["\u2581Once", "\u2581upon", "\u2581a", "\u2581time", "s", ".", "\u2581", "é"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BEGIN, END = "<s>", "</s>"


def sentencepiece() -> Tokenizer:
    """As SentencePiece's converters make it: spaces are part of words, other characters are bytes, and the first space
    of a text is dropped when it is decoded."""
    names = ["<unk>", BEGIN, END, *BYTES, *WORDS]
    vocabulary = [(name, -1.0) for name in names]
    rust = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    rust.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(content=" ", left=1),
        ]
    )
    rust.add_special_tokens([BEGIN, END])
    return Tokenizer(rust, {"bos_token": BEGIN, "eos_token": END})


PIECES = sentencepiece()
BYTE_LEVEL = byte_tokenizer()


def random_pieces(count: int) -> list[int]:
    """Words, special tokens, and characters of several bytes that may be cut at their ends."""
    ids: list[int] = []
    while len(ids) < count:
        kind = random.random()
        if kind < 0.1:
            ids.append(random.choice([1, 2]))
        elif kind < 0.5:
            ids += [3 + byte for byte in random.choice("é€😀").encode()]
        else:
            ids.append(3 + 256 + random.randrange(len(WORDS)))
    return ids


def random_bytes(count: int) -> list[int]:
    text = "".join(random.choices("ab é€😀", k=count)).encode()
    return list(text)


def continued(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    assembly = TextAssembly(tokenizer, after=prompt)
    return "".join(map(assembly.push, ids)) + assembly.flush()


def oracle(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """What both together have and the prompt alone has not."""
    known, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    same = [a == b for a, b in zip(known, whole, strict=False)]
    return whole[[*same, False].index(False) :]


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_continuation_is_what_follows_the_prompt(kind: str) -> None:
    tokenizer, make = (PIECES, random_pieces) if kind == "sentencepiece" else (BYTE_LEVEL, random_bytes)
    began_with_a_space = cut = 0
    for _ in range(300):
        ids = make(random.randint(2, 150))
        border = random.randrange(1, len(ids))
        prompt, rest = ids[:border], ids[border:]
        if kind == "sentencepiece" and not tokenizer.decode(prompt[-64:]):
            continue
        text = continued(tokenizer, prompt, rest)
        assert text == oracle(tokenizer, prompt, rest)
        began_with_a_space += text.startswith(" ")
        cut += tokenizer.decode(prompt).endswith("\ufffd")
    assert began_with_a_space > 5
    assert cut > 5


def test_a_message_of_its_own_begins_without_a_space() -> None:
    prompt, ids = PIECES.encode("Once"), PIECES.encode("upon a time")
    assert PIECES.decode(prompt + ids) == "Once upon a time"
    assert continued(PIECES, prompt, ids) == " upon a time"
    assert continued(PIECES, [*prompt, 2, 1], ids) == " upon a time"
    assert continued(PIECES, [], ids) == continued(PIECES, [1], ids) == "upon a time"


def test_a_character_that_began_in_the_prompt_is_told_when_it_is_whole() -> None:
    for tokenizer, first, letter in ((BYTE_LEVEL, 0, ord("s")), (PIECES, 3, 3 + 256 + WORDS.index("s"))):
        euro = [first + byte for byte in "€".encode()]
        for border in (1, 2):
            assembly = TextAssembly(tokenizer, after=euro[:border])
            assert [assembly.push(token_id) for token_id in euro[border:]] == ["", "€"][border - 1 :]
            assert continued(tokenizer, euro[:border], [letter]) == "s"  # it never becomes whole
        long_run = [first + byte for byte in ("€" * 100).encode()]
        assert continued(tokenizer, long_run, euro) == "€"


def writing(tokenizer: Tokenizer) -> tuple[Transformer, list[int]]:
    """A model with the tokenizer's vocabulary, and a prompt after which it writes a word, and no end."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(int(torch.randint(0, 2**31, ())))
    with torch.no_grad():  # words that begin with a space are likelier than the rest
        model.lm_head.weight *= 0.01
        model.lm_head.weight[259:262] += 1.0
        model.norm.weight.fill_(1.0)
        model.lm_head.weight[:259] -= 1.0
        model.embed_tokens.weight.abs_()
    return model.eval(), tokenizer.encode("Once")


def test_the_engine_and_generate_go_on_with_the_prompt() -> None:
    model, prompt = writing(PIECES)
    sampling = SamplingConfig(max_tokens=4, temperature=0, ignore_eos=True)
    requests = [Request(prompt_ids=prompt, sampling=sampling, new_message=new) for new in (False, True)]
    engine = Engine(model, PIECES, EngineConfig(max_sequences=2))
    told = list(run(engine, requests).values())
    ids = [token.id for delta in told[0] for token in delta.tokens]
    texts = ["".join(delta.text for delta in deltas) for deltas in told]
    whole = PIECES.decode(prompt + ids)
    assert texts == [whole.removeprefix("Once"), PIECES.decode(ids)]
    assert texts[0].startswith(" ")
    assert moesaic.generate(model, PIECES, "Once", max_tokens=4, temperature=0) == texts[0]
    for new_message, expected in zip((False, True), texts, strict=True):
        generation = Generation(prompt_tokens=0)
        assert "".join(stream(model, PIECES, prompt, sampling, generation, new_message=new_message)) == expected
