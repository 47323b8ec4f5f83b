"""Blocks against a plain account of who has which, and what each holds."""

import random

import pytest

from moesaic.engine.block_pool import BlockPool
from moesaic.errors import MoesaicError

BLOCK = 32


def test_a_beginning_is_found_block_by_block_and_leaves_a_token_to_compute() -> None:
    pool, ids = BlockPool(8), [random.randrange(9) for _ in range(3 * BLOCK)]
    blocks = pool.take(3)
    assert pool.remember(blocks, ids, BLOCK + 5, 0) == 1
    assert pool.remember(blocks, ids, len(ids), 1) == 3
    pool.give_back(blocks)
    assert (pool.num_free, pool.num_used) == (8, 0)
    for length, expected in ((0, 0), (BLOCK, 0), (BLOCK + 1, 1), (3 * BLOCK, 2), (3 * BLOCK + 1, 3)):
        found = pool.take_beginning([*ids, 1][:length])
        assert found == blocks[:expected]
        assert pool.num_used == expected
        pool.give_back(found)
    other = [*ids[:BLOCK], -1, *ids[BLOCK + 1 :], 1]
    assert pool.take_beginning(other) == blocks[:1]


def test_the_oldest_beginnings_leave_first_and_their_ends_before_them() -> None:
    pool = BlockPool(4)
    texts = [[number] * (2 * BLOCK) for number in range(3)]
    for ids in texts[:2]:
        blocks = pool.take(2)
        pool.remember(blocks, ids, len(ids), 0)
        pool.give_back(blocks)
    pool.take(1)
    assert [len(pool.take_beginning([*ids, 0])) for ids in texts] == [1, 2, 0]


def test_nothing_is_kept_where_that_is_not_wanted() -> None:
    pool, ids = BlockPool(2, keeps_beginnings=False), [1] * (BLOCK + 1)
    blocks = pool.take(2)
    assert pool.remember(blocks, ids, len(ids), 0) == 0
    pool.give_back(blocks)
    assert pool.take_beginning(ids) == []


def test_more_blocks_than_there_are_are_refused() -> None:
    pool = BlockPool(3)
    pool.take(2)
    with pytest.raises(MoesaicError, match="2 blocks are needed and 1 of 3 are free"):
        pool.take(2)
    assert len(pool.take(1)) == 1


def test_many_texts_never_share_a_block_that_is_written() -> None:
    """Texts of few letters come, grow and go; what a found block holds is what was written into it."""
    pool, content = BlockPool(24), {}
    texts: list[tuple[list[int], list[int], int]] = []
    for _ in range(3000):
        if texts and (random.random() < 0.4 or len(texts) > 6):
            ids, blocks, _ = texts.pop(random.randrange(len(texts)))
            pool.give_back(blocks)
        ids = [letter for _ in range(random.randint(1, 3)) for letter in [random.randrange(2)] * BLOCK] + [0]
        blocks = pool.take_beginning(ids)
        for index, block in enumerate(blocks):
            assert content[block] == ids[: (index + 1) * BLOCK]
        missing = -(-len(ids) // BLOCK) - len(blocks)
        if missing > pool.num_free:
            pool.give_back(blocks)
            continue
        known = len(blocks)
        fresh = pool.take(missing)
        in_use = {block for _, taken, _ in texts for block in taken}
        assert not in_use & set(fresh)
        blocks += fresh
        for index in range(known, len(blocks)):
            content[blocks[index]] = ids[: (index + 1) * BLOCK]
        pool.remember(blocks, ids, len(ids), known)
        texts.append((ids, blocks, known))
        assert pool.num_used == len({block for _, taken, _ in texts for block in taken})
    for _, blocks, _ in texts:
        pool.give_back(blocks)
    assert pool.num_used == 0
