"""Stability: whether heads trained from different seeds have the same features, and put them in the same groups.

Heads with a decoder are matched by the directions that features write; any head by when its features are active. Both
questions are asked because they can disagree: two encoders may read one direction in different ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap, from_draws, wilson
from mmhooks.errors import MMHooksError, NoDecoder, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.hooks.features import FeatureSet

ABOVE = 0.7
"""From this similarity on, two features count as the same."""
CHUNK = 4096


@dataclass(frozen=True)
class Stability(Result):
    """Features of two heads, matched one to one to maximise the sum of similarities.

    Attributes:
        mean: mean similarity of matched features, with a bootstrap interval over features.
        chance: the same where nothing is shared: for decoder rows as many random rows of the same width, uniform on the
            sphere; for activations the other head's over shuffled rows of the same modality, so that being of the same
            modality does not count as being the same feature.
        matched: share of features whose partner is more similar than ``above``. matched_by_chance: share of the same
            control.
        values: similarity of each feature of the narrower head (the first, if they are equally wide) with its partner.
        partner: that feature of the other head.
        by: "decoder rows" (cosine) or "activations" (Pearson's r).
    """

    mean: Estimate
    chance: float
    values: Float[Tensor, " n"] = field(repr=False)
    partner: Int[Tensor, " n"] = field(repr=False)
    matched: Estimate
    matched_by_chance: float
    above: float
    by: str

    @property
    def same(self) -> Bool[Tensor, " n"]:
        """Which features of the narrower head have a partner more similar than ``above``."""
        return self.values > self.above

    def table(self) -> Records:
        row = {
            "by": self.by,
            **self.mean.columns("similarity", "features"),
            "chance": self.chance,
            f"above {self.above}": self.matched.value,
            "by chance": self.matched_by_chance,
            "above 0.9": float((self.values > 0.9).float().mean()),
        }
        return Records([row])


def stability(one: Head, other: Head, *, above: float = ABOVE, seed: int = 0) -> Stability:
    """Matches the decoder rows of two heads, usually of two seeds (Hungarian mean max-cosine, Paulo & Belrose 2025).

    The assignment costs ``n^3``: seconds at n = 4,096.

    Args:
        above: cosine from which on two features count as the same.

    Raises:
        NoDecoder: a head has no decoder; :func:`activation_stability` compares any heads.
        ShapeMismatch: the heads differ in width.

    >>> from mmhooks.heads import TopKSAE
    >>> sae = TopKSAE(8, 32, 4)
    >>> round(stability(sae, sae).mean.value, 4)
    1.0
    """
    _check_heads(one, other)
    few, many = sorted((_directions(head) for head in (one, other)), key=len)
    generator = torch.Generator().manual_seed(seed)
    drawn = [normalize(torch.randn(r.shape, generator=generator), dim=1) for r in (few, many)]
    return _result(few @ many.T, drawn[0] @ drawn[1].T, above, "decoder rows", seed)


def activation_stability(
    one: Head, other: Head, *vectors: Any, above: float = ABOVE, seed: int = 0
) -> Stability:
    """Matches the features of two heads by Pearson's r of their activations over the same vectors.

    For heads without a decoder (NCL), and for any others beside :func:`stability`. One pass, a batch at a time: memory
    grows with the product of the numbers of features, not with the rows. A feature that is never active, or always
    equally, is similar to nothing (r = 0).

    Args:
        vectors: raw embeddings ``[rows, d]`` of one or more modalities, usually held-out images and texts: tensors, or
            sites of a store.
        above: r from which on two features count as the same.

    Raises:
        ShapeMismatch: the heads differ in width, or there are fewer than two vectors of a modality.
        NotFinite: a vector is not finite.

    >>> from mmhooks.heads import NCL
    >>> ncl, x = NCL(8, 32), torch.nn.functional.normalize(torch.randn(100, 8), dim=1)
    >>> round(float(activation_stability(ncl, ncl, x).matched.value), 1)  # but for features that are never active
    1.0
    """
    _check_heads(one, other)
    if not vectors or min(len(x) for x in vectors) < 2:
        raise ShapeMismatch(
            f"activation_stability: expected at least 2 vectors of every modality, got {[len(x) for x in vectors]}"
        )
    few, many = sorted((one, other), key=lambda head: head.n_features)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x), generator=generator) for x in vectors]
    paired, shuffled = _correlations(few, many, vectors, orders)
    return _result(paired, shuffled, above, "activations", seed)


@dataclass(frozen=True)
class GroupAgreement(Result):
    """Whether features that two heads share are in the same groups.

    Attributes:
        kappa: Cohen's kappa over shared features that are in a group of both heads, with a bootstrap interval: 0 where
            they agree as often as groups of these sizes would by chance, 1 where always.
        agreement: how often they agree. expected: by chance.
        adjusted_rand: Rand index adjusted for chance (Hubert & Arabie 1985).
        counts: shared features by group of the narrower head (rows) and of the other.
        ungrouped: shared features that one of the heads has in no group.
    """

    kappa: Estimate
    agreement: float
    expected: float
    adjusted_rand: float
    counts: Int[Tensor, "g g"]
    names: tuple[str, ...]
    ungrouped: int

    def table(self) -> Records:
        rows = Records()
        for name, row in zip(self.names, self.counts.tolist(), strict=True):
            rows.append({"group": name} | {f"there {n}": c for n, c in zip(self.names, row, strict=True)})
        return rows


def group_agreement(
    found: Stability, one: Sequence[FeatureSet], other: Sequence[FeatureSet], *, seed: int = 0
) -> GroupAgreement:
    """Compares the groups of the features that two heads share (``found.same``).

    Args:
        found: the heads, matched.
        one, other: groups of the two heads in the order that ``found`` was computed in, disjoint, by the same names.

    Raises:
        ShapeMismatch: groups of other heads, overlapping groups, or other names.
        MMHooksError: no shared feature is in a group of both.

    >>> from mmhooks.heads import TopKSAE
    >>> sae = TopKSAE(8, 4, 2); groups = [FeatureSet([0, 1], 4, name="A"), FeatureSet([2, 3], 4, name="B")]
    >>> group_agreement(stability(sae, sae), groups, groups).kappa.value
    1.0
    """
    from sklearn.metrics import adjusted_rand_score

    names = tuple(group.name for group in one)
    if names != tuple(group.name for group in other):
        raise ShapeMismatch(
            f"group_agreement: expected groups of the same names, got {names} and {tuple(g.name for g in other)}"
        )
    few, many = sorted((labels_of(one), labels_of(other)), key=len)
    if len(few) != len(found.values) or int(found.partner.max()) >= len(many):
        raise ShapeMismatch(
            f"group_agreement: expected groups of the heads that were matched, the narrower of {len(found.values)} "
            f"features, got groups of heads of {len(few)} and {len(many)}"
        )
    a, b = few[found.same], many[found.partner[found.same]]
    both = (a >= 0) & (b >= 0)
    a, b = a[both], b[both]
    if not len(a):
        raise MMHooksError(
            f"group_agreement: expected features that both heads share and have in a group, got none of {len(found.values)}: "
            f"{int(found.same.sum())} are more similar than {found.above}"
        )
    counts = torch.bincount(a * len(names) + b, minlength=len(names) ** 2).view(len(names), -1)
    agreement, expected = _agreement(counts[None].double())
    return GroupAgreement(
        kappa=_kappa(counts, seed),
        agreement=float(agreement),
        expected=float(expected),
        adjusted_rand=float(adjusted_rand_score(a.numpy(), b.numpy())),
        counts=counts,
        names=names,
        ungrouped=int((~both).sum()),
    )


def labels_of(groups: Sequence[FeatureSet]) -> Int[Tensor, " n"]:
    """The number of each feature's group, -1 for features in none.

    Raises:
        ShapeMismatch: no groups, or groups that overlap or differ in their number of features.
    """
    if not groups or len({group.n_features for group in groups}) > 1:
        raise ShapeMismatch(f"expected groups of one head, got {list(groups)}")
    labels = torch.full((groups[0].n_features,), -1)
    for number, group in enumerate(groups):
        if bool((labels[group.mask] >= 0).any()):
            raise ShapeMismatch(f"expected disjoint groups, got {group!r} that overlaps with one before it")
        labels[group.mask] = number
    return labels


def _agreement(counts: Float[Tensor, "b g g"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """How often two labellings agree, and how often they would by chance."""
    share = counts / counts.sum((1, 2), keepdim=True)
    return share.diagonal(dim1=1, dim2=2).sum(1), (share.sum(2) * share.sum(1)).sum(1)


def _kappa(counts: Int[Tensor, "g g"], seed: int, draws: int = 2000) -> Estimate:
    """Cohen's kappa, NaN if both labellings have only one group; resampling features is a multinomial draw of counts."""
    n = int(counts.sum())
    probabilities = (counts / n).flatten().double().expand(draws, -1)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.multinomial(probabilities, n, replacement=True, generator=generator)
    drawn = torch.zeros(draws, counts.numel(), dtype=torch.float64).scatter_add_(
        1, picks, torch.ones(picks.shape, dtype=torch.float64)
    )
    agreement, expected = _agreement(torch.cat([counts[None].double(), drawn.view(draws, *counts.shape)]))
    kappa = torch.where(expected < 1, (agreement - expected) / (1 - expected), torch.nan)
    known = kappa[1:][~kappa[1:].isnan()]
    value = float(kappa[0])
    return from_draws(value, known, n) if len(known) > 1 and n > 1 else Estimate(value, n=n)


def _check_heads(one: Head, other: Head) -> None:
    if one.d_in != other.d_in:
        raise ShapeMismatch(
            f"stability: expected heads of the same width, got {one.d_in} and {other.d_in}: compare heads of the same site"
        )


def _directions(head: Head) -> Float[Tensor, "n d"]:
    rows = getattr(head, "W_dec", None)
    if not head.has_decoder or rows is None:
        raise NoDecoder(
            f"stability: expected heads with decoder rows, got {head.name!r} ({head.kind}) without any; "
            "activation_stability(one, other, vectors) matches features by their activations"
        )
    rows = rows.detach().cpu().float()
    check_finite(rows, f"decoder rows of head {head.name!r}")
    return normalize(rows, dim=1)


@torch.no_grad()
def _correlations(
    few: Head, many: Head, vectors: Sequence[Any], orders: Sequence[Int[Tensor, " _"]]
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Pearson's r of all features of two heads over all vectors, and with the second head's over shuffled rows."""
    n, m = few.n_features, many.n_features
    rows, products, shuffled = (
        0,
        torch.zeros(n, m, dtype=torch.float64),
        torch.zeros(n, m, dtype=torch.float64),
    )
    sums = [torch.zeros(2, width, dtype=torch.float64) for width in (n, m)]
    for x, order in zip(vectors, orders, strict=True):
        for begin in range(0, len(x), CHUNK):
            end = min(begin + CHUNK, len(x))
            a, b = (_encoded(head, x[begin:end], begin) for head in (few, many))
            rows += len(a)
            products += a.T @ b
            shuffled += a.T @ _encoded(many, x[order[begin:end]], begin)
            for side, f in zip(sums, (a, b), strict=True):
                side += torch.stack([f.sum(0), f.square().sum(0)])
    means = [side[0] / rows for side in sums]
    spreads = [
        (side[1] / rows - mean.square()).clamp_min(0).sqrt() for side, mean in zip(sums, means, strict=True)
    ]
    # A constant feature's spread is rounding: it correlates with nothing.
    scales = [torch.where(s > 1e-9, 1 / s.clamp_min(1e-9), 0) for s in spreads]
    found = [(p / rows - torch.outer(*means)) * torch.outer(*scales) for p in (products, shuffled)]
    return found[0].float(), found[1].float()


def _encoded(head: Head, rows: Tensor, begin: int) -> Float[Tensor, "b n"]:
    check_finite(rows, "vectors", start=begin)
    return head.encode(rows.float()).detach().cpu().double()


def _result(
    similarity: Float[Tensor, "n m"], chance: Float[Tensor, "n m"], above: float, by: str, seed: int
) -> Stability:
    if not 0 < above < 1:
        raise MMHooksError(f"above: expected a similarity between 0 and 1, got {above}")
    values, partner = _match(similarity)
    by_chance = _match(chance)[0]
    return Stability(
        mean=bootstrap(values, seed=seed),
        chance=float(by_chance.mean()),
        values=values,
        partner=partner,
        matched=wilson(int((values > above).sum()), len(values)),
        matched_by_chance=float((by_chance > above).float().mean()),
        above=above,
        by=by,
    )


def _match(similarity: Float[Tensor, "n m"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    from scipy.optimize import linear_sum_assignment

    partner = torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])
    return similarity.gather(1, partner[:, None]).squeeze(1), partner
