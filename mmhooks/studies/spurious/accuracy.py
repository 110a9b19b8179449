"""Classification without some attention heads: worst-group accuracy, intervals, comparisons and claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.statistics.intervals import from_draws
from mmhooks.analysis.statistics.power import detectable_beyond_random, detectable_mean
from mmhooks.analysis.statistics.primaries import Decision, Measured, Primary, decide, verdict_text
from mmhooks.analysis.statistics.resampling import beyond_random
from mmhooks.studies.common.claims import verdict_of_outcome

Head = tuple[int, int]


@dataclass(frozen=True)
class Runner:
    """Classifies scenes with some attention heads mean-ablated live; returns which images are correct."""

    hooked: Any
    means: dict[str, Tensor]
    texts: Tensor
    batch: int

    @torch.no_grad()
    def __call__(self, heads: Sequence[Head], scenes: Any) -> Bool[Tensor, " n"]:
        from mmhooks.analysis.interventions.mean_ablation import Parts, mean_edits

        edits = mean_edits(Parts("heads", heads=tuple(heads)), self.means)
        with self.hooked.hooks(*edits):
            z = torch.cat(
                [
                    self.hooked.encode_image(self.hooked.to_input(part))
                    for part in scenes.pixels.split(self.batch)
                ]
            )
        return (normalize(z.float().cpu(), dim=1) @ self.texts.T).argmax(1) == scenes.animals


def worst_group(right: Bool[Tensor, " n"], groups: Int[Tensor, " n"]) -> float:
    """Returns the lowest accuracy of a group; groups without an image do not count."""
    return min(float(right[groups == g].float().mean()) for g in groups.unique().tolist())


def species_draws(groups: Int[Tensor, " n"], species: Int[Tensor, " n"], seed: int, draws: int = 2000) -> Any:
    """Draws how often every image counts when species are resampled as wholes, ``[draws n]``.

    Land and water animals are resampled apart, so that no group of a draw is empty for want of its animals.
    """
    generator, weights = (
        torch.Generator().manual_seed(seed),
        torch.zeros(draws, len(groups), dtype=torch.float64),
    )
    for kind in (groups // 2).unique():
        rows = (groups // 2 == kind).nonzero()[:, 0]
        _, own = species[rows].unique(return_inverse=True)
        n = int(own.max()) + 1
        picks = torch.randint(n, (draws, n), generator=generator)
        counts = torch.zeros(draws, n, dtype=torch.float64)
        counts.scatter_add_(1, picks, torch.ones(draws, n, dtype=torch.float64))
        weights[:, rows] = counts[:, own]
    return weights


def group_accuracies(
    right: Bool[Tensor, "k n"], groups: Int[Tensor, " n"], weights: Float[Tensor, "draws n"]
) -> Float[Tensor, "draws k g"]:
    """Returns the accuracy of every group when image i counts ``weights[:, i]`` times; a group without weight is NaN."""
    found = []
    for g in groups.unique().tolist():
        here = weights[:, groups == g]
        found.append((here @ right[:, groups == g].double().T) / here.sum(1, keepdim=True))
    return torch.stack(found, 2)


def accuracy_estimates(
    right: Bool[Tensor, " n"],
    groups: Int[Tensor, " n"],
    species: Int[Tensor, " n"],
    shares: Float[Tensor, " 4"],
    seed: int,
) -> dict[str, Any]:
    """Returns the accuracy of every group, of the worst, and two averages: with the groups' shares where heads were chosen,
    and with those of the evaluated images. All intervals resample species."""
    from mmhooks.studies.spurious.samples import GROUPS

    n, there = len(right), groups.unique().tolist()
    drawn = group_accuracies(right[None], groups, species_draws(groups, species, seed))[:, 0]
    own = group_accuracies(right[None], groups, torch.ones(1, n, dtype=torch.float64))[0, 0]
    drawn = drawn[~drawn.isnan().any(1)]
    weights = shares[there].double() / shares[there].sum()
    tested = torch.bincount(groups, minlength=4)[there].double() / n
    return {
        "groups": {
            GROUPS[g]: from_draws(float(own[i]), drawn[:, i], int((groups == g).sum()))
            for i, g in enumerate(there)
        },
        "worst": from_draws(float(own.min()), drawn.min(1).values, n),
        "average": from_draws(float(own @ weights), drawn @ weights, n),
        "test_average": from_draws(float(own @ tested), drawn @ tested, n),
    }


def worst_of_random(
    trials: Sequence[Sequence[Bool[Tensor, " _"]]], groups: Int[Tensor, " m"]
) -> Float[Tensor, " draws"]:
    """Returns the worst group of all splits together, by draw of random heads."""
    return torch.tensor(
        [worst_group(torch.cat(parts), groups) for parts in zip(*trials, strict=True)]
    ).double()


def mean_and_range(values: Float[Tensor, " draws"]) -> Any:
    """Returns the mean over random heads, and the range of the central 95 %."""
    return from_draws(float(values.mean()), values.double(), len(values))


PRIMARIES = tuple(
    Primary(
        f"attention heads by {name}, direct effects ablated, raise the worst group above {what}", "greater"
    )
    for name in ("TextSpan", "contrast")
    for what in ("the plain model's", "that of random ones chosen alike")
)


def measured(
    name: str,
    right: dict[str, Bool[Tensor, " n"]],
    random: Sequence[Sequence[Bool[Tensor, " _"]]],
    groups: Int[Tensor, " n"],
    species: Int[Tensor, " n"],
    seed: int,
) -> tuple[Measured, Measured]:
    """Compares the worst group without the heads of ``name`` with the plain model's, and with random heads'.

    Both are paired: the same resampled species on both sides. Against random heads the gain must lie beyond the scatter
    of species *and* beyond that of random sets, so the larger of the two p-values counts.
    """
    sets = [torch.cat(parts) for parts in zip(*random, strict=True)]
    stacked = torch.stack([right["plain"], right[name], *sets])
    drawn = group_accuracies(stacked, groups, species_draws(groups, species, seed)).amin(2)
    drawn = drawn[~drawn.isnan().any(1)]
    own = group_accuracies(stacked, groups, torch.ones(1, len(groups), dtype=torch.float64))[0].amin(1)
    df = len(species.unique()) - 2
    plain = _paired(float(own[1] - own[0]), drawn[:, 1] - drawn[:, 0], df, len(groups))
    against = _paired(float(own[1] - own[2:].mean()), drawn[:, 1] - drawn[:, 2:].mean(1), df, len(groups))
    p = max(against.p, beyond_random(float(own[1]), own[2:]))
    needed = max(against.detectable, detectable_beyond_random(own[2:]))
    return plain, Measured(against.estimate, p, needed)


def _paired(value: float, drawn: Float[Tensor, " draws"], df: int, n: int) -> Measured:
    """A paired difference: its bootstrap interval, two-sided p by the share of draws beyond 0, and power."""
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (1 + beyond) / (1 + len(drawn)))
    return Measured(from_draws(value, drawn, n), p, detectable_mean(float(drawn.std()), df))


def decided(
    right: dict[str, Bool[Tensor, " n"]],
    random: Sequence[Sequence[Bool[Tensor, " _"]]],
    groups: Int[Tensor, " n"],
    species: Int[Tensor, " n"],
    seed: int,
) -> dict[str, Decision]:
    """Tests the primaries, which are on direct effects as in the paper; everything live is exploratory."""
    found = [
        m for name in ("TextSpan", "contrast") for m in measured(name, right, random, groups, species, seed)
    ]
    return decide(PRIMARIES, {p.name: m for p, m in zip(PRIMARIES, found, strict=True)})


def claims_of(decisions: dict[str, Decision]) -> list[tuple[Any, str, str]]:
    """Returns verdict, claim and numbers of every primary, as a page lists them."""
    return [(verdict_of_outcome(d.outcome), d.name, verdict_text(d)) for d in decisions.values()]
