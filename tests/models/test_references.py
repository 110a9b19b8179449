"""Reference pictures as conditioners, and the modality of the conditioner's features."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import mmhooks as mm
from mmhooks.analysis.measures.conditioner_mds import conditioner_mds
from mmhooks.errors import MissingWeights, MMHooksError, ShapeMismatch
from mmhooks.models.diffusion.conditioner import conditioner_sides, joint_sides
from mmhooks.models.diffusion.references import (
    caption_embeds,
    conditioner,
    image_embeds,
    text_end,
    text_projection,
    token_norm,
)

from .pipelines import build, draw, matching_clip, text_encoder, tokenizer


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = mm.HookedDiffusion(build(kind))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(5)
    return [Image.fromarray(torch.randint(0, 255, (24, 20, 3), dtype=torch.uint8).numpy()) for _ in range(3)]


def with_projection(sd, d_joint):
    """The model that the pipeline's text encoder was cut out of."""
    whole = text_encoder(sd.unet.config.cross_attention_dim, projection=d_joint)
    missing = whole.text_model.load_state_dict(sd.pipe.text_encoder.state_dict(), strict=False).missing_keys
    assert not missing
    return whole


def test_projected(pipes, pictures):
    sd = pipes("sd2")  # 32 wide, the joint space has 16
    whole = with_projection(sd, 16)
    ref = mm.reference(sd, pictures, projection=whole)
    embeds = image_embeds(sd, pictures)
    assert ref.shape == (3, 1, 32) and embeds.shape == (3, 16)
    # Its text embedding is the picture's, and no hidden state of less norm has that one.
    matrix = whole.text_projection.weight.T
    torch.testing.assert_close(
        F.cosine_similarity(ref[:, 0] @ matrix, embeds), torch.ones(3), atol=1e-5, rtol=1e-5
    )
    inside = torch.linalg.lstsq(matrix, ref[:, 0].T).solution
    torch.testing.assert_close(matrix @ inside, ref[:, 0].T, atol=1e-4, rtol=1e-4)
    norms = conditioner(sd, "a photo")[0, 1:].norm(dim=-1)
    torch.testing.assert_close(ref.norm(dim=-1), norms.median().expand(3, 1))
    assert token_norm(sd) == pytest.approx(float(norms.median()))
    torch.testing.assert_close(mm.reference(sd, pictures[0], projection=matrix.detach()), ref[:1])

    # Strength 1 on the conditional half: the prompt no longer matters, the picture does.
    def drawn(prompt, toward, strength):
        with sd.hooks(mm.Interpolate(toward=toward, strength=strength, at="text.cond", guidance="cond")):
            return draw(sd.pipe, prompt)

    torch.testing.assert_close(
        drawn("a red panda", ref[:1], 1.0), drawn("blue kite", ref[:1], 1.0), atol=1e-4, rtol=1e-3
    )
    assert not torch.equal(drawn("a red panda", ref[:1], 1.0), drawn("a red panda", ref[1:2], 1.0))
    assert torch.equal(drawn("a red panda", ref[:1], 0.0), draw(sd.pipe))
    both = drawn(["a red panda"] * 2, ref[:2], 0.5)  # a reference a row
    assert not torch.equal(both[0], both[1])


def test_naive(pipes, pictures):
    sd = pipes("sd1")  # 16 wide, as the joint space
    ref = mm.reference(sd, pictures, mode="naive", norm=3.0)
    torch.testing.assert_close(ref[:, 0], F.normalize(image_embeds(sd, pictures), dim=-1) * 3)
    with pytest.raises(ShapeMismatch, match="has 16 dimensions, the U-Net reads 32.*projected"):
        mm.reference(pipes("sd2"), pictures, mode="naive")


def test_of_an_open_clip_model(pipes, pictures):
    """mini's picture tower and projection, for a pipeline on mini's text tower."""
    clip = mm.load("mini")
    sd = pipes("sd1")
    with pytest.raises(ShapeMismatch, match=r"from 16 dimensions.*\(192, 256\)"):
        mm.reference(sd, pictures, clip=clip)
    from .pipelines import unet

    wide = build("sd1")
    wide.register_modules(text_encoder=text_encoder(192), unet=unet(192))
    stranger = mm.HookedDiffusion(wide)
    with pytest.raises(MMHooksError, match=r"not the model whose text tower the pipeline uses.*\(520, 192\)"):
        mm.reference(stranger, pictures, clip=clip)
    tokens = wide.text_encoder.get_input_embeddings()
    tokens.weight = clip.model.token_embedding.weight
    ref = mm.reference(stranger, pictures, clip=clip)
    assert ref.shape == (3, 1, 192)
    want = clip.encode_image(torch.stack([clip.preprocess(p) for p in pictures]))
    solved = torch.linalg.lstsq(clip.model.text_projection.T, want.T).solution.T
    torch.testing.assert_close(F.cosine_similarity(ref[:, 0], solved), torch.ones(3), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        half = tokens.weight.half().float()
    tokens.weight = torch.nn.Parameter(half)
    assert text_projection(stranger, clip).shape == (192, 256)  # stored in half precision: the same model
    tokens.weight = torch.nn.Parameter(half + 0.1)
    with pytest.raises(MMHooksError, match="rows differ"):
        text_projection(stranger, clip)


def test_unclip(pipes, pictures):
    sd = pipes("unclip")
    clip = type("Clip", (), {})()
    clip.preprocess, clip.device, clip.dtype = (
        (lambda p: torch.zeros(3, 4, 4)),
        torch.device("cpu"),
        torch.float32,
    )
    clip.encode_image = lambda x: torch.arange(16.0).expand(len(x), 16)
    ref = mm.reference(sd, pictures[0], mode="unclip", clip=clip)
    assert torch.equal(ref, torch.arange(16.0)[None])
    plain = draw(sd.pipe)
    original = sd.pipe.noise_image_embeddings
    for guidance in (1.0, 4.0):

        def by_hand(image_embeds, **options):
            return original(image_embeds=image_embeds + 0.6 * (ref - image_embeds), **options)

        sd.pipe.noise_image_embeddings = by_hand
        try:
            want = draw(sd.pipe, guidance=guidance)
        finally:
            del sd.pipe.noise_image_embeddings
        with (
            sd.hooks(mm.Interpolate(toward=ref, strength=0.6, at="image.embed")),
            sd.caching("image.*") as cache,
        ):
            assert torch.equal(draw(sd.pipe, guidance=guidance), want)
        with sd.hooks(mm.Interpolate(toward=ref, strength=0.6, at="image.embed", guidance="cond")):
            assert torch.equal(
                draw(sd.pipe, guidance=guidance), want
            )  # the unconditional half is zeros, made later
        assert cache["image.embed"].shape == (1, 16) and cache["image.cond"].shape == (
            3,
            1 + (guidance > 1),
            32,
        )
    assert torch.equal(draw(sd.pipe), plain) and "noise_image_embeddings" not in vars(sd.pipe)
    with pytest.raises(MissingWeights, match="has no image tower"):
        mm.reference(sd, pictures[0], mode="unclip")
    with pytest.raises(MMHooksError, match="for StableUnCLIPPipeline"):
        mm.reference(pipes("sd1"), pictures[0], mode="unclip")


def test_what_does_not_fit(pipes, pictures):
    sd = pipes("sd2")
    with pytest.raises(MissingWeights, match="no text projection of its own"):
        mm.reference(sd, pictures)
    with pytest.raises(ShapeMismatch, match="maps to 8 dimensions, the image tower gives 16"):
        mm.reference(sd, pictures, projection=with_projection(sd, 8))
    with pytest.raises(MissingWeights, match="Linear has no text_projection"):
        text_projection(sd, torch.nn.Linear(2, 2))
    with pytest.raises(MMHooksError, match="text and text_2"):
        sdxl = pipes("sdxl")
        mm.reference(sdxl, pictures, mode="naive", clip=mm.load("mini"))


def test_modality_of_the_image_embedding(pipes, pictures, tmp_path):
    """Both sides in the joint space, by hand, and features of a head there."""
    sd = mm.HookedDiffusion(build("unclip"))
    pipe = sd.pipe
    pipe.prior.clip_std.data.fill_(1.0)  # else the prior gives zeros
    clip = mm.load(matching_clip(pipe.prior_text_encoder, tmp_path / "clip"))
    pairs = folder_of(tmp_path / "pairs", pictures, ["a red panda", "blue kite", "house"] * 3)
    images, texts = conditioner_sides(sd, pairs, mode="unclip", clip=clip, batch_size=4, progress=False)
    pixels = torch.stack([clip.preprocess(pair.image) for pair in pairs])
    with torch.no_grad():
        torch.testing.assert_close(images, clip.encode_image(pixels))
        ids = tokenizer()(pairs.texts, padding="max_length", return_tensors="pt").input_ids
        said = pipe.prior_text_encoder(ids).text_embeds
        torch.testing.assert_close(said, clip.model.encode_text(ids))  # one joint space with the pictures
    lengths = images.norm(dim=1).sort().values
    torch.testing.assert_close(texts.norm(dim=1), lengths[4].expand(9))
    torch.testing.assert_close(F.cosine_similarity(texts, said), torch.ones(9))
    # What the pipeline itself gives its prior for these words.
    prior = pipe._encode_prior_prompt(list(pairs.texts), "cpu", 1, False)[0]
    torch.testing.assert_close(caption_embeds(sd, pairs.texts, clip=clip), prior)

    torch.manual_seed(0)
    sae = mm.TopKSAE(16, 32, 4)
    scored = conditioner_mds((images, texts), head=sae, min_fires=1)
    group = max(scored.groups, key=len)
    toward = sae.encode(unit(images[:1]))
    original = pipe.noise_image_embeddings

    def by_hand(image_embeds, **options):
        z, length = sae.encode(unit(image_embeds)), image_embeds.norm(dim=1, keepdim=True)
        moved = torch.where(group.mask, z + 0.7 * (toward - z), z)
        return original(image_embeds=image_embeds + length * ((moved - z) @ sae.W_dec), **options)

    pipe.noise_image_embeddings = by_hand
    try:
        with torch.no_grad():
            want = draw(pipe)
    finally:
        del pipe.noise_image_embeddings
    sd.attach(sae, at="image.embed")
    try:
        at = "image.embed.sae.latents"
        with sd.hooks(mm.Interpolate(group, toward=toward, strength=0.7, at=at, guidance="cond")):
            got = draw(pipe)
    finally:
        sd.detach()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got - draw(pipe)).abs().max() > 1e-3

    torch.manual_seed(7)
    other = mm.load(matching_clip(text_encoder(16, projection=16), tmp_path / "other"))
    with pytest.raises(MMHooksError, match="not the model whose text tower the pipeline uses"):
        conditioner_sides(sd, pairs, mode="unclip", clip=other, progress=False)
    with pytest.raises(MMHooksError, match="no prior with a text encoder"):
        caption_embeds(pipes("sd1"), ["a red panda"])


def unit(rows):
    return F.normalize(rows, dim=-1)  # as a head reads them


def folder_of(folder, pictures, captions):
    """Pairs of captions and pictures, each picture turned once more when its turn comes again."""
    folder.mkdir()
    rows = ["file_name,text"]
    for n, caption in enumerate(captions):
        pictures[n % 3].rotate(90 * (n // 3)).save(folder / f"{n}.png")
        rows.append(f"{n}.png,{caption}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return mm.data.pairs(folder)


@pytest.mark.parametrize("tokens", ["end", "mean"])
def test_modality_of_the_conditioner(pipes, pictures, tokens, tmp_path):
    sd = pipes("sd1")
    pairs = folder_of(tmp_path / "pairs", pictures, ["a red panda", "blue kite", "house"] * 3)
    whole = with_projection(sd, 16)
    sides = conditioner_sides(sd, pairs, projection=whole, tokens=tokens, batch_size=4, progress=False)
    images, texts = sides
    assert images.shape == texts.shape == (9, 16)
    for n in range(9):
        pair = pairs[n]
        torch.testing.assert_close(images[n : n + 1], mm.reference(sd, pair.image, projection=whole)[:, 0])
        cond, end = conditioner(sd, pair.text)[0], int(text_end(sd, [pair.text]))
        want = cond[end] if tokens == "end" else cond[1 : end + 1].mean(0)
        torch.testing.assert_close(texts[n], want, atol=1e-5, rtol=1e-5)
    if tokens == "end":  # the state that the projection reads
        ids = sd.pipe.tokenizer([pair.text], padding="max_length", return_tensors="pt").input_ids
        torch.testing.assert_close(texts[8:] @ whole.text_projection.weight.T, whole(ids).text_embeds)
    raw = conditioner_mds(sides, min_fires=1)
    torch.testing.assert_close(raw.R, mm.mds(images, texts, kind="abs", min_fires=1).R)
    torch.manual_seed(0)
    sae = mm.TopKSAE(16, 32, 4)
    scored = conditioner_mds(sides, head=sae, min_fires=1)
    torch.testing.assert_close(
        scored.R, mm.mds(sae.encode(unit(images)), sae.encode(unit(texts))).R, equal_nan=True
    )
    sd.attach(sae, at="text.cond")
    try:
        group = next(g for g in scored.groups if len(g))
        toward = sae.encode(unit(images[:1]))[:, None]
        with sd.hooks(mm.Interpolate(group, toward=toward, strength=0.5, guidance="cond")):
            draw(sd.pipe)
        with sd.hooks(mask=group):
            draw(sd.pipe)
    finally:
        sd.detach()
    with pytest.raises(MMHooksError, match="reads 16 dimensions, as the conditioner has, got 8"):
        conditioner_mds(sides, head=mm.TopKSAE(8, 32, 4))


def test_joint_sides_are_clips_own_unit_embeddings():
    clip, pairs = mm.load("mini"), mm.data.pairs("mini", limit=6)
    images, texts = joint_sides(pairs, clip, batch_size=4, progress=False)
    with torch.no_grad():
        pixels = torch.stack([clip.preprocess(pairs.image(i)) for i in range(6)])
        own = (
            clip.encode_image(pixels, normalize=True),
            clip.encode_text(clip.tokenizer(pairs.texts), normalize=True),
        )
    for found, expected in zip((images, texts), own, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(MMHooksError, match="preprocess= and tokenizer="):
        joint_sides(pairs, mm.HookedCLIP(clip.model))
