"""Runs every measure on unusual tensors, as users do, without the type checks of the tests. Prints, for each measure and
input, what came of it beside what a loop in float64 gives. Run by test_measure_faults.py."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.decomposition.head_moments import HeadMoments
from mmhooks.analysis.decomposition.text_span import text_span
from mmhooks.analysis.measures.bridges import Bridge
from mmhooks.analysis.measures.cknna import cknna
from mmhooks.analysis.measures.density import density
from mmhooks.analysis.measures.fidelity import fidelity
from mmhooks.analysis.measures.groups import groups_of
from mmhooks.analysis.measures.modality_gap import modality_gap
from mmhooks.analysis.measures.monosemanticity import monosemanticity
from mmhooks.analysis.measures.retrieval import retrieval
from mmhooks.analysis.measures.sweep import sweep
from mmhooks.analysis.measures.top_activating import top_activating

N, K, M = 24, 5, 4


def unit(x: Tensor) -> Tensor:
    x = x.double() / x.double().abs().amax(1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True)


def naive_mds(image: Tensor, text: Tensor) -> list[float]:
    found = []
    for k in range(image.shape[1]):
        ratios = [
            float(i / (i + t))
            for i, t in zip(image[:, k].double(), text[:, k].double(), strict=True)
            if i + t > 0
        ]
        found.append(sum(ratios) / len(ratios) if ratios else math.nan)
    return found


def naive_top(latents: Tensor) -> list[list[int]]:
    found = []
    for column in latents.double().T.tolist():
        ranked = sorted((i for i, v in enumerate(column) if v > 0), key=lambda i: (-column[i], i))
        found.append(ranked[:M])
    return found


def naive_similarity(latents: Tensor, vectors: Tensor) -> tuple[list[float], list[float]]:
    """Mean cosine of the pairs of top samples, and how often it is above that of all pairs."""
    e = unit(vectors)
    cosines = e @ e.T
    every = [float(cosines[i, j]) for i in range(len(e)) for j in range(i)]
    alike, wins = [], []
    for top in naive_top(latents):
        own = [float(cosines[i, j]) for a, i in enumerate(top) for j in top[:a]]
        alike.append(sum(own) / len(own) if own else math.nan)
        wins.append(
            sum(sum(o > c + 1e-7 for c in every) / len(every) for o in own) / len(own) if own else math.nan
        )
    return alike, wins


def naive_ranks(image: Tensor, text: Tensor) -> list[float]:
    """Counts the candidates that are at least as near as the partner."""
    scores = unit(image) @ unit(text).T
    return [
        sum(float(s) >= float(row[i]) - 1e-9 for j, s in enumerate(row) if j != i)
        for side in (scores, scores.T)
        for i, row in enumerate(side)
    ]


def naive_gap(image: Tensor, text: Tensor) -> list[float]:
    one, other = unit(image), unit(text)
    return [float((one.mean(0) - other.mean(0)).norm()), float((one * other).sum(1).mean())]


def naive_mono(latents: Tensor, vectors: Tensor) -> list[float]:
    e, found = unit(vectors), []
    for a in latents.double().T:
        a = (a - a.min()) / (a.max() - a.min()) if a.max() > a.min() else a * math.nan
        weights = [(float(a[i] * a[j]), float(e[i] @ e[j])) for i in range(len(a)) for j in range(i)]
        total = sum(w for w, _ in weights)
        found.append(sum(w * c for w, c in weights) / total if total > 0 else math.nan)
    return found


def naive_moments(latents: Tensor, _: Tensor) -> list[float]:
    x = latents.double().view(len(latents), 1, -1)
    centred = x - x.mean(0)
    return (torch.einsum("nhd,nhe->hde", centred, centred) / len(x)).flatten().tolist()


def moments(latents: Any, _: Any) -> list[float]:
    metric = HeadMoments(1, K)
    metric.update(
        latents[:, None] if isinstance(latents, Tensor) and latents.layout == torch.strided else latents
    )
    return metric.compute()["covariance"].flatten().tolist()


def bridge(image: Any, text: Any) -> list[float]:
    metric = Bridge(K)
    metric.update(image, text)
    return metric.compute()["together"].flatten().tolist()


def flat(samples: Any) -> list[int]:
    """Concatenates the samples of each feature, each list followed by -1."""
    return [int(i) for own in samples for i in (*own, -1)]


def across(x: Any) -> Any:
    """Swaps samples and features, as groups need at least six features; anything but a 2-D tensor is returned as it is."""
    return x.T if isinstance(x, Tensor) and x.ndim == 2 else x


def groups(image: Any, text: Any) -> list[int]:
    found, _ = groups_of(mm.mds(across(image), across(text)))
    return flat(sorted(found[name]) for name in ("ImgD", "TextD", "CrossD"))


def naive_groups(image: Tensor, text: Tensor) -> list[int]:
    alive = sorted((r, k) for k, r in enumerate(naive_mds(image.T, text.T)) if not math.isnan(r))
    mu = sum(r for r, _ in alive) / len(alive)
    sigma = math.sqrt(sum((r - mu) ** 2 for r, _ in alive) / len(alive))
    first, last = [k for r, k in alive if r > mu + sigma], [k for r, k in alive if r < mu - sigma]
    if not (first and last and len(first) + len(last) < len(alive)):
        sixth = len(alive) // 6
        first, last = [k for _, k in alive[-sixth:]], [k for _, k in alive[:sixth]]
    rest = [k for _, k in alive if k not in first and k not in last]
    return flat(map(sorted, (first, last, rest)))


def swept(image: Any, text: Any) -> list[float]:
    """FVU, L0 and dead features of a head trained on these rows, which are held out too."""
    with tempfile.TemporaryDirectory() as out:
        (row,) = sweep(image, text, out=out, k=[2], n=[12], epochs=1, batch_size=8, valid=(image, text), top=M,
                       progress=False).rows  # fmt: skip
    return [row["FVU"], row["L0"], row["dead"]]


def swept_as_float32(image: Tensor, text: Tensor) -> list[float]:
    return swept(image.float().contiguous(), text.float().contiguous())


def held_out(image: Any, text: Any) -> list[float]:
    """As :func:`swept`, but trained on good rows: bad held-out rows must fail before training."""
    rows = [inputs(False, seed) for seed in range(2)]
    with tempfile.TemporaryDirectory() as out:
        (row,) = sweep(*rows, out=out, k=[2], n=[12], epochs=1, batch_size=8, valid=(image, text), top=M,
                       progress=False).rows  # fmt: skip
    return [row["FVU"], row["L0"], row["dead"]]


SAE = mm.TopKSAE(K, 12, 3, seed=0)
# Name: the measure, a loop for it (None: only what it refuses is looked at), and whether each side is activations.
MEASURES: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, bool, bool]] = {
    "mds": (lambda a, b: mm.mds(a, b).R.tolist(), naive_mds, True, True),
    "density": (lambda a, b: density(a).values.tolist(), lambda a, b: (a != 0).double().mean(0).tolist(), True, True),
    "top": (lambda a, b: flat(map(top_activating(a, m=M).of, range(K))), lambda a, b: flat(naive_top(a)), True, True),
    "embed_sim": (lambda a, b: mm.embed_sim(a, b, m=M).s_plus.tolist(), lambda a, b: naive_similarity(a, b)[0], True, False),
    "win_rate": (lambda a, b: mm.win_rate(a, b, m=M).values.tolist(), lambda a, b: naive_similarity(a, b)[1], True, False),
    "monosemanticity": (lambda a, b: monosemanticity(a, b).values.tolist(), naive_mono, True, False),
    "retrieval": (lambda a, b: (lambda r: [*r.image_ranks.tolist(), *r.text_ranks.tolist()])(retrieval(a, b)),
                  naive_ranks, False, False),
    "gap": (lambda a, b: (lambda g: [g.gap.value, g.pair_cosine.value])(modality_gap(a, b)), naive_gap, False, False),
    "moments": (moments, naive_moments, False, False),
    "cknna": (lambda a, b: [cknna(a, b, k=3)], lambda a, b: [cknna(a.double().clone(), b.double().clone(), k=3)], False, False),
    "fidelity": (lambda a, b: [fidelity(SAE, a, b, neighbours=3).fvu], None, False, False),
    "bridge": (bridge, lambda a, b: (a.double().T @ b.double() / len(a)).flatten().tolist(), True, True),
    "text_span": (
        lambda a, b: text_span(a, b, list(map(str, range(N if b is None else len(b)))), n_texts=2, rank=3).mean[0].tolist(),
        lambda a, b: a.double().mean(0).tolist(), False, False,
    ),
    "groups": (groups, naive_groups, True, True),
    "sweep": (swept, swept_as_float32, False, False),
    "sweep, held out": (held_out, lambda a, b: held_out(a.float().contiguous(), b.float().contiguous()), False, False),
}  # fmt: skip
ONE_SIDED = ("density", "top", "moments")


def with_(row: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([x[:row], torch.full_like(x[:1], value), x[row + 1 :]])


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 1


ACCEPTED: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda x: x,
    "float64": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bf16": lambda x: x.bfloat16(),
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "requires grad": lambda x: x.clone().requires_grad_(),
    "inference": inference,
    "one sample for a feature": lambda x: torch.cat(
        [x[:1].abs() + 1, x[1:] * 0 + x[1:].abs().clamp_max(1e-3)]
    ),
    "tiny": lambda x: x * 1e-15,
    "huge": lambda x: x * 1e15,
    "two of a kind": lambda x: torch.cat([x[: N // 2], x[: N // 2]]),
    "six rows": lambda x: x[:6],
}
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "integers": lambda x: (10 * x).long(),
    "bools": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "numpy": lambda x: x.numpy(),
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
    "NaN": with_(3, math.nan),
    "infinity": with_(3, math.inf),
    "one dimension": lambda x: x[:, 0],
    "three dimensions": lambda x: x[None],
    "no columns": lambda x: x[:, :0],
    "other rows": lambda x: x[:-1],
}
DIRECTIONS = {"a row of zeros": with_(3, 0.0)}


def inputs(activations: bool, seed: int) -> Tensor:
    x = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    return x.relu() if activations else x


def tried(measure: Callable[..., Any], *given: Any) -> dict[str, Any]:
    try:
        return {"got": measure(*given)}
    except mm.errors.MMHooksError as refused:
        return {"refused": str(refused)}
    except Exception as fault:
        return {"fault": f"{type(fault).__name__}: {fault}"}


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    for name, (measure, loop, *kinds) in MEASURES.items():
        sides = [inputs(kind, seed) for seed, kind in enumerate(kinds)]
        rows = found[name] = {}
        for what, change in ACCEPTED.items():
            given = [change(side) for side in sides]
            rows[f"accepted: {what}"] = tried(measure, *given)
            if loop is not None:
                rows[f"accepted: {what}"]["wanted"] = loop(*[g.detach().clone() for g in given])
        for at in range(1 if name in ONE_SIDED else 2):
            odd = REFUSED | (
                {} if kinds[at] or name in ("cknna", "moments", "text_span", "retrieval") else DIRECTIONS
            )
            for what, change in odd.items():
                if what == "other rows" and (name in ONE_SIDED or name == "text_span"):
                    continue
                if what == "None" and at == 1 and name == "fidelity":
                    continue  # one modality alone
                given = [change(side) if at == i else side for i, side in enumerate(sides)]
                rows[f"refused: {what}, side {at}"] = tried(measure, *given)
        if name not in ("top", "moments", "bridge"):  # a stream may have empty batches
            rows["refused: no rows"] = tried(measure, *[side[:0] for side in sides])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
