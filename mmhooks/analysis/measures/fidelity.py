"""Fidelity of a head: how well its reconstruction keeps vectors, their neighbourhoods and the model's predictions.

The sums are those of :mod:`mmhooks.heads.reconstruction`, which training uses directly; this module adds intervals,
neighbourhoods (CKNNA), choices (zero-shot, retrieval) and stability across seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, normalize
from torchmetrics import Metric

from mmhooks.analysis.inputs.checks import check_numbers
from mmhooks.analysis.inputs.store_rows import ActivationStore, batch_size, row_batches
from mmhooks.analysis.measures.cknna import cknna
from mmhooks.analysis.measures.density import Density
from mmhooks.analysis.measures.stability import Stability, stability
from mmhooks.analysis.results import Estimate, Records, Result, plain
from mmhooks.analysis.statistics.intervals import bootstrap, wilson
from mmhooks.analysis.statistics.jackknife import JackknifeGroups
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.heads.reconstruction import Reconstruction, Sums, reconstruction_of, sums
from mmhooks.heads.vectors import SITES, Vectors, as_vectors, training_rows

NAMES: tuple[Literal["image"], Literal["text"]] = ("image", "text")


@dataclass(frozen=True)
class ModalityFidelity(Result):
    """One modality of a :class:`FidelityResult`; NaN or None where the head has no decoder.

    Attributes:
        fvu, cosine, l0: with jackknife intervals over groups of batches.
        sums: the same numbers as training reports, with the firing counts.
        cknna, cknna_latents: alignment of the neighbourhoods of ``x'``, and of the latents, with those of ``x``.
        retrieval: of each query's partner among those of the other modality; only the query is reconstructed.
        zero_shot: of each vector's label among ``classes``; only the vector is reconstructed.
    """

    name: str
    fvu: Estimate
    cosine: Estimate
    l0: Estimate
    sums: Reconstruction = field(repr=False)
    cknna: float
    cknna_latents: float
    retrieval: ChoiceAgreement | None = None
    zero_shot: ChoiceAgreement | None = None

    @property
    def density(self) -> Density:
        """How often each feature fires in this modality; ``.histogram()`` bins it in equal steps of the logarithm."""
        n = self.sums.n
        return Density(torch.tensor(self.sums.counts).double() / n, self.l0, self.sums.dead, n)

    def to_json(self) -> dict[str, Any]:
        kept = {"retrieval": self.retrieval, "zero_shot": self.zero_shot}
        edges, features = self.density.histogram()
        return {
            "name": self.name,
            **{k: plain(getattr(self, k)) for k in ("fvu", "cosine", "l0", "cknna", "cknna_latents")},
            "dead": self.sums.dead,
            "rare": self.sums.rare,
            "n": self.sums.n,
            "counts": list(self.sums.counts),
            "density_histogram": {"edges": edges, "features": features},
            **{k: None if v is None else v.to_json() for k, v in kept.items()},
        }

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"modality": self.name}
        for name, e in (("FVU", self.fvu), ("cosine", self.cosine), ("L0", self.l0)):
            row |= {name: e.value, f"{name} low": e.low, f"{name} high": e.high}
        row |= {"dead": self.sums.dead, "rare": self.sums.rare, "CKNNA": self.cknna,
                "CKNNA latents": self.cknna_latents, "n": self.sums.n}  # fmt: skip
        return row


@dataclass(frozen=True)
class FidelityResult(Result):
    """Result of :func:`fidelity`; ``fvu``, ``cosine`` and ``l0`` are means over its modalities.

    Attributes:
        dead: share of features that fire in neither modality. rare: share that fire fewer than ``rare_below`` times.
        stability: compared with each head of ``others``.
    """

    head: str
    image: ModalityFidelity
    text: ModalityFidelity | None
    dead: float
    rare: float
    rare_below: int
    gallery: int
    scale: float
    stability: tuple[Stability, ...] = ()

    @property
    def modalities(self) -> tuple[ModalityFidelity, ...]:
        return (self.image,) if self.text is None else (self.image, self.text)

    @property
    def n(self) -> int:
        """Number of vectors per modality: of pairs, if there are two modalities."""
        return self.image.sums.n

    @property
    def n_features(self) -> int:
        return self.image.sums.n_features

    @property
    def fvu(self) -> float:
        """FVU; for two modalities the mean, each relative to its own variance."""
        return self._mean("fvu")

    @property
    def cosine(self) -> float:
        return self._mean("cosine")

    @property
    def l0(self) -> float:
        return self._mean("l0")

    def _mean(self, name: str) -> float:
        return sum(getattr(m, name).value for m in self.modalities) / len(self.modalities)

    def table(self) -> Records:
        """One row per modality."""
        return Records(m.row() for m in self.modalities)

    def choices_kept(self) -> Records:
        """One row per modality, task and k: rates before and after, agreement and KL."""
        rows = Records()
        for m in self.modalities:
            for task, found in (("retrieval", m.retrieval), ("zero-shot", m.zero_shot)):
                if found is None:
                    continue
                for k in found.before:
                    one, two = found.before[k], found.after[k]
                    rows.append(
                        {"modality": m.name, "task": task, "k": k,
                         "before": one.value, "before low": one.low, "before high": one.high,
                         "after": two.value, "after low": two.low, "after high": two.high,
                         "same first choice": found.agreement.value, "KL": found.kl.value,
                         "candidates": found.candidates, "n": found.n}
                    )  # fmt: skip
        return rows

    def to_json(self) -> dict[str, Any]:
        own = ("head", "n", "n_features", "dead", "rare", "rare_below", "gallery", "scale")
        return {k: plain(getattr(self, k)) for k in own} | {
            "image": self.image.to_json(),
            "text": None if self.text is None else self.text.to_json(),
            "stability": [found.to_json() for found in self.stability],
        }


@torch.no_grad()
def fidelity(
    head: Head,
    image: Any,
    text: Any = None,
    *,
    sites: Sequence[str] = SITES,
    classes: Float[Tensor, "c d"] | None = None,
    labels: Int[Tensor, " n"] | None = None,
    others: Sequence[Head] = (),
    scale: float = 100.0,
    ks: Sequence[int] = (1, 5, 10),
    neighbours: int = 10,
    gallery: int = 2048,
    rare_below: int = 5,
    batch: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> FidelityResult:
    """Measures how well a head keeps vectors, their neighbourhoods, retrieval and zero-shot classification.

    FVU, cosine, L0, firing counts and zero-shot use all rows, in batches. Retrieval and CKNNA compare rows with
    each other and use ``gallery`` evenly spaced ones; the result says how many.

    Args:
        image: ``[n, d]``, with ``text [n, d]`` or by itself (any one modality); or a Store, or the directory of
            one, whose ``sites`` are read one batch at a time.
        classes, labels: text embeddings of class names, and each row's class; adds zero-shot classification.
            ``classes`` are not reconstructed.
        others: heads of the same site from other seeds, for stability.
        scale: CLIP's logit scale, for the softmax whose KL is measured.
        ks, neighbours: k of retrieval and of CKNNA.
        batch: rows at a time (default 4,096, or a twentieth: the intervals leave out groups of batches).

    Raises:
        ShapeMismatch: widths or lengths differ, or there are fewer than 2 rows. NotFinite: NaN, or a row of zeros.
        MMHooksError: ``classes`` without ``labels`` or vice versa.

    >>> from mmhooks.heads import TopKSAE
    >>> found = fidelity(TopKSAE(8, 32, k=4), torch.randn(100, 8), torch.randn(100, 8))
    >>> found.image.l0.value <= 4, found.text.retrieval.candidates
    (True, 100)
    """
    head.check_reconstructs("fidelity")
    for what, given in (("image", image), ("text", text)):
        if not isinstance(given, (str, Path, ActivationStore)) and (given is not None or what == "image"):
            check_numbers(given, f"{what} vectors")
    device = next(head.parameters()).device
    rows = [part for part in as_vectors(head, *training_rows(image, text, sites), device) if part is not None]
    if (classes is None) != (labels is None):
        raise MMHooksError(
            "zero-shot: expected both classes= (one embedding per class) and labels= (one class per row), got only one"
        )
    if classes is not None and labels is not None:
        _check_labels(head, classes, labels, len(rows[0]))
        classes, labels = classes.to(device), labels.to(device)
    chosen = _evenly_spaced(len(rows[0]), gallery)
    shown = [_reconstructed(head, part[chosen]) for part in rows]
    found: list[ModalityFidelity] = []
    total = torch.zeros(head.n_features, dtype=torch.long)
    for i, (name, part) in enumerate(zip(NAMES, rows, strict=False)):
        zero_shot = None
        if classes is not None:
            own = torch.arange(len(classes), device=device)
            zero_shot = ChoiceMetric(classes, own, scale=scale, ks=ks, seed=seed)
        stream = _stream(head, part, zero_shot, labels, name, batch, progress)
        x, f, back = shown[i]
        retrieval = None
        if len(rows) == 2 and back is not None:
            retrieval = _retrieval(x, back, shown[1 - i][0], scale=scale, ks=ks, seed=seed)
        fvu, cosine, l0 = stream.estimates(lambda m: _numbers(m, head), len(part))
        enough = len(x) >= max(4, neighbours + 1)
        summed = reconstruction_of(head, stream.merged().compute(), rare_below)
        total += torch.tensor(summed.counts)
        found.append(
            ModalityFidelity(
                name, fvu, cosine, l0, summed,
                cknna=cknna(x, back, k=neighbours) if enough and back is not None else math.nan,
                cknna_latents=cknna(x, f, k=neighbours) if enough else math.nan,
                retrieval=retrieval,
                zero_shot=None if zero_shot is None or back is None else zero_shot.result(),
            )
        )  # fmt: skip
    return FidelityResult(
        head=head.id,
        image=found[0],
        text=found[1] if len(found) == 2 else None,
        dead=float((total == 0).double().mean()),
        rare=float(((total > 0) & (total < rare_below)).double().mean()),
        rare_below=rare_below,
        gallery=len(chosen),
        scale=scale,
        stability=tuple(stability(head, other, seed=seed) for other in others),
    )


def _check_labels(head: Head, classes: Tensor, labels: Tensor, n: int) -> None:
    head.check_width(classes)
    if len(labels) != n or (n and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes)):
        raise ShapeMismatch(
            f"labels=: expected one of {len(classes)} classes for each of {n} rows, got {len(labels)} labels"
            + (f" from {int(labels.min())} to {int(labels.max())}" if len(labels) else "")
        )


def _evenly_spaced(n: int, most: int) -> Int[Tensor, " m"]:
    """Chooses at most ``most`` of ``n`` row numbers, evenly spaced."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).round().long()


def _reconstructed(head: Head, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    f = head.encode(x)
    return x, f, head.decode(f) if head.has_decoder else None


def _stream(
    head: Head,
    rows: Vectors,
    zero_shot: ChoiceMetric | None,
    labels: Tensor | None,
    name: str,
    batch: int | None,
    progress: bool,
) -> JackknifeGroups[FidelitySums]:
    stream = JackknifeGroups(partial(FidelitySums, head.d_in, head.n_features))
    what = f"fidelity of {head.name}, {name}"
    for number, begin, end in row_batches(len(rows), batch or batch_size(len(rows)), what, progress=progress):
        x, f, back = _reconstructed(head, rows[begin:end])
        stream.update(x, f, back, number=number)
        if zero_shot is not None and labels is not None and back is not None:
            zero_shot.update(x, back, labels[begin:end])
    return stream


def _retrieval(
    x: Tensor, back: Tensor, partners: Tensor, *, scale: float, ks: Sequence[int], seed: int
) -> ChoiceAgreement:
    own = torch.arange(len(x), device=x.device)
    choices = ChoiceMetric(partners, own, scale=scale, ks=ks, seed=seed)
    for part in own.split(1024):
        choices.update(x[part], back[part], part)
    return choices.result()


def _numbers(metric: FidelitySums, head: Head) -> list[float]:
    found = metric.compute()
    return [found.fvu, found.mean_cosine, found.l0] if head.has_decoder else [math.nan, math.nan, found.l0]


class FidelitySums(Metric):
    """Streaming sums that give FVU, cosine, L0 and firing counts: ``update(x, f, x')``, then ``compute()``."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, d_in: int, n_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sizes = {"x_sum": (d_in,), "counts": (n_features,)}
        for name in Sums._fields:
            dtype = torch.long if name in ("n", "counts") else torch.float64
            self.add_state(name, torch.zeros(sizes.get(name, ()), dtype=dtype), dist_reduce_fx="sum")

    def update(
        self, x: Float[Tensor, "b d"], f: Float[Tensor, "b n"], back: Float[Tensor, "b d"] | None
    ) -> None:
        """Adds prepared vectors, their features and their reconstruction (None: the head has no decoder)."""
        for name, value in sums(x, f, back)._asdict().items():
            setattr(self, name, getattr(self, name) + value.to(getattr(self, name).device))

    def compute(self) -> Sums:
        return Sums(*(getattr(self, name) for name in Sums._fields))


@dataclass(frozen=True)
class ChoiceAgreement:
    """Choices among candidates by cosine, before and after reconstruction of the query.

    Attributes:
        before, after: by k, the share of queries with a right candidate among the first k; k = 1 is accuracy.
        agreement: share of queries whose first choice is the same, right or wrong.
        kl: mean ``KL(before || after)`` of ``softmax(scale * cosine)``, in nats.
        candidates, n: number of candidates and of queries.
    """

    before: dict[int, Estimate]
    after: dict[int, Estimate]
    agreement: Estimate
    kl: Estimate
    candidates: int
    n: int

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


class ChoiceMetric(Metric):
    """Collects :class:`ChoiceAgreement` over batches of queries against fixed candidates.

    Args:
        candidates: ``[c, d]``, one label each; any candidate with the query's label is right.
        scale: inverse temperature of the softmax.
        ks: values above the number of candidates are left out.
    """

    hits: Tensor
    same: Tensor
    n: Tensor
    kl: list[Tensor]

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(
        self,
        candidates: Float[Tensor, "c d"],
        labels: Int[Tensor, " c"],
        *,
        scale: float,
        ks: Sequence[int],
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.candidates, self.labels = normalize(candidates.float(), dim=1), labels
        self.scale, self.seed = scale, seed
        self.ks = [k for k in ks if k <= len(candidates)]
        self.add_state("hits", torch.zeros(2, len(self.ks), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("same", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("kl", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(
        self, x: Float[Tensor, "b d"], back: Float[Tensor, "b2 d2"], labels: Int[Tensor, " b3"]
    ) -> None:
        """Adds queries before and after reconstruction, with their labels.

        Raises:
            ShapeMismatch: the numbers of queries, reconstructions and labels differ.
        """
        if not len(x) == len(back) == len(labels):
            raise ShapeMismatch(
                f"expected as many reconstructions and labels as the {len(x)} queries, got {len(back)} and {len(labels)}"
            )
        scores = [normalize(part.float(), dim=1) @ self.candidates.T for part in (x, back)]
        right = labels[:, None] == self.labels
        for hits, score in zip(self.hits, scores, strict=True):
            best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            rank = ((score >= best) & ~right).sum(1)  # a tied candidate counts as ranked before the right one
            hits += torch.stack([(rank < k).sum() for k in self.ks]).to(hits.device)
        before, after = ((self.scale * score).double().log_softmax(1) for score in scores)
        self.kl.append(kl_div(after, before, log_target=True, reduction="none").sum(1).cpu())
        self.same += (scores[0].argmax(1) == scores[1].argmax(1)).sum().to(self.same.device)
        self.n += len(x)

    def compute(self) -> dict[str, Tensor]:
        kl = self.kl if isinstance(self.kl, Tensor) else torch.cat([torch.empty(0).double(), *self.kl])
        return {"hits": self.hits, "same": self.same, "n": self.n, "kl": kl}

    def result(self) -> ChoiceAgreement:
        found = self.compute()
        n, counts = int(found["n"]), found["hits"].tolist()
        before, after = ({k: wilson(h, n) for k, h in zip(self.ks, row, strict=True)} for row in counts)
        kl = bootstrap(found["kl"], draws=500, seed=self.seed)
        return ChoiceAgreement(before, after, wilson(int(found["same"]), n), kl, len(self.candidates), n)
