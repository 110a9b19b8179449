"""Fidelity of a head: what of a vector, of its neighbourhood and of what a model does with it survives.

The sums are those of :mod:`mmhooks.heads.fidelity`, which training uses by itself; here they come with
intervals, beside neighbourhoods (CKNNA), choices (zero-shot, retrieval) and the agreement of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.checks import check_numbers
from mmhooks.analysis.cknna import cknna
from mmhooks.analysis.fidelity_metric import Choices, FidelitySums, Kept
from mmhooks.analysis.geometry import Density
from mmhooks.analysis.grouped import Grouped
from mmhooks.analysis.passes import ActivationStore, batch_size, share
from mmhooks.analysis.results import Estimate, Records, Result, plain
from mmhooks.analysis.stability import Stability, stability
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.heads.fidelity import Fidelity, fidelity_of
from mmhooks.heads.source import SITES, Vectors, paired, ready

NAMES: tuple[Literal["image"], Literal["text"]] = ("image", "text")


@dataclass(frozen=True)
class ModalityFidelity(Result):
    """One modality's share of a :class:`FidelityResult`; NaN or None where the head has no decoder.

    Attributes:
        fvu, cosine, l0: with jackknife intervals over groups of batches.
        sums: the same numbers as training reports them, with the firing counts.
        cknna, cknna_latents: neighbourhoods of ``x'``, and of the latents, against those of ``x``.
        retrieval: of each query of this modality, its partner among those of the other; only the query is rebuilt.
        zero_shot: of each vector, its label among ``classes``; only the vector is rebuilt.
    """

    name: str
    fvu: Estimate
    cosine: Estimate
    l0: Estimate
    sums: Fidelity = field(repr=False)
    cknna: float
    cknna_latents: float
    retrieval: Kept | None = None
    zero_shot: Kept | None = None

    @property
    def density(self) -> Density:
        """How often each feature fires in this modality; ``.histogram()`` has it in equal steps of the logarithm."""
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
    """What :func:`fidelity` measured. With one modality its numbers are this object's own.

    Attributes:
        dead: share of features that fire in neither modality; rare: that fire, but fewer than ``rare_below`` times.
        stability: against each head of ``others``.
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
        """Vectors of a modality: pairs, where there are two."""
        return self.image.sums.n

    @property
    def n_features(self) -> int:
        return self.image.sums.n_features

    @property
    def fvu(self) -> float:
        """FVU; of two modalities the mean, each over its own variance."""
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
        """One row a modality."""
        return Records(m.row() for m in self.modalities)

    def kept(self) -> Records:
        """One row a modality, task and k: rates before and after, agreement and KL."""
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
    """How much survives a head: of vectors, of their neighbourhoods, of retrieval and zero-shot classification.

    FVU, cosine, L0, firing counts and zero-shot go through all rows in batches. Retrieval and CKNNA compare rows
    with each other and use ``gallery`` evenly spaced ones; the result says how many.

    Args:
        image: ``[n, d]``, beside ``text [n, d]`` or alone (any one modality); or a Store, or the directory of one,
            whose ``sites`` are read a batch at a time.
        classes, labels: text embeddings of class names and each row's class: adds zero-shot classification.
            ``classes`` are not rebuilt.
        others: heads of the same site from other seeds, for stability.
        scale: of the softmax whose KL is measured: CLIP's logit scale.
        ks, neighbours: of retrieval and of CKNNA.
        batch: rows at a time (default 4,096, or a twentieth: the intervals leave out groups of batches).

    Raises:
        ShapeMismatch: widths or lengths that differ, fewer than 2 rows. NotFinite: NaN, or a row of zeros.
        MMHooksError: ``classes`` without ``labels`` or the other way round.

    >>> from mmhooks.heads import TopKSAE
    >>> found = fidelity(TopKSAE(8, 32, k=4), torch.randn(100, 8), torch.randn(100, 8))
    >>> found.image.l0.value <= 4, found.text.retrieval.candidates
    (True, 100)
    """
    for what, given in (("image", image), ("text", text)):
        if not isinstance(given, (str, Path, ActivationStore)) and (given is not None or what == "image"):
            check_numbers(given, f"{what} vectors")
    device = next(head.parameters()).device
    rows = [part for part in ready(head, *paired(image, text, sites), device) if part is not None]
    if (classes is None) != (labels is None):
        raise MMHooksError(
            "zero-shot needs both: classes= (an embedding a class) and labels= (a class a row)"
        )
    if classes is not None and labels is not None:
        _check_labels(head, classes, labels, len(rows[0]))
        classes, labels = classes.to(device), labels.to(device)
    chosen = _evenly(len(rows[0]), gallery)
    shown = [_rebuilt(head, part[chosen]) for part in rows]
    found: list[ModalityFidelity] = []
    total = torch.zeros(head.n_features, dtype=torch.long)
    for i, (name, part) in enumerate(zip(NAMES, rows, strict=False)):
        zero_shot = None
        if classes is not None:
            zero_shot = Choices(classes, torch.arange(len(classes), device=device), scale=scale, ks=ks, seed=seed)  # fmt: skip
        stream = _stream(head, part, zero_shot, labels, name, batch, progress)
        x, f, back = shown[i]
        retrieval = None
        if len(rows) == 2 and back is not None:
            retrieval = _retrieval(x, back, shown[1 - i][0], scale=scale, ks=ks, seed=seed)
        fvu, cosine, l0 = stream.estimates(lambda m: _numbers(m, head), len(part))
        enough = len(x) >= max(4, neighbours + 1)
        summed = fidelity_of(head, stream.whole().compute(), rare_below)
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
            f"labels= names one of the {len(classes)} classes for each of the {n} rows; came {len(labels)} labels"
            + (f" from {int(labels.min())} to {int(labels.max())}" if len(labels) else "")
        )


def _evenly(n: int, most: int) -> Int[Tensor, " m"]:
    """At most ``most`` of ``n`` row numbers, evenly spaced."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).round().long()


def _rebuilt(head: Head, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    f = head.encode(x)
    return x, f, head.decode(f) if head.has_decoder else None


def _stream(
    head: Head,
    rows: Vectors,
    zero_shot: Choices | None,
    labels: Tensor | None,
    name: str,
    batch: int | None,
    progress: bool,
) -> Grouped[FidelitySums]:
    stream = Grouped(partial(FidelitySums, head.d_in, head.n_features))
    what = f"fidelity of {head.name}, {name}"
    for number, begin, end in share(len(rows), batch or batch_size(len(rows)), what, progress=progress):
        x, f, back = _rebuilt(head, rows[begin:end])
        stream.update(x, f, back, number=number)
        if zero_shot is not None and labels is not None and back is not None:
            zero_shot.update(x, back, labels[begin:end])
    return stream


def _retrieval(
    x: Tensor, back: Tensor, partners: Tensor, *, scale: float, ks: Sequence[int], seed: int
) -> Kept:
    own = torch.arange(len(x), device=x.device)
    choices = Choices(partners, own, scale=scale, ks=ks, seed=seed)
    for part in own.split(1024):
        choices.update(x[part], back[part], part)
    return choices.result()


def _numbers(metric: FidelitySums, head: Head) -> list[float]:
    found = metric.compute()
    return [found.fvu, found.mean_cosine, found.l0] if head.has_decoder else [math.nan, math.nan, found.l0]
