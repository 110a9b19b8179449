"""One split of the spurious-cue study: attention heads chosen on some animals and evaluated on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.decomposition.text_span import text_span
from mmhooks.analysis.interventions.mean_ablation import site_means
from mmhooks.data.sources.text_pools import TextPool
from mmhooks.errors import DataError
from mmhooks.models.clip.embed_texts import embed_texts
from mmhooks.studies.spurious.accuracy import Runner
from mmhooks.studies.spurious.direct import DirectScores, Head, direct_scores
from mmhooks.studies.spurious.options import Options
from mmhooks.studies.spurious.samples import Scenes, Split
from mmhooks.utils.progress import track

SIZES = (1, 2, 3, 4, 6, 8, 10)  # how many attention heads of a ranking are tried


@dataclass(frozen=True)
class Trial:
    """Results of one split.

    Attributes:
        chosen: the heads by way of choosing.
        right: which images are classified correctly without them: ``direct`` effects ablated, and ``live``.
        random: the same for random rankings of which the best prefix was chosen as for the others, draw by draw.
        texts: of every head.
        reach: the largest share of a head's variance that texts of backgrounds span.
    """

    chosen: dict[str, list[Head]]
    right: dict[str, dict[str, Bool[Tensor, " n"]]]
    random: dict[str, list[Bool[Tensor, " n"]]]
    texts: dict[str, list[str]]
    reach: float


def trial(
    model: Any,
    found: Split,
    pool: TextPool,
    embedded: Float[Tensor, "t e"],
    options: Options,
    *,
    seed: int,
    title: str,
) -> Trial:
    """Chooses attention heads on one half of the animals and evaluates them on the other.

    The number of heads is chosen by direct effects, for random rankings too: what selection gains, they gain as well.
    """
    batch, progress = options.batch, not options.quiet
    texts = class_texts(model, found.names)
    depth = len(model.sites("image.blocks.*.resid_post"))
    layers = list(range(max(0, depth - options.layers), depth))
    full, scores, outputs = direct_scores(model, found.choose, texts, layers, batch=batch, progress=progress)
    means = scores.mean(0)
    choose = DirectScores(full, scores, means, tuple(layers), found.choose.animals)
    full, scores, _ = direct_scores(model, found.judge, texts, layers, batch=batch, progress=progress)
    judge = DirectScores(full, scores, means, tuple(layers), found.judge.animals)
    named, ranked, reach = by_text_span(
        pool, embedded, outputs, layers, options.kinds.split(","), options.selection
    )
    rankings = {"TextSpan": ranked, "contrast": by_contrast(outputs, layers, found.choose, texts)}
    chosen = {name: best_prefix(choose, order, found.choose) for name, order in rankings.items()}
    sites = [f"image.blocks.{n}.attn.head_out" for n in layers]
    live = Runner(model, site_means(model, found.choose.pixels, sites, batch_size=batch), texts, batch)
    sets = {"plain": [], **chosen}
    right = {
        "direct": {name: judge.right(own) for name, own in sets.items()},
        "live": {name: live(own, found.judge) for name, own in sets.items()},
    }
    drawn = random_sets(choose, found.choose, outputs.shape[2], options.direct_draws, seed)
    some = track(drawn[: options.draws], min(options.draws, len(drawn)), f"{title}: random", show=progress)
    random = {
        "direct": [judge.right(own) for own in drawn],
        "live": [live(own, found.judge) for own in some],
    }
    return Trial(chosen, right, random, named, reach)


def random_sets(
    choose: DirectScores, scenes: Scenes, n_heads: int, draws: int, seed: int
) -> list[list[Head]]:
    """Draws random rankings of all heads and chooses the best prefix of each."""
    everything = [(n, h) for n in choose.layers for h in range(n_heads)]
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(everything), generator=generator).tolist() for _ in range(draws))
    return [best_prefix(choose, [everything[i] for i in order], scenes) for order in orders]


# -- choosing ------------------------------------------------------------------------------------------------


def best_prefix(scores: DirectScores, order: list[Head], scenes: Scenes) -> list[Head]:
    """Returns the prefix of a ranking with the best worst group, on the scenes where heads are chosen."""
    sizes = [k for k in SIZES if k <= len(order)]
    if not sizes:
        return []
    right = scores.prefixes(order[: sizes[-1]])[sizes].double()
    worst = torch.stack([right[:, scenes.groups == g].mean(1) for g in scenes.groups.unique()]).amin(0)
    return order[: sizes[int(worst.argmax())]]


def class_texts(hooked: Any, names: tuple[list[str], list[str]]) -> Float[Tensor, "2 e"]:
    """Returns each class as the mean of its names' unit embeddings."""
    return torch.stack([normalize(embed_texts(hooked, own).mean(0), dim=0) for own in names])


def by_text_span(
    pool: TextPool,
    embedded: Float[Tensor, "t e"],
    outputs: Float[Tensor, "n l h e"],
    layers: Sequence[int],
    kinds: Sequence[str],
    selection: str,
) -> tuple[dict[str, list[str]], list[Head], float]:
    """Ranks heads by the variance that they write along those of their texts that name a background.

    Args:
        kinds: of the pool's texts that are backgrounds. selection: how :func:`text_span` chooses.

    Returns:
        The texts of every head; the ranked heads, without those that have no such text; and the largest share of a
        head's variance that such texts span.

    Raises:
        DataError: a pool without kinds.
    """
    if pool.kinds is None:
        raise DataError(f"pool {pool.name!r} has no kinds: put a line '# kind' above the texts of each kind")
    n_heads = outputs.shape[2]
    names = [f"{n}.{h}" for n in layers for h in range(n_heads)]
    rank = min(80, outputs.shape[-1], len(outputs) - 1)
    span = text_span(
        outputs.flatten(1, 2),
        embedded,
        pool.texts,
        heads=names,
        rank=rank,
        n_texts=min(20, rank, len(pool.texts)),
        selection=selection,  # type: ignore[arg-type]
    )
    along: dict[str, float] = {}
    for name, own, explained, variance in zip(
        names, span.indices, span.explained, span.variance, strict=True
    ):
        more = [b - a for a, b in zip((0.0, *explained), explained, strict=False)]
        along[name] = variance * sum(m for i, m in zip(own, more, strict=True) if pool.kinds[i] in kinds)
    order = sorted((name for name in names if along[name] > 0), key=lambda name: -along[name])
    named = {name: list(texts) for name, texts in zip(names, span.texts, strict=True)}
    reach = max(along[name] / v for name, v in zip(names, span.variance, strict=True))
    return named, [(int(n), int(h)) for n, h in (name.split(".") for name in order)], reach


def by_contrast(
    outputs: Float[Tensor, "n l h e"], layers: Sequence[int], scenes: Scenes, texts: Float[Tensor, "2 e"]
) -> list[Head]:
    """Ranks heads by how far a background of water instead of land moves them towards the text of water animals."""
    moved = outputs @ (texts[1] - texts[0])
    effect = torch.zeros(moved.shape[1:])
    kinds = [animal for animal in (0, 1) if len(set(scenes.places[scenes.animals == animal].tolist())) == 2]
    for animal in kinds:
        of, water = scenes.animals == animal, scenes.places == 1
        effect += moved[of & water].mean(0) - moved[of & ~water].mean(0)
    order = effect.flatten().argsort(descending=True).tolist()
    return [(layers[i // effect.shape[1]], i % effect.shape[1]) for i in order if effect.flatten()[i] > 0]
