"""The SAE's training objective: reconstruction of both modalities, and AuxK that revives dead features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mmhooks.errors import MMHooksError
from mmhooks.heads.linalg import geometric_median, mean_row, project_out_, to_unit_, total_variance, unit_rows
from mmhooks.heads.reconstruction import fidelity
from mmhooks.heads.sae import topk_kernels as sparse
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.sae.batchtopk import BatchTopKSAE, threshold_at
from mmhooks.heads.sae.jumprelu import JumpReLUSAE
from mmhooks.heads.sae.modality_centres import KEY, shifted
from mmhooks.heads.sae.relu import ReLUSAE
from mmhooks.heads.training.objective import Objective, StepLoss
from mmhooks.heads.training.resample import resample
from mmhooks.heads.vectors import Rows, Vectors


@dataclass
class SAEObjective(Objective):
    """``mean over modalities of FVU + penalty * (the head's own) + aux_weight * AuxK``.

    Each modality's squared error is divided by that modality's own variance over the training data, so the
    tighter of two clouds is not ignored. A nested head's levels count equally. AuxK (Gao et al. 2024, A.2)
    asks the ``aux_k`` strongest *dead* features to reconstruct what the living ones left over.

    Of a head with a K the encoder starts at the length that reconstructs best, and biases learn at the data's scale, so
    that a head of scaled vectors is the scaled head.

    Attributes:
        image_share: weight of the images' FVU in the mean, the texts' has the rest. The dictionary is divided by
            what an error costs: a modality that would take it nearly whole can be held back here.
        b_pre: where the pre-bias starts: geometric median, mean of both modalities pooled, or zero.
        centre: "modality" takes each modality's mean off its vectors first (:mod:`mmhooks.heads.sae.modality_centres`);
            "pooled" leaves both to ``b_pre``.
        init: decoder rows at random, or centred training vectors (then no feature starts far from all data).
        aux_k: dead features in the auxiliary reconstruction (default: half of ``d_in``).
        dead_after: epochs without firing after which a feature is dead.
        resample_every: after every so many epochs of the first half, dead features begin again at rows that the
            head explains badly (:mod:`mmhooks.heads.training.resample`).
        penalty: weight of the head's own penalty (ReLU: L1, divided by the data's standard deviation so that
            scale does not matter; JumpReLU: L0); by default the head's ``penalty_weight``. No other head has one.
        target_l0: for JumpReLU, ``(L0 / target_l0 - 1)^2`` in place of L0 (Rajamanoharan et al. 2024, app. F),
            weighted by ``penalty`` (default 1); thresholds start where so many features are active.
    """

    # On a few ten thousand vectors steps are what an SAE lacks: many small ones at a higher rate.
    default_batch_size = 256
    default_lr = 2e-3

    image_share: float = 0.5
    b_pre: Literal["median", "mean", "zero"] = "median"
    centre: Literal["pooled", "modality"] = "pooled"
    init: Literal["random", "data"] = "random"
    aux_k: int | None = None
    aux_weight: float = 1 / 32
    dead_after: float = 1.0
    resample_every: int | None = None
    penalty: float | None = None
    target_l0: float | None = None
    variance: tuple[float, float] = field(default=(1.0, 1.0), init=False)
    offsets: tuple[Tensor | None, Tensor | None] = field(default=(None, None), init=False, repr=False)

    @torch.no_grad()
    def start(self, head: SAE, image: Tensor, text: Tensor | None) -> None:
        self._check(head)
        pooled, _ = self.stack(image, text)
        sample = pooled[:: max(1, len(pooled) // 16384)]
        if self.b_pre == "median":
            head.b_pre.copy_(geometric_median(sample))
        elif self.b_pre == "mean":
            head.b_pre.copy_(pooled.mean(dim=0))
        if self.init == "data":
            rows = torch.linspace(0, len(pooled) - 1, head.n_features).long()
            head.W_dec.copy_(unit_rows(pooled[rows] - head.b_pre))
            head.W_enc.copy_(head.W_dec)
        if hasattr(head, "k"):
            # K unit rows that overlap reconstruct too much; the selection does not change with the encoder's length.
            centred = sample - head.b_pre
            sketch = _sketch(head, centred)
            head.W_enc.mul_((centred * sketch).sum() / sketch.square().sum().clamp_min(1e-30))
        if self.target_l0 is not None:
            assert isinstance(head, JumpReLUSAE)
            head.set_threshold(threshold_at(head, self.target_l0, sample).clamp_min(1e-6))

    def rate(self, head: SAE, name: str) -> float:
        """With a K, biases learn at the data's scale; elsewhere they are what makes a head sparse, at the full rate."""
        return self.spread / head.d_in**0.5 if name in ("b_enc", "b_pre") and hasattr(head, "k") else 1.0

    def measure(self, image: Rows, text: Rows | None) -> None:
        variances = [total_variance(x) for x in (image, text) if x is not None]
        if min(variances) < 1e-12:
            raise MMHooksError(
                f"the training vectors of a modality are all the same (variances {variances}): "
                "there is nothing to learn"
            )
        self.variance = (variances[0], variances[-1])
        if self.centre == "modality":
            if text is None:
                raise MMHooksError("centre='modality' is for two modalities: pass text= as well as image=")
            self.offsets = (mean_row(image).float(), mean_row(text).float())

    def loss(self, head: SAE, image: Tensor, text: Tensor | None, dead: Bool[Tensor, " n"]) -> StepLoss:
        x, weight = self.stack(image, text)
        out = head.training_pass(x)
        errors = [x - recon for recon in out.recons]
        fvu = sum((weight @ e.square().sum(dim=1) for e in errors), x.new_zeros(())) / len(errors)
        loss, parts = fvu, {"fvu": fvu.detach(), "l0": out.l0}
        if out.penalty is not None:
            penalty = self._penalty(head, out.penalty)
            loss, parts = loss + penalty, parts | {"penalty": penalty.detach()}
        if self.aux_weight > 0 and bool(dead.any()):
            aux = self.auxiliary(head, x, errors[-1].detach(), dead)
            loss, parts = loss + self.aux_weight * aux, parts | {"aux": aux.detach()}
        return StepLoss(loss, out.fired, parts)

    def _check(self, head: SAE) -> None:
        """Options that this head has no use for are refused, not ignored."""
        if not 0 < self.image_share < 1:
            raise MMHooksError(f"image_share lies between 0 and 1, came {self.image_share}")
        if self.penalty is not None and head.penalty_weight == 0:
            raise MMHooksError(
                f"penalty={self.penalty}: a {head.kind} head has no penalty to weigh; set its k"
            )
        if self.target_l0 is not None and not isinstance(head, JumpReLUSAE):
            raise MMHooksError(
                f"target_l0={self.target_l0} needs an L0 with a gradient, as jumprelu has; came a {head.kind} "
                "head: set its k, or penalty= for relu"
            )

    def _penalty(self, head: SAE, density: Float[Tensor, ""]) -> Float[Tensor, ""]:
        if self.target_l0 is not None:
            weight = 1.0 if self.penalty is None else self.penalty
            # The square of the whole batch's mean, of which this process may hold a part: its value and gradient.
            miss = self.across(density.detach()) / self.target_l0 - 1
            return weight * (miss.square() + 2 * miss * (density - density.detach()) / self.target_l0)
        weight = head.penalty_weight if self.penalty is None else self.penalty
        return weight * (density if isinstance(head, JumpReLUSAE) else density / self.spread)

    @property
    def spread(self) -> float:
        """The data's standard deviation: root of the mean of the modalities' variances."""
        return (sum(self.variance) / 2) ** 0.5

    def stack(self, image: Tensor, text: Tensor | None) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        """Both modalities, centred, as one batch, and each row's weight: share / (rows x variance) of its modality."""
        parts = [part for part in (image, text) if part is not None]
        split = (self.image_share, 1 - self.image_share) if len(parts) == 2 else (1.0,)
        shares = [
            part.new_full((len(part),), share / (len(part) * variance))
            for part, share, variance in zip(parts, split, self.variance, strict=False)
        ]
        centred = [
            part if offset is None else part - offset
            for part, offset in zip(parts, self.offsets, strict=False)
        ]
        if len(parts) == 1:
            return centred[0], shares[0]
        return torch.cat(centred), torch.cat(shares)

    def auxiliary(
        self, head: SAE, x: Float[Tensor, "b d"], error: Float[Tensor, "b d"], dead: Bool[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """AuxK: ``|e - e'|^2 / |e|^2`` with ``e'`` from the strongest dead features alone."""
        rows = dead.nonzero().squeeze(1)
        pre = F.linear(x - head.b_pre, head.W_enc[rows], head.b_enc[rows])
        k = min(self.aux_k or max(1, head.d_in // 2), len(rows))
        values, chosen = pre.topk(k, dim=-1, sorted=False)
        guess = torch.zeros_like(pre).scatter(-1, chosen, values.relu()) @ head.W_dec[rows]
        return (error - guess).square().sum() / self.across(error.square().sum()).clamp_min(1e-30)

    @torch.no_grad()
    def before_step(self, head: SAE) -> None:
        if head.unit_decoder and head.W_dec.grad is not None:
            project_out_(head.W_dec.grad, head.W_dec)

    @torch.no_grad()
    def after_step(self, head: SAE) -> None:
        if head.unit_decoder:
            to_unit_(head.W_dec)
        if isinstance(head, BatchTopKSAE):
            head.threshold.copy_(self.across(head.threshold))

    def after_epoch(
        self,
        head: SAE,
        adam: torch.optim.Optimizer,
        dead: Bool[Tensor, " n"],
        epoch: int,
        done: float,
        sample: Callable[[], tuple[Tensor, Tensor | None]],
        generator: torch.Generator,
    ) -> int:
        # Not in the second half: a feature that begins again needs the rest of the training to find its place.
        due = self.resample_every is not None and epoch % self.resample_every == 0 and done <= 0.5
        return resample(head, adam, dead, *self.stack(*sample()), generator) if due else 0

    @torch.no_grad()
    def finish(self, head: SAE, image: Rows, text: Rows | None) -> None:
        """ReLU: the decoder's norms into the encoder. BatchTopK: the threshold where K are active on the data."""
        if isinstance(head, ReLUSAE):
            head.fold_norms()
        if isinstance(head, BatchTopKSAE):
            sample = self.stack(_some(image), None if text is None else _some(text))[0]
            head.threshold.copy_(threshold_at(head, head.k, sample))
        one, two = self.offsets
        if one is not None and two is not None:
            # Used as one head, it stands between the modalities; by_modality() puts it where each one is.
            middle = (one + two) / 2
            head.b_pre.add_(middle)
            centres = {"image": one - middle, "text": two - middle}
            head.info = head.info | {KEY: {name: offset.tolist() for name, offset in centres.items()}}

    def score(self, head: SAE, image: Tensor, text: Tensor | None) -> dict[str, float]:
        scores = {}
        for name, x, offset in zip(("image", "text"), (image, text), self.offsets, strict=True):
            if x is not None:
                with shifted(head, offset):
                    scores[f"fvu_{name}"] = fidelity(head, x).fvu
        return scores | {"score": sum(scores.values()) / len(scores)}


def _sketch(head: Any, centred: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """What the K strongest features of each row make of it, before any training."""
    parts = []
    for part in centred.split(4096):
        values, places = sparse.encode(part, head.W_enc, head.b_enc, head.k)
        parts.append(sparse.decode(values, places, head.W_dec))
    return torch.cat(parts)


def _some(rows: Rows, most: int = 32768) -> Float[Tensor, "_ d"]:
    """Evenly spaced rows."""
    return rows.sample(most) if isinstance(rows, Vectors) else rows[:: max(1, len(rows) // most)]
