"""Turn a finished training run into what the package ships: fp16 weights, a card, a learning curve.

    python recipes/ship_mini.py --corpus runs/corpus --run runs/mini --name mini

The card's retrieval is measured on the rounded weights, the ones that users get.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from mini_corpus import SOURCES, UNSEEN_STYLE, Corpus
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import binomtest
from train_mini import embed, galleries, ranks

from mmhooks.models import mini, zoo

matplotlib.use("Agg")
GALLERIES = {
    "heldout_pictures": "unseen pictures of seen concepts",
    "heldout_concepts": "unseen concepts",
    "unseen_style": f"a drawing style never seen ({UNSEEN_STYLE})",
}


def rate(hits: int, n: int) -> dict:
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return {"value": hits / n, "low": low, "high": high}


@torch.no_grad()
def retrieval(model, corpus: Corpus) -> dict:
    """R@k with Wilson intervals both ways, and by chance, on the galleries of the card."""
    tokenizer, result = mini.tokenizer(), {}
    for name, chosen in galleries(corpus).items():
        image, text = embed(model, tokenizer, corpus, chosen)
        n = len(chosen)
        row: dict = {"what": GALLERIES[name], "n": n, "chance": {f"R@{k}": k / n for k in (1, 5, 10)}}
        for way, rank in (("image_to_text", ranks(image, text)), ("text_to_image", ranks(text, image))):
            row[way] = {f"R@{k}": rate(int((rank < k).sum()), n) for k in (1, 5, 10)}
        result[name] = row
    return result


def draw_curve(rows: list[dict], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, label in GALLERIES.items():
        axes.plot(
            [r["step"] for r in rows],
            [100 * r[name]["R@10"] for r in rows],
            label=f"{label} (n = {rows[-1][name]['n']})",
        )
    axes.set(xlabel="step of 256 pairs", ylabel="image→text R@10, %", ylim=(0, 100), title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(
    run: Annotated[Path, typer.Option(help="folder of a finished train_mini.py run")],
    name: Annotated[str, typer.Option(help="mini or mini-declip")] = "mini",
    corpus: Annotated[Path, typer.Option()] = Path("runs/corpus"),
    figures: Annotated[Path, typer.Option()] = Path("docs/figures"),
) -> None:
    """Ship a run: python recipes/ship_mini.py --corpus runs/corpus --run runs/mini --name mini"""
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        step = int(file.metadata()["step"])
        keys = [key for key in file.keys() if key.startswith("average.")]  # noqa: SIM118 - not a dict
        weights = {key.removeprefix("average."): file.get_tensor(key) for key in keys}
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    model = mini.build().eval()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    drawings = Corpus(corpus)
    plan = json.loads((run / "plan.json").read_text())
    curve = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    counts = Counter(row["style"] for row in drawings.rows)
    trained = Counter(drawings.rows[i]["style"] for i in drawings.where("train"))
    card = {
        "name": name,
        "architecture": "open_clip CLIP: ViT 64 px, patch 8, width 192, 6 layers; text width 192, 4 layers, "
        "context 16; embedding 256",
        "parameters": sum(p.numel() for p in model.parameters()),
        "licence": "weights: Apache-2.0; trained on drawings under the licences listed in data",
        "data": [
            {"source": s.style, "licence": s.licence, "attribution": s.attribution,
             "pictures": counts[s.style], "trained_on": trained[s.style]} for s in SOURCES
        ],
        "text_teacher": "all-MiniLM-L6-v2 (Apache-2.0): start of the word table"
        + (", neighbourhoods of captions in the loss" if plan["relational"] else ""),
        "recipe": {"script": "recipes/train_mini.py", "plan": plan, "steps_done": step,
                   "pairs_seen": step * plan["batch"], "torch": version("torch"),
                   "open_clip_torch": version("open_clip_torch")},
        "retrieval": retrieval(model, drawings),
    }  # fmt: skip
    target = zoo.ASSETS / name
    target.mkdir(parents=True, exist_ok=True)
    save_file(half, target / "model.safetensors", {"format": "pt", "name": name})
    (target / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    figures.mkdir(parents=True, exist_ok=True)
    draw_curve(curve, figures / f"{name}-curve.png", f"{name}: held-out retrieval while training")
    for row in card["retrieval"].values():
        shown = ", ".join(f"{k} {100 * v['value']:.1f}" for k, v in row["image_to_text"].items())
        typer.echo(f"{row['what']} (n = {row['n']}): {shown} %")


if __name__ == "__main__":
    typer.run(main)
