"""Structured output: what masks allow against brute force, random texts under random schemas, and hostile grammars."""

import json
import random
import sys
import time
from typing import Any

import pytest
import tokenizers
import torch

from moesaic.engine import constraint as constraint_module
from moesaic.engine.constraint import ConstraintCompiler, GrammarConstraint, token_bytes
from moesaic.errors import MoesaicError, UsageError
from moesaic.ops.device import resident_bytes
from moesaic.tokenizer import Tokenizer, byte_tokenizer, train_bpe

BYTES = byte_tokenizer()
FURTHER_IDS = 7
"""Models have more ids than their tokenizers."""
VOCAB_SIZE = BYTES.vocab_size + FURTHER_IDS
pytest.importorskip("llguidance")


def sentencepiece_tokenizer() -> Tokenizer:
    """Words with a sign for the space before them, and bytes for what is no word."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁{", "▁the", '":', "▁true", "ab", "▁▁"]
    words += [chr(code) for code in range(0x21, 0x7F)] + ["é", "日本"]
    rust = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    rust.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    rust.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(rust, {"eos_token": "</s>"})


def unigram_tokenizer() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(0x20, 0x7F)]
    rust = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    rust.decoder = tokenizers.decoders.Metaspace()
    rust.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(rust, {"eos_token": "</s>"})


def bpe_tokenizer() -> Tokenizer:
    texts = [
        json.dumps({"name": "ab", "kind": [True, False, None], "é": 1.5, "count": [1, 2, 3]}, indent=i % 3)
        for i in range(9)
    ]
    return train_bpe(texts, 400)


TOKENIZERS = {
    "bytes": BYTES,
    "bpe": bpe_tokenizer(),
    "sentencepiece": sentencepiece_tokenizer(),
    "unigram": unigram_tokenizer(),
}


def make_compiler(tokenizer: Tokenizer) -> ConstraintCompiler:
    assert tokenizer.eos_id is not None
    return ConstraintCompiler(tokenizer, tokenizer.vocab_size + FURTHER_IDS, [tokenizer.eos_id])


COMPILERS = {name: make_compiler(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def allowed_ids(constraint: GrammarConstraint, vocab_size: int) -> list[int]:
    bias_V = torch.randn(vocab_size)
    before = bias_V.clone()
    constraint.mask(bias_V)
    forbidden = bias_V == -torch.inf
    assert torch.equal(bias_V[~forbidden], before[~forbidden])
    return (~forbidden).nonzero().flatten().tolist()


def random_text(constraint: GrammarConstraint, tokenizer: Tokenizer, vocab_size: int, most: int = 4000) -> str:
    """Of random allowed tokens, which end as soon as half the chances to end are gone."""
    ids: list[int] = []
    while len(ids) < most:
        allowed = allowed_ids(constraint, vocab_size)
        assert max(allowed) < tokenizer.vocab_size
        token_id = random.choice(allowed)
        if tokenizer.eos_id in allowed and random.random() < 0.5:
            token_id = tokenizer.eos_id
        assert token_id is not None
        constraint.accept(token_id)
        if token_id == tokenizer.eos_id:
            break
        ids.append(token_id)
        if constraint.finished:
            assert allowed_ids(constraint, vocab_size) == [tokenizer.eos_id]
            break
    else:
        pytest.fail(f"no end after {most} tokens: {tokenizer.decode(ids)[-200:]!r}")
    return tokenizer.decode(ids)


def random_schema(depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"] + ["object", "array", "anyOf"] * (
        depth > 0
    )
    kind = random.choice(kinds)
    if kind == "string":
        return {"type": "string", "minLength": random.randint(0, 3), "maxLength": random.randint(3, 9)}
    if kind in ("integer", "number"):
        least = random.randint(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + random.randint(0, 5000)}
    if kind == "enum":
        return {"enum": [random.choice(["a", "é\n", '"', 3, None, [1, {"x": 2}]]) for _ in range(3)]}
    if kind == "const":
        return {"const": random.choice(["/\\", 17, {"a": [True]}])}
    if kind == "array":
        return {"type": "array", "items": random_schema(depth - 1), "minItems": random.randint(0, 2), "maxItems": 3}
    if kind == "anyOf":
        return {"anyOf": [random_schema(depth - 1), random_schema(depth - 1)]}
    if kind == "object":
        names = random.sample(["a", "name", "é", "x y", '"'], random.randint(0, 4))
        required = [name for name in names if random.random() < 0.6]
        properties = {name: random_schema(depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def satisfies(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(satisfies(value, option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = {"string": str, "integer": int, "boolean": bool, "null": type(None), "array": list, "object": dict}
    if type(value) is not kinds[schema["type"]]:
        return False
    if isinstance(value, str):
        return schema["minLength"] <= len(value) <= schema["maxLength"]
    if type(value) is int:
        return schema["minimum"] <= value <= schema["maximum"]
    if isinstance(value, list):
        return schema["minItems"] <= len(value) <= 3 and all(satisfies(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        known = all(key in schema["properties"] and satisfies(v, schema["properties"][key]) for key, v in value.items())
        return known and set(schema["required"]) <= value.keys()
    return True


@pytest.mark.parametrize("name", ["bytes", "bpe", "sentencepiece"])
def test_random_allowed_tokens_are_json_of_the_schema(name: str) -> None:
    tokenizer, compiler = TOKENIZERS[name], COMPILERS[name]
    for _ in range(8):
        schema = random_schema(3)
        text = random_text(compiler.json_schema(schema), tokenizer, tokenizer.vocab_size + FURTHER_IDS)
        assert satisfies(json.loads(text), schema), (text, schema)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_masks_allow_exactly_the_tokens_that_can_go_on(name: str) -> None:
    tokenizer, compiler = TOKENIZERS[name], COMPILERS[name]
    vocab_size = tokenizer.vocab_size + FURTHER_IDS
    letters = ['a"b', "{ the", " \\x", "b", "/", "é", "日本", "\n"] if name != "unigram" else ["a a", "b/", "the", " x"]
    choices = ["".join(random.choices(letters, k=random.randint(1, 3))) for _ in range(5)]
    tokens, _ = token_bytes(tokenizer, vocab_size, [])
    constraint, written = compiler.choice(choices), b""
    wholes = [choice.encode() for choice in choices]
    while True:
        going = {i for i, token in enumerate(tokens) if token and any(w.startswith(written + token) for w in wholes)}
        ending = {tokenizer.eos_id} if written in wholes else set()
        assert set(allowed_ids(constraint, vocab_size)) == going | ending
        assert constraint.finished == (not going)
        if not going:
            return
        token_id = random.choice(sorted(going))
        constraint.accept(token_id)
        written += tokens[token_id]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_tokens_are_those_that_the_tokenizer_counts(name: str) -> None:
    tokens, special = token_bytes(TOKENIZERS[name], TOKENIZERS[name].vocab_size, [])
    assert [0 if i in special else len(token) for i, token in enumerate(tokens)] == TOKENIZERS[name].token_bytes()


def test_each_of_several_ends_ends_and_is_never_text() -> None:
    rust = tokenizers.Tokenizer.from_str(BYTES.to_json())
    rust.add_tokens(["abc"])  # id 257, not special
    tokenizer = Tokenizer(rust)
    compiler = ConstraintCompiler(tokenizer, 300, [256, 257, 290, ord("z"), 9999])
    constraint = compiler.regex("[a-z]{3,4}")
    assert allowed_ids(constraint, 300) == list(range(ord("a"), ord("z")))
    for character in b"abc":
        constraint.accept(character)
    assert allowed_ids(constraint, 300) == [*range(ord("a"), ord("z") + 1), 256, 257, 290]
    constraint.accept(290)
    assert constraint.finished
    with pytest.raises(MoesaicError, match="complete"):
        constraint.accept(ord("a"))


def test_a_model_without_an_end_finishes_where_nothing_more_is_allowed() -> None:
    constraint = ConstraintCompiler(BYTES, 257, []).regex("ab?")
    constraint.accept(ord("a"))
    assert not constraint.finished
    assert allowed_ids(constraint, 257) == [ord("b")]
    constraint.accept(ord("b"))
    assert constraint.finished


def test_special_tokens_are_allowed_where_a_grammar_names_them() -> None:
    rust = tokenizers.Tokenizer.from_str(BYTES.to_json())
    rust.add_special_tokens(["<call>"])
    compiler = ConstraintCompiler(Tokenizer(rust), 300, [256])
    assert compiler.special_id("<call>") == 257
    assert compiler.special_id("<other>") is None
    assert allowed_ids(compiler.grammar('start: <call> "a"'), 300) == [257]
    assert allowed_ids(compiler.grammar('start: <[257]> "a"'), 300) == [257]
    assert 257 not in allowed_ids(compiler.regex("(.|\n)+"), 300)


def test_an_object_is_json_and_ends() -> None:
    for _ in range(3):
        constraint = COMPILERS["bytes"].json_object()
        for character in '{"a": [1, {"b": "c"}],\n  "d": null}':
            assert ord(character) in allowed_ids(constraint, VOCAB_SIZE)
            constraint.accept(ord(character))
        assert constraint.finished
    with pytest.raises(MoesaicError, match="failed after 1 tokens"):
        COMPILERS["bytes"].json_object().accept(ord("["))


def test_copies_go_their_own_ways() -> None:
    first = COMPILERS["bytes"].choice(["ab", "cd"])
    second = first.copy()
    first.accept(ord("a"))
    second.accept(ord("c"))
    assert allowed_ids(first, VOCAB_SIZE) == [ord("b")]
    assert allowed_ids(second, VOCAB_SIZE) == [ord("d")]


BOMBS = {
    "enum": ("json_schema", {"enum": [f"value {i}" for i in range(100_000)]}),
    "references": (
        "json_schema",
        {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(6000)} | {"6000": True}},
    ),
    "itself": ("json_schema", {"$ref": "#"}),
    "products": (
        "json_schema",
        {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"{i} {j}": {}}} for j in range(9)]} for i in range(9)
            ]
        },
    ),
    "patterns": (
        "json_schema",
        {"allOf": [{"type": "string", "pattern": f"(.*a.{{{i}}}|b.*c.{{{i}}})"} for i in range(5, 40)]},
    ),
    "long string": ("json_schema", {"type": "string", "minLength": 10_000_000, "maxLength": 10_000_000}),
    "long array": (
        "json_schema",
        {"type": "array", "minItems": 10_000_000, "items": {"type": "array", "minItems": 10**7}},
    ),
    "long constant": ("json_schema", {"const": "a" * 250_000}),
    "own options": ("json_schema", {"type": "object", "x-guidance": {"whitespace_pattern": "(a{1000}){1000}{1000}"}}),
    "repetition": ("regex", "(a{1000}){1000}{1000}"),
    "states": ("regex", "(.|\n)*a(.|\n){2000}"),
    "parentheses": ("regex", "(" * 50_000 + ")" * 50_000),
    "ambiguity": ("grammar", 'start: e\ne: e e | e e e | "a" | '),
    "terminals": ("grammar", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "a"'),
    "chain": ("grammar", "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(16_000)) + '\na16000: "a"'),
    "nesting": ("grammar", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000),
    "rules": ("grammar", "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "a"?'),
    "choices": ("choice", [f"choice {i}" for i in range(9_999)]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_or_bounded(name: str) -> None:
    kind, value = BOMBS[name]
    compiler = COMPILERS["bpe"]
    compiler.json_object()
    resident, started, processor = resident_bytes(), time.monotonic(), time.thread_time()
    reason = ""
    try:
        constraint = getattr(compiler, kind)(value)
        compiled = time.thread_time() - processor
        for _ in range(40):
            allowed = allowed_ids(constraint, TOKENIZERS["bpe"].vocab_size + FURTHER_IDS)
            going = [token_id for token_id in allowed if token_id != TOKENIZERS["bpe"].eos_id]
            if not going:
                break
            constraint.accept(random.choice(going))
    except MoesaicError as error:
        reason, compiled = str(error), time.thread_time() - processor
    assert "\n" not in reason
    assert len(reason) < 500
    assert compiled < 3
    assert time.monotonic() - started < 20  # twice what the process may take on a busy machine
    assert resident_bytes() - resident < 200 * 2**20
    assert compiler.regex(f"after {name}[0-9]") is not None  # whatever happened to the process


def test_a_grammar_that_becomes_too_complex_fails_its_text() -> None:
    constraint = COMPILERS["bytes"].grammar(BOMBS["rules"][1])

    def write() -> None:
        for _ in range(200):
            allowed_ids(constraint, VOCAB_SIZE)
            constraint.accept(ord("a"))

    with pytest.raises(MoesaicError, match=r"structured output failed after \d+ tokens: .*; simplify its grammar"):
        write()


def test_masks_have_a_budget_of_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = COMPILERS["bytes"].json_object()
    monkeypatch.setattr(constraint_module, "_START_SECONDS", 0.0)
    with pytest.raises(MoesaicError, match="processor time"):
        allowed_ids(constraint, VOCAB_SIZE)
    monkeypatch.undo()
    constraint = COMPILERS["bytes"].json_object()
    sizes = iter(range(0, 2**40, 2**26))
    monkeypatch.setattr(constraint_module, "resident_bytes", lambda: next(sizes))
    monkeypatch.setattr(constraint_module, "_SLOW_SECONDS", 0.0)
    allowed_ids(constraint, VOCAB_SIZE)
    allowed_ids(constraint, VOCAB_SIZE)
    allowed_ids(constraint, VOCAB_SIZE)
    with pytest.raises(MoesaicError, match="took 192 MiB"):
        allowed_ids(constraint, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("json_schema", {"type": "strin"}, "the JSON schema cannot be used: Invalid type: strin; change"),
        ("json_schema", {"type": "string", "minLength": 3, "maxLength": 1}, "minLength"),
        ("json_schema", {"type": "string", "pattern": "a(b"}, "unclosed group"),
        ("json_schema", {"minimum": float("nan")}, "must be made of JSON values"),
        ("json_schema", {"title": "\ud800"}, "UTF-8|surrogate|escape"),
        ("json_schema", [], "it must be an object"),
        ("json_schema", {"$ref": "http://example.com/schema"}, "example.com"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "a(b", "unclosed group"),
        ("regex", "", "is empty"),
        ("regex", "a\ud800", "UTF-8"),
        ("grammar", 'start: a\nb: "x"', "2?.*unknown name"),
        ("grammar", "start: <|unknown|>", "unknown special token"),
        ("grammar", '{"grammars": []}', "Lark"),
        ("grammar", "start: A\nA: /x/ & /y/", "no text satisfies it"),
        ("choice", [], "one at least"),
        ("choice", ["a", ""], "not empty"),
        ("choice", ["a"] * 10_001, "10,001 choices"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(kind: str, value: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        getattr(COMPILERS["bytes"], kind)(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a\nb", 'q"\\x', "é\x00\x1f", "/x/", "%json {}", "日本\u2028 ' #"])
def test_choices_are_taken_as_they_are(text: str) -> None:
    constraint = COMPILERS["bytes"].choice([text, text + "!"])
    for byte in text.encode():
        constraint.accept(byte)
    assert set(allowed_ids(constraint, VOCAB_SIZE)) == {ord("!"), 256}


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"pip install 'moesaic\[serve\]'"):
        ConstraintCompiler(BYTES, 257, [256]).json_object()


def test_tokenizers_that_do_not_join_their_tokens_are_refused() -> None:
    rust = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    rust.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(UsageError, match="WordPiece"):
        ConstraintCompiler(Tokenizer(rust), 3, []).json_object()
