"""Which features carry a gender, and Figure 5: images by their share of ImgD."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.interventions.masked_classification import CosineLabels, Masked, single_ablations
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.analysis.results import Estimate, plain
from mmhooks.analysis.statistics.hypothesis_tests import benjamini_hochberg
from mmhooks.analysis.statistics.intervals import from_draws
from mmhooks.analysis.statistics.resampling import bootstrap_ratio, paired_test, resampled_sums
from mmhooks.studies.gender.masking import SIDES, Inputs, Setting, Split
from mmhooks.studies.gender.samples import CLASSES

TOP = 16  # "most active features" of Figure 5


def strongest_features(
    setting: Setting, inputs: Inputs, *, count: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Returns the features whose ablation changes the own class's probability most.

    They are chosen on the samples that are not judged; their effect is measured on those that are.
    """
    labels, fit, judged, out = inputs.labels, inputs.fit, inputs.judged, {}
    group_of = {k: g for g, members in zip(GROUPS, setting.mds.groups, strict=True) for k in members}
    for side in SIDES:
        known, fresh = (inputs.masked(setting, side, s.rows) for s in (fit, judged))
        active = (known.latents > 0).any(0).nonzero().flatten()
        effect = torch.cat([_effect(known, part, labels, fit.y).mean(0) for part in active.split(64)])
        chosen = active[effect.abs().argsort(descending=True)[:count]]
        moved = _effect(fresh, chosen, labels, judged.y)
        rows = []
        for j, k in enumerate(chosen.tolist()):
            test = paired_test(
                moved[:, j], torch.zeros(len(judged.y)).double(), judged.families, draws=1999, seed=seed
            )
            to_woman = torch.where(judged.y == 0, moved[:, j], -moved[:, j])
            rows.append(
                {
                    "feature": k,
                    "group": group_of.get(k, ""),
                    "score": plain(float(setting.mds.R[k])),
                    "chosen_by": float(effect[(active == k).nonzero()[0, 0]]),
                    "change": plain(test.difference),
                    "p": test.p,
                    "change_of_woman": float(to_woman.mean()),
                    "active": int((fresh.latents[:, k] > 0).sum()),
                }
            )
        q = benjamini_hochberg(torch.tensor([r["p"] for r in rows], dtype=torch.float64)).tolist()
        out[side] = [r | {"q": v} for r, v in zip(rows, q, strict=True)]
    return out


def _effect(samples: Masked, features: Tensor, labels: CosineLabels, y: Tensor) -> Float[Tensor, "n m"]:
    """Returns the change of the own class's probability with each single feature at zero."""
    own = labels(samples.vectors(None)).gather(1, y[:, None])
    ablated = single_ablations(samples, features, labels)
    return ablated.gather(2, y[:, None, None].expand(-1, len(features), 1))[..., 0] - own


def imgd_shares(
    setting: Setting, inputs: Inputs, everyone: Split, *, shown: int, seed: int
) -> dict[str, Any]:
    """Returns Figure 5: the share of ImgD among the most active features of each image.

    By class: ``shown`` images evenly spaced by rank, the mean share, and its rank correlation with the probability of
    the class.
    """
    samples = inputs.masked(setting, "image", everyone.rows)
    values, top = samples.latents.topk(min(TOP, samples.latents.shape[1]), dim=1)
    member = setting.mds.groups[0].mask[top] & (values > 0)
    share = member.sum(1).double() / (values > 0).sum(1).clamp_min(1)
    own = inputs.labels(samples.vectors(None)).gather(1, everyone.y[:, None])[:, 0]
    out = {}
    for c, name in enumerate(CLASSES):
        of = (everyone.y == c).nonzero().flatten()
        order = of[share[of].argsort(stable=True)]
        at = torch.linspace(0, len(order) - 1, min(shown, len(order))).round().long()
        out[name] = {
            "pictures": [{"row": int(everyone.rows[i]), "share": float(share[i])} for i in order[at]],
            "mean": plain(bootstrap_ratio(share[of], None, everyone.families[of], seed=seed)),
            "correlation": plain(_spearman(share[of], own[of], everyone.families[of], seed)),
        }
    return out


def _spearman(a: Tensor, b: Tensor, families: Tensor, seed: int, draws: int = 500) -> Estimate:
    from scipy.stats import rankdata

    x, y = (torch.from_numpy(rankdata(v.numpy())).double() for v in (a, b))
    columns = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)

    def r(s: Tensor) -> Tensor:
        n, sx, sy, xx, yy, xy = s.unbind(-1)
        under = ((n * xx - sx**2) * (n * yy - sy**2)).clamp_min(0).sqrt()
        return torch.where(under > 0, (n * xy - sx * sy) / under, torch.nan)

    value = float(r(columns.sum(0)))
    if len(families.unique()) < 2 or math.isnan(value):
        return Estimate(value, math.nan, math.nan, len(a))
    drawn = r(resampled_sums(columns, families, draws=draws, seed=seed))
    return from_draws(value, drawn[~drawn.isnan()], len(a))
