"""Drafts against a plain search, and the judge against steps whose costs are known."""

import random

import pytest

from moesaic.engine.prompt_lookup import DraftJudge, PromptLookup


def searched(ids: list[int], max_tokens: int) -> list[int]:
    for length in (3, 2):
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == ids[-length:]:
                longer = list(ids)
                for i in range(max_tokens):
                    longer.append(longer[start + length + i])
                return longer[len(ids) :]
    return []


@pytest.mark.parametrize("num_ids", [1, 3, 8])
def test_drafts_are_what_a_search_finds(num_ids: int) -> None:
    found = 0
    for _ in range(60):
        max_tokens, ids = random.randint(1, 6), random.choices(range(num_ids), k=random.randint(0, 30))
        lookup = PromptLookup(max_tokens)
        for _ in range(12):
            assert lookup.draft(ids) == lookup.draft(ids) == searched(ids, max_tokens), ids
            found += bool(searched(ids, max_tokens))
            ids += random.choices(range(num_ids), k=random.randint(1, 4))
    assert found > 50


def test_a_call_looks_only_at_the_new_tokens() -> None:
    class Counting(list[int]):
        read = 0

        def __getitem__(self, key):
            found = super().__getitem__(key)
            self.read += len(found) if isinstance(key, slice) else 1
            return found

    ids, lookup = Counting(random.choices(range(50), k=5000)), PromptLookup(4)
    lookup.draft(ids)
    ids.read = 0
    for _ in range(100):
        ids.append(random.randrange(50))
        lookup.draft(ids)
    assert ids.read <= 100 * 20


def play(
    judge: DraftJudge, steps: int, *, drafted_seconds: float, accepted: float, num_texts: int = 1, found: float = 1.0
) -> int:
    """How many of `steps` steps wanted drafts. A plain step takes a second per text; one with drafts
    `drafted_seconds`, and each text gets one more token with probability `accepted`."""
    wanted = 0
    for _ in range(steps):
        drafts = judge.wanted(num_texts)
        wanted += drafts
        used = drafts and random.random() < found
        tokens = num_texts + (sum(random.random() < accepted for _ in range(num_texts)) if used else 0)
        seconds = num_texts * (drafted_seconds if used else 1.0) * random.uniform(0.97, 1.03)
        judge.observe(seconds, tokens, num_texts, used)
    return wanted


@pytest.mark.parametrize("num_texts", [1, 5])
def test_drafts_that_pay_stay_and_drafts_that_lose_are_tried_now_and_then(num_texts: int) -> None:
    assert play(DraftJudge(), 640, drafted_seconds=1.2, accepted=0.9, num_texts=num_texts) >= 500
    assert play(DraftJudge(), 640, drafted_seconds=1.2, accepted=0.02, num_texts=num_texts) <= 80


def test_the_judge_changes_its_mind_when_the_texts_change() -> None:
    judge = DraftJudge()
    play(judge, 100, drafted_seconds=1.2, accepted=0.0)
    assert play(judge, 1000, drafted_seconds=1.2, accepted=1.0) >= 600
    assert play(judge, 100, drafted_seconds=1.2, accepted=0.0) <= 25


def test_one_slow_step_decides_nothing() -> None:
    for drafted in (True, False):
        judge = DraftJudge()
        play(judge, 70, drafted_seconds=1.2, accepted=1.0)
        judge.observe(50.0, 1, 1, drafted)
        assert play(judge, 64, drafted_seconds=1.2, accepted=1.0) >= 60


def test_steps_are_compared_with_steps_of_as_many_texts() -> None:
    judge = DraftJudge()
    play(judge, 100, drafted_seconds=3.0, accepted=0.5, num_texts=8)
    assert play(judge, 100, drafted_seconds=1.1, accepted=1.0, num_texts=1) >= 85
    assert play(judge, 100, drafted_seconds=3.0, accepted=0.5, num_texts=8) <= 5


def test_where_drafts_are_rarely_found_they_stay_wanted_until_they_were_tried() -> None:
    assert play(DraftJudge(), 200, drafted_seconds=1.2, accepted=0.0, found=0.02) >= 40
    assert play(DraftJudge(), 400, drafted_seconds=1.2, accepted=1.0, found=0.1) >= 380
