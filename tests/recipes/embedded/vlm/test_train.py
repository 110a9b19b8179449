"""mini-vlm's training: packed questions are answered as if asked alone, and a resumed run ends with the same bits."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded.vlm import evaluate, report, ship
from embedded.vlm import requests as asking
from embedded.vlm import train as training
from embedded.vlm.packing import answer_logits

from mmhooks.data.synthetic import scenes
from mmhooks.data.synthetic.questions import KINDS, Question, ask
from mmhooks.errors import MMHooksError
from mmhooks.models.embedded import mini_vlm
from mmhooks.models.vlm.model import HookedVLM

PLAN = training.VlmPlan(tower_steps=2, steps=4, batch=2, blind=1, questions=4, width=64, layers=2, warmup=1)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], training.VlmTrainer]:
    def embed(model: object, tokenizer: object, texts: list[str]) -> torch.Tensor:
        return torch.randn(len(texts), 256, generator=torch.Generator().manual_seed(1))

    def drawing(name: str) -> np.ndarray:
        rgba = np.full((20, 20, 4), 255, np.uint8)
        rgba[..., :3] = np.random.default_rng(sum(map(ord, name))).integers(0, 256, 3)
        return rgba

    monkeypatch.setattr(training, "embed_texts", embed)
    monkeypatch.setattr(scenes, "openmoji_drawing", drawing)
    return lambda: training.VlmTrainer(PLAN, tmp_path)


def rows_of(n: int) -> tuple[list[scenes.Scene], list[list[Question]]]:
    rng = random.Random(3)
    made = [scenes.sample_scene(rng) for _ in range(n)]
    return made, [[q for kind in KINDS if (q := ask(kind, scene, rng))] for scene in made]


def test_a_resumed_run_ends_with_the_same_bits(trainer: Callable[[], training.VlmTrainer]) -> None:
    whole = trainer()
    losses = [whole.run_step() for _ in range(4)]
    again = trainer()
    found = [again.run_step()]
    for stop in (1, 3):  # within each stage
        again.save()
        again = trainer()
        again.resume()
        assert again.step == stop
        found += [again.run_step() for _ in range(2 if stop == 1 else 1)]
    assert found == losses
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
        assert torch.equal(whole.average[key], again.average[key]), key


def test_each_stage_trains_its_own_parts(trainer: Callable[[], training.VlmTrainer]) -> None:
    made = trainer()
    before = {k: v.clone() for k, v in made.model.state_dict().items()}

    def moved() -> set[str]:
        return {k for k, v in made.model.state_dict().items() if not torch.equal(v, before[k])}

    made.run_step()
    made.run_step()
    assert not any(k.startswith("language_model.layers.") for k in moved())
    assert any(k.startswith("vision_tower.encoder.") for k in moved())
    assert any(k.startswith("multi_modal_projector.") for k in moved())
    made.run_step()
    assert any(k.startswith("language_model.layers.1.") for k in moved())
    stem = "vision_tower.embeddings.patch_embedding."
    assert not any(k.startswith((f"{stem}letters.", f"{stem}word.")) for k in moved())
    assert made.plan.senses_at(1) == 1 and made.plan.senses_at(2) == made.plan.senses
    assert made.plan.senses_at(3) == 0
    assert replace(PLAN, tower_steps=100, steps=500).senses_at(200) == pytest.approx(0.5 * PLAN.senses)


def test_time_that_is_over_leaves_a_checkpoint(
    trainer: Callable[[], training.VlmTrainer], tmp_path: Path
) -> None:
    made = trainer()
    made.run_step()
    made.until = time.time() - 1
    with pytest.raises(training.Stopped, match="at step 1; start it again to go on"):
        made.run_step()
    again = trainer()
    again.resume()
    assert again.step == 1 and (tmp_path / "checkpoint.safetensors").exists()


@torch.no_grad()
def test_packed_questions_are_answered_as_if_asked_alone(trainer: Callable[[], training.VlmTrainer]) -> None:
    """Against transformers' own forward of one prompt with its picture, and of one without."""
    made = trainer()
    llava = made.llava.eval()
    pictures, rows = rows_of(3)
    images = training.pixels(pictures)
    projected = report.projected(llava.model, images)
    rows = [*rows, [asking.taught_request(random.Random(i)) for i in range(3)]]
    packed = made.packer(rows, sees=[True, True, True, False])
    logits, truth = answer_logits(llava.model, packed, projected, made.packer.vocabulary["<image>"])
    owners, k = packed.owners(), 0
    for b, questions in enumerate(rows):
        for question in questions:
            sight = ["<image>"] * 65 if b < 3 else []
            prompt = made.packer.ids(" ".join(["<s> USER:", *sight, question.text, "ASSISTANT:"]))
            said = [*made.packer.ids(question.answer), made.packer.vocabulary["</s>"]]
            assert truth[owners == k].tolist() == said
            shown = {"pixel_values": images[b : b + 1]} if b < 3 else {}
            alone = llava(input_ids=torch.tensor([prompt + said]), **shown).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(logits[owners == k], alone, atol=1e-4, rtol=1e-4)
            k += 1
    assert k == int(owners.max()) + 1


@torch.no_grad()
def test_every_answer_weighs_the_same(trainer: Callable[[], training.VlmTrainer]) -> None:
    made = trainer()
    rows = [
        [asking.taught_request(random.Random(i)) for i in range(5)],
        [Question("exists", "Is there a fox?", "no")],
    ]
    packed = made.packer(rows, sees=[False, False])
    logits, truth = answer_logits(made.model, packed, None, made.packer.vocabulary["<image>"])
    each = torch.nn.functional.cross_entropy(logits, truth, reduction="none")
    by_hand = torch.stack([each[packed.owners() == k].mean() for k in range(6)]).mean()
    torch.testing.assert_close(made.answer_loss(packed, None), by_hand)


@torch.no_grad()
def test_accuracy_is_that_of_greedy_decoding(trainer: Callable[[], training.VlmTrainer]) -> None:
    """Of a model that took a step, so that it says something: generated answers, one by one, against packed ones."""
    made = trainer()
    with torch.enable_grad():
        for _ in range(4):
            made.run_step()
    made.tokenizer.save_pretrained(made.out / "tokenizer")
    made.average = {k: v.clone() for k, v in made.model.state_dict().items()}
    llava = made.averaged_model()
    pictures, rows = rows_of(6)
    rows = [
        [replace(q, answer=a) for q, a in zip(row, ["yes", "red", "two", "fox"] * 3, strict=False)]
        for row in rows
    ]
    projected = report.projected(llava.model, training.pixels(pictures))
    right = evaluate.right_answers(llava.model, made.packer, rows, projected)
    speaker = HookedVLM(llava, mini_vlm.processor(made.out / "tokenizer"))
    llava.generation_config.pad_token_id, llava.generation_config.eos_token_id = 0, 2
    shown = torch.stack([torch.from_numpy(scenes.render(s, scenes.openmoji_drawing)) for s in pictures])
    shown = shown.permute(0, 3, 1, 2).float() / 255
    said = [
        speaker.answer(shown[b : b + 1], [q.text], max_new_tokens=3)[0]
        for b, row in enumerate(rows)
        for q in row[:3]
    ]
    expected = [q.answer for row in rows for q in row[:3]]
    assert [a == b for a, b in zip(said, expected, strict=True)] == [r for row in right for r in row[:3]]
    scores = evaluate.picture_accuracy(llava.model, made.packer, rows, projected)
    for kind, row in scores.items():
        hits = [r for questions, found in zip(rows, right, strict=True)
                for q, r in zip(questions, found, strict=True) if q.kind == kind]  # fmt: skip
        assert row["n"] == len(hits) and row["right"] == pytest.approx(sum(hits) / len(hits))


@torch.no_grad()
def test_what_ships_loads_and_a_model_that_does_not_look_does_not_ship(
    trainer: Callable[[], training.VlmTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer()
    made.save()
    (tmp_path / "plan.json").write_text(json.dumps(training.asdict(PLAN)))
    monkeypatch.setattr(
        report, "rate", lambda hits, n: {"value": hits / n, "low": hits / n, "high": hits / n}
    )
    with pytest.raises(MMHooksError, match="expected answers that depend on the picture, got none such for"):
        ship.main(tmp_path, tmp_path / "assets", 8)
    assert not (tmp_path / "assets").exists()
    monkeypatch.setattr(ship, "not_looked_at", lambda scores: [])
    (tmp_path / "curve.jsonl").write_text(
        "".join(
            json.dumps({"step": k, "answers": {"where": {"right": 0.1 * k, "wrong": 0.1, "n": 9}}}) + "\n"
            for k in range(3)
        )
    )
    ship.main(tmp_path, tmp_path / "assets", 8, tmp_path / "figures")
    folder = tmp_path / "assets" / ship.NAME
    card = json.loads((folder / "card.json").read_text())
    again, llava = report.load_run(tmp_path)
    assert card["parameters"] == sum(v.numel() for v in llava.model.state_dict().values())
    assert set(card["exams"]["pictures"]) == {name for name, _, _ in report.SETS}
    requests = {"refused, in text", "refused, kept out, in text", "act on the thing shown"}
    assert requests <= set(card["exams"]["requests"])
    assert (tmp_path / "figures" / "mini-vlm-curve.png").stat().st_size > 0
    assert json.loads((tmp_path / "assets" / "digests.json").read_text()).keys() >= {"mini-vlm/card.json"}
    loaded, processor = mini_vlm.load_from(folder)
    process: Any = processor
    pictures, _ = rows_of(2)
    inputs = process(text=["USER: <image>\nIs there a fox? ASSISTANT:"] * 2, return_tensors="pt", images=[
        scenes.Image.fromarray(scenes.render(s, scenes.openmoji_drawing)) for s in pictures])  # fmt: skip
    torch.testing.assert_close(inputs["pixel_values"], training.pixels(pictures))
    ours = llava(input_ids=inputs["input_ids"], pixel_values=training.pixels(pictures)).logits
    torch.testing.assert_close(loaded(**inputs).logits, ours, atol=1e-4, rtol=1e-4)
    (folder / "config.json").unlink()
    with pytest.raises(MMHooksError, match=r"got no config\.json"):
        mini_vlm.load_from(folder)


def test_looking_is_judged_by_intervals() -> None:
    def row(right: float, wrong: float, chance: float) -> dict:
        return {"n": 9, "chance": chance, "right": {"value": right, "low": right - 0.1, "high": right + 0.1},
                "wrong": {"value": wrong, "low": wrong - 0.1, "high": wrong + 0.1}}  # fmt: skip

    kinds = {"a": row(0.9, 0.5, 0.5), "b": row(0.55, 0.5, 0.5), "c": row(0.6, 0.3, 0.5)}
    assert report.not_looked_at({"taught": kinds}) == ["b", "c"]
