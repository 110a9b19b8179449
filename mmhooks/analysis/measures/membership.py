"""Membership: how probable it is that a feature belongs to ImgD, TextD or CrossD, over other samples and other seeds.

Which group a feature is in depends on the pairs it was scored on: all thresholds move when these change. So the whole
rule is applied again to every resample. Whole families are resampled, because pairs of one family are no independent
observations. A Poisson bootstrap gives each family an independent weight, a function of the seed and the family alone,
so that one pass over a stream is enough and its batches and processes do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mmhooks.analysis.inputs.sparse import Latents, check_latent_pair
from mmhooks.analysis.inputs.store_rows import (
    BATCH,
    ActivationStore,
    paired_latents,
    row_batches,
)
from mmhooks.analysis.measures.mds import GROUPS, KINDS, Kind, activation
from mmhooks.analysis.measures.stability import Stability
from mmhooks.analysis.results import Records, Result
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.hooks.features import FeatureSet
from mmhooks.utils.indexing import number_labels

Rule = Literal["sigma", "thirds"]
"""``mu ± sigma`` over the alive features of each resample (the paper's), or ``R > 2/3``, ``R < 1/3`` and between."""
DRAWS = 500


@dataclass(frozen=True)
class Membership(Result):
    """Probability of every feature to be in each group.

    Attributes:
        probability: of ImgD, TextD and CrossD, one row each. They sum to less than 1 for a feature that is dead in some
            resamples, or that has no partner in some of the other heads.
        assigned: the group on the pairs as they are (0, 1, 2; -1: dead).
        R: Modality Dominance Score on the pairs as they are. low, high: its central 95 % over resamples; NaN if dead.
        draws, n_pairs, n_families, rule: what was resampled, and how groups are defined.
        heads: of how many heads the probability is the mean (:func:`over_seeds`). partners: share of the other heads in
            which the feature has a partner; NaN without any.
    """

    probability: Float[Tensor, "g n"] = field(repr=False)
    assigned: Int[Tensor, " n"] = field(repr=False)
    R: Float[Tensor, " n"] = field(repr=False)
    low: Float[Tensor, " n"] = field(repr=False)
    high: Float[Tensor, " n"] = field(repr=False)
    partners: Float[Tensor, " n"] = field(repr=False)
    draws: int
    n_pairs: int
    n_families: int
    rule: Rule
    heads: int = 1
    head: str = ""
    data: str = ""

    def groups(self, at_least: float = 0.9) -> tuple[FeatureSet, FeatureSet, FeatureSet]:
        """ImgD, TextD and CrossD: the features that belong there with at least this probability, above one half.

        Raises:
            MMHooksError: a probability of one half or less, at which groups may overlap, or above 1.
        """
        if not 0.5 < at_least <= 1:
            raise MMHooksError(f"at_least: expected a probability above .5 and at most 1, got {at_least}")
        about = {"rule": self.rule, "at_least": at_least, "draws": self.draws, "heads": self.heads}
        about |= {"data": self.data, "n_pairs": self.n_pairs, "n_families": self.n_families}
        # Probabilities are shares of draws; without the margin .9 would not be at least .9.
        one, two, three = (
            FeatureSet(p >= at_least - 1e-9, len(p), name=name, head=self.head, info=about)
            for name, p in zip(GROUPS, self.probability, strict=True)
        )
        return one, two, three

    def undecided(self, at_least: float = 0.9) -> FeatureSet:
        """The alive features in none of :meth:`groups`."""
        alive = FeatureSet(self.assigned >= 0, len(self.assigned), name="alive", head=self.head)
        one, two, three = self.groups(at_least)
        return FeatureSet(
            (alive - (one | two | three)).indices, len(self.assigned), name="undecided", head=self.head
        )

    def table(self) -> Records:
        """One row per group: members on the pairs as they are, expected number, and those above .5, .9 and .99."""
        rows = Records()
        for number, name in enumerate(GROUPS):
            p = self.probability[number]
            row: dict[str, Any] = {"group": name, "assigned": int((self.assigned == number).sum())}
            row["expected"] = float(p.sum())
            row |= {f"p ≥ {a}": len(self.groups(a)[number]) for a in (0.51, 0.9, 0.99)}
            rows.append(row | {"pairs": self.n_pairs, "families": self.n_families, "heads": self.heads})
        return rows


def membership(
    image_latents: Latents | ActivationStore,
    text_latents: Latents | None = None,
    *,
    families: Sequence[Hashable] | Int[Tensor, " n"],
    rule: Rule = "sigma",
    kind: Kind = "relu",
    draws: int = DRAWS,
    head: str | Head = "",
    data: str = "",
    seed: int = 0,
    image: str | None = None,
    text: str | None = None,
    progress: bool = False,
) -> Membership:
    """Computes how probable each feature's group is, by a bootstrap over families of pairs.

    Args:
        image_latents, text_latents: as in :func:`mmhooks.analysis.measures.mds.mds`: both sides of the same pairs, dense
            or sparse, or only a store.
        families: one label per pair; pairs of a label are resampled together. ``range(n)`` if every pair is its own.
        rule: how a resample's scores become groups: "sigma" (the paper's ``mu ± sigma``) or "thirds".
        draws: number of resamples.
        kind, head, data, image, text: as in :func:`mmhooks.analysis.measures.mds.mds`.

    Raises:
        ShapeMismatch: the sides differ in shape, there is no pair, or not one label per pair.
        NotFinite: NaN or infinity in either side.

    Source: Poisson bootstrap, Hanley & MacGibbon 2006; Chamandy et al. 2012.

    >>> image = torch.tensor([[3.0, 0.0, 1.0]] * 8); text = torch.tensor([[0.0, 2.0, 1.0]] * 8)
    >>> found = membership(image, text, families=range(8), rule="thirds", draws=50)
    >>> [list(group) for group in found.groups(at_least=0.9)]
    [[0], [1], [2]]
    """
    numbers = families if isinstance(families, Tensor) else number_labels(list(families))
    sides = paired_latents(image_latents, text_latents, head=head, data=data, image=image, text=text)
    rows = len(sides)
    if not rows or numbers.shape != (rows,):
        raise ShapeMismatch(
            f"membership: expected at least one pair and one family per pair, got {rows} pairs and {len(numbers)} labels"
        )
    metric = GroupMembership(sides.n_features, rule=rule, kind=kind, draws=draws, seed=seed)
    for _, begin, end in row_batches(rows, BATCH, "membership", reads=sides.reads, progress=progress):
        metric.update(sides.images[begin:end], sides.texts[begin:end], numbers[begin:end])
    return replace(metric.result(), head=sides.head, data=sides.data)


def over_seeds(own: Membership, others: Sequence[tuple[Membership, Stability]]) -> Membership:
    """Averages a feature's probabilities with those of its partners in heads of other training seeds.

    A head in which the feature has no partner counts with probability 0 of every group: a feature that other seeds do
    not have is a member of nothing.

    Args:
        own: of the head whose features are judged.
        others: for every other head its memberships on the same pairs, and ``stability(own head, other head)`` or
            ``activation_stability``.

    Raises:
        ShapeMismatch: no other head, or one that was matched the other way round or scored by another rule.
    """
    if not others:
        raise ShapeMismatch("over_seeds: expected at least one other head, got none")
    total, partners = own.probability.clone(), torch.zeros(own.probability.shape[1])
    for number, (there, found) in enumerate(others):
        n, m = own.probability.shape[1], there.probability.shape[1]
        if len(found.values) != n or int(found.partner.max()) >= m:
            raise ShapeMismatch(
                f"over_seeds: other head {number}: expected the stability of a head of {n} features against one of at "
                f"least as many, here {m}, got one over {len(found.values)}: stability(own head, other head)"
            )
        if (there.rule, there.n_pairs) != (own.rule, own.n_pairs):
            raise ShapeMismatch(
                f"over_seeds: other head {number}: expected groups by {own.rule!r} over {own.n_pairs} pairs, got "
                f"{there.rule!r} over {there.n_pairs}"
            )
        total += torch.where(found.same, there.probability[:, found.partner], 0.0)
        partners += found.same
    heads = len(others) + 1
    return replace(own, probability=total / heads, partners=partners / len(others), heads=heads)


class GroupMembership(Metric):
    """Streaming bootstrap of groups: ``update(image, text, families)``, then :meth:`result`.

    The states are two tables ``[draws + 1, n]``, whose first row is of the data as they are, and the families seen.

    Args:
        n_features: width of the latents.
        rule, kind, draws, seed: as in :func:`membership`.

    >>> metric = GroupMembership(2, draws=20, rule="thirds")
    >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([7]))
    >>> metric.result().assigned.tolist()
    [0, 1]
    """

    ratio_sum: Tensor
    counts: Tensor
    n_pairs: Tensor
    families: list[Tensor]
    rule: Rule
    kind: Kind

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(
        self,
        n_features: int,
        *,
        rule: Rule = "sigma",
        kind: Kind = "relu",
        draws: int = DRAWS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for what, known, given in (("rule", get_args(Rule), rule), ("kind", KINDS, kind)):
            if given not in known:
                raise MMHooksError(
                    f"{what}: expected one of {', '.join(known)} for membership, got {given!r}"
                )
        if draws < 1:
            raise MMHooksError(f"draws: expected at least one resample, got {draws}")
        self.n_features, self.rule, self.kind = n_features, rule, kind
        self.draws, self.seed = draws, seed
        for name in ("ratio_sum", "counts"):
            zeros = torch.zeros(draws + 1, n_features, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self.add_state("n_pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("families", [], dist_reduce_fx="cat")

    def update(self, image: Latents, text: Latents, families: Int[Tensor, " b"]) -> None:
        """Adds the latents of a batch of pairs, dense or sparse, with the number (from 0 on) of each pair's family.

        Raises:
            ShapeMismatch: the sides differ in shape, their width is not ``n_features``, or not one family per pair.
            NotFinite: NaN or infinity in either.
        """
        check_latent_pair(image, text, self.n_features, start=int(self.n_pairs))
        if families.shape != (len(image),) or (len(families) and int(families.min()) < 0):
            raise ShapeMismatch(
                f"families: expected a number from 0 on for each of {len(image)} pairs, got shape {tuple(families.shape)}"
            )
        if not len(image):
            return
        ratio, counted = _ratios(_table(image, self.kind), _table(text, self.kind))
        weights = self._weights(families.cpu().numpy())
        for state, table in ((self.ratio_sum, ratio), (self.counts, counted)):
            state += torch.from_numpy(np.ascontiguousarray((table.T @ weights).T)).to(state)
        self.families.append(families.unique().to(self.counts.device))
        self.n_pairs = self.n_pairs + len(image)

    def _weights(self, families: np.ndarray) -> np.ndarray:
        """Weights ``[pairs, 1 + draws]``: 1 for the data as they are, then each family's own Poisson draws."""
        unique, place = np.unique(families, return_inverse=True)
        drawn = [np.random.default_rng([self.seed, int(f)]).poisson(1.0, self.draws) for f in unique]
        table = np.concatenate([np.ones((len(unique), 1)), np.stack(drawn)], axis=1)
        return table[place]

    def compute(self) -> dict[str, Tensor]:
        """``R`` of every resample, the data as they are first, NaN where nothing fires; the pairs and families."""
        score = torch.where(self.counts != 0, self.ratio_sum / self.counts, torch.nan)
        families = dim_zero_cat(self.families).unique() if self.families else self.n_pairs.new_zeros(0)
        return {"R": score, "n_pairs": self.n_pairs, "families": families}

    def result(self) -> Membership:
        """The probabilities from everything added so far."""
        found = self.compute()
        score = found["R"].cpu()
        labels = group_labels(score, self.rule)
        probability = torch.stack([(labels[1:] == g).double().mean(0) for g in range(len(GROUPS))])
        low, high = np.nanquantile(_known(score[1:]).numpy(), [0.025, 0.975], axis=0)
        dead = labels[0] < 0
        return Membership(
            probability=probability.float(),
            assigned=labels[0],
            R=score[0],
            low=torch.from_numpy(low).masked_fill(dead, math.nan),
            high=torch.from_numpy(high).masked_fill(dead, math.nan),
            partners=torch.full((self.n_features,), math.nan),
            draws=self.draws,
            n_pairs=int(found["n_pairs"]),
            n_families=found["families"].numel(),  # torchmetrics squeezes a single one
            rule=self.rule,
        )


def group_labels(R: Float[Tensor, "b n"], rule: Rule) -> Int[Tensor, "b n"]:
    """The group of every feature in every row of scores: 0 ImgD, 1 TextD, 2 CrossD, -1 where the score is NaN.

    >>> group_labels(torch.tensor([[0.9, 0.1, 0.5, torch.nan]]), "thirds").tolist()
    [[0, 1, 2, -1]]
    """
    if rule == "thirds":
        low = torch.full((len(R), 1), 1 / 3, dtype=R.dtype)
        high = torch.full((len(R), 1), 2 / 3, dtype=R.dtype)
    else:
        mean = R.nanmean(1, keepdim=True)
        sigma = (R - mean).square().nanmean(1, keepdim=True).sqrt()
        # Equal scores differ only by rounding; that is not dominance. (As in MDS.)
        sigma = torch.where(sigma > 1e-9, sigma, torch.inf)
        low, high = mean - sigma, mean + sigma
    labels = torch.full(R.shape, 2)
    labels[high < R] = 0
    labels[low > R] = 1
    labels[R.isnan()] = -1
    return labels


def _known(score: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Scores with 0 for features that no resample has: NumPy warns of columns of NaN."""
    return score.masked_fill(score.isnan().all(0), 0)


def _table(latents: Latents, kind: Kind) -> Any:
    """The activations as a SciPy table of their entries, which serves dense and sparse latents alike."""
    from scipy.sparse import coo_array, csr_array

    if isinstance(latents, Tensor):
        return csr_array(activation(latents.cpu(), kind).double().numpy())
    values = activation(latents.values.cpu(), kind).double().numpy()
    rows = np.repeat(np.arange(len(values)), values.shape[1])
    columns = latents.indices.cpu().long().numpy().reshape(-1)
    # Entries of one place are added: padding of value 0 may have any index.
    return coo_array((values.reshape(-1), (rows, columns)), shape=latents.shape).tocsr()


def _ratios(image: Any, text: Any) -> tuple[Any, Any]:
    """``a_I / (a_I + a_T)`` of every pair and feature, and 1 where the sum is not 0."""
    total = (image + text).tocsr()
    total.eliminate_zeros()
    inverse, counted = total.copy(), total.copy()
    inverse.data, counted.data = 1 / total.data, np.ones_like(total.data)
    return image.multiply(inverse).tocsr(), counted
