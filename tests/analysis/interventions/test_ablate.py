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
    class_token_parts,
    cumulative_parts,
    head_importance,
    mean_edits,
    paper_parts,
    site_means,
)
from mmhooks.errors import DataError, NoExactSum, ShapeMismatch, WrongOrigin

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


def class_token_alone(model, pixels):
    """Naive, head by head and image by image: the class token's attention to itself times its values through W_O, the
    final LayerNorm (σ of the run) and the projection; mean and biases divided among components, heads and tokens."""
    visual = model.model.visual
    blocks, norm = visual.transformer.resblocks, visual.ln_post
    with torch.no_grad():
        _, c = model.run_with_cache(pixels, sites=["image.blocks.*"])
    out = torch.zeros(len(pixels), 6, 6, 256)
    with torch.no_grad():
        for b in range(len(pixels)):
            x = c["image.blocks.5.resid_post"][b, 0]
            sigma = (x.var(correction=0) + norm.eps).sqrt()
            for n, block in enumerate(blocks):
                pattern, v = c[f"image.blocks.{n}.attn.pattern"][b], c[f"image.blocks.{n}.attn.v"][b]
                n_tokens = pattern.shape[-1]
                for h in range(6):
                    width = v.shape[-1]
                    w_o = block.attn.out_proj.weight[:, h * width : (h + 1) * width]
                    written = pattern[h, 0, 0] * (w_o @ v[0, h]) + block.attn.out_proj.bias / (6 * n_tokens)
                    pieces = 13 * 6 * n_tokens  # 6 attention layers, 6 MLPs and the initial stream
                    normed = (written - x.mean() / pieces) / sigma * norm.weight + norm.bias / pieces
                    out[b, n, h] = normed @ visual.proj
    return out


def test_class_token_ablation_by_hand(mini, pixels):
    """The public code's ``compute_ablations.py``, in loops: attention minus its class token's part plus the mean of that."""
    own = class_token_alone(mini, pixels)
    parts = mm.decompose(mini, pixels, class_token=True, tokens=True)
    torch.testing.assert_close(parts.class_token, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.class_token, parts.tokens[:, :, :, 0], rtol=1e-4, atol=1e-6)
    means = mm.decompose(mini, [pixels[:4], pixels[4:]], class_token=True)
    torch.testing.assert_close(means.class_token, own.mean(0), rtol=1e-4, atol=1e-5)
    alone, with_mlps = class_token_parts(6, 6)
    no_cls = parts.heads.sum(2) - own.sum(2) + own.sum(2).mean(0)
    rest = parts.initial + parts.mlps.sum(1)
    torch.testing.assert_close(ablate_direct(parts, means, alone), no_cls.sum(1) + rest, rtol=1e-4, atol=1e-5)
    expected = no_cls.sum(1) + parts.initial + parts.mlps.mean(0).sum(0)
    torch.testing.assert_close(ablate_direct(parts, means, with_mlps), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ablate_direct(parts, means, alone), parts.embedding, atol=1e-3)


def test_class_token_ablations_in_the_accuracy(mini, pixels, tmp_path):
    labels, classes = torch.arange(6) % 3, torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    means = mm.decompose(mini, [pixels], class_token=True, normalize=True)
    means = type(means).load(means.save(tmp_path / "means.safetensors"))
    what = [*class_token_parts(6, 6), SOME]
    live = site_means(mini, pixels, ablation_sites(SOME))
    found = mm.ablate(
        mini, pixels, labels, classes, means, what, live_means=live, normalize=True, batch_size=4
    )
    parts = mm.decompose(mini, pixels, class_token=True, normalize=True)
    unit = torch.nn.functional.normalize(classes, dim=1)
    for one, accuracy in zip(what, found.direct, strict=True):
        hits = (ablate_direct(parts, means, one) @ unit.T).argmax(1) == labels
        assert accuracy.value == pytest.approx(float(hits.float().mean()))
    assert found.live[:2] == (None, None) and found.live[2] is not None


def test_class_token_ablations_that_cannot_be_are_refused(mini, pixels):
    alone, _ = class_token_parts(6, 6)
    plain = mm.decompose(mini, [pixels])
    with pytest.raises(ShapeMismatch, match=r"got means without them: .*class_token=True"):
        mm.ablate(mini, pixels, torch.zeros(6, dtype=torch.long), torch.randn(2, 256), plain, [alone])
    with pytest.raises(ShapeMismatch, match="got parts without them"):
        ablate_direct(mm.decompose(mini, pixels), mm.decompose(mini, [pixels], class_token=True), alone)
    with pytest.raises(ShapeMismatch, match="only a part of what heads write: use ablate_direct"):
        mean_edits(alone, {})
    with pytest.raises(ShapeMismatch, match='expected "all" or "cls", got \'patches\''):
        Parts("patches", heads=[(0, 0)], tokens="patches")
    import open_clip

    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16, "pool_type": "avg"}  # fmt: skip
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    pooled = mm.HookedCLIP(open_clip.CLIP(24, vision, text).eval())
    with pytest.raises(NoExactSum, match="read from one token, got an image tower that pools"):
        mm.decompose(pooled, torch.randn(1, 3, 32, 32), class_token=True)


def test_what_texts_get_from_the_token_that_is_read(mini):
    tokens = mini.tokenizer(["a red dog", "two very small blue boats on a lake"])
    parts = mm.decompose(mini, texts=tokens, class_token=True, tokens=True)
    for row, at in enumerate(tokens.argmax(1).tolist()):
        torch.testing.assert_close(parts.class_token[row], parts.tokens[row, :, :, at], rtol=1e-4, atol=1e-6)
