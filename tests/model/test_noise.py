"""Random numbers from keys: spread as they should be, and the same for the same key wherever it stands."""

import math

import torch

from moesaic.model.noise import combine, mix, normal, uniform

NUM_KEYS, WIDTH = 4000, 16


def test_every_input_bit_moves_about_half_of_the_output_bits() -> None:
    keys = torch.cat((torch.randint(-(2**62), 2**62, (500,)), torch.arange(500)))
    for bit in range(64):
        flipped = mix(keys) ^ mix(keys ^ (1 << bit if bit < 63 else -(2**63)))
        moved = torch.stack([(flipped >> place) & 1 for place in range(64)]).double()
        assert abs(float(moved.mean()) - 0.5) < 0.02
        assert float((moved.mean(1) - 0.5).abs().max()) < 0.12


def test_the_key_of_two_depends_on_their_order_and_different_pairs_give_different_keys() -> None:
    left, right = torch.meshgrid(torch.arange(-50, 250), torch.arange(-50, 250), indexing="ij")
    assert len(combine(left, right).unique()) == left.numel()
    assert torch.equal(combine(left, 7), combine(left, torch.full_like(left, 7)))


def test_uniform_numbers_are_even_and_independent() -> None:
    for keys in (torch.arange(NUM_KEYS), torch.randint(-(2**62), 2**62, (NUM_KEYS,))):
        values = uniform(keys, WIDTH)
        assert values.dtype == torch.float64
        assert float(values.min()) > 0.0
        assert float(values.max()) < 1.0
        count = values.numel()
        share = torch.histc(values, 20, 0.0, 1.0) / count
        assert float((share - 0.05).abs().max()) < 6 * math.sqrt(0.05 * 0.95 / count)
        centred = (values - 0.5) * math.sqrt(12)
        for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1))):
            assert abs(float((centred * other).mean())) < 6 / math.sqrt(count)


def test_normal_numbers_have_mean_0_and_variance_1() -> None:
    for keys in (torch.arange(NUM_KEYS), torch.randint(-(2**62), 2**62, (NUM_KEYS,))):
        values = normal(keys, WIDTH)
        count = values.numel()
        assert bool(values.isfinite().all())
        assert abs(float(values.mean())) < 6 / math.sqrt(count)
        assert abs(float(values.var()) - 1) < 6 * math.sqrt(2 / count)
        assert abs(float((values**4).mean()) - 3) < 6 * math.sqrt(96 / count)
        assert abs(float((values.abs() < 1).double().mean()) - 0.6827) < 6 * math.sqrt(0.22 / count)
        assert abs(float((values * values.roll(1, 1)).mean())) < 6 / math.sqrt(count)


def test_equal_keys_draw_the_same_wherever_they_stand() -> None:
    keys = torch.randint(-(2**62), 2**62, (64,))
    for draw in (uniform, normal):
        whole = draw(keys, WIDTH)
        assert torch.equal(torch.cat([draw(part, WIDTH) for part in keys.split([1, 20, 43])]), whole)
        order = torch.randperm(64)
        assert torch.equal(draw(keys[order], WIDTH), whole[order])
        assert torch.equal(draw(keys, 5), whole[:, :5])
        assert torch.equal(draw(keys[:1].expand(3), WIDTH), whole[:1].expand(3, -1))
