"""Zero-masked classification: live hooks, a naive loop and scikit-learn agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

import mmhooks as mm
from mmhooks.analysis.interventions.masked_classification import (
    CosineLabels,
    Masked,
    centroids,
    classified,
    fit_probe,
    prompt_labels,
    single_ablations,
)
from mmhooks.errors import MMHooksError, NoDecoder, ShapeMismatch, WrongHead
from mmhooks.models.embedded import mini

SPACES = ("decoded", "spliced", "latent")


@pytest.fixture(scope="module")
def model() -> mm.HookedCLIP:
    torch.manual_seed(0)
    return mm.HookedCLIP(mini.build().eval(), mini.tokenizer(), mini.preprocess)


def sae_for(d: int, n: int = 64, k: int = 8) -> mm.TopKSAE:
    torch.manual_seed(1)
    sae = mm.TopKSAE(d, n, k)
    with torch.no_grad():
        sae.b_pre.normal_(std=0.1)
    return sae.eval()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("side", ["image", "text"])
def test_live_masks_give_the_probabilities_by_hand(model: mm.HookedCLIP, space: str, side: str) -> None:
    """``with model.hooks(mask=group)`` against the formulas written out, to 1e-6 at the model's usual scale."""
    sae, scale = sae_for(256), 100.0
    torch.manual_seed(2)
    x = torch.randn(12, 3, 64, 64) if side == "image" else model.tokenizer([f"a word {i}" for i in range(12)])
    encode = model.encode_image if side == "image" else model.encode_text
    with torch.no_grad():
        raw = encode(x)
        # Labels near the samples and each other: probabilities away from 0 and 1, where differences show.
        labels = normalize(
            raw.mean(0) / raw.mean(0).norm() + 0.1 * normalize(torch.randn(2, 256), dim=-1), dim=-1
        )
        named = sae.encode(labels) if space == "latent" else labels
        f = sae.encode(raw / raw.norm(dim=-1, keepdim=True))
        group = mm.FeatureSet(f.sum(0).topk(20).indices, 64, head=sae.id)
        f_masked = f.clone()
        f_masked[:, group.indices] = 0
        by_hand = {
            "decoded": sae.decode(f_masked),
            "spliced": raw + raw.norm(dim=-1, keepdim=True) * ((f_masked - f) @ sae.W_dec),
            "latent": f_masked,
        }[space]
        wanted = (scale * cosine_similarity(by_hand.double()[:, None], named.double()[None], dim=-1)).softmax(
            1
        )
        model.attach(
            sae, at=f"{side}.embed", name="h", error_term=space != "decoded", splice=space != "latent"
        )
        try:
            if space == "latent":
                with model.hooks(mask=group), model.caching([f"{side}.embed.h.latents"]) as cache:
                    encode(x)
                live = cache[f"{side}.embed.h.latents"]
            else:
                with model.hooks(mask=group):
                    live = encode(x)
        finally:
            model.detach("h")
    judge = CosineLabels(named, scale)
    mine = Masked(sae, raw).vectors(group, space)
    assert (judge(live) - wanted).abs().max() < 1e-6
    assert (judge(mine) - wanted).abs().max() < 1e-6
    untouched = judge(Masked(sae, raw).vectors(None, space))
    assert (judge(mine) - untouched).abs().max() > 1e-3  # the mask did something


@pytest.mark.parametrize("normalize_input", [True, False, "layer_norm"])
@pytest.mark.parametrize("space", SPACES)
def test_single_ablations_equal_masks_of_one_feature(normalize_input: object, space: str) -> None:
    torch.manual_seed(3)
    sae = mm.TopKSAE(16, 40, 6, normalize_input=normalize_input)  # type: ignore[arg-type]
    samples = Masked(sae, torch.randn(9, 16) * 3)
    labels = CosineLabels(torch.randn(3, 40 if space == "latent" else 16), 20.0)
    fast = single_ablations(samples, range(40), labels, space=space)
    for k in range(40):
        one = labels(samples.vectors(mm.FeatureSet([k], 40), space))
        assert torch.allclose(fast[:, k], one, atol=1e-5), k


def test_a_head_without_decoder_is_masked_in_its_own_space() -> None:
    samples = Masked(mm.NCL(8, 20), torch.randn(4, 8))
    group = mm.FeatureSet(range(5), 20)
    assert bool((samples.vectors(group, "latent")[:, :5] == 0).all())
    with pytest.raises(NoDecoder, match="space='latent'"):
        samples.vectors(group, "decoded")
    with pytest.raises(MMHooksError, match="got 'nowhere'"):
        samples.vectors(group, "nowhere")
    with pytest.raises(WrongHead, match="of 21 features"):
        samples.vectors(mm.FeatureSet([1], 21), "latent")


def test_removed_share_is_of_the_activations() -> None:
    samples = Masked(sae_for(16, 30, 5), torch.randn(7, 16))
    group = mm.FeatureSet(range(10), 30)
    assert samples.removed_share(group) + samples.removed_share(~group) == pytest.approx(1)
    assert samples.removed_share(group) == pytest.approx(
        float(samples.latents[:, :10].sum() / samples.latents.sum())
    )


def test_probe_equals_scikit_learn_and_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(4)
    y = torch.arange(60) % 3
    x = torch.randn(60, 10) + 2 * torch.nn.functional.one_hot(y, 10)
    probe = fit_probe(x, y, n_classes=3)
    unit = normalize(x, dim=-1).double().numpy()
    want = LogisticRegression(C=10, class_weight="balanced", max_iter=2000).fit(unit, y.numpy())
    assert np.allclose(probe(x).numpy(), want.predict_proba(unit), atol=1e-6)
    two = y < 2
    binary = fit_probe(x[two], y[two])
    want = LogisticRegression(C=10, class_weight="balanced", max_iter=2000).fit(unit[two], y[two].numpy())
    assert np.allclose(binary(x[two]).numpy(), want.predict_proba(unit[two]), atol=1e-6)
    assert float((probe(x).argmax(1) == y).float().mean()) > 0.8
    with pytest.raises(ShapeMismatch, match=r"no sample of class \[1\]"):
        fit_probe(x[:1], y[:1])
    with pytest.raises(ShapeMismatch, match="60 samples but 59 labels"):
        centroids(x, y[1:])


def test_classified_counts() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.5, 0.5]])
    got = classified(p, torch.tensor([0, 0, 1, 1]), ("woman", "man"))
    assert got.accuracy.value == pytest.approx(2.5 / 4)  # a tie is half right
    assert got.balanced.value == pytest.approx((1 + 0.25) / 2)
    assert got.probability.value == pytest.approx((0.9 + 0.8 + 0.4 + 0.5) / 4)
    assert got.by_class["woman"][0].value == 1 and got.by_class["man"][1].value == pytest.approx(0.45)
    uneven = classified(p[:3], torch.tensor([0, 0, 1]), ("woman", "man"))
    assert uneven.balanced.value == pytest.approx(0.5) and uneven.accuracy.value == pytest.approx(2 / 3)
    with pytest.raises(ShapeMismatch, match=r"0\.\.2"):
        classified(p[:3], torch.tensor([0, 1, 2]), ("woman", "man"))


def test_prompts_are_mean_unit_embeddings(model: mm.HookedCLIP) -> None:
    got = prompt_labels(model, [["woman", "girl"], ["man"]], ["a {}", "{}"])
    with torch.no_grad():
        each = normalize(model.encode_text(model.tokenizer(["a woman", "a girl", "woman", "girl"])), dim=-1)
    assert torch.allclose(got[0], normalize(each.mean(0), dim=-1), atol=1e-6)
    assert got.shape == (2, 256) and torch.allclose(got.norm(dim=-1), torch.ones(2))
