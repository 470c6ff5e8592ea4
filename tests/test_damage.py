"""What damage does to images."""

import pytest
import torch

from maskrl import patchify, rng, unpatchify
from workbench.damage import (
    JUDGE_DAMAGE,
    REWARD_DAMAGE,
    damage,
    noisy,
    partners,
    pasted,
    shuffled,
    swapped,
    torn,
)
from workbench.data import draw_shapes, to_unit


def after(make, x, strength=1.0, partner=None):
    """x [B, 3, 8, 8] after one kind of damage, in patches of 2 pixels."""
    partner = x.roll(1, 0) if partner is None else partner
    return make(x, torch.full((len(x), 1, 1, 1), strength), partner, 2, rng(0))


@pytest.mark.parametrize("kinds", [REWARD_DAMAGE, JUDGE_DAMAGE])
def test_damage_leaves_half_alone_and_does_what_it_says(kinds):
    x, labels = torch.rand(1200, 3, 8, 8), torch.arange(3).repeat(400)
    damaged, kind = damage(x, labels, 2, rng(0), kinds)
    fractions = kind.bincount(minlength=1 + len(kinds)) / len(kind)
    expected = torch.tensor([0.5] + [0.125] * len(kinds))
    torch.testing.assert_close(fractions, expected, rtol=0, atol=0.04)
    assert torch.equal(damaged[kind == 0], x[kind == 0])
    assert (damaged[kind > 0] != x[kind > 0]).flatten(1).any(1).all()


def test_reward_and_judge_learn_from_different_damage():
    assert not set(REWARD_DAMAGE) & set(JUDGE_DAMAGE)


@pytest.mark.parametrize("make", [*REWARD_DAMAGE, *JUDGE_DAMAGE])
def test_strong_damage_changes_more_than_weak(make):
    x = to_unit(draw_shapes(torch.arange(9).repeat(20), 8, rng(0)))
    weak, strong = (float((after(make, x, a) - x).abs().mean()) for a in (0.1, 1.0))
    assert 0 < weak < strong


def test_shuffling_moves_patches_and_loses_none():
    x = torch.arange(5 * 16.0).view(5, 16, 1).expand(5, 16, 12)
    tokens = patchify(after(shuffled, unpatchify(x, 2)), 2)
    assert (tokens == tokens[..., :1]).all()  # whole patches
    assert torch.equal(tokens[..., 0].sort(1).values, x[..., 0])
    moved = (tokens != x).any(-1).float().mean()
    assert 0.2 < moved < 0.6


@pytest.mark.parametrize("make, fraction", [(swapped, 0.5), (pasted, 0.7**2)])
def test_what_is_swapped_or_pasted_comes_from_the_partner(make, fraction):
    x, partner = torch.zeros(50, 3, 8, 8), torch.ones(50, 3, 8, 8)
    damaged = after(make, x, partner=partner)
    assert set(damaged.unique().tolist()) == {0.0, 1.0}
    assert abs(float(damaged.mean()) - fraction) < 0.1


def test_a_torn_image_has_the_same_pixels_in_every_row_or_in_every_column():
    x = torch.rand(1, 3, 8, 8)
    damaged = after(torn, x)
    same_rows = torch.equal(damaged.sort(3).values, x.sort(3).values)
    same_columns = torch.equal(damaged.sort(2).values, x.sort(2).values)
    assert same_rows != same_columns
    assert not torch.equal(damaged, x)


def test_partners_are_of_the_same_class():
    labels = torch.randint(4, (200,), generator=rng(0))
    partner = partners(labels, rng(1))
    assert torch.equal(labels[partner], labels)
    assert (partner != torch.arange(200)).float().mean() > 0.9
    assert len(set(partner.tolist())) == 200


def test_patches_that_were_swapped_for_equal_ones_are_no_damage():
    """Images of a class are equal here. The reward network was once taught that such whole images
    are damaged; and patches of another class would show."""
    labels = torch.arange(3).repeat(400)
    x = labels[:, None, None, None].float().expand(-1, 3, 8, 8) / 3
    damaged, kind = damage(x, labels, 2, rng(0))
    noise = 1 + REWARD_DAMAGE.index(noisy)
    assert set(kind.tolist()) == {0, noise}  # blurred or shuffled, a flat image is the same
    assert torch.equal(damaged[kind == 0], x[kind == 0])
    assert not torch.equal(damaged[kind == noise], x[kind == noise])
