"""Measures sparse sums of texts (SpLiCE) and neurons on `mini`, and writes both into docs/text_span.md.

    PYTHONPATH=recipes python -m publish.text_codes      # some ten minutes on one core

Means and directions are of 1,000 drawings, accuracies of 400 held-out ones among their own names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

import mmhooks as mm
from mmhooks.analysis.statistics.intervals import bootstrap, wilson
from mmhooks.report import Cell, Table, fixed, percent
from mmhooks.studies.common.held_out import held_out_rows, sample_rows
from mmhooks.studies.decomposition.measures import Evaluation
from mmhooks.studies.gender.discrimination import auc
from publish.marked_block import fill

ROOT = Path(__file__).parents[2]
PENALTIES = (0.5, 0.3, 0.1, 0.02)
SETS = 200  # of random texts
LAYER, TOP_IMAGES, N_TEXTS = 3, 100, 32
LIVE_NEURONS, LIVE_IMAGES = 48, 128


@dataclass(frozen=True)
class Inputs:
    """`mini`, the pool with its unit embeddings, drawings for means and directions, and those that are classified."""

    model: Any
    pairs: Any
    pool: Any
    texts: Float[Tensor, "t e"]
    seen: list[int]
    evaluation: Evaluation

    @classmethod
    def of(cls) -> Inputs:
        model, pairs, pool = mm.load("mini"), mm.data.pairs("mini"), mm.data.text_pool("general")
        held = sample_rows(held_out_rows(pairs, "mini", 0), 400, 0)
        others = sorted(set(range(len(pairs))) - set(held_out_rows(pairs, "mini", 0)))
        seen = sample_rows(others, 1000, 0)
        return cls(
            model, pairs, pool, mm.embed_texts(model, pool.texts), seen, Evaluation.of(model, pairs, held)
        )

    @torch.no_grad()
    def images(self, rows: list[int]) -> Float[Tensor, "n e"]:
        """Returns unit embeddings of drawings."""
        parts = [self.model.encode_image(self.pixels(rows[i : i + 64])) for i in range(0, len(rows), 64)]
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=1)

    def pixels(self, rows: list[int]) -> Float[Tensor, "n 3 h w"]:
        return torch.stack([self.model.preprocess(self.pairs.image(i)) for i in rows])


def accuracy(images: Float[Tensor, "n e"], inputs: Inputs) -> str:
    """Returns the share of images that are nearest to their own name, with its Wilson interval."""
    right = (images @ inputs.evaluation.classes.T).argmax(1) == inputs.evaluation.labels
    rate = wilson(int(right.sum()), len(right))
    return Cell(f"{percent(rate.value)} %", f"[{percent(rate.low)}, {percent(rate.high)}]").markdown()


def sparse_sums(inputs: Inputs) -> str:
    """Returns the table of penalties, and what taking the animals out of an image's texts does."""
    seen, held = inputs.images(inputs.seen), inputs.images(inputs.evaluation.rows)
    mean, rows = seen.mean(0), []
    for penalty in PENALTIES:
        code = mm.sparse_text_code(held, inputs.texts, inputs.pool.texts, l1_penalty=penalty, mean=mean)
        rows.append([f"{penalty:g}", fixed(float(code.l0.mean()), 1), fixed(float(code.cosine.mean())),
                     accuracy(code.recompose(), inputs)])  # fmt: skip
    table = Table(
        ["l1_penalty", "Texts per image", "Cosine to the embedding", "Accuracy of recomposed embeddings"], rows,
        "Images rebuilt from texts",
        f"{len(held)} held-out images among {len(inputs.evaluation.names)} names, mean of {len(seen):,} others, pool "
        f"`{inputs.pool.name}`; the embeddings themselves: {accuracy(held, inputs)}.",
    )  # fmt: skip
    return f"{table.markdown()}\n\n{without_animals(inputs, seen, mean)}"


def without_animals(inputs: Inputs, seen: Float[Tensor, "n e"], mean: Float[Tensor, " e"]) -> str:
    """Returns how well images of animals are told from others before and after the texts of animals are taken out."""
    pool = inputs.pool
    animals = torch.tensor([kind == "animal" for kind in pool.kinds])
    names = {re.sub(r"^an? ", "", t) for t, own in zip(pool.texts, animals.tolist(), strict=True) if own}
    word = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names))) + r")\b")
    # auc() ranks class 0 above class 1.
    other = torch.tensor([not word.search(inputs.pairs.texts[i]) for i in inputs.seen]).long()
    animal, thing = mm.embed_texts(inputs.model, ["an animal", "an object"])
    code = mm.sparse_text_code(seen, inputs.texts, pool.texts, l1_penalty=0.1, mean=mean)

    def told(images: Tensor) -> float:
        return auc((images @ (animal - thing)).double().numpy(), other.numpy())

    count, generator = int(animals.sum()), torch.Generator().manual_seed(0)
    rest = (~animals).nonzero().flatten()
    drawn = torch.tensor([
        told(code.intervene(rest[torch.randperm(len(rest), generator=generator)[:count]])) for _ in range(SETS)
    ])  # fmt: skip
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975])).tolist()
    weights = torch.zeros(len(pool)).index_add_(
        0, code.codes.indices.flatten().long(), code.codes.values.flatten().float()
    )
    share = float(weights[animals].sum() / weights.sum())
    return (
        f"Without the {count} texts of animals ({100 * share:.0f} % of all weight; `l1_penalty=0.1`) the difference of "
        f"similarities to “an animal” and “an object” tells the {int((other == 0).sum())} of {len(other):,} images whose name "
        f"has a word of these texts by an AUC of {fixed(told(code.intervene(animals)))} instead of "
        f"{fixed(told(code.recompose()))}; "
        f"without {count} random other texts {fixed(float(drawn.mean()))} [{fixed(low)}, {fixed(high)}] ({SETS} sets)."
    )


def neurons(inputs: Inputs) -> str:
    """Returns how well directions and texts describe a layer's neurons, their ablation with its power, and their prediction."""
    model, seen = inputs.model, inputs.pairs.select(inputs.seen)
    found = mm.neuron_directions(model, seen, layer=LAYER, top_k=TOP_IMAGES)
    plain = mm.second_order(model, seen, layer=LAYER)
    same = cosine_similarity(found.direction, plain.direction).abs()
    rebuilt = {}
    for scale in ("texts", "coordinates"):
        code = mm.orthogonal_text_code(
            found.direction, inputs.texts, inputs.pool.texts, n_texts=N_TEXTS, scale=scale
        )
        rebuilt[scale] = bootstrap(cosine_similarity(code.reconstruct(), found.direction))
    held = inputs.pixels(inputs.evaluation.rows)
    ablated = mm.ablate_neurons(model, held, inputs.evaluation.labels, inputs.evaluation.classes, found)
    first = (
        f"Block {LAYER}, {len(inputs.seen):,} images for the directions: the direction carries "
        f"{percent(float(found.explained.nanmean()))} % of the squares of a neuron's {TOP_IMAGES} longest effects and has a mean "
        f"cosine of {fixed(float(same.mean()), 2)} with that of `mm.second_order`; {N_TEXTS} of {len(inputs.pool):,} texts "
        f'rebuild it to a cosine of {interval(rebuilt["texts"])}, with `scale="coordinates"`, the public code\'s, to '
        f"{interval(rebuilt['coordinates'])}."
    )
    return "\n\n".join(
        [first, ablation_table(ablated, len(inputs.evaluation.names)).markdown(), predicted(inputs)]
    )


def ablation_table(found: Any, names: int) -> Table:
    """Returns accuracy with effects ablated, its change over the same images, and the smallest change these images show."""
    rows: list[list[str | Cell]] = [["nothing", points(found.before, "%"), "", ""]]
    rows += [
        [
            kind,
            points(rate, "%"),
            points(found.change[kind], "points"),
            f"{percent(found.detectable[kind])} points",
        ]
        for kind, rate in found.without.items()
    ]
    return Table(
        ["Second-order effects at their mean", "Accuracy", "Change", "Detectable at 80 % power"], rows,
        f"Ablating the second-order effects of all {found.n_neurons} neurons",
        f"{found.before.n} held-out images among {names} names. Changes are over the same images (Agresti, Min 2005). "
        f"Significant: effects longer than the neuron's {TOP_IMAGES}th longest.",
        text_columns=(0,),
    )  # fmt: skip


def predicted(inputs: Inputs) -> str:
    """Returns what the effects of single neurons predict of their ablation in the running model."""
    width = torch.randperm(768, generator=torch.Generator().manual_seed(0))[:LIVE_NEURONS]
    some = inputs.pixels(inputs.seen[:LIVE_IMAGES])
    found = mm.predict_ablations(inputs.model, some, layer=LAYER, neurons=sorted(width.tolist()))
    second, direct, both = (bootstrap(v) for v in (found.second, found.direct, found.both))
    return (
        f"With one neuron set to its mean in the running model ({LIVE_NEURONS} random neurons, {LIVE_IMAGES} images, intervals "
        f"over neurons), its second-order effects alone predict {points(second, '%')} of the squares of the embedding's change, "
        f"its direct effect {points(direct, '%')}, both together {points(both, '%')}."
    )


def points(e: Any, unit: str) -> str:
    """Returns hundredths with their interval."""
    plus = unit == "points"
    between = f"[{percent(e.low, plus=plus)}, {percent(e.high, plus=plus)}]"
    return f"{percent(e.value, plus=plus)} {unit} {between}"


def interval(e: Any) -> str:
    return f"{fixed(e.value)} [{fixed(e.low)}, {fixed(e.high)}]"


BLOCKS: dict[str, Callable[[Inputs], str]] = {"splice": sparse_sums, "neurons": neurons}


def main(
    page: Annotated[Path, typer.Option(help="Where the markers of both blocks are.")] = ROOT
    / "docs/text_span.md",
) -> None:
    """Measures and fills both blocks."""
    torch.manual_seed(0)
    inputs = Inputs.of()
    for name, made in BLOCKS.items():
        fill(page, made(inputs), slot=name)


if __name__ == "__main__":
    typer.run(main)
