"""Means and other statistics are used where they belong only: a Decomposition, another tower, normalization or model
where raw image means belong is refused, and what the means belong to is in their file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mmhooks as mm
from mmhooks.analysis.decomposition.dataset import MeanDecomposition
from mmhooks.analysis.interventions.ablation_accuracy import ablate
from mmhooks.analysis.interventions.mean_ablation import (
    Parts,
    ablate_direct,
    ablation_sites,
    head_importance,
    mean_edits,
    site_means,
)
from mmhooks.errors import DataError, MMHooksError
from mmhooks.models.embedded.mini import build

SOME = Parts("some", heads=((1, 2), (5, 0)), mlps=(4,))


@pytest.fixture(scope="module")
def mini() -> mm.HookedCLIP:
    return mm.load("mini")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokens(mini) -> torch.Tensor:
    return mini.tokenizer(["a red dog", "a cat", "three boats", "rain"])


@pytest.fixture(scope="module")
def wrong(mini, pixels, tokens) -> dict[str, object]:
    """By name, all that does not belong where raw means of mini's image tower do."""
    raw = mm.decompose(mini, [pixels])
    torch.manual_seed(0)
    other = mm.HookedCLIP(build().eval())
    return {
        "normalized": mm.decompose(mini, [pixels], normalize=True),
        "text tower": mm.decompose(mini, texts=[tokens]),
        "another model": mm.decompose(other, [pixels]),
        "a Decomposition": mm.decompose(mini, pixels),
        "means of sites": site_means(mini, pixels, ablation_sites(SOME)),
        "a tensor": raw.heads,
        "a dict": {"heads": raw.heads},
        "nothing": None,
    }


WORDS = {
    "normalized": "unit-norm embeddings.*not of raw",
    "text tower": "text tower, not of the image tower",
    "another model": "with weights",
    "a Decomposition": r"got a Decomposition: .*mm.decompose\(model, \[pixels\]\)",
    "means of sites": "got a SiteMeans",
    "a tensor": "got a Tensor",
    "a dict": "got a dict",
    "nothing": "got a NoneType",
}


@pytest.mark.parametrize("kind", WORDS)
def test_means_of_another_origin_are_refused_everywhere(mini, pixels, wrong, kind):
    from mmhooks.errors import WrongOrigin

    parts, means = mm.decompose(mini, pixels), wrong[kind]
    classes, labels = torch.randn(3, 256), torch.tensor([0, 1, 2, 0])
    calls = [
        lambda: ablate_direct(parts, means, SOME),
        lambda: ablate(mini, pixels, labels, classes, means, [SOME]),
    ]
    if means is not None:
        calls.append(lambda: head_importance(parts, classes[0], means))
    for call in calls:
        with pytest.raises(WrongOrigin, match=WORDS[kind]):
            call()


def test_normalized_means_belong_to_normalized_parts(mini, pixels, wrong):
    unit, means = mm.decompose(mini, pixels, normalize=True), wrong["normalized"]
    gone = Parts("all", tuple((n, h) for n in range(6) for h in range(6)), tuple(range(6)), initial=True)
    found = ablate_direct(unit, means, gone)
    torch.testing.assert_close(found, means.embedding.expand_as(found), rtol=1e-4, atol=1e-5)
    assert torch.equal(ablate_direct(mm.decompose(mini, pixels).normalized(), means, gone), found)
    with pytest.raises(MMHooksError, match="raw embeddings.*not of unit-norm"):
        ablate_direct(unit, mm.decompose(mini, [pixels]), gone)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_file_says_what_its_means_belong_to(mini, pixels, tokens, tower, normalize, tmp_path):
    pairs = mm.data.pairs("mini", limit=5)
    made = mm.decompose(mini, **{f"{tower}s": pairs}, normalize=normalize)
    back = MeanDecomposition.load(made.save(tmp_path / "means.safetensors"))
    assert back.origin == made.origin
    assert (back.origin.tower, back.origin.normalize, back.origin.model) == (tower, normalize, "mini")
    assert pairs.fingerprint in back.origin.data
    parts = mm.decompose(mini, **{f"{tower}s": pixels if tower == "image" else tokens}, normalize=normalize)
    what = Parts("some", heads=((1, 2),), mlps=(3,))
    assert torch.equal(ablate_direct(parts, back, what), ablate_direct(parts, made, what))
    assert made.to_json()["origin"]["tower"] == tower


def test_an_older_file_is_refused(mini, pixels, tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"embedding": torch.zeros(3)}, tmp_path / "old", metadata={"kind": "MeanDecomposition", "n": "1", "error": "0"}
    )  # fmt: skip
    with pytest.raises(DataError, match="does not say what its numbers belong to"):
        MeanDecomposition.load(tmp_path / "old")


def test_weights_that_were_written_to_are_another_model(pixels):
    torch.manual_seed(0)
    model = mm.HookedCLIP(build().eval())
    means = mm.decompose(model, [pixels])
    with torch.no_grad():
        model.model.visual.proj[0, 0] += 1
    with pytest.raises(MMHooksError, match="with weights"):
        ablate_direct(mm.decompose(model, pixels), means, SOME)


def test_the_same_weights_in_another_object_are_the_same_model(mini, pixels):
    again = mm.load("mini")
    assert again.model is not mini.model
    means = mm.decompose(again, [pixels])
    assert torch.isfinite(ablate_direct(mm.decompose(mini, pixels), means, SOME)).all()


def test_live_means(mini, pixels, tokens):
    classes, labels = torch.randn(3, 256), torch.tensor([0, 1, 2, 0])
    means, sites = mm.decompose(mini, [pixels]), ablation_sites(SOME)
    torch.manual_seed(0)
    other = site_means(mm.HookedCLIP(build().eval()), pixels, sites)
    with pytest.raises(MMHooksError, match="with weights"):
        ablate(mini, pixels, labels, classes, means, [SOME], live_means=other)
    for bad in (means, mm.decompose(mini, pixels), means.heads):
        with pytest.raises(MMHooksError, match="expected means by site"):
            mean_edits(SOME, bad)
        with pytest.raises(MMHooksError, match="expected means by site"):
            ablate(mini, pixels, labels, classes, means, [SOME], live_means=bad)
    with pytest.raises(MMHooksError, match=r"got none at image\.blocks\.1\.attn\.head_out"):
        mean_edits(SOME, site_means(mini, pixels, sites[1:]))
    what = Parts("some", heads=((1, 2),), mlps=(3,))
    text = site_means(mini, tokens, ablation_sites(what, tower="text"), tower="text")
    with pytest.raises(MMHooksError, match="expected means of the image tower"):
        mean_edits(what, text)
    assert len(mean_edits(what, text, tower="text")) == 2
    by_hand = {site: value for site, value in site_means(mini, pixels, sites).items()}
    assert len(mean_edits(SOME, by_hand)) == 3


def test_parts_keep_their_origin(mini, pixels):
    parts = mm.decompose(mini, pixels, batch_size=2)
    assert parts.origin == replace(mm.decompose(mini, [pixels]).origin, data="a tensor [4, 3, 64, 64]")
    assert parts.normalized().origin.normalize and not parts.origin.normalize
