"""Trains and ships ``mini-vlm/lm-sae``: a sparse autoencoder on the prompt's tokens in mini-vlm's language tower.

    PYTHONPATH=recipes python -m embedded.token_heads.language --acts runs/lm_acts

Image and text tokens share one dictionary (``tokens="prompt"``): the answer is computed from both, so a reconstruction can
take the place of the whole residual stream, and a feature may fire on patches and on words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

import mmhooks as mm
from embedded.token_heads.candidates import Candidate, Plan, measured, pair_of_rows, rows_of, train_all
from mmhooks.analysis.statistics.intervals import bootstrap, wilson
from mmhooks.data.pair_set import Pairs, Row
from mmhooks.data.synthetic.questions import KINDS, Question, ask
from mmhooks.data.synthetic.scenes import Combination, Scene, openmoji_drawing, render, sample_scene
from mmhooks.heads import TopKSAE, reconstruction
from mmhooks.hooks.edits import Edit
from mmhooks.utils.assets import ASSETS
from mmhooks.utils.digest import digest

LAYERS = range(4)
KS = (8, 32)  # beside 16, at block 1


class _Drawn:
    """Draws scenes when they are opened."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self._scenes = scenes

    def open(self, image_key: int | str) -> Image.Image:
        return Image.fromarray(render(self._scenes[int(image_key)], openmoji_drawing))


class Asked(NamedTuple):
    """Scenes with one question each."""

    pairs: Pairs
    questions: list[Question]


def asked(count: int, seed: str, combination: Combination = "taught") -> Asked:
    """Draws scenes, each with a question, the kinds of questions in turn."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    questions: list[Question] = []
    while len(scenes) < count:
        scene = sample_scene(rng, combination)
        question = ask(KINDS[len(scenes) % len(KINDS)], scene, rng, combination)
        if question is not None:
            scenes.append(scene)
            questions.append(question)
    rows = [Row(f"{seed}/{i}", question.text, i) for i, question in enumerate(questions)]
    name = f"scenes with questions, {combination}"
    return Asked(Pairs(rows, _Drawn(scenes), name=name, content=digest(repr(scenes))), questions)


class Sets(NamedTuple):
    """Scenes to train on, to choose by, and held out: as in training, and of drawings that mini-vlm never saw."""

    train: Asked
    choosing: Asked
    held_out: Asked
    unseen: Asked


def sets(train: int, test: int) -> Sets:
    return Sets(
        asked(train, "train"),
        asked(test // 2, "choosing"),
        asked(test, "held out"),
        asked(test // 2, "unseen", "unseen concept"),
    )


def candidates(features: int) -> list[Candidate]:
    """K = 16 at every layer; at block 1 two other K."""
    return [
        *(Candidate(f"lm.blocks.{layer}.resid_post", features, 16) for layer in LAYERS),
        *(Candidate("lm.blocks.1.resid_post", features, k) for k in KS),
    ]


class Kinds(NamedTuple):
    """Rows of a store of prompts: image tokens, and those of the question and what follows it.

    What stands before the image is the same in every prompt, and in neither.
    """

    image: Bool[Tensor, " rows"]
    question: Bool[Tensor, " rows"]


def kinds_of(model: mm.HookedVLM, store: mm.Store) -> Kinds:
    """Which rows are which; the prompt's template puts the image at the same tokens in every prompt."""
    ids = model.read([Image.new("RGB", (64, 64))], ["What is it?"])["input_ids"][0]
    image = (ids == model.model.config.image_token_id).nonzero().flatten()  # type: ignore[union-attr]
    numbers = store.tokens
    within = (numbers >= int(image[0])) & (numbers <= int(image[-1]))
    return Kinds(within, numbers > int(image[-1]))


class Answered(NamedTuple):
    """Of each question, the cross-entropy of the right answer, and whether the model would say it."""

    loss: Float[Tensor, " n"]
    right: Bool[Tensor, " n"]


class Prompts(NamedTuple):
    """What the model's forward takes, batch by batch, and the token of each right answer: one word, one token."""

    inputs: list[dict[str, Tensor]]
    truth: list[Int[Tensor, " b"]]
    questions: list[Question]


def prompts(model: mm.HookedVLM, scenes: Asked, batch: int = 64) -> Prompts:
    """Draws and reads all scenes once."""
    tokenizer = model.processor.tokenizer
    inputs, truth = [], []
    for begin in range(0, len(scenes.pairs), batch):
        rows = range(begin, min(begin + batch, len(scenes.pairs)))
        images = [scenes.pairs.image(i) for i in rows]
        inputs.append(model.inputs(images, [scenes.pairs.texts[i] for i in rows]))
        words = [scenes.questions[i].answer for i in rows]
        truth.append(torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in words]))
    return Prompts(inputs, truth, scenes.questions)


@torch.no_grad()
def answers(model: mm.HookedVLM, asked: Prompts, *edits: Edit, mask: Sequence[int] | None = None) -> Answered:
    """Runs every prompt once."""
    losses, right = [], []
    for inputs, truth in zip(asked.inputs, asked.truth, strict=True):
        with model.hooks(*edits, mask=mask):
            logits = model.forward(**inputs).logits[:, -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, truth, reduction="none"))
        right.append(logits.argmax(-1) == truth)
    return Answered(torch.cat(losses), torch.cat(right))


class Means(NamedTuple):
    """Mean vectors of a site over training prompts: of all tokens, and of image tokens."""

    prompt: Float[Tensor, " d"]
    image: Float[Tensor, " d"]


def references(model: mm.HookedVLM, asked: Prompts, site: str, means: Means) -> dict[str, Answered]:
    """Answers with image tokens, or all tokens, at their mean."""
    return {
        "mean image": answers(model, asked, mm.Mean(mean=means.image, at=site, tokens="image")),
        "mean": answers(model, asked, mm.Mean(mean=means.prompt, at=site)),
    }


def rebuilt(model: mm.HookedVLM, asked: Prompts, head: TopKSAE, site: str) -> Answered:
    """Answers with every token replaced by its reconstruction, without error term."""
    model.attach(head, at=site, name="candidate", error_term=False)
    try:
        return answers(model, asked, mask=[])
    finally:
        model.detach("candidate")


def entry(found: dict[str, Answered], questions: Sequence[Question]) -> dict[str, Any]:
    """Cross-entropy and accuracy of each way to run the model, and accuracy by kind of question."""
    kinds = [question.kind for question in questions]
    return {
        name: {
            "cross_entropy": bootstrap(one.loss).to_json(),
            "right": wilson(int(one.right.sum()), len(one.right)).to_json(),
            "by_kind": {
                kind: wilson(int(one.right[of].sum()), int(of.sum())).to_json()
                for kind in sorted(set(kinds))
                if (of := torch.tensor([k == kind for k in kinds])).any()
            },
        }
        for name, one in found.items()
    }


def by_kind(
    head: TopKSAE, rows: Float[Tensor, "rows d"], kinds: Kinds, scenes: Int[Tensor, " rows"]
) -> dict[str, Any]:
    """What the head reconstructs of image tokens and of the question's, with intervals over scenes."""
    return {name: measured(head, rows[of], scenes[of]) for name, of in kinds._asdict().items()}


def main(
    acts: Annotated[Path, typer.Option(help="folder for the stores of activations")] = Path("runs/lm_acts"),
    features: Annotated[int, typer.Option(help="of the shipped head")] = 1024,
    epochs: Annotated[int, typer.Option(help="passes over the training tokens")] = 4,
    train: Annotated[int, typer.Option(help="scenes to train on")] = 3000,
    test: Annotated[int, typer.Option(help="scenes held out; half as many choose the layer")] = 1000,
    out: Annotated[Path, typer.Option(help="where the head goes")] = ASSETS / "mini-vlm" / "lm-sae",
) -> None:
    """Trains and ships the head: PYTHONPATH=recipes python -m embedded.token_heads.language --acts runs/lm_acts"""
    model, data = mm.load("mini-vlm"), sets(train, test)
    sites = [f"lm.blocks.{layer}.resid_post" for layer in LAYERS]
    stores = {
        name: mm.extract(
            model, part.pairs, sites, acts / name, tokens="prompt", dtype="fp16", batch_size=64, workers=0
        )
        for name, part in zip(Sets._fields, data, strict=True)
    }
    plan = Plan(epochs=epochs)
    heads = train_all(stores["train"], candidates(features), plan, name="lm-sae")

    kinds = {name: kinds_of(model, store) for name, store in stores.items()}
    scenes = {name: pair_of_rows(store) for name, store in stores.items()}
    choosing, held_out = prompts(model, data.choosing), prompts(model, data.held_out)
    untouched = answers(model, held_out)
    known: dict[str, tuple[dict[str, Answered], dict[str, Answered]]] = {}
    table: list[dict[str, Any]] = []
    for candidate, head in heads.items():
        site = candidate.site
        if site not in known:
            rows = rows_of(stores["train"], site)
            means = Means(rows.mean(0), rows[kinds["train"].image].mean(0))
            known[site] = references(model, choosing, site, means), references(model, held_out, site, means)
        without = known[site][0]["mean image"].loss - rebuilt(model, choosing, head, site).loss
        row: dict[str, Any] = {
            "site": site,
            "features": candidate.features,
            "k": candidate.k,
            "saved": float(without.mean()),
            "dead": reconstruction(head, rows_of(stores["held_out"], site)).dead,
            "dead_in_training": reconstruction(head, rows_of(stores["train"], site)).dead,
        }
        for name in ("held_out", "unseen"):
            row[name] = by_kind(head, rows_of(stores[name], site), kinds[name], scenes[name])
        ways = {"model": untouched, "rebuilt": rebuilt(model, held_out, head, site), **known[site][1]}
        row["answers"] = entry(ways, held_out.questions)
        table.append(row)
        typer.echo(f"{candidate.name}: {summary(row)}")

    able = [i for i, c in enumerate(heads) if (c.features, c.k) == (features, 16)]
    number = max(able, key=lambda i: table[i]["saved"])
    (chosen, head), row = list(heads.items())[number], table[number]
    script = "recipes/embedded/token_heads/language.py"
    head.info = {
        "model": "mini-vlm",
        "site": chosen.site,
        "tokens": "prompt",
        "data": f"prompts about {train:,} composed pictures (mmhooks.data.synthetic), one question each, ten kinds in turn",
        "recipe": {"script": script, "features": features, "k": 16, "scenes": train, **asdict(plan)},
        "chosen": "the layer at K = 16 whose reconstruction has most below the cross-entropy of image tokens at their mean, on "
        "scenes of their own",
        "held_out": row["held_out"],
        "unseen_concepts": row["unseen"],
        "dead": row["dead"],
        "dead_in_training": row["dead_in_training"],
        "answers": row["answers"],
        "candidates": [brief(one) for one in table],
    }
    head.save(out, dtype="fp16")
    typer.echo(f"{chosen.site} -> {out}")


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """A candidate's row of the card: its numbers on held-out scenes, and what it was chosen by."""
    return {
        **{key: row[key] for key in ("site", "features", "k", "saved", "dead", "dead_in_training")},
        "fvu": {kind: found["fvu"] for kind, found in row["held_out"].items()},
        "l0": {kind: found["l0"] for kind, found in row["held_out"].items()},
        "cross_entropy": {name: found["cross_entropy"]["value"] for name, found in row["answers"].items()},
        "right": {name: found["right"]["value"] for name, found in row["answers"].items()},
    }


def summary(row: dict[str, Any]) -> str:
    kinds = ", ".join(f"FVU {kind} {found['fvu']['value']:.3f}" for kind, found in row["held_out"].items())
    ways = ", ".join(
        f"{name} {found['cross_entropy']['value']:.3f} / {found['right']['value']:.3f}"
        for name, found in row["answers"].items()
    )
    dead = f"dead {row['dead']:.3f} (in training {row['dead_in_training']:.3f})"
    return f"{kinds}, {dead}, saved {row['saved']:.3f}; cross-entropy / right: {ways}"


if __name__ == "__main__":
    typer.run(main)
