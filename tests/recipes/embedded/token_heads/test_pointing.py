"""The pointing game of patch features: hits by a loop, chosen and matched features, and the controls."""

from __future__ import annotations

import pytest
import torch
from embedded.token_heads import pointing
from embedded.token_heads.pointing import Pictures

from mmhooks.errors import MMHooksError
from mmhooks.heads import TopKSAE

N, SIDE, F = 60, 4, 30


@pytest.fixture
def shown() -> Pictures:
    """Feature 0 is always on the object, the others anywhere; 5 and above are rarer and rarer."""
    g = torch.Generator().manual_seed(0)
    masks = torch.zeros(N, 16, 16, dtype=torch.bool)
    for i in range(N):
        top, left = torch.randint(0, 9, (2,), generator=g).tolist()
        masks[i, top : top + 7, left : left + 7] = True
    heat = torch.rand(N, SIDE, SIDE, F, generator=g)
    for feature in range(5, F):
        heat[(feature - 4) * 2 :, :, :, feature] = 0
    covered = masks.unflatten(2, (4, 4)).unflatten(1, (4, 4)).float().mean((2, 4))
    middle = masks[:, 2::4, 2::4]
    heat[..., 0] = covered * middle + 1e-6 * (covered > 0.99)
    return Pictures(heat, covered, middle)


def test_hits_and_shares_are_those_of_a_loop(shown: Pictures) -> None:
    hits, shares = shown.hits(), shown.shares()
    for feature in (0, 3, 7):
        inside = []
        for i in range(N):
            heat = shown.heat[i, :, :, feature]
            if float(heat.max()) == 0:
                assert hits[i, feature] == 0
                continue
            row, column = divmod(int(heat.argmax()), SIDE)
            assert bool(hits[i, feature]) == bool(shown.middle[i, row, column])
            inside.append(float((heat * shown.covered[i]).sum() / heat.sum()))
        assert float(shares[feature]) == pytest.approx(sum(inside) / len(inside), abs=1e-5)


def test_pictures_are_a_head_on_patches_and_masks_by_patch() -> None:
    head = TopKSAE(6, 12, 3)
    rows, masks = torch.randn(5, 16, 6), torch.rand(5, 32, 32) > 0.5
    found = pointing.pictures(head, rows, masks)
    torch.testing.assert_close(found.heat[2, 1, 3], head.encode(rows[2, 7]))
    assert float(found.covered[4, 2, 0]) == pytest.approx(float(masks[4, 16:24, :8].float().mean()))
    assert bool(found.middle[4, 2, 0]) == bool(masks[4, 20, 4])
    with pytest.raises(MMHooksError, match="whole patches"):
        pointing.pictures(head, rows, masks[:, :, :30])


def test_best_features_are_active_enough_and_matched_ones_are_others(shown: Pictures) -> None:
    best = pointing.best_features(shown, 4)
    assert best[0] == 0 and bool((shown.active.sum(0)[best] >= pointing.ACTIVE_IN).all())
    matched = pointing.matched_features(shown, best, near=1)
    assert len({*best.tolist(), *matched.tolist()}) == 8
    often = shown.active.sum(0)
    left = [f for f in range(F) if f not in best.tolist()]
    assert min(abs(int(often[f] - often[best[0]])) for f in left) == abs(
        int(often[matched[0]] - often[best[0]])
    )
    with pytest.raises(MMHooksError, match="expected at least"):
        pointing.best_features(shown, F)


def test_the_game_tells_a_feature_of_objects_from_the_others(shown: Pictures) -> None:
    families = torch.arange(N) // 2
    found = pointing.game(shown, shown, families, count=1)
    assert found["features"] == [0] and found["families"] == N // 2
    active = shown.active[:, 0]
    assert found["hits"]["value"] == 1.0 and active.sum() > 20
    assert found["hits_minus_matched"]["low"] > 0 and found["hits_minus_elsewhere"]["low"] > 0
    assert found["chance"]["value"] == pytest.approx(float(shown.middle[active].float().mean()))
    assert 0 < found["elsewhere"]["value"] < 1


def test_the_other_picture_is_of_another_family() -> None:
    families = torch.tensor([0, 0, 0, 1, 2])
    other = pointing._of_other_families(families, 0)
    assert bool((families[other] != families).all())
    with pytest.raises(MMHooksError, match="two families"):
        pointing._of_other_families(torch.zeros(3, dtype=torch.long), 0)
