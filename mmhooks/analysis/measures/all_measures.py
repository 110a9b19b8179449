"""All measures of a store in one pass, each with its interval: :func:`measure` and its result :class:`Measures`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.inputs.sparse import Latents
from mmhooks.analysis.inputs.store_rows import (
    ActivationStore,
    LatentRows,
    Side,
    VectorRows,
    batch_size,
    data_id,
    latent_rows,
    row_batches,
    vector_rows,
)
from mmhooks.analysis.measures.bridges import Bridge, BridgeResult
from mmhooks.analysis.measures.cknna import CKNNA
from mmhooks.analysis.measures.density import Density, FeatureDensity
from mmhooks.analysis.measures.embed_sim import EmbedSimResult
from mmhooks.analysis.measures.groups import FeatureTests, differs_from_half
from mmhooks.analysis.measures.mds import GROUPS, KINDS, MDS, Kind, MDSResult, activated_rows, activation
from mmhooks.analysis.measures.modality_gap import ModalityGap, ModalityMeans, gap_of
from mmhooks.analysis.measures.monosemanticity import (
    GroupContrast,
    MonoSemanticity,
    MonosemanticityResult,
)
from mmhooks.analysis.measures.samples import Zeros, check_kind, check_sizes, samples_of, with_inactive
from mmhooks.analysis.measures.similarity import CANDIDATES, similarity, similarity_of_families
from mmhooks.analysis.measures.top_activating import TopActivating, TopSamples, check_families, first_of
from mmhooks.analysis.measures.win_rate import WinRateResult
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.hypothesis_tests import PermutationTest
from mmhooks.analysis.statistics.jackknife import GROUPS as GROUPS_LEFT_OUT
from mmhooks.analysis.statistics.jackknife import JackknifeGroups, jackknife_error
from mmhooks.analysis.statistics.two_way import family_groups, two_way
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import MMHooksError
from mmhooks.heads.base import Head
from mmhooks.utils.stage_timer import StageTimer

SIDES: tuple[Side, ...] = get_args(Side)
BRIDGE_FEATURES = 4096
CKNNA_ROWS, CKNNA_BLOCKS, CKNNA_NEIGHBOURS = 1000, 10, 10
CKNNA_PAIRS = (
    ("image embeddings", "text embeddings"),
    ("image embeddings", "image latents"),
    ("text embeddings", "text latents"),
    ("image latents", "text latents"),
)


@dataclass(frozen=True)
class _Inputs:
    n: int
    latents: dict[Side, LatentRows]
    embeddings: dict[Side, VectorRows]  # the model's own
    judges: dict[Side, VectorRows]  # whose cosine says how similar samples are


@torch.no_grad()
def measure(
    store: ActivationStore,
    *,
    head: Head | None = None,
    image: str | None = None,
    text: str | None = None,
    embeddings: Mapping[str, Float[Tensor, "n d"] | str] | None = None,
    kind: Kind = "relu",
    m: int = 20,
    pool: int = 2048,
    min_fires: int = 20,
    min_samples: int = 2,
    zeros: Zeros = "drop",
    families: Int[Tensor, " n2"] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Measures:
    """Computes every measure of both sides of a store, in one pass with memory that does not grow with the store.

    MDS with groups and tests, density and L0, top samples, EmbedSim, WinRate, MonoSemanticity, modality gap,
    bridges, CKNNA. After the pass, the vectors of top samples, of one random pool and of the paper's controls are
    read by row number, and at most 10 blocks of 1,000 rows for CKNNA. Under ``torchrun`` (an initialised
    ``torch.distributed``) the batches are divided among the processes, which all return the same result.

    Args:
        store: :class:`mmhooks.data.Store`, or anything that reads like one.
        head: runs on stored embeddings; without one the stored latents are read.
        image, text: sites of latents or, with a head, of the vectors that it reads; default
            ``<side>.embed`` with a head, else the side's one site of latents.
        embeddings: by side ("image", "text"), another model's vectors of the same pairs, row by row, or the name
            of a site. They say how similar samples are (EmbedSim, WinRate, MonoSemanticity). Default: the model's
            own ``<side>.embed``.
        kind: the activation: "relu", "abs" for a model's own signed coordinates, or "paper", their raw values.
        m: top samples per feature. pool: random samples of WinRate.
        min_fires, seed: as in :func:`mmhooks.analysis.measures.mds.mds`.
        min_samples, zeros: as in :func:`mmhooks.analysis.measures.embed_sim.embed_sim`; dead features are NaN.
        families: the family of each pair (:func:`mmhooks.data.families`). Lists of top samples then hold one sample per
            family, random samples are of different families, and the intervals of means over features (MDS, EmbedSim,
            WinRate, contrasts) are over features and families.

    Raises:
        UnknownSite, ShapeMismatch: a site is missing or does not fit; raised before anything is read.
        NotFinite: the store holds NaN; names row and feature.

    >>> mm.measure(mm.Store("runs/acts"), head=mm.load_head("mini/sae")).table()    # doctest: +SKIP
    """
    check_kind("activation", kind, KINDS)
    check_kind("zeros", zeros, get_args(Zeros))
    check_sizes(m, min_samples, len(store))
    check_families(families, len(store))
    timer, skipped = StageTimer(), {}
    inputs = _resolve(store, head, {"image": image, "text": text}, embeddings or {}, skipped)
    n, n_features = inputs.n, inputs.latents["image"].n_features
    name = inputs.latents["image"].site if head is None else head.id
    data = data_id(store)

    def score(**options: bool) -> MDS:
        return MDS(n_features, kind=kind, head=name, data=data, min_fires=min_fires, seed=seed, **options)

    scores = JackknifeGroups(score)
    groups = None
    if families is not None:
        groups = family_groups(families, groups=min(GROUPS_LEFT_OUT, len(families.unique())), seed=seed)
    kept = m if families is None else CANDIDATES * m
    top: dict[Side, TopSamples] = {
        side: TopSamples(n_features, m=kept, by_family=families is not None) for side in SIDES
    }
    fires: dict[Side, FeatureDensity] = {side: FeatureDensity(n_features, seed=seed) for side in SIDES}
    mono: dict[Side, MonoSemanticity] = {
        side: MonoSemanticity(n_features, judge.width, seed=seed) for side, judge in inputs.judges.items()
    }
    means = _means(inputs, skipped)
    bridge = _bridge(n_features, head, skipped)
    reads = [*inputs.latents.values(), *inputs.embeddings.values(), *inputs.judges.values()]
    for number, begin, end in row_batches(
        n, batch_size(n), f"measures of {n} pairs", reads=reads, progress=progress
    ):
        with timer("latents"):
            batch: dict[Side, Latents] = {
                side: _activated(rows[begin:end], kind) for side, rows in inputs.latents.items()
            }
        with timer("MDS"):
            if groups is None:
                scores.update(batch["image"], batch["text"], start=begin, number=number)
            else:
                _update_by_group(scores, batch, groups[begin:end], begin)
        with timer("top samples"):
            of = None if families is None else families[begin:end]
            for side in SIDES:
                top[side].update(batch[side], start=begin, families=of)
        with timer("density and L0"):
            for side in SIDES:
                fires[side].update(batch[side])
        with timer("MonoSemanticity"):
            for side, metric in mono.items():
                metric.update(batch[side], inputs.judges[side][begin:end].cpu())
        if means is not None:
            with timer("modality gap"):
                means.update(*(inputs.embeddings[side][begin:end].cpu() for side in SIDES), number=number)
        if bridge is not None:
            with timer("bridges"):
                bridge.update(batch["image"], batch["text"])
    with timer("intervals and tests"):
        dominance_scores = scores.merged().result()
        over_samples = scores.estimate(_mean_score, n)
        dominance = differs_from_half(dominance_scores)
        gap = None if means is None else gap_of(means, n)
        found = {side: metric.result() for side, metric in top.items()}
        densities = {side: metric.result() for side, metric in fires.items()}
        monosemanticity = {side: metric.result() for side, metric in mono.items()}
    with timer("CKNNA"):
        alignment = _alignment(inputs, kind, skipped)
    with timer("EmbedSim and WinRate"):
        if zeros == "keep":
            alive = dominance_scores.alive
            found = {s: with_inactive(t, alive, families=families, seed=seed) for s, t in found.items()}
        samples = {
            side: samples_of(
                found[side], judge, n, m=kept, pool=pool, seed=seed, s_minus=_mean_cosine(mono[side]),
                families=families,
            )
            for side, judge in inputs.judges.items()
        }  # fmt: skip
        if groups is None:
            similar = similarity(samples, dominance_scores, min_samples=min_samples, seed=seed)
        else:
            left_out = [metric.result() for metric in scores.left_out()]
            similar = similarity_of_families(
                samples, dominance_scores, groups, left_out, m=m, min_samples=min_samples, seed=seed
            )
            spread = torch.tensor([[r.mu, r.sigma] for r in left_out], dtype=torch.float64)
            mu, sigma = jackknife_error(spread).tolist()
            similar.family_errors.update({"MDS mean": mu, "MDS sigma": sigma})
            wider = two_way(dominance_scores.mu_estimate, mu, groups=len(left_out))
            dominance_scores = replace(dominance_scores, mu_estimate=wider)
    return Measures(
        n_pairs=n,
        head=name,
        data=data,
        sites={side: rows.site for side, rows in inputs.latents.items()},
        judges={side: rows.name for side, rows in inputs.judges.items()},
        settings={
            "kind": kind,
            "m": m,
            "pool": pool,
            "min_fires": min_fires,
            "min_samples": min_samples,
            "zeros": zeros,
            "families": None if families is None else len(families.unique()),
            "seed": seed,
        },
        mds=dominance_scores,
        mds_over_samples=over_samples,
        dominance=dominance,
        density=dict(densities),
        top={side: first_of(t, m) for side, t in found.items()},
        gap=gap,
        embed_sim=similar.embed_sim,
        win_rate=similar.win_rate,
        monosemanticity=dict(monosemanticity),
        contrasts=similar.contrasts,
        permutations=similar.permutations,
        bridge=None if bridge is None or head is None else bridge.result(head.W_dec),  # type: ignore[arg-type]
        cknna=alignment,
        family_errors=similar.family_errors,
        skipped=skipped,
        seconds=timer.all(),
    )


def _update_by_group(
    scores: JackknifeGroups[MDS], batch: Mapping[Side, Latents], groups: Int[Tensor, " b"], begin: int
) -> None:
    """Adds a batch of pairs to the jackknife groups of their families."""
    for group in groups.unique().tolist():
        of = (groups == group).nonzero().flatten()
        scores.update(batch["image"][of], batch["text"][of], start=begin + group, number=group)


def _resolve(
    store: ActivationStore,
    head: Head | None,
    sites: dict[Side, str | None],
    given: Mapping[str, Tensor | str],
    skipped: dict[str, str],
) -> _Inputs:
    if set(given) - set(SIDES):
        raise MMHooksError(f"embeddings: expected the sides image and text as keys, got {', '.join(given)}")
    latents: dict[Side, LatentRows] = {side: latent_rows(store, side, head, sites[side]) for side in SIDES}
    widths = {side: rows.n_features for side, rows in latents.items()}
    if len(set(widths.values())) > 1:
        raise MMHooksError(
            f"expected both sides of the same head, got {widths['image']} features at {latents['image'].site}, "
            f"{widths['text']} at {latents['text'].site}"
        )
    own: dict[Side, VectorRows] = {
        s: vector_rows(store, f"{s}.embed") for s in SIDES if f"{s}.embed" in store.sites
    }
    judges: dict[Side, VectorRows] = {
        s: vector_rows(store, given[s]) if s in given else own[s] for s in SIDES if s in given or s in own
    }
    for side in SIDES:
        if side not in judges:
            skipped[f"EmbedSim, WinRate, MonoSemanticity ({side})"] = (
                f"no vectors: the store has no site {side}.embed; extract it, or give embeddings="
            )
    return _Inputs(len(store), latents, own, judges)


def _means(inputs: _Inputs, skipped: dict[str, str]) -> JackknifeGroups[ModalityMeans] | None:
    widths = {side: rows.width for side, rows in inputs.embeddings.items()}
    if len(widths) == 2 and len(set(widths.values())) == 1:
        return JackknifeGroups(partial(ModalityMeans, widths["image"]))
    skipped["modality gap"] = f"needs image.embed and text.embed of the same width, got {widths or 'neither'}"
    return None


def _bridge(n_features: int, head: Head | None, skipped: dict[str, str]) -> Bridge | None:
    if head is None or not head.has_decoder:
        skipped["bridges"] = "needs the features' decoder directions: give a head with a decoder"
    elif n_features > BRIDGE_FEATURES:
        skipped["bridges"] = (
            f"{n_features}² pairs of features are too many: give mmhooks.analysis.measures.bridges a selection"
        )
    else:
        return Bridge(n_features)
    return None


def _alignment(inputs: _Inputs, kind: Kind, skipped: dict[str, str]) -> dict[str, Estimate]:
    """Computes CKNNA of the representations in CKNNA_PAIRS, over blocks of rows spread evenly over the store."""
    size = min(CKNNA_ROWS, inputs.n)
    if not inputs.embeddings or size < 2 * CKNNA_NEIGHBOURS:
        skipped["CKNNA"] = (
            f"needs embeddings and {2 * CKNNA_NEIGHBOURS} pairs, got {inputs.n} pairs and "
            f"{', '.join(rows.name for rows in inputs.embeddings.values()) or 'no embeddings'}"
        )
        return {}
    blocks = min(CKNNA_BLOCKS, inputs.n // size)
    metrics: dict[str, CKNNA] = {}
    for _, block, _ in row_batches(blocks, 1):
        begin = block * (inputs.n - size) // max(1, blocks - 1)
        rows = slice(begin, begin + size)
        tables: dict[str, Tensor] = {f"{s} embeddings": v[rows].cpu() for s, v in inputs.embeddings.items()}
        for side in inputs.embeddings:
            latents = _activated(inputs.latents[side][rows], kind)
            tables[f"{side} latents"] = latents.dense() if isinstance(latents, SparseRows) else latents
        for one, other in CKNNA_PAIRS:
            if one in tables and other in tables:
                metric = metrics.setdefault(f"{one} – {other}", CKNNA(k=CKNNA_NEIGHBOURS))
                metric.update(tables[one], tables[other])
    names = [f"{a} – {b}" for a, b in CKNNA_PAIRS if all(x.split()[0] in inputs.embeddings for x in (a, b))]
    with warnings.catch_warnings():  # a process without a block only adds those of others
        warnings.filterwarnings("ignore", message="The ``compute`` method")
        return {name: metrics.setdefault(name, CKNNA(k=CKNNA_NEIGHBOURS)).result() for name in names}


def _activated(latents: Latents, kind: Kind) -> Latents:
    sparse = isinstance(latents, SparseRows)
    return activated_rows(latents, kind) if sparse else activation(latents, kind)


def _mean_score(metric: MDS) -> float:
    return float(metric.compute()["R"].nanmean())


def _mean_cosine(metric: MonoSemanticity) -> float:
    """Mean cosine over all pairs of samples, from sums that MonoSemanticity keeps anyway."""
    state = metric.compute()
    n = int(state["n_samples"])
    return (float(state["unit_sum"].square().sum()) - float(state["unit_squares"])) / (n * n - n)


@dataclass(frozen=True)
class Measures(Result):
    """All measures of one head over one store; see :func:`mmhooks.analysis.measures.all_measures.measure`.

    Attributes:
        mds: scores and groups. mds_over_samples: their mean over alive features, with a jackknife over samples.
        dominance: per-feature test of R against one half, after Benjamini-Hochberg.
        density, embed_sim, win_rate, monosemanticity, top: by side.
        contrasts, permutations: visual (ImgD − TextD on images) and textual (TextD − ImgD on texts)
            EmbedSim, with random groups and with a permutation test.
        gap, bridge: of the two sides. cknna: by the representations compared.
        family_errors: standard errors over families, by measure; empty without families.
        skipped: measures that could not be computed, and why.
        judges: by side, the vectors that say how similar samples are.
        sites: by side, the site that was read.
        seconds: time spent on reading, on each measure and in total, by this process.
    """

    n_pairs: int
    head: str
    data: str
    sites: dict[str, str]
    judges: dict[str, str]
    settings: dict[str, Any]
    mds: MDSResult
    mds_over_samples: Estimate
    dominance: FeatureTests
    density: dict[str, Density]
    top: dict[str, TopActivating] = field(repr=False)
    gap: ModalityGap | None = None
    embed_sim: dict[str, EmbedSimResult] = field(default_factory=dict)
    win_rate: dict[str, WinRateResult] = field(default_factory=dict)
    monosemanticity: dict[str, MonosemanticityResult] = field(default_factory=dict)
    contrasts: dict[str, GroupContrast] = field(default_factory=dict)
    permutations: dict[str, PermutationTest] = field(default_factory=dict)
    bridge: BridgeResult | None = None
    cknna: dict[str, Estimate] = field(default_factory=dict)
    family_errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def table(self) -> Records:
        """One row per number: value, interval, n and what n counts."""
        rows = [_row("MDS μ", "both", self.mds.mu_estimate, "features")]
        rows.append(_row("MDS μ", "both", self.mds_over_samples, "pairs"))
        for side, found in self.density.items():
            rows.append(_row("L0", side, found.l0, "samples"))
        for name, results in (
            ("EmbedSim", self.embed_sim),
            ("WinRate", self.win_rate),
            ("MonoSemanticity", self.monosemanticity),
        ):
            rows += [_row(name, side, result.estimate, "features") for side, result in results.items()]
        if self.gap is not None:
            rows.append(_row("modality gap", "both", self.gap.gap, "pairs"))
            rows.append(_row("cosine of pairs", "both", self.gap.pair_cosine, "pairs"))
        rows += [_row("CKNNA", what, estimate, "batches") for what, estimate in self.cknna.items()]
        return Records(rows)

    def tables(self) -> dict[str, Records]:
        """All tables by title, in reading order."""
        features = Records(
            {
                "side": side,
                "dead": found.dead,
                "median density of alive": float(found.values[found.values > 0].median())
                if bool((found.values > 0).any())
                else float("nan"),
                "L0": found.l0.value,
                "samples": found.n_samples,
            }
            for side, found in self.density.items()
        )
        tables = {
            "Measures": self.table(),
            "Modality dominance": self.mds.table(),
            "R differs from one half": self.dominance.table(),
            "Features": features,
            "EmbedSim of groups": Records(
                {"kind": kind, **row} for kind, c in self.contrasts.items() for row in c.table()
            ),
            "Permutation tests": Records(
                {"kind": kind, **row} for kind, t in self.permutations.items() for row in t.table()
            ),
            "Strongest bridges": Records() if self.bridge is None else self.bridge.table(),
            "Skipped": Records({"measure": name, "why": why} for name, why in self.skipped.items()),
            "Seconds": Records({"stage": name, "seconds": value} for name, value in self.seconds.items()),
        }
        return {title: table for title, table in tables.items() if table}

    def group_names(self) -> list[str]:
        """The group of every feature, or "dead"."""
        names = ["dead"] * len(self.mds.R)
        for name, group in zip(GROUPS, self.mds.groups, strict=True):
            for k in group:
                names[k] = name
        return names


def _row(measure: str, side: str, e: Estimate, over: str) -> dict[str, Any]:
    return {"measure": measure, "side": side, **e.columns(), "over": over}
