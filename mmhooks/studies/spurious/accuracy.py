"""Classification without some attention heads: worst-group accuracy, intervals, comparisons and claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.studies.spurious.page import count_text

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


def accuracy_estimates(
    right: Bool[Tensor, " n"], groups: Int[Tensor, " n"], shares: Float[Tensor, " 4"], seed: int
) -> dict[str, Any]:
    """Returns the accuracy of every group (Wilson), of the worst group, and the weighted average (group bootstrap)."""
    from mmhooks.analysis.statistics.intervals import from_draws, wilson
    from mmhooks.studies.spurious.samples import GROUPS

    drawn, own = group_draws(right[None], groups, seed)
    there = groups.unique().tolist()
    weights = shares[there].double() / shares[there].sum()
    return {
        "groups": {GROUPS[g]: wilson(int(right[groups == g].sum()), int((groups == g).sum())) for g in there},
        "worst": from_draws(float(own[0].min()), drawn[0].min(1).values, len(right)),
        "average": from_draws(float(own[0] @ weights), drawn[0] @ weights, len(right)),
    }


def group_draws(
    right: Bool[Tensor, "k n"], groups: Int[Tensor, " n"], seed: int, draws: int = 2000
) -> tuple[Float[Tensor, "k draws g"], Float[Tensor, "k g"]]:
    """Returns the accuracy of every group in bootstrap samples, the same images for all ``k``; and the observed one."""
    generator = torch.Generator().manual_seed(seed)
    drawn, own = [], []
    for g in groups.unique().tolist():
        here = right[:, groups == g].double()
        picks = torch.randint(here.shape[1], (draws, here.shape[1]), generator=generator)
        drawn.append(torch.stack([row[picks].mean(1) for row in here]))
        own.append(here.mean(1))
    return torch.stack(drawn, 2), torch.stack(own, 1)


def mean_and_range(values: Float[Tensor, " draws"]) -> Any:
    """Returns the mean over random heads, and the range of the central 95 %."""
    from mmhooks.analysis.statistics.intervals import from_draws

    return from_draws(float(values.mean()), values.double(), len(values))


def compare_with_controls(
    name: str,
    counts: Sequence[int],
    right: dict[str, Tensor],
    groups: Int[Tensor, " n"],
    random: Any,
    seed: int,
) -> list[tuple[Any, str, str]]:
    """Compares the worst group with the plain model's (paired bootstrap) and with random heads.

    Against random heads a claim holds if the interval lies above the central 95 % of the draws.
    """
    from mmhooks.analysis.statistics.intervals import from_draws

    what = f"{count_text(counts)} by {name}, ablated,"
    if not any(counts):
        return [
            (
                "open",
                f"{what} raise the worst group",
                "no attention head carries the background by this choice",
            )
        ]
    drawn, own = group_draws(torch.stack([right["plain"], right[name]]), groups, seed)
    worst, before = drawn.min(2).values, own.min(1).values
    gain = from_draws(float(before[1] - before[0]), worst[1] - worst[0], len(groups))
    ours = from_draws(float(before[1]), worst[1], len(groups))
    claims: list[tuple[Any, str, str]] = [
        (
            "same" if gain.low > 0 else "differs" if gain.high < 0 else "open",
            f"{what} raise the worst group above the plain model's",
            f"{before[0]:.3f} to {before[1]:.3f}, difference {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}], n = {gain.n}",
        )
    ]
    above, below = ours.low > random.high, ours.high < random.low
    claims.append(
        (
            "same" if above else "differs" if below else "open",
            f"{what} raise it above as many random ones",
            f"{ours.value:.3f} [{ours.low:.3f}, {ours.high:.3f}] against {random.value:.3f} "
            f"[{random.low:.3f}, {random.high:.3f}] over {random.n} draws",
        )
    )
    return claims


def worst_group_of_random(trials: Sequence[Sequence[Bool[Tensor, " n"]]], groups: Int[Tensor, " m"]) -> Any:
    """Returns mean and range, over draws of random heads, of the worst group of all splits together."""
    worst = [worst_group(torch.cat(parts), groups) for parts in zip(*trials, strict=True)]
    return mean_and_range(torch.tensor(worst))


def claims_of(
    trials: Sequence[Any],
    right: dict[str, Tensor],
    groups: Int[Tensor, " n"],
    randoms: dict[str, Any],
    seed: int,
) -> list[tuple[Any, str, str]]:
    """Returns the claims on every way of choosing heads, over all splits."""
    claims = []
    for name in trials[0].chosen:
        counts = [len(t.chosen[name]) for t in trials]
        made = compare_with_controls(name, counts, right, groups, randoms[name], seed)
        if name == "TextSpan":  # a failure has this reason: the texts span little of what the head carries
            reach = max(t.reach for t in trials)
            why = f"; texts of backgrounds span at most {100 * reach:.0f} % of any attention head's variance"
            made = [(v, claim, found if v == "same" else found + why) for v, claim, found in made]
        claims += made
    return claims
