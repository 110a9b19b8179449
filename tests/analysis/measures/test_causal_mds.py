"""The closed form of masking one feature against decoding every masked embedding; planted causes are found."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import mmhooks as mm
from mmhooks.errors import ShapeMismatch
from mmhooks.heads import NCL, TopKSAE

N, D = 30, 8


def embeddings(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator) * 3, torch.randn(N, D, generator=generator) * 2


def loss(query, candidates, tau):
    query = torch.where(
        query.norm(dim=1, keepdim=True) < 1e-5, 0.0, query
    )  # rounding of an embedding all masked
    logits = tau * normalize(query, dim=1) @ normalize(candidates, dim=1).T
    return cross_entropy(logits, torch.arange(N))


@pytest.mark.parametrize("kind", ["sae", "raw sae", "ncl", "coordinates"])
def test_it_equals_masking_and_decoding(kind):
    torch.manual_seed(1)
    head = {
        "sae": TopKSAE(D, 20, 4),
        "raw sae": TopKSAE(D, 20, 4, normalize_input=False),
        "ncl": NCL(D, 20),
        "coordinates": None,
    }[kind]
    x, t = (v.double().float() for v in embeddings())
    found = mm.causal_mds(x, t, head, logit_scale=5.0)
    sides = {}
    for name, v in (("image", x), ("text", t)):
        if head is None:
            sides[name] = v, lambda k, v=v: v.index_fill(1, torch.tensor([k]), 0.0)
            continue
        f = head.encode(head.prepare(v)).detach()
        if kind == "ncl":
            sides[name] = f, lambda k, f=f: f.index_fill(1, torch.tensor([k]), 0.0)
            continue
        scale = head.scaled(v)[1]

        def masked(k, f=f, v=v, scale=scale):
            change = head.decode(f.index_fill(1, torch.tensor([k]), 0.0)) - head.decode(f)
            return (v + (change if scale is None else scale * change)).detach()

        sides[name] = v, masked
    for k in range(len(found.image)):
        image = loss(sides["image"][1](k), sides["text"][0], 5.0) - loss(
            sides["image"][0], sides["text"][0], 5.0
        )
        text = loss(sides["text"][1](k), sides["image"][0], 5.0) - loss(
            sides["text"][0], sides["image"][0], 5.0
        )
        assert found.image[k].item() == pytest.approx(float(image), abs=2e-5)
        assert found.text[k].item() == pytest.approx(float(text), abs=2e-5)


def test_a_feature_used_by_both_sides_is_found_and_noise_is_not():
    """Coordinates 0-3 carry the pairing, 4 is loud in images only and 5 in texts only, 6 and 7 are faint noise."""
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(200, 4, generator=generator)
    x, t = (0.01 * torch.randn(200, D, generator=generator) for _ in range(2))
    x[:, :4] += shared
    t[:, :4] += shared
    found = mm.causal_mds(x, t, logit_scale=20.0)
    assert found.cross_modal()[:4].all() and not found.cross_modal()[4:].any()
    assert (found.score[:4] - 0.5).abs().max() < 0.1


def test_repeated_captions_are_right_and_copies_are_one_family():
    x, t = embeddings(3)
    once = mm.causal_mds(x, t, logit_scale=5.0)
    labels = torch.arange(N).repeat(2)
    twice = mm.causal_mds(x.repeat(2, 1), t.repeat(2, 1), logit_scale=5.0, same=labels, families=labels)
    assert torch.allclose(once.image, twice.image, atol=1e-9) and twice.families == N
    assert torch.equal(once.image_q, twice.image_q)


def test_bad_input_is_refused():
    with pytest.raises(ShapeMismatch, match="at least 2 pairs and one label of each, got 1 and no labels"):
        mm.causal_mds(torch.ones(1, 3), torch.ones(1, 3))
