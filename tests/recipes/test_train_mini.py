"""The training of the embedded models: resumes to the same bits, refuses another plan, and its losses are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from embedded import losses
from embedded.checkpoints import joined_curve, stages
from embedded.clip import train as train_mini

from mmhooks.data.sources.drawings import Corpus
from mmhooks.models.embedded import mini


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    g = torch.Generator().manual_seed(0)
    words = [
        "red fox",
        "blue whale",
        "green tree",
        "old house",
        "left arrow",
        "small boat",
        "big sun",
        "pink cake",
    ]
    splits = ("train", "heldout_pictures", "unseen_style")
    rows = [
        {"style": f"s{i % 2}", "name": words[i % 8], "keywords": ["thing", "drawing"], "toned": False,
         "concept": words[i % 8], "split": splits[i % 3]}
        for i in range(48)
    ]  # fmt: skip
    save_file({"rgba": torch.randint(0, 256, (48, 72, 72, 4), dtype=torch.uint8, generator=g)},
              tmp_path / "rgba.safetensors")  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return Corpus(tmp_path)


def plan(**changes) -> train_mini.Plan:
    base = {"steps": 4, "batch": 6, "warmup": 1, "relational": 0.0, "word_init": False}
    return train_mini.Plan(**(base | changes))


@pytest.mark.parametrize("declip", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(corpus: Corpus, tmp_path: Path, declip: bool) -> None:
    whole = train_mini.Trainer(corpus, plan(declip=declip), tmp_path)
    for _ in range(4):
        whole.run_step()
    first = train_mini.Trainer(corpus, plan(declip=declip), tmp_path)
    for _ in range(2):
        first.run_step()
    first.save()
    again = train_mini.Trainer(corpus, plan(declip=declip), tmp_path)
    again.resume()
    assert again.step == 2
    for _ in range(2):
        again.run_step()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
        assert torch.equal(whole.average[key], again.average[key]), key


def test_one_folder_holds_one_plan(tmp_path: Path) -> None:
    train_mini.keep_plan(plan(), tmp_path / "plan.json")
    train_mini.keep_plan(plan(), tmp_path / "plan.json")
    with pytest.raises(typer.BadParameter, match="seed"):
        train_mini.keep_plan(plan(seed=1), tmp_path / "plan.json")


def test_contrastive_is_cross_entropy_where_all_names_differ() -> None:
    image, text = torch.randn(5, 8), torch.randn(5, 8)
    logits = 10 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    assert torch.allclose(losses.contrastive(image, text, torch.tensor(10.0), torch.eye(5).bool()), expected)


def test_relational_is_zero_only_for_the_same_neighbourhoods() -> None:
    x = torch.randn(6, 8)
    turned = x @ torch.linalg.qr(torch.randn(8, 8)).Q
    assert losses.relational(turned, x).abs() < 1e-5
    assert losses.relational(torch.randn(6, 8), x) > 0.05


def test_masked_words_keep_start_end_and_padding() -> None:
    tokens = mini.tokenizer()(["a red fox in the snow", "whale"])
    masked, where = losses.mask_words(tokens, mini.mask_id(), torch.Generator().manual_seed(0))
    assert where.any(1).all() and (masked[where] == mini.mask_id()).all()
    assert torch.equal(masked[~where], tokens[~where])
    assert not where[tokens >= mini.mask_id() - 2].any() and not where[tokens == 0].any()


def test_plain_pictures_equal_what_preprocess_gives(corpus: Corpus) -> None:
    from PIL import Image

    picture = torch.zeros(72, 72, 4, dtype=torch.uint8)
    picture[20:50, 10:60] = torch.tensor([200, 30, 60, 255], dtype=torch.uint8)
    ours = losses.plain(picture[None])[0]
    theirs = mini.preprocess(Image.fromarray(picture.numpy(), "RGBA"))
    assert (ours - theirs).abs().mean() < 0.02


def test_stages_of_a_run_that_went_on_from_others(tmp_path: Path) -> None:
    for name, start, done in (("a", "mini", 3), ("b", "a", 5)):
        run = tmp_path / name
        run.mkdir()
        (run / "plan.json").write_text(json.dumps({"start": start, "steps": 9}))
        save_file({"average.x": torch.zeros(1)}, run / "checkpoint.safetensors", {"step": str(done)})
        rows = [
            {"step": step, "loss": 0.0} for step in (2, done, 8)
        ]  # 8: past the checkpoint, not in the weights
        (run / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chain = stages(tmp_path / "b")
    assert [(s.plan["start"], s.steps) for s in chain] == [("mini", 3), ("a", 5)]
    assert [row["step"] for row in joined_curve(chain)] == [2, 3, 5, 8]
