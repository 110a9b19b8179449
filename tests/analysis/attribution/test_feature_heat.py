"""Heat of features planted in the patches: which cell lights up, and where it lies in the original image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

import mmhooks as mm
from mmhooks.analysis.attribution.feature_heat import Heat
from mmhooks.analysis.attribution.heat_inside import heat_on_objects, inside_mask, pointing_hit
from mmhooks.analysis.attribution.pointing_game import pointing_game
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.report.blocks import Gallery
from mmhooks.report.heat import heat_gallery

SITE, NORM = "image.patches", T.Normalize([0.5] * 3, [0.5] * 3)


def colours(module):
    """Makes the first three channels of a patch embedding the means of red, green and blue."""
    with torch.no_grad():
        module.weight.zero_()
        if module.bias is not None:
            module.bias.zero_()
        for c in range(3):
            module.weight[c, c] = 1 / module.weight[c, c].numel()


def redness(width):
    """Features 0 to 2: how much redder, greener, bluer a vector is than grey."""
    head = mm.ReLUSAE(width, 3, normalize_input=False)
    with torch.no_grad():
        head.W_enc.zero_()
        head.W_enc[:3, :3] = 1.5 * torch.eye(3) - 0.5
        for name in ("b_enc", "b_pre"):
            getattr(head, name).zero_()
    return head.eval()


def vit(size=(48, 48), registers=2):
    """A ViT of timm with a class token and registers, 8 pixels a patch."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        size, 8, num_classes=0, embed_dim=32, depth=1, num_heads=2, reg_tokens=registers
    ).eval()
    colours(model.patch_embed.proj)
    with torch.no_grad():
        model.pos_embed.zero_()
    return model


def scene(size, box, colour=(230, 20, 20)):
    """One rectangle on grey, and its mask."""
    image = Image.new("RGB", size, (128, 128, 128))
    image.paste(colour, box)
    mask = torch.zeros(size[1], size[0], dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return image, mask


def open_clip(size, **options):
    from open_clip.transform import image_transform

    return image_transform(size, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3, **options)


def clip_processor():
    from transformers import CLIPImageProcessor

    from mmhooks.models.processing import Preprocess

    made = CLIPImageProcessor(
        size={"shortest_edge": 54}, crop_size=48, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Preprocess(made)


# preprocess -> height and width of what the model reads
PREPROCESSES = {
    "resize and crop": (lambda: open_clip(48), (48, 48)),
    "resize and pad": (lambda: open_clip(48, resize_mode="longest", fill_color=(128,) * 3), (48, 48)),
    "squash": (lambda: open_clip(48, resize_mode="squash"), (48, 48)),
    "crop, not square": (lambda: open_clip((48, 80)), (48, 80)),
    "CLIP's processor": (clip_processor, (48, 48)),
    "unknown": (lambda: lambda image: open_clip(48)(image.crop((20, 0, *image.size))), (48, 48)),
}


@pytest.mark.parametrize("site", [SITE, "image.blocks.0.resid_pre"])
@pytest.mark.parametrize("name", PREPROCESSES)
def test_a_planted_feature_lights_the_cell_where_the_object_is(name, site):
    make, size = PREPROCESSES[name]
    preprocess, head = make(), redness(32)
    model = mm.HookedVision(vit(size), preprocess)
    for box in ((100, 40, 140, 80), (150, 90, 190, 130)):
        image, mask = scene((240, 180), box)
        found = mm.heat(head, model, image, 0, site)
        assert found.values.shape == (size[0] // 8, size[1] // 8)
        assert (found.feature, found.site, found.head) == (0, site, "sae")
        # The witness: each cell's mean redness in what the model reads, patch by patch.
        pixels = preprocess(image)
        red = pixels.unflatten(1, (-1, 8)).unflatten(3, (-1, 8)).mean((2, 4))
        expected = (red[0] - red.mean(0)).mul(1.5).clamp_min(0)
        assert torch.allclose(found.values, expected, atol=1e-5)
        # And in the original: cells that light up overlap the object, all others do not.
        boxes = found.boxes
        over = (
            (boxes[..., 2] > box[0])
            & (boxes[..., 0] < box[2])
            & (boxes[..., 3] > box[1])
            & (boxes[..., 1] < box[3])
        )
        strong = found.values > 0.1 * found.values.max()
        assert bool((over | ~strong).all()) and bool(strong.any())
        middle = boxes[..., :2].add(boxes[..., 2:]) / 2
        inside = (middle > torch.tensor(box[:2])).all(-1) & (middle < torch.tensor(box[2:])).all(-1)
        assert bool((strong | ~inside).all())
        assert pointing_hit(found, mask)
        share = inside_mask(found, mask)
        assert share == pytest.approx(share_by_points(found, box), abs=0.01)
        assert share > 5 * inside_mask(spread(found), mask)  # of chance
        other = mm.heat(head, model, image, 1, site)
        assert not (other.values > 0.05).any()


def share_by_points(heat, box, n=120):
    """The share inside a rectangle, by a lattice of points in each cell."""
    steps, inside = (torch.arange(n) + 0.5) / n, torch.zeros_like(heat.values)
    for row in range(heat.values.shape[0]):
        for column in range(heat.values.shape[1]):
            left, top, right, bottom = heat.boxes[row, column].tolist()
            x, y = left + (right - left) * steps, top + (bottom - top) * steps
            hits = ((x > box[0]) & (x < box[2]))[:, None] & ((y > box[1]) & (y < box[3]))
            inside[row, column] = hits.float().mean()
    return float((heat.values * inside).sum() / heat.values.sum())


def spread(heat):
    """The same grid with an activation of 1 everywhere."""
    return Heat(
        torch.ones_like(heat.values),
        heat.tops_bottoms,
        heat.lefts_rights,
        heat.image,
        0,
        heat.site,
        heat.head,
    )


def test_boxes_by_hand():
    preprocess = T.Compose([T.Resize(48), T.CenterCrop(48), T.ToTensor(), NORM])
    model = mm.HookedVision(vit(), preprocess)
    image, _ = scene((192, 96), (0, 0, 10, 10))
    found = mm.heat(redness(32), model, image, 0, SITE)  # halved; 24 columns fall off at each side
    assert found.boxes.shape == (6, 6, 4)
    assert found.boxes[0, 0].tolist() == [48, 0, 64, 16] and found.boxes[5, 2].tolist() == [80, 80, 96, 96]
    assert found.extent == (48, 0, 144, 96)
    assert found.seen.sum() == 96 * 96 and not found.seen[:, :48].any()
    assert not (found.values > 0.01).any()  # the object was cropped away
    padded = mm.heat(
        redness(32), mm.HookedVision(vit(), open_clip(48, resize_mode="longest")), image, 0, SITE
    )
    assert padded.extent == (0, -48, 192, 144) and padded.seen.all()


def test_maps_share_the_pixels_evenly():
    import timm as library

    torch.manual_seed(0)
    model = library.create_model("test_convnext", num_classes=0).eval()
    colours(model.stem[0])
    hooked = mm.HookedVision(
        model, T.Compose([T.Resize((64, 96), T.InterpolationMode.NEAREST), T.ToTensor(), NORM])
    )
    image, mask = scene((300, 200), (125, 75, 175, 125))  # 4 x 4 cells
    with hooked.caching(SITE) as cache:
        hooked.encode_image(hooked.preprocess(image)[None])
    channels = cache[SITE].shape[1]
    found = mm.heat(redness(channels), hooked, image, 0, SITE)
    assert found.values.shape == cache[SITE].shape[2:] == (16, 24)
    assert found.boxes[0, 0].tolist() == pytest.approx([0, 0, 12.5, 12.5])
    assert pointing_hit(found, mask) and inside_mask(found, mask) == pytest.approx(1, abs=1e-4)
    lit = (found.values > 0.1).nonzero()
    assert lit.tolist() == [[row, column] for row in range(6, 10) for column in range(10, 14)]
    assert torch.equal(found.values, redness(channels).encode(cache[SITE].movedim(1, -1))[0, ..., 0])


def test_at_pixels_and_on_image():
    edges = torch.tensor([[-2.0, 2.0], [2.0, 6.0], [6.0, 10.0]])
    image = Image.new("RGB", (9, 4), (10, 20, 30))
    found = Heat(torch.arange(9.0).view(3, 3), edges[:, :] - 2, edges, image, 0, SITE, "sae")
    # Rows of the image lie in cells [0, 4): the second row of the grid (from 0 to 4).
    expected = torch.tensor([[3, 3, 4, 4, 4, 4, 5, 5, 5]] * 4).float()
    assert torch.equal(found.at_pixels(), expected) and found.seen.all()
    # Between the middles 0, 4 and 8 of the columns, and 2 of the row (-2, 2, 6 of all).
    across = 3 + (torch.arange(9) + 0.5).clamp(0, 8) / 4
    down = (torch.arange(4) + 0.5 - 2) / 4 * 3
    assert torch.allclose(found.at_pixels(smooth=True), across[None] + down[:, None])
    cropped = Heat(torch.tensor([[0.0, 5.0]]), edges[:1] + 2, edges[1:], image, 0, SITE, "sae")
    assert cropped.at_pixels()[0].tolist() == [0, 0, 0, 0, 0, 0, 5, 5, 5]
    assert cropped.seen[0].tolist() == [False, False] + [True] * 7
    drawn = np.asarray(cropped.on_image(strength=1.0))
    assert drawn.shape == (4, 9, 3) and (drawn[:, :2] == (10, 20, 30)).all()
    assert len(np.unique(drawn[:, 2:6].reshape(-1, 3), axis=0)) == 1
    assert (drawn[:, 6] != drawn[:, 5]).any() and cropped.peak == (8, 2)
    weaker = np.asarray(cropped.on_image(strength=1.0, span=(0.0, 50.0)))
    assert weaker[0, 8].sum() < drawn[0, 8].sum()


def test_inside_a_mask_by_hand():
    edges = torch.tensor([[-2.0, 2.0], [2.0, 6.0]])
    image = Image.new("RGB", (6, 6))
    found = Heat(torch.tensor([[1.0, 0.0], [-3.0, 3.0]]), edges, edges, image, 0, SITE, "sae")
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1:4] = True
    # The first cell: 1 of 4 rows and 2 of 4 columns lie in the image's part of the mask; the last one: 2 of 4 rows.
    assert inside_mask(found, mask) == pytest.approx((1 * 1 / 4 * 2 / 4 + 3 * 2 / 4) / 4)
    assert found.peak == (4, 4) and not pointing_hit(found, mask)
    mask[4] = True
    assert pointing_hit(found, mask)
    corner = Heat(torch.tensor([[9.0, 1.0]]), edges[:1] - 1, edges, image, 0, SITE, "sae")
    assert corner.peak == (0, -1) and not pointing_hit(corner, ~torch.zeros_like(mask))  # on padding
    with pytest.raises(ShapeMismatch, match=r"expected one of the image's size, \[6, 6\], got \[5, 6\]"):
        inside_mask(found, mask[1:])
    dead = Heat(torch.zeros(2, 2), edges, edges, image, 7, SITE, "sae")
    for measure in (inside_mask, pointing_hit):
        with pytest.raises(
            ShapeMismatch, match="got feature 7 of 'sae' at 'image.patches', which is active nowhere"
        ):
            measure(dead, mask)


def test_over_many_images():
    edges = torch.tensor([[0.0, 2.0], [2.0, 4.0]])
    grids = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[1.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    image, mask = Image.new("RGB", (4, 4)), torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, :2] = True
    heats = [Heat(values, edges, edges, image, 0, SITE, "sae") for values in grids]
    found = heat_on_objects(heats, [mask] * 3)
    assert found.share.value == pytest.approx((1 + 0.25) / 2) and found.share.n == 2
    assert found.hits.value == 0.5 and found.hits.n == 2
    assert found.chance == 0.25 and found.images == 3
    assert found.share.low == 0.25 and found.share.high == 1
    (row,) = found.table()
    assert row["chance"] == 0.25 and row["images"] == 3
    with pytest.raises(ShapeMismatch, match="one mask for each heat, got 3 heats and 2 masks"):
        heat_on_objects(heats, [mask] * 2)
    with pytest.raises(ShapeMismatch, match="got one that is silent in all 1"):
        heat_on_objects(heats[2:], [mask])


def test_several_images_and_an_attached_head():
    model, head = mm.HookedVision(vit(), open_clip(48)), redness(32)
    images = [scene((96 + 24 * n, 96), (40, 30, 70, 60))[0] for n in range(3)]
    with pytest.raises(MMHooksError, match=r"attached at one site, got one attached nowhere; give site="):
        mm.heat(head, model, images, 0)
    model.attach(head, at=[SITE])
    many = mm.heat(head, model, images, 0, batch=2)
    assert [heat.image for heat in many] == images
    for image, heat in zip(images, many, strict=True):
        for one in (
            mm.heat(head, model, image, 0, SITE),
            mm.heat("sae", model, image, 0),
            mm.heat(f"{SITE}.sae", model, image, 0),
        ):
            assert torch.allclose(heat.values, one.values, atol=1e-6) and torch.equal(heat.boxes, one.boxes)
    both = mm.heat(head, model, images, [2, 0], batch=2)
    assert [*both] == [2, 0] and all(
        torch.equal(a.values, b.values) for a, b in zip(both[0], many, strict=True)
    )
    assert [heat.feature for heat in both[2]] == [2, 2, 2]
    lone = mm.heat(head, model, images[0], np.array([0]))
    assert [*lone] == [0] and torch.allclose(lone[0].values, many[0].values, atol=1e-6)
    with model.hooks(mm.Zero(at=SITE, tokens="patch")):
        assert not mm.heat(head, model, images[0], 0).values.any()
    model.attach(head, at=["image.blocks.0.resid_pre"])
    with pytest.raises(MMHooksError, match=r"attached image.patches, image.blocks.0.resid_pre; give site="):
        mm.heat(head, model, images, 0)
    masks = torch.stack([scene((96, 96), (40, 30, 70, 60))[1]])
    game = pointing_game(many[0].at_pixels()[None], masks)
    assert game.rate.value == 1 and game.energy > 0.6


def test_what_has_no_grid_is_refused():
    model, head, image = mm.HookedVision(vit(), open_clip(48)), redness(32), Image.new("RGB", (50, 50))
    for site in ("image.embed", "image.blocks.0.mlp.pre"):
        with pytest.raises(
            ShapeMismatch, match="site with patches" if site == "image.embed" else "width 32, site"
        ):
            mm.heat(head, model, image, 0, site)
    with pytest.raises(ShapeMismatch, match="features of head 'sae'"):
        mm.heat(head, model, image, 3, SITE)
    with pytest.raises(ShapeMismatch, match="features of head 'sae': expected at least one, got none"):
        mm.heat(head, model, image, [], SITE)
    with pytest.raises(MMHooksError, match="expected PIL images, got Tensor"):
        mm.heat(head, model, torch.zeros(1, 3, 48, 48), 0, SITE)
    with pytest.raises(MMHooksError, match="expected PIL images, got none"):
        mm.heat(head, model, [], 0, SITE)
    with pytest.raises(MMHooksError, match=r"name of an attached one \(none\), got 'sae'"):
        mm.heat("sae", model, image, 0, SITE)
    with pytest.raises(MMHooksError, match="the name of one site of the model, got 'image.blocks"):
        mm.heat(head, model, image, 0, "image.blocks.0.*")
    with pytest.raises(MMHooksError, match="need the model's preprocess"):
        mm.heat(head, mm.HookedVision(vit()), image, 0, SITE)
    with pytest.raises(MMHooksError, match="expected a mm.HookedCLIP or mm.HookedVision of images"):
        mm.heat(head, mm.HookedModel(vit()), image, 0, SITE)


def test_the_gallery_shows_the_strongest_images_on_one_scale():
    model, head = mm.HookedVision(vit(), open_clip(48)), redness(32)
    shades = [(230, 20, 20), (160, 110, 110), (20, 20, 230), (200, 60, 60)]
    images = [scene((96, 96), (40, 30, 70, 60), shade)[0] for shade in shades]
    heats = {f"feature {n}": shown for n, shown in mm.heat(head, model, images, [0, 1], SITE).items()}
    gallery = heat_gallery(heats, "Colours.", top=2, side=64)
    assert isinstance(gallery, Gallery) and gallery.caption == "Colours."
    red, green = gallery.cards
    assert [card.title for card in gallery.cards] == ["feature 0", "feature 1"]
    assert len(red.images) == 2 and not green.images and green.empty == "active in no image"
    strongest = [float(heats["feature 0"][n].values.max()) for n in (0, 3)]
    assert [image.alt for image in red.images] == [f"activation up to {value:.3g}" for value in strongest]
    assert red.facts == f"image.patches; active in 3 of 4 images, up to {strongest[0]:.3g}"
    with pytest.raises(ShapeMismatch, match="features with at least one image each"):
        heat_gallery({"feature 0": []})
