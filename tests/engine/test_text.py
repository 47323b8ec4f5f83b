"""Text assembly against decoding the whole text anew after every token."""

import random

import pytest

from moesaic.engine.text import TextAssembly
from moesaic.errors import UsageError
from moesaic.tokenizer import byte_tokenizer, train_bpe

BYTES = byte_tokenizer()
END = BYTES.eos_id
assert END is not None
ALPHABET = "abé€😀"


def decoded(ids: list[int], visible: bool) -> str:
    """Of all `ids`; the visible END stands between texts of their own."""
    if not visible:
        return BYTES.decode(ids)
    runs: list[list[int]] = [[]]
    for token_id in ids:
        runs.append([]) if token_id == END else runs[-1].append(token_id)
    return "<|endoftext|>".join(BYTES.decode(run) for run in runs)


def first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    return min((place for one in stop if (place := text.find(one)) >= 0), default=None)


def certain_part(text: str, stop: tuple[str, ...]) -> str:
    """Without the longest end that a stop string may begin with."""
    return next(
        text[:start]
        for start in range(len(text) + 1)
        if start == len(text) or any(one.startswith(text[start:]) for one in stop)
    )


def random_ids() -> list[int]:
    """Characters of one to four bytes, some cut short, and special tokens."""
    ids: list[int] = []
    for _ in range(random.randint(0, 40)):
        piece = list(random.choice(ALPHABET).encode())
        ids += piece[: random.randint(1, len(piece))] if random.random() < 0.1 else piece
        if random.random() < 0.05:
            ids.append(int(END or 0))
    return ids


@pytest.mark.parametrize("visible", [False, True])
def test_pieces_and_stops_are_those_of_the_whole_text(visible: bool) -> None:
    stops_seen = 0
    for _ in range(300):
        ids = random_ids()
        stop = tuple(
            "".join(random.choices((*ALPHABET, "\ufffd", "<|"), k=random.randint(1, 4)))
            for _ in range(random.randint(0, 3))
        )
        assembly, text, known = TextAssembly(BYTES, stop, [int(END or 0)] if visible else ()), "", ""
        for count, token_id in enumerate(ids, 1):
            text += assembly.push(token_id)
            now = decoded(ids[:count], visible)
            known = known if now.endswith("\ufffd") else now
            place = first_stop(known, stop)
            assert assembly.stopped == (place is not None)
            assert text == (certain_part(known, stop) if place is None else known[:place])
            if assembly.stopped:
                break
        if not assembly.stopped:
            known = decoded(ids, visible)
        text += assembly.flush()
        assert text == known[: first_stop(known, stop)]
        assert assembly.stopped == (first_stop(known, stop) is not None)
        assert assembly.push(97) == "" or not assembly.stopped
        stops_seen += assembly.stopped
    assert stops_seen > 50


def test_of_several_stop_strings_the_one_that_starts_first_ends_the_text() -> None:
    tokenizer = train_bpe(["one two three " * 50], 270)
    ids = tokenizer.encode(" three")
    assert len(ids) == 1
    assembly = TextAssembly(tokenizer, ("ee", "re", "hree!"))
    assert assembly.push(ids[0]) == " th"
    assert assembly.stopped


def test_what_may_become_a_stop_string_is_held_back_until_it_cannot() -> None:
    assembly = TextAssembly(BYTES, ("aab", "\n\nQ"))
    pieces = [assembly.push(byte) for byte in b"aaac\n\n\nR\n"]
    assert pieces == ["", "", "a", "aac", "", "", "\n", "\n\nR", ""]
    assert assembly.flush() == "\n"
    assert not assembly.stopped


def test_special_tokens_are_text_only_where_they_are_asked_for() -> None:
    assert END is not None
    for visible_ids, expected in (((), "a€b"), ((END,), "a<|endoftext|>€b")):
        assembly = TextAssembly(BYTES, visible_ids=visible_ids)
        assert "".join(assembly.push(token_id) for token_id in [97, END, *"€b".encode()]) + assembly.flush() == expected
    with pytest.raises(UsageError, match="no token 9999; it has ids below 257"):
        TextAssembly(BYTES, visible_ids=[9999])


def test_a_long_stop_string_costs_no_more_than_the_text() -> None:
    """Text that almost is the stop string, over and over; quadratic work would be 10^9 steps."""
    stop = "a" * 30000 + "b"
    assembly = TextAssembly(BYTES, (stop,))
    text = "".join(assembly.push(97) for _ in range(60000))
    assert text == "a" * 30000
    assert assembly.push(98) == ""
    assert assembly.stopped


def test_bytes_that_never_become_a_character_are_not_waited_for() -> None:
    assembly, released = TextAssembly(BYTES), [0]
    for _ in range(300):
        released.append(released[-1] + len(assembly.push(0x80)))
    assert released[-1] >= 300 - 64
    assert released[-1] + len(assembly.flush()) == 300


def test_tokens_are_told_once_their_text_begins_and_not_behind_a_stop() -> None:
    """After each token, those that begin in the text so far: their characters are found by decoding all before them."""
    stops_seen = 0
    for _ in range(300):
        ids = random_ids()
        stop = tuple("".join(random.choices(ALPHABET, k=random.randint(1, 3))) for _ in range(random.randint(0, 3)))
        assembly, told, text, count = TextAssembly(BYTES, stop), 0, "", 0
        for count, token_id in enumerate(ids, 1):
            text += assembly.push(token_id)
            told += assembly.take_told()
            assert told == sum(start < len(text) for start in starts_of(ids[:count]))
            if assembly.stopped:
                break
        text += assembly.flush()
        told += assembly.take_told()
        behind = [start >= len(text) for start in starts_of(ids[:count])] if assembly.stopped else []
        assert told == count - sum(behind)
        stops_seen += assembly.stopped and any(behind)
    assert stops_seen > 50


def starts_of(ids: list[int]) -> list[int]:
    """How many characters are certain before each token."""
    decoder, starts, length = BYTES.decoder(), [], 0
    for token_id in ids:
        starts.append(length)
        length += len(decoder.push(token_id))
    return starts
