"""The embedded models and heads are really trained, load strictly, and say what they are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

import mmhooks as mm
from mmhooks.data.synthetic import words
from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.heads.hub import embedded_heads
from mmhooks.models.embedded import mini
from mmhooks.utils.assets import ASSETS, EMBEDDED, card


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_model_ranks_held_out_drawings_far_above_chance(name: str) -> None:
    model = mm.load(name)
    pairs = mm.data.pairs("mini", split="heldout_pictures", progress=False)
    with torch.no_grad():
        image = model.encode_image(torch.stack([model.preprocess(pair.image) for pair in pairs]))
        text = model.encode_text(model.tokenizer(pairs.texts))
    found = mm.retrieval(image, text)
    assert found.image_to_text[10].low > 5 * found.chance[10]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_card_names_every_source_and_the_held_out_numbers(name: str) -> None:
    known = card(name)
    assert all(source["licence"] and source["attribution"] for source in known["data"])
    unseen = next(source for source in known["data"] if source["source"] == "twemoji")
    assert unseen["trained_on"] == 0
    for row in known["retrieval"].values():
        value = row["image_to_text"]["R@10"]
        assert row["n"] >= 600 and value["low"] > row["chance"]["R@10"]
    model = mini.build(reads=name == "mini-reader")
    assert known["parameters"] == sum(p.numel() for p in model.parameters())


# Short names of drawings that mini-reader was taught, none in DejaVu.
TAUGHT = ("apple", "banana", "beer", "bicycle", "bus", "cactus", "camel", "castle", "cloud", "cookie", "cow", "crab",
          "dolphin", "door", "fire", "goat", "horse", "key", "koala", "melon", "monkey", "mouse", "pear", "pig",
          "rainbow", "rocket", "rose", "shield", "snake", "violin", "whale", "wolf")  # fmt: skip


def _pictures_of_words(model) -> torch.Tensor:
    from PIL import Image

    pictures = []
    for i, word in enumerate(TAUGHT):
        font = words.DEJAVU[i % 4]
        size = min(15.0, words.largest_size(word, font, 60, 40))
        how = words.TextStyle(font, size, (0.5, 0.3 + 0.05 * (i % 9)))
        pixels = words.write(torch.ones(3, 64, 64), word, how)
        pictures.append(model.preprocess(Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())))
    return torch.stack(pictures)


def _own_word_first(name: str) -> int:
    model = mm.load(name)
    with torch.no_grad():
        image = F.normalize(model.encode_image(_pictures_of_words(model)), dim=-1)
        text = F.normalize(model.encode_text(model.tokenizer([f"the word {w}" for w in TAUGHT])), dim=-1)
    return int(((image @ text.T).argmax(1) == torch.arange(len(TAUGHT))).sum())


def test_mini_reader_reads_words_in_a_font_it_never_saw_and_mini_does_not() -> None:
    by_chance = 5  # of 32; more by chance has p < 2e-3
    assert _own_word_first("mini") <= by_chance
    assert _own_word_first("mini-reader") >= 4 * by_chance


def test_hooks_of_mini_reader_fire_at_every_site_and_change_nothing() -> None:
    model = mm.load("mini-reader")
    pixels, tokens = torch.randn(2, 3, 64, 64), model.tokenizer(["a red panda", "the word fox"])
    with torch.no_grad():
        before = model.encode_image(pixels), model.encode_text(tokens)
        with model.caching("*") as cache:
            during = model.encode_image(pixels), model.encode_text(tokens)
        with model.hooks(fwd_hooks=[("image.patches", lambda patches, *, hook: 0 * patches)]):
            blind = model.encode_image(pixels)
        after = model.encode_image(pixels), model.encode_text(tokens)
    assert not torch.allclose(blind, before[0], atol=1e-2)
    for a, b, c in zip(before, during, after, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert set(cache.keys()) == set(model.sites())
    assert cache["image.patches"].shape == (2, 64, 192)


def test_embedded_heads_fit_their_model() -> None:
    models = {name: mm.load(name) for name in ("mini", "mini-reader")}
    widths = {"mini/sae": 256, "mini/sae-wide": 1024, "mini/ncl": 256, "mini/ncl-wide": 1024}
    widths |= {f"mini/{kind}-seed{seed}": 256 for kind in ("sae", "ncl") for seed in range(1, 5)}
    widths |= {f"mini-reader/sae{end}": 256 for end in ("", "-seed1", "-seed2")}
    on_tokens = {"mini/patch-sae", "mini-vlm/lm-sae"}  # tests/models/test_token_heads.py
    assert {*widths, *on_tokens} == set(embedded_heads())
    for number, (name, n) in enumerate(widths.items()):
        head = mm.load_head(name)
        assert (head.d_in, head.n_features) == (mini.EMBED_DIM, n)
        models[name.split("/")[0]].attach(head, at=["image.embed", "text.embed"], name=f"head{number}")
    assert mm.load_head(name).id == head.id


def test_seeds_of_the_shipped_sae_share_what_their_cards_say() -> None:
    heads = [mm.load_head(f"mini/sae{end}") for end in ("", "-seed1", "-seed2", "-seed3", "-seed4")]
    assert len({head.id for head in heads}) == 5 and [h.info["recipe"]["seed"] for h in heads] == list(
        range(5)
    )
    shared = sum(mm.stability(heads[0], other).matched.value for other in heads[1:]) / 4
    card = heads[0].info["stability"]
    assert card["other_seeds"] == 4 and shared == pytest.approx(card["decoder"], abs=0.01)
    assert shared > 0.75 > 0.1 > card["decoder_by_chance"]


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
        (lambda: mm.load_head("mini-vlm/sea"), MissingWeights, ["mini-vlm/sea", "mini-vlm/lm-sae"]),
        (lambda: mm.load_head("nowhere"), MissingWeights, ["nowhere", "directory"]),
        (lambda: card("maxi"), MissingWeights, ["maxi", "mini"]),
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
    shutil.copytree(ASSETS / "mini", tmp_path / "mini", ignore=shutil.ignore_patterns("model.safetensors"))
    monkeypatch.setattr(mini, "ASSETS", tmp_path)
    with pytest.raises(MissingWeights, match="reinstall mmhooks"):
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
