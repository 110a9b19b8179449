"""Measures reading and typographic attacks of mini-reader, compared with mini and the control without words.

    python -m embedded.reader.report --corpus runs/corpus --run runs/reader --control runs/reader-control --out runs/report

Everything is measured on the rounded weights, which users get. Writes report.json and report.md.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Bool
from rich.progress import track
from torch import Tensor

from embedded.clip.ship import half_weights, model_from, rate, retrieval
from embedded.reader.evaluate import (
    CANDIDATES,
    CONDITIONS,
    Classified,
    Sample,
    attack,
    make_test_images,
    read_right,
    samples,
)
from embedded.reader.words import FONTS, UNSEEN_FONTS, Vocabulary, Written, unseen_fonts
from mmhooks.analysis.statistics.repeated import repeated_difference
from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.synthetic import words
from mmhooks.models import zoo
from mmhooks.models.embedded import mini
from mmhooks.utils.files import write_text

SIZES = ((8, 9), (10, 11), (12, 14), (15, 19), (20, 30))  # pixels per em


def reading(model, test_images: list[Written], pool: tuple[str, ...]) -> dict:
    """Returns the accuracy among 32 words and among the whole pool, over all images and by size."""
    right = read_right(model, mini.tokenizer(), test_images, pool)
    sizes = torch.tensor([one.writing.size for one in test_images])

    def table(chosen: Bool[Tensor, " n"]) -> dict:
        n = int(chosen.sum())
        return {"n": n} | {key: rate(int(hit[chosen].sum()), n) for key, hit in right.items()}

    whole = table(torch.ones(len(test_images), dtype=torch.bool))
    by_size = {f"{low}-{high} px": (sizes >= low) & (sizes < high + 1) for low, high in SIZES}
    return whole | {
        "words": len(pool),
        "chance": {"of_32": 1 / min(CANDIDATES, len(pool)), "of_all": 1 / len(pool)},
        "by_size": {name: table(chosen) for name, chosen in by_size.items() if chosen.any()},
    }


def difference(a: Bool[Tensor, " n"], b: Bool[Tensor, " n"]) -> dict:
    """Returns the mean of a - b over the same samples: 95 % by bootstrap, and the exact McNemar test."""
    found = repeated_difference(a[None], b[None])
    e = found.difference
    return {"value": e.value, "low": e.low, "high": e.high, "p": found.p}


def attacked(model, corpus: Corpus, chosen: list[Sample]) -> dict:
    found: dict[str, dict[str, Classified]] = {}
    for place, condition, classified in attack(model, mini.tokenizer(), corpus, chosen):
        found.setdefault(place, {})[condition] = classified
    result: dict = {"n": len(chosen), "candidates": CANDIDATES}
    for place, by_condition in found.items():
        result[place] = {
            condition: {
                "A_first": rate(int(classified.is_a.sum()), len(chosen)),
                "B_first": rate(int(classified.is_b.sum()), len(chosen)),
                "p_A": classified.p_a.mean().item(),
                "p_B": classified.p_b.mean().item(),
            }
            for condition, classified in by_condition.items()
        }
        word, fake = by_condition["word"], by_condition["nonsense"]
        result[place]["B(word) - B(nonsense)"] = difference(word.is_b, fake.is_b)
        result[place]["A(nonsense) - A(word)"] = difference(fake.is_a, word.is_a)
    return result


def digest(model) -> str:
    """Returns a digest of the weights, so that weights in the report are not measured again."""
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        state.update(name.encode() + value.contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def markdown(report: dict) -> str:
    def percent(cell: dict) -> str:
        return f"{100 * cell['value']:.1f} ({100 * cell['low']:.1f} – {100 * cell['high']:.1f})"

    lines = [
        "# What mini-reader reads",
        "",
        "## Reading: share of images whose own word comes first, %",
        "",
    ]
    lines += ["| Model | Words | n | among 32 | among all of them |", "|:--|:--|--:|--:|--:|"]
    for model, test_sets in report["reading"].items():
        for name, row in test_sets.items():
            lines.append(f"| {model} | {name} ({row['words']}) | {row['n']} | {percent(row['of_32'])} | "
                         f"{percent(row['of_all'])} |")  # fmt: skip
    lines += ["", "By size, taught words in unseen fonts:", "", "| Model | Size | n | among 32 | among all |",
              "|:--|:--|--:|--:|--:|"]  # fmt: skip
    for model, test_sets in report["reading"].items():
        for size, row in test_sets["taught words"]["by_size"].items():
            lines.append(
                f"| {model} | {size} | {row['n']} | {percent(row['of_32'])} | {percent(row['of_all'])} |"
            )
    lines += ["", "## Retrieval: image to text, %", "", "| Model | Held out | n | R@1 | R@5 | R@10 |",
              "|:--|:--|--:|--:|--:|--:|"]  # fmt: skip
    for model, galleries in report["retrieval"].items():
        for row in galleries.values():
            cells = " | ".join(percent(row["image_to_text"][k]) for k in ("R@1", "R@5", "R@10"))
            lines.append(f"| {model} | {row['what']} | {row['n']} | {cells} |")
    lines += ["", "## A word B on a drawing of A: named first among 32, %", ""]
    for model, kinds in report["attack"].items():
        for kind, result in kinds.items():
            lines += [f"### {model}, B from the {kind} (n = {result['n']})", "",
                      "| Where | Condition | A | B | mean p(A) | mean p(B) |", "|:--|:--|--:|--:|--:|--:|"]  # fmt: skip
            for place in ("over", "beside"):
                for condition in CONDITIONS:
                    row = result[place][condition]
                    lines.append(f"| {place} | {condition} | {percent(row['A_first'])} | {percent(row['B_first'])}"
                                 f" | {row['p_A']:.3f} | {row['p_B']:.3f} |")  # fmt: skip
            lines.append("")
            for place in ("over", "beside"):
                for key in ("B(word) - B(nonsense)", "A(nonsense) - A(word)"):
                    row = result[place][key]
                    lines.append(f"- {place}: {key} = {percent(row)} points, p = {row['p']:.2g}")
            lines.append("")
    return "\n".join(lines) + "\n"


def main(
    run: Annotated[Path, typer.Option(help="folder of a run of embedded.reader.train")] = Path("runs/reader"),
    control: Annotated[Path | None, typer.Option(help="its --control run, if there is one")] = None,
    corpus: Annotated[Path, typer.Option(help="folder made by embedded.corpus")] = Path("runs/corpus"),
    out: Annotated[Path, typer.Option()] = Path("runs/report"),
    n: Annotated[int, typer.Option(help="samples of the attack, and of each reading test")] = 400,
    threads: int = 1,
) -> None:
    """Measures a run: PYTHONPATH=recipes python -m embedded.reader.report --run runs/reader --control runs/reader-control"""
    torch.set_num_threads(threads)
    drawings = Corpus(corpus)
    v = Vocabulary.of(drawings)
    fonts = unseen_fonts()
    models = {"mini": zoo.load("mini").model, "mini-reader": model_from(half_weights(run)[1], reads=True)}
    if control is not None:
        models["control"] = model_from(half_weights(control)[1], reads=True)
    test_sets = {
        "taught words": (make_test_images(v.names, fonts, 2 * n, seed=10), v.names),
        "held-out words": (make_test_images(v.unseen_names, fonts, n, seed=11), v.unseen_names),
    }
    chosen = {
        "taught words": samples(drawings, v.names, set(v.all), fonts, n),
        "held-out words": samples(drawings, v.names, set(v.all), fonts, n, b_pool=v.unseen_names),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    report: dict = {
        "fonts": {
            "trained": [f.__dict__ for f in FONTS],
            "unseen": [
                *(f.__dict__ for f in UNSEEN_FONTS),
                {"package": "matplotlib", "licence": "Bitstream Vera", "files": ", ".join(words.DEJAVU)},
            ],
        },
        "words": {"names": len(v.names), "others": len(v.others), "held_out_names": len(v.unseen_names),
                  "held_out_others": len(v.unseen_others)},
        "measured": {}, "reading": {}, "retrieval": {}, "attack": {},
    }  # fmt: skip
    for name, model in track(models.items(), description="measure"):
        report["measured"][name] = f"{digest(model)}, n = {n}"
        if before.get("measured", {}).get(name) == report["measured"][name]:
            for part in ("reading", "retrieval", "attack"):
                report[part][name] = before[part][name]
            continue
        report["reading"][name] = {
            kind: reading(model, *test_images) for kind, test_images in test_sets.items()
        }
        report["retrieval"][name] = retrieval(model, drawings)
        kinds = chosen if name == "mini-reader" else {"taught words": chosen["taught words"]}
        report["attack"][name] = {kind: attacked(model, drawings, some) for kind, some in kinds.items()}
        write_text(path, json.dumps(report, indent=1) + "\n")
    write_text(path, json.dumps(report, indent=1) + "\n")
    write_text(out / "report.md", markdown(report))
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
