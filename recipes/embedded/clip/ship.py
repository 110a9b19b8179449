"""Turns a finished training run into the shipped files: fp16 weights, a card, a learning curve.

    PYTHONPATH=recipes python -m embedded.clip.ship --corpus runs/corpus --run runs/mini --name mini

The card's retrieval is measured on the rounded weights, which users get.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from safetensors.torch import save_file

from embedded.checkpoints import Stage, joined_curve, read_part, stages
from embedded.clip.train import embed, galleries, ranks
from mmhooks.analysis.statistics.intervals import wilson
from mmhooks.data.sources.drawings import SOURCES, UNSEEN_STYLE, Corpus
from mmhooks.models.embedded import mini
from mmhooks.utils.assets import ASSETS, write_digests
from mmhooks.utils.files import write_text

matplotlib.use("Agg")
GALLERIES = {
    "heldout_pictures": "unseen pictures of seen concepts",
    "heldout_concepts": "unseen concepts",
    "unseen_style": f"a drawing style never seen ({UNSEEN_STYLE})",
}

READING = {
    "read_unseen_fonts": "taught words, unseen fonts",
    "read_heldout_words": "held-out words, unseen fonts",
    "read_small": "taught words of 8 – 11 px",
}


def rate(hits: int, n: int) -> dict:
    """Returns a rate with its 95 % Wilson interval."""
    e = wilson(hits, n)
    return {"value": e.value, "low": e.low, "high": e.high}


@torch.no_grad()
def retrieval(model, corpus: Corpus) -> dict:
    """Returns R@k with Wilson intervals in both directions, and by chance, on the galleries of the card."""
    tokenizer, result = mini.tokenizer(), {}
    for name, chosen in galleries(corpus).items():
        image, text = embed(model, tokenizer, corpus, chosen)
        n = len(chosen)
        row: dict = {"what": GALLERIES[name], "n": n, "chance": {f"R@{k}": k / n for k in (1, 5, 10)}}
        for way, rank in (("image_to_text", ranks(image, text)), ("text_to_image", ranks(text, image))):
            row[way] = {f"R@{k}": rate(int((rank < k).sum()), n) for k in (1, 5, 10)}
        result[name] = row
    return result


def half_weights(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Returns the step of a run's checkpoint and its running average in half precision, which is shipped."""
    step, weights = read_part(run / "checkpoint.safetensors", "average")
    return step, {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}


def model_from(half: dict[str, torch.Tensor], *, reads: bool = False):
    """Builds the model from shipped weights, in evaluation mode."""
    model = mini.build(reads=reads).eval()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    return model


def images_seen(chain: Sequence[Stage]) -> tuple[int, int]:
    """Returns the numbers of drawings and of word images that mini-reader saw over all stages."""
    seen = shown = 0
    for stage in chain:
        batch, words = stage.plan["batch"], stage.plan["words"]
        # steps of reading only take a third of the drawings and 4/3 of the words of a joint step
        alone = min(stage.plan["first"] if words else 0, stage.steps)
        seen += (stage.steps - alone) * batch + alone * (batch // 3)
        shown += (stage.steps - alone) * words + alone * (words * 4 // 3)
    return seen, shown


def draw_curve(chain: Sequence[Stage], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    rows, batches = joined_curve(chain), {stage.plan["batch"] for stage in chain}
    reads = "read_unseen_fonts" in rows[-1]
    figure, panels = plt.subplots(
        1, 1 + reads, figsize=(6.4 + 3.2 * reads, 3.6), layout="constrained", squeeze=False
    )
    steps = [r["step"] for r in rows]
    axes = panels[0, 0]
    for name, label in GALLERIES.items():
        axes.plot(steps, [100 * r[name]["R@10"] for r in rows], label=f"{label} (n = {rows[-1][name]['n']})")
    axes.set(
        xlabel=f"step of {' or '.join(map(str, sorted(batches)))} drawings",
        ylabel="image→text R@10, %",
        ylim=(0, 100),
        title=title,
    )
    if reads:
        axes = panels[0, 1]
        for key, label in READING.items():
            for pool, line in (("of_32", "-"), ("of_all", ":")):
                axes.plot(
                    steps,
                    [100 * r[key][pool] for r in rows],
                    line,
                    color=f"C{list(READING).index(key)}",
                    label=label if pool == "of_32" else None,
                )
        axes.set(
            xlabel="step", ylabel="own word first, %", ylim=(0, 100), title="— among 32 words, ··· among all"
        )
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(
    run: Annotated[Path, typer.Option(help="folder of a finished run of embedded.clip.train")],
    name: Annotated[str, typer.Option(help="mini, mini-declip or mini-reader")] = "mini",
    report: Annotated[Path | None, typer.Option(help="report.json of embedded.reader.report")] = None,
    control: Annotated[
        Path | None, typer.Option(help="the control run without words, as in the report")
    ] = None,
    corpus: Annotated[Path, typer.Option()] = Path("runs/corpus"),
    figures: Annotated[Path, typer.Option()] = Path("docs/figures"),
) -> None:
    """Ships a run: PYTHONPATH=recipes python -m embedded.clip.ship --corpus runs/corpus --run runs/mini --name mini"""
    chain = stages(run)
    plan = chain[-1].plan
    reads = "words" in plan
    step, half = half_weights(run)
    model = model_from(half, reads=reads)
    drawings = Corpus(corpus)
    counts = Counter(row["style"] for row in drawings.rows)
    trained = Counter(drawings.rows[i]["style"] for i in drawings.where("train"))
    card = {
        "name": name,
        "architecture": "open_clip CLIP: ViT 64 px, patch 8, width 192, 6 layers; text width 192, 4 layers, "
        "context 16; embedding 256" + ("; ReadingStem before the blocks" if reads else ""),
        "parameters": sum(p.numel() for p in model.parameters()),
        "licence": "weights: Apache-2.0; trained on drawings under the licences listed in data",
        "data": [
            {"source": s.style, "licence": s.licence, "attribution": s.attribution,
             "pictures": counts[s.style], "trained_on": trained[s.style]} for s in SOURCES
        ],
        "text_teacher": "all-MiniLM-L6-v2 (Apache-2.0): start of the word table"
        + (", neighbourhoods of captions in the loss" if plan["relational"] else ""),
        "recipe": {"script": f"recipes/embedded/{'reader' if reads else 'clip'}/train.py", "plan": plan, "steps_done": step,
                   "pairs_seen": step * plan["batch"], "torch": version("torch"),
                   "open_clip_torch": version("open_clip_torch")},
        "retrieval": retrieval(model, drawings),
    }  # fmt: skip
    if reads:
        seen, shown = images_seen(chain)
        card["recipe"] |= {"starts_from": "mini", "plans_before": [stage.plan for stage in chain[:-1]],
                           "pairs_seen": seen, "word_pictures_seen": shown}  # fmt: skip
    if report is not None:
        measured = json.loads(report.read_text())
        card |= {key: measured[key] for key in ("fonts", "words")}
        for key in ("reading", "attack"):
            card[key] = measured[key][name]
        joint = " + ".join(str(stage.steps) for stage in stages(control)) if control else "?"
        card["control"] = {"what": f"the same stem and plan, {joint} steps, without words; not shipped"} | {
            key: measured[key].get("control") for key in ("retrieval", "reading", "attack")
        }
    target = ASSETS / name
    target.mkdir(parents=True, exist_ok=True)
    save_file(half, target / "model.safetensors", {"format": "pt", "name": name})
    write_text(target / "card.json", json.dumps(card, indent=1) + "\n")
    write_digests()
    figures.mkdir(parents=True, exist_ok=True)
    draw_curve(chain, figures / f"{name}-curve.png", f"{name}: held-out retrieval while training")
    for row in card["retrieval"].values():
        shown = ", ".join(f"{k} {100 * v['value']:.1f}" for k, v in row["image_to_text"].items())
        typer.echo(f"{row['what']} (n = {row['n']}): {shown} %")


if __name__ == "__main__":
    typer.run(main)
