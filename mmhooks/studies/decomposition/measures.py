"""Measures of the decomposition study: contributions of attention heads, their texts, ablations, neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.decomposition.dataset import decompositions
from mmhooks.analysis.decomposition.second_order import second_order
from mmhooks.analysis.decomposition.text_span_checks import (
    SpanOverlap,
    half_overlap,
    reconstruction_accuracy,
)
from mmhooks.analysis.interventions.ablation_accuracy import ablate
from mmhooks.analysis.interventions.mean_ablation import (
    ablation_sites,
    class_token_parts,
    paper_parts,
    site_means,
)
from mmhooks.analysis.results import correlation
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.data.families import families
from mmhooks.errors import NoExactSum
from mmhooks.models.clip.embed_texts import embed_texts
from mmhooks.studies.common.held_out import sample_rows
from mmhooks.studies.decomposition.options import Options


@dataclass(frozen=True)
class Evaluation:
    """Held-out images, to be classified among the distinct texts of all of them.

    Attributes:
        rows: of the pairs. names: the distinct texts. classes: their embeddings. labels: the class of each image.
    """

    rows: list[int]
    names: list[str]
    classes: Float[Tensor, "c e"]
    labels: Int[Tensor, " n"]

    @classmethod
    def of(cls, model: Any, pairs: Any, rows: list[int]) -> Evaluation:
        names = sorted({pairs.texts[i] for i in rows})
        labels = torch.tensor([names.index(pairs.texts[i]) for i in rows])
        return cls(rows, names, embed_texts(model, names), labels)


@dataclass(frozen=True)
class Contributions:
    """Direct contributions of the last layers' attention heads to the embeddings of all images.

    Attributes:
        means: of every component, over some of the images that are not evaluated.
        layers: whose attention heads are analysed. heads: their names, "layer.head".
        outputs: contribution of each head to each image. embeddings: of all images.
    """

    means: Any
    layers: list[int]
    heads: list[str]
    outputs: Float[Tensor, "n h e"]
    embeddings: Float[Tensor, "n e"]


def contributions(model: Any, pairs: Any, seen: list[int], options: Options) -> Contributions:
    """Decomposes the embeddings of all images, and takes means over those that are not evaluated (``seen``)."""
    progress = not options.quiet
    some = pairs.select(sample_rows(seen, 1000, options.seed))
    one_token = model.readout("image").positions is not None
    means = mm.decompose(model, some, class_token=one_token, batch_size=options.batch, progress=progress)
    depth, n_heads = means.heads.shape[:2]
    layers = list(range(max(0, depth - options.layers), depth))
    outputs, embeddings = [], []
    for parts in decompositions(model, pairs, batch_size=options.batch, progress=progress):
        outputs.append(parts.heads[:, layers].flatten(1, 2).cpu())
        embeddings.append(parts.embedding.cpu())
    heads = [f"{layer}.{head}" for layer in layers for head in range(n_heads)]
    return Contributions(means, layers, heads, torch.cat(outputs), torch.cat(embeddings))


def halves(
    pairs: Any, parts: Contributions, seen: list[int], texts: Tensor, names: Sequence[str], span: Any
) -> SpanOverlap:
    """Returns how much the texts of two halves of the images agree that share no family of drawings."""
    return half_overlap(
        parts.outputs[seen], texts, names, families=families(pairs)[seen], n_texts=max(map(len, span.texts)),
        heads=parts.heads, selection=span.selection,
    )  # fmt: skip


def other_selection(
    parts: Contributions, seen: list[int], texts: Tensor, names: Sequence[str], span: Any
) -> dict[str, Any]:
    """Counts the texts of every head that TextSpan's other way of choosing has too."""
    name = "unit" if span.selection == "paper" else "paper"
    other = mm.text_span(
        parts.outputs[seen],
        texts,
        names,
        n_texts=max(map(len, span.texts)),
        heads=parts.heads,
        selection=name,
    )
    shared = [len(set(a) & set(b)) for a, b in zip(span.indices, other.indices, strict=True)]
    return {"selection": name, "shared": shared, "first": [list(t[:5]) for t in other.texts]}


def agreement(span: Any, outputs: Any, captions: Any, pool: Any, seed: int, top: int = 5) -> dict[str, Any]:
    """Measures whether the texts of an attention head describe its directions.

    For the first ``top`` texts of a head: the mean correlation, over held-out images, of the projection on the text's
    direction with the similarity of the image's caption to the text; as control, to random texts of the pool.
    """
    generator = torch.Generator().manual_seed(seed)
    similarity = (captions - captions.mean(0)) @ (pool - pool.mean(0)).T
    own, random = [], []
    for h in range(len(span.heads)):
        along = (outputs[:, h] - span.mean[h]) @ span.bases[h][:top].T
        chosen = span.indices[h][:top]
        other = torch.randint(len(pool), (len(chosen),), generator=generator).tolist()
        for values, texts in ((own, chosen), (random, other)):
            found = [correlation(along[:, k], similarity[:, t]) for k, t in enumerate(texts)]
            values.append(sum(found) / len(found) if found else float("nan"))
    return {
        "heads": [None if v != v else v for v in own],
        "own": bootstrap(torch.tensor(own)).__dict__,
        "random": bootstrap(torch.tensor(random)).__dict__,
    }


def rebuilt_from_texts(
    span: Any, parts: Contributions, evaluation: Evaluation, seen: list[int], n_texts: int
) -> dict[str, Any]:
    """Returns the accuracy with attention heads rebuilt from their first texts, the other components kept or at the mean."""
    rest = parts.embeddings - parts.outputs.sum(1)
    others = {
        "everything else kept": rest[evaluation.rows],
        "everything else at its mean": rest[seen].mean(0).expand(len(evaluation.rows), -1),
    }
    counts = sorted({0, 1, 2, 5, 10, n_texts})
    outputs = parts.outputs[evaluation.rows]
    return {
        name: reconstruction_accuracy(
            span, outputs, other, evaluation.classes, evaluation.labels, n_texts=counts
        )
        for name, other in others.items()
    }


def ablation_accuracy(
    model: Any, pairs: Any, parts: Contributions, evaluation: Evaluation, seen: list[int], options: Options
) -> Any:
    """Returns the accuracy with components mean-ablated: their direct effects and, unless ``--direct``, live."""
    pixels = torch.stack([model.preprocess(pairs.image(i)) for i in evaluation.rows])
    shape = parts.means.heads.shape[:2]
    removed = paper_parts(*shape, last=len(parts.layers))
    if parts.means.class_token is not None:
        removed[1:1] = class_token_parts(*shape)  # after the MLPs, as the public code prints them
    live = None
    if options.live:
        sites = sorted({site for part in removed if part.has_live for site in ablation_sites(part)})
        some = pairs.select(sample_rows(seen, 256, options.seed))
        live = site_means(model, some, sites, batch_size=options.batch)
    return ablate(
        model, pixels, evaluation.labels, evaluation.classes, parts.means, removed, live_means=live,
        batch_size=options.batch,
    )  # fmt: skip


def strongest_neurons(
    model: Any,
    pairs: Any,
    seen: list[int],
    layer: int,
    pool: Float[Tensor, "t e"],
    texts: Sequence[str],
    options: Options,
) -> dict[str, Any]:
    """Returns the neurons of a layer with the largest effect through later attention heads, described by texts.

    Of a tower that pools by attention (SigLIP) there are none, and ``why`` says so: their effects are no exact sum.
    """
    rows = sample_rows(seen, 512, options.seed)
    try:
        found = second_order(model, pairs.select(rows), layer=layer, batch_size=options.batch)
    except NoExactSum as fault:
        return {
            "layer": layer,
            "n_samples": 0,
            "reference": None,
            "mean_rank1": None,
            "strongest": [],
            "why": str(fault),
        }
    strong = found.strongest(options.each)
    code = mm.sparse_text_code(
        found.direction[strong], pool, texts, mean=torch.zeros(found.direction.shape[1]), penalty=0.1
    )
    summary = {k: v for k, v in found.to_json().items() if k in ("layer", "n_samples", "reference")}
    return summary | {
        "mean_rank1": float(found.explained.nanmean()),
        "strongest": [
            {
                "neuron": found.neurons[i],
                "size": float(found.size[i]) / found.reference,
                "rank1": float(found.explained[i]),
                "texts": code.top(j, 6),
                "cosine": float(code.cosine[j]),
                "top": [rows[t] for t in found.top[i].tolist() if t >= 0],
            }
            for j, i in enumerate(strong)
        ],
    }
