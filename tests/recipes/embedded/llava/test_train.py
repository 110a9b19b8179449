"""mini-llava's lessons and training: what is asked and answered, and that a resumed run ends with the same bits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from embedded.llava import examples
from embedded.llava import train as training
from safetensors.torch import save_file

from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.synthetic import words
from mmhooks.studies.adversarial.requests import HELD_OUT

NAMES = ("umbrella", "piano", "hammer", "bomb", "grenade", "axe", "woman", "dagger", "flute", "red apple")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    g = torch.Generator().manual_seed(0)
    rows = [{"style": "noto" if i % 5 else "openmoji", "name": NAMES[i % 10], "keywords": ["thing", "tool"], "toned": False,
             "concept": NAMES[i % 10], "split": "train"} for i in range(60)]  # fmt: skip
    rgba = torch.randint(1, 256, (60, 72, 72, 4), dtype=torch.uint8, generator=g)
    save_file({"rgba": rgba}, tmp_path / "rgba.safetensors")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return Corpus(tmp_path)


def test_what_is_held_out_is_described_and_never_asked_for(corpus: Corpus) -> None:
    source = examples.ExampleSource.of(corpus, ("piano", "bomb", "axe"))
    seen, usable = ({source.names[i] for i in rows} for rows in (source.seen, source.usable))
    assert {"grenade", "axe", "bomb", "piano"} <= seen and "woman" not in seen
    assert {"bomb", "dagger", "piano"} <= usable and not usable & set(HELD_OUT)
    assert "axe" in source.words and "axe" not in source.usable_words
    assert not set(source.things) & {*examples.REFUSED, *HELD_OUT}
    rng = random.Random(0)
    for kind in ("act", "act with word", "act on word", "comply", "refuse"):
        for _ in range(40):
            made = source.example(kind, source.usable[rng.randrange(len(source.usable))], rng)
            assert not any(w in f"{made.request} {made.answer}".replace(".", "").split() for w in HELD_OUT)
            assert (made.answer == examples.REFUSAL) == (kind == "refuse")


def test_a_resumed_run_ends_with_the_same_bits(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fonts = [words.font_file(name) for name in words.DEJAVU[:2]]
    monkeypatch.setattr(training, "font_paths", lambda sources: fonts)
    monkeypatch.setattr(training, "SEEING", {"describe": 2, "act": 2, "act on word": 2, "refuse": 1})
    monkeypatch.setattr(training, "BLIND", {"comply": 1, "refuse": 1})

    def teacher(texts: list[str], cache: Path) -> torch.Tensor:
        return torch.randn(len(texts), 384, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(training, "teacher_embeddings", teacher)
    of = training.Vocabulary.of
    monkeypatch.setattr(training.random.Random, "sample", lambda self, pool, k: list(pool)[:k])
    monkeypatch.setattr(training.Vocabulary, "of", classmethod(lambda cls, c: of(c, drawings=1)))
    plan = training.LlavaPlan(steps=4, width=64, layers=1, warmup=1)

    def trainer() -> training.LlavaTrainer:
        return training.LlavaTrainer(corpus, plan, tmp_path)

    whole = trainer()
    for _ in range(4):
        whole.run_step()
    first = trainer()
    for _ in range(2):
        first.run_step()
    first.save()
    again = trainer()
    again.resume()
    assert again.step == 2
    for _ in range(2):
        again.run_step()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
        assert torch.equal(whole.average[key], again.average[key]), key
    # the loss is transformers' own on the same answers
    example = [examples.Example("told", "Say how to use the bomb.", examples.REFUSAL)]
    ids, answer = whole.encode(example)
    labels = ids.masked_fill(~answer, -100)
    with torch.no_grad():
        ours = whole.loss_of(example, None).mean()
        theirs = whole.llava(input_ids=ids, labels=labels).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)
