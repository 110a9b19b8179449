"""The embedded models and heads are really trained, load strictly, and say what they are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.models import mini, zoo


@pytest.mark.parametrize("name", zoo.EMBEDDED)
def test_an_embedded_model_ranks_held_out_drawings_far_above_chance(name: str) -> None:
    model = mm.load(name)
    pairs = mm.data.pairs("mini", split="heldout_pictures", progress=False)
    with torch.no_grad():
        image = model.encode_image(torch.stack([model.preprocess(pair.image) for pair in pairs]))
        text = model.encode_text(model.tokenizer(pairs.texts))
    found = mm.retrieval(image, text)
    assert found.image_to_text[10].low > 5 * found.chance[10]


@pytest.mark.parametrize("name", zoo.EMBEDDED)
def test_a_card_names_every_source_and_the_held_out_numbers(name: str) -> None:
    card = zoo.card(name)
    assert all(source["licence"] and source["attribution"] for source in card["data"])
    unseen = next(source for source in card["data"] if source["source"] == "twemoji")
    assert unseen["trained_on"] == 0
    for row in card["retrieval"].values():
        value = row["image_to_text"]["R@10"]
        assert row["n"] >= 600 and value["low"] > row["chance"]["R@10"]
    assert card["parameters"] == sum(p.numel() for p in mini.build().parameters())


def test_embedded_heads_fit_their_model() -> None:
    model = mm.load("mini")
    assert {"mini/sae", "mini/ncl"} <= set(zoo.embedded_heads())
    for name in ("mini/sae", "mini/ncl"):
        head = mm.load_head(name)
        assert (head.d_in, head.n_features) == (mini.EMBED_DIM, 1024)
        model.attach(head, at=["image.embed", "text.embed"])
    assert mm.load_head("mini/ncl").id == head.id


def test_a_directory_is_a_head_too(tmp_path) -> None:
    head = mm.TopKSAE(8, 32, k=4)
    head.save(tmp_path / "mine")
    assert mm.load_head(tmp_path / "mine").id == head.id


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mm.load("mnii"), MMHooksError, ["mnii", "mini"]),
        (lambda: mm.load("ViT-B-23"), MMHooksError, ["ViT-B-32"]),
        (lambda: mm.load("ViT-B-32", pretrained="opneai"), MissingWeights, ["opneai", "openai"]),
        (lambda: mm.load("mini", pretrained="openai"), MMHooksError, ["embedded", "openai"]),
        (lambda: mm.load_head("mini/sea"), MissingWeights, ["mini/sea", "mini/sae"]),
        (lambda: mm.load_head("nowhere"), MissingWeights, ["nowhere", "directory"]),
        (lambda: zoo.card("maxi"), MissingWeights, ["maxi", "mini"]),
    ],
)
def test_wrong_names_are_told_with_the_way_out(call, error, words) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


def test_weights_that_cannot_be_fetched_are_one_clear_error(monkeypatch) -> None:
    import open_clip

    def offline(*args, **kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", offline)
    with pytest.raises(MissingWeights, match="openai.*without network"):
        mm.load("ViT-B-32", pretrained="openai")


def test_an_installation_without_weights_says_so(tmp_path, monkeypatch) -> None:
    shutil.copytree(
        zoo.ASSETS / "mini", tmp_path / "mini", ignore=shutil.ignore_patterns("model.safetensors")
    )
    monkeypatch.setattr(zoo, "ASSETS", tmp_path)
    with pytest.raises(MissingWeights, match="install mmhooks again"):
        mm.load("mini")


def test_a_local_checkpoint_of_an_open_clip_model_loads_by_path(tmp_path) -> None:
    import open_clip

    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}  # fmt: skip
    (tmp_path / "mmhooks-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "mmhooks-tiny.json")
    model = open_clip.create_model("mmhooks-tiny")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = mm.load("mmhooks-tiny", pretrained=str(tmp_path / "weights.pt"))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.encode_image(pixels), model.eval().encode_image(pixels))
