"""Mean-ablations against direct computation and plain hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.interventions.ablation_accuracy import ablate
from mmhooks.analysis.interventions.mean_ablation import (
    Parts,
    ablate_direct,
    ablation_sites,
    cumulative_parts,
    head_importance,
    mean_edits,
    paper_parts,
    site_means,
)
from mmhooks.errors import DataError, ShapeMismatch, WrongOrigin

SOME = Parts("some", heads=((1, 2), (5, 0), (5, 3)), mlps=(0, 4))


@pytest.fixture(scope="module")
def mini() -> mm.HookedCLIP:
    return mm.load("mini")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_direct_ablation_by_hand(mini, pixels):
    parts, means = mm.decompose(mini, pixels), mm.decompose(mini, [pixels])
    expected = parts.initial.clone()
    for n in range(6):
        for h in range(6):
            expected += means.heads[n, h] if (n, h) in SOME.heads else parts.heads[:, n, h]
        expected += means.mlps[n] if n in SOME.mlps else parts.mlps[:, n]
    torch.testing.assert_close(ablate_direct(parts, means, SOME), expected, rtol=1e-4, atol=1e-5)
    everything = Parts(
        "all", tuple((n, h) for n in range(6) for h in range(6)), tuple(range(6)), initial=True
    )
    alike = ablate_direct(parts, means, everything)
    torch.testing.assert_close(alike, means.embedding.expand_as(alike), rtol=1e-4, atol=1e-5)


def test_live_ablation_by_hand(mini, pixels):
    """The edit is what a hook that writes the means of a cache would do."""
    with torch.no_grad():
        _, cache = mini.run_with_cache(pixels, sites=ablation_sites(SOME))
        means = site_means(mini, pixels, ablation_sites(SOME), batch_size=4)
        assert set(means) == set(cache)
        for site, value in cache.items():
            torch.testing.assert_close(means[site], value.mean(0), rtol=1e-4, atol=1e-5)

        def heads(value, *, hook):
            value = value.clone()
            for n, h in SOME.heads:
                if f".{n}." in hook.name:
                    value[:, :, h] = means[hook.name][:, h]
            return value

        def whole(value, *, hook):
            return means[hook.name].expand_as(value)

        by_hand = [(s, whole if s.endswith("mlp_out") else heads) for s in cache]
        with mini.hooks(fwd_hooks=by_hand):
            expected = mini.encode_image(pixels)
        with mini.hooks(*mean_edits(SOME, means)):
            torch.testing.assert_close(mini.encode_image(pixels), expected)
        assert not torch.allclose(mini.encode_image(pixels), expected, atol=1e-3)


def test_the_last_layers_live_ablation_is_its_direct_one_before_the_norm(mini, pixels):
    """Nobody reads the last MLP, so live and direct agree but for σ, which a direct ablation holds fixed."""
    last = Parts("last MLP", mlps=(5,))
    parts, means = mm.decompose(mini, pixels), mm.decompose(mini, [pixels])
    with torch.no_grad(), mini.hooks(*mean_edits(last, site_means(mini, pixels, ablation_sites(last)))):
        live = mini.encode_image(pixels)
    direct = ablate_direct(parts, means, last)
    assert torch.cosine_similarity(live, direct).min() > 0.98


def test_table(mini, pixels):
    classes, labels = mini.encode_image(pixels).detach()[:3], torch.tensor([0, 1, 2, 0, 0, 0])
    what = [Parts("nothing"), *paper_parts(6, 6)[:3]]
    sites = sorted({s for one in what for s in ablation_sites(one)})
    found = ablate(
        mini, pixels, labels, classes, mm.decompose(mini, [pixels]), what,
        live_means=site_means(mini, pixels, sites), batch_size=4,
    )  # fmt: skip
    assert found.n == 6 and found.before.value >= 0.5
    assert found.direct[0] == found.live[0] == found.before  # nothing ablated
    assert found.live[3] is None and found.live[1] is not None
    assert found.table()[0]["ablated"] == "nothing"


def test_importance_is_a_mean_projection(mini, pixels):
    direction = torch.randn(256, generator=torch.Generator().manual_seed(1))
    parts = mm.decompose(mini, pixels)
    found = head_importance(parts, 3 * direction)
    naive = [(parts.heads[i, 2, 1] @ direction) / direction.norm() for i in range(6)]
    torch.testing.assert_close(found[2, 1], torch.stack(naive).mean(), rtol=1e-4, atol=1e-5)
    assert head_importance(parts, direction, mm.decompose(mini, [pixels])).abs().max() < 1e-4


def test_impossible_ablations_are_refused(mini, pixels):
    parts, means = mm.decompose(mini, pixels), mm.decompose(mini, [pixels])
    with pytest.raises(ShapeMismatch, match="layers 0 to 5 of 6"):
        ablate_direct(parts, means, Parts("far", heads=((6, 0),)))
    with pytest.raises(ShapeMismatch, match="use ablate_direct"):
        mean_edits(Parts("all", initial=True), {})
    with pytest.raises(ShapeMismatch, match="each of 6 images"):
        ablate(mini, pixels, torch.tensor([0]), torch.randn(2, 256), means)
    with pytest.raises(DataError, match="no means"):
        site_means(mini, [], ["image.blocks.0.mlp_out"])


def test_batches_that_bring_their_labels_are_read_once_and_give_the_same(mini, pixels):
    labels, classes = torch.arange(6) % 3, torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    means = mm.decompose(mini, [pixels])
    what = [SOME, *cumulative_parts(6, 6)[:2]]
    live = site_means(mini, [pixels], [s for one in what for s in ablation_sites(one)])
    whole = mm.ablate(mini, pixels, labels, classes, means, what, live_means=live)
    read = []

    def batches():
        for i in (0, 4):
            read.append(i)
            yield pixels[i : i + 4], labels[i : i + 4]

    found = mm.ablate(mini, batches(), None, classes, means, what, live_means=live, batch_size=3)
    assert found == whole and read == [0, 4] and found.n == 6
    with pytest.raises(DataError, match="at least one image with its label"):
        mm.ablate(mini, [], None, classes, means)
    with pytest.raises(ShapeMismatch, match="labels: expected one per image, got None"):
        mm.ablate(mini, pixels, None, classes, means)
    with pytest.raises(ShapeMismatch, match=r"expected batches \(pixels, labels\), got a Tensor"):
        mm.ablate(mini, [pixels], None, classes, means)


def test_contributions_to_the_unit_embedding_are_ablated_by_their_own_means(mini, pixels):
    """By hand: contributions divided by each embedding's length, whose means replace them."""
    labels = torch.arange(6) % 3
    classes = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    means = mm.decompose(mini, [pixels], normalize=True)
    found = mm.ablate(mini, pixels, labels, classes, means, [SOME], normalize=True)
    parts = mm.decompose(mini, pixels)
    length = parts.embedding.norm(dim=1, keepdim=True)
    embedding = parts.embedding / length
    for n, h in SOME.heads:
        embedding = embedding + means.heads[n, h] - parts.heads[:, n, h] / length
    for n in SOME.mlps:
        embedding = embedding + means.mlps[n] - parts.mlps[:, n] / length
    right = (embedding @ torch.nn.functional.normalize(classes, dim=1).T).argmax(1) == labels
    assert found.direct[0].value == pytest.approx(float(right.float().mean()))
    with pytest.raises(WrongOrigin):
        mm.ablate(mini, pixels, labels, classes, means, [SOME])


def test_cumulative_parts_end_with_all_attention():
    parts = cumulative_parts(3, 4)
    assert [len(p.heads) for p in parts] == [4, 8, 12] and not any(p.mlps for p in parts)
    assert set(parts[-1].heads) == {(n, h) for n in range(3) for h in range(4)}
