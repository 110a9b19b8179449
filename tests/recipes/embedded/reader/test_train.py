"""mini-reader's training: words lie where they are said to lie, held-out words never show, runs resume bit for bit."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from embedded.reader import evaluate as reader_evaluation
from embedded.reader import stem as reader_stem
from embedded.reader import train as reader_training
from embedded.reader import words as reader_words
from safetensors.torch import save_file

import mmhooks as mm
from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.synthetic import words
from mmhooks.models.embedded import mini

FONTS = [words.font_file(name) for name in ("DejaVuSans", "DejaVuSerif-Bold")]
NAMES = ["fox", "whale", "tree", "house", "arrow", "boat", "sun", "cake", "old man", "tiger", "cloud", "pear"]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    g = torch.Generator().manual_seed(0)
    splits = ("train", "train", "train", "heldout_pictures", "unseen_style")
    rows = [
        {"style": f"s{i % 2}", "name": NAMES[i % 12], "keywords": ["thing", "drawing", "a river boat"],
         "toned": False, "concept": NAMES[i % 12], "split": splits[i // 12]}
        for i in range(60)
    ]  # fmt: skip
    save_file({"rgba": torch.randint(0, 256, (60, 72, 72, 4), dtype=torch.uint8, generator=g)},
              tmp_path / "rgba.safetensors")  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return Corpus(tmp_path)


def plan(**changes) -> reader_training.ReaderPlan:
    base = {"steps": 4, "batch": 8, "warmup": 1, "relational": 0.0, "words": 4, "overlays": 0.25,
            "spelled": 3, "stem_steps": 2, "code_steps": 4, "first": 2, "ramp": 3}  # fmt: skip
    return reader_training.ReaderPlan(**(base | changes))


def trainer(corpus: Corpus, out: Path, **changes) -> reader_training.ReaderTrainer:
    out.mkdir(exist_ok=True)
    return reader_training.ReaderTrainer(corpus, plan(**changes), out, FONTS)


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stem's stages on 16 words a step instead of 128: an eighth of the time, and no claim here needs more."""
    for stage in ("train_stem", "train_code"):
        monkeypatch.setattr(reader_training, stage, partial(getattr(reader_training, stage), batch=16))


@pytest.mark.usefixtures("few_words")
def test_a_resumed_run_ends_with_the_same_bits(corpus: Corpus, tmp_path: Path) -> None:
    whole = trainer(corpus, tmp_path / "whole")
    first = trainer(corpus, tmp_path / "cut")  # trains its own stem: that stage is seeded too
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[key]), key
    for _ in range(4):
        whole.run_step()
    for _ in range(2):
        first.run_step()
    first.save()
    again = trainer(corpus, tmp_path / "cut")
    again.resume()
    for _ in range(2):
        again.run_step()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
        assert torch.equal(whole.average[key], again.average[key]), key


@pytest.mark.usefixtures("few_words")
def test_without_what_the_stem_adds_the_reader_starts_as_mini(corpus: Corpus, tmp_path: Path) -> None:
    reader, ours = trainer(corpus, tmp_path / "run").averaged_model(), mm.load("mini")
    pixels, tokens = torch.rand(3, 3, 64, 64), mini.tokenizer()(["a red fox", "the word tiger", "sun"])
    stem = reader.visual.conv1
    with torch.no_grad():
        assert torch.equal(reader.encode_text(tokens), ours.encode_text(tokens))
        assert not torch.allclose(reader.encode_image(pixels), ours.encode_image(pixels), atol=1e-3)
        for layer in (stem.mix, stem.say):
            layer.weight.zero_(), layer.bias.zero_()
        assert torch.equal(reader.encode_image(pixels), ours.encode_image(pixels))


@pytest.mark.usefixtures("few_words")
def test_the_control_sees_no_word(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = reader_training.ReaderTrainer(
        corpus, plan().without_words(), _folder(tmp_path / "control"), FONTS
    )
    monkeypatch.setattr(
        words, "write", lambda *_: pytest.fail("a word was written")
    )  # stages one and two did
    for _ in range(3):
        control.run_step()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_held_out_words_are_never_rendered_in_training(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_words, "held_out", lambda word: word in {"tiger", "river"})
    shown: list[str] = []
    write = words.write
    monkeypatch.setattr(words, "write", lambda p, text, how: shown.append(text) or write(p, text, how))
    run = trainer(corpus, tmp_path / "run", words=40, overlays=0.9, made_up=0.0, stem_steps=1, code_steps=3)
    assert set(run.vocabulary.unseen_names) == {"tiger"} and set(run.vocabulary.unseen_others) == {"river"}
    for _ in range(4):
        run.run_step()
    assert len(shown) > 600 and not {"tiger", "river"} & set(shown)
    assert set(shown) <= set(run.vocabulary.names + run.vocabulary.others)


def test_dropout_keeps_every_patch_with_ink() -> None:
    torch.manual_seed(0)
    drop = reader_training.KeepInk(0.5).train()
    made = reader_words.word_images(["tiger", "fox"], FONTS, random.Random(0))
    drop.wanted = torch.stack([one.patches() for one in made])
    tokens = torch.arange(65.0).view(1, 65, 1).expand(2, -1, -1)
    kept = drop(tokens)
    assert kept.shape == (2, 33, 1) and (kept[:, 0] == 0).all()
    for row, wanted in zip(kept[:, 1:, 0], drop.wanted, strict=True):
        assert len(set(row.tolist())) == 32
        assert {i + 1 for i in wanted.nonzero().flatten().tolist()} <= set(row.int().tolist())
    assert torch.equal(drop.eval()(tokens), tokens)
    with pytest.raises(ValueError, match="wanted"):
        drop.train()(tokens[:1])


def test_ink_lies_inside_the_patches_that_are_said_to_hold_it() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        blank = torch.ones(3, 64, 64)
        made = reader_words.write(blank, "giraffe", reader_words.place(
            "giraffe", FONTS[0], rng, width=(0.3, 0.95), size=(8.0, 30.0)))  # fmt: skip
        changed = (made.image != blank).any(0).view(8, 8, 8, 8).any(3).any(1).flatten()
        assert changed.any() and not (changed & ~made.patches()).any()


def test_the_letter_map_reads_back_as_the_word() -> None:
    for seed, word in enumerate(["tiger", "boat", "camera"]):
        writing = words.TextStyle(FONTS[0], 15.0, centre=(0.5, 0.4 + 0.1 * seed))
        found = reader_words.write(torch.ones(3, 64, 64), word, writing).letter_map()
        assert found.shape == (8, 16)
        row = (found >= 0).any(1).nonzero()
        assert len(row) == 1
        read = [(i // 26, chr(97 + i % 26)) for i in found[row.item()].tolist() if i >= 0]
        assert read == list(enumerate(word))


def test_folding_batch_norm_changes_nothing() -> None:
    torch.manual_seed(0)
    stem = mini.build(reads=True).visual.conv1
    finder = reader_stem.LetterFinder(stem).train()
    for _ in range(3):
        finder(torch.randn(8, 3, 64, 64))
    finder.eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = finder.letters(pixels)
        reader_stem.fold(finder.letters, stem.letters)
        assert torch.allclose(stem.letters(pixels), expected, atol=1e-4)


def test_every_condition_of_the_attack_differs_where_it_should(corpus: Corpus) -> None:
    taught = [name for name in NAMES if " " not in name]
    candidates, reader_evaluation.CANDIDATES = reader_evaluation.CANDIDATES, 6
    try:
        chosen = reader_evaluation.samples(corpus, taught, set(taught), FONTS, 8)
    finally:
        reader_evaluation.CANDIDATES = candidates
    assert all(s.a != s.b and s.nonsense not in taught and len(s.nonsense) == len(s.b) for s in chosen)
    for strip in (False, True):
        shown = {
            c: reader_evaluation.attacked(corpus, chosen, c, strip=strip)
            for c in reader_evaluation.CONDITIONS
        }
        for condition in ("word", "nonsense", "noise"):
            assert (shown[condition] != shown["clean"]).flatten(1).any(1).all(), condition
        assert (shown["word"] != shown["nonsense"]).flatten(1).any(1).all()
        if strip:  # beside the drawing: the drawing itself stays whole
            assert torch.equal(shown["word"][:, :, :44], shown["clean"][:, :, :44])
            assert torch.equal(shown["blank"], shown["clean"])
