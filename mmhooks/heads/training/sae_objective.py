"""The SAE's training objective: reconstruction of both modalities, and AuxK, which revives dead features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.linalg import geometric_median, mean_row, project_out_, to_unit, to_unit_, total_variance
from mmhooks.heads.reconstruction import reconstruction
from mmhooks.heads.sae import topk_kernels as sparse
from mmhooks.heads.sae.archetypal import ArchetypalSAE
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.sae.batchtopk import BatchTopKSAE, threshold_at
from mmhooks.heads.sae.jumprelu import JumpReLUSAE
from mmhooks.heads.sae.modality_centres import KEY, shifted
from mmhooks.heads.sae.relu import ReLUSAE
from mmhooks.heads.training.clusters import cluster_directions
from mmhooks.heads.training.objective import Objective, StepLoss
from mmhooks.heads.training.resample import resample, strongest_dead
from mmhooks.heads.vectors import Rows, evenly_spaced


@dataclass
class SAEObjective(Objective):
    """``mean over modalities of FVU + penalty * (the head's own) + aux_weight * AuxK``.

    Each modality's squared error is divided by that modality's own variance over the training data, so the tighter of
    the two clouds is not ignored. A nested head's levels count equally. AuxK (Gao et al. 2024, A.2) trains the ``aux_k``
    strongest *dead* features to reconstruct the error of the live ones.

    For a head with a K, the encoder is initialised at the length that reconstructs best, and biases learn at the data's
    scale, so that training on scaled vectors gives the scaled head.

    Attributes:
        image_share: weight of the images' FVU in the mean; the texts' has the rest. It controls how the dictionary is
            divided between the modalities if one of them would take nearly all of it.
        b_pre: initial pre-bias: geometric median or mean of both modalities pooled, or zero.
        centre: "modality" subtracts each modality's mean first (:mod:`mmhooks.heads.sae.modality_centres`); "pooled"
            leaves centring to ``b_pre``.
        init: random decoder rows, centred training vectors (then no feature starts far from all data), or the directions
            of clusters of these (:mod:`mmhooks.heads.training.clusters`: the start on which other seeds agree most).
        init_seed, init_restarts: seed of the clustering, and of how many starts it is the best.
        aux_k: number of dead features in the auxiliary reconstruction (default: half of ``d_in``).
        dead_after: epochs without firing after which a feature is dead.
        resample_every: in the first half of training, restart dead features every so many epochs at badly
            reconstructed rows (:mod:`mmhooks.heads.training.resample`).
        penalty: weight of the head's own penalty (ReLU: L1, divided by the data's standard deviation so that
            scale does not matter; JumpReLU: L0); by default the head's ``penalty_weight``. No other head has one.
        target_l0: for JumpReLU, ``(L0 / target_l0 - 1)^2`` instead of L0 (Rajamanoharan et al. 2024, app. F),
            weighted by ``penalty`` (default 1); thresholds start where this many features are active.
    """

    # On some ten thousand vectors an SAE lacks optimiser steps: many small batches at a higher learning rate.
    default_batch_size = 256
    default_lr = 2e-3

    image_share: float = 0.5
    b_pre: Literal["median", "mean", "zero"] = "median"
    centre: Literal["pooled", "modality"] = "pooled"
    init: Literal["random", "data", "clusters"] = "random"
    init_seed: int = 0
    init_restarts: int = 4
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
        pooled, weight = self.stack(image, text)
        sample = pooled[:: max(1, len(pooled) // 16384)]
        if isinstance(head, ArchetypalSAE):
            head.set_points(pooled[torch.linspace(0, len(pooled) - 1, head.n_points).long()])
        elif self.b_pre == "median":
            head.b_pre.copy_(geometric_median(sample))
        elif self.b_pre == "mean":
            head.b_pre.copy_(pooled.mean(dim=0))
        if self.init != "random":
            head.W_dec.copy_(self._directions(head, pooled - head.b_pre, weight))
            if not head.tied:
                head.W_enc.copy_(head.W_dec)
        if hasattr(head, "k") and not head.tied:
            # K overlapping unit rows overshoot; rescaling the encoder corrects this without changing the selection.
            centred = sample - head.b_pre
            sketch = _sketch(head, centred)
            gain = (centred * sketch).sum() / sketch.square().sum().clamp_min(1e-30)
            head.W_enc.mul_(gain)
            head.b_enc.mul_(gain)
        if self.target_l0 is not None:
            assert isinstance(head, JumpReLUSAE)
            head.set_threshold(threshold_at(head, self.target_l0, sample).clamp_min(1e-6))

    def _directions(
        self, head: SAE, centred: Float[Tensor, "b d"], weight: Float[Tensor, " b"]
    ) -> Float[Tensor, "n d"]:
        if self.init == "data":
            return to_unit(centred[torch.linspace(0, len(centred) - 1, head.n_features).long()])
        return cluster_directions(
            centred, weight, head.n_features, restarts=self.init_restarts, seed=self.init_seed
        ).to(head.W_dec)

    def lr_scale(self, head: SAE, name: str) -> float:
        """With a K, biases learn at the data's scale; without one they make the head sparse, and use the full rate."""
        if (
            isinstance(head, ArchetypalSAE) and name == "mix"
        ):  # Adam would move every one of many weights that sum to 1 by the rate
            return 1 / head.n_points**0.5
        if name == "relax":  # a decoder's rows, at the data's scale
            return self.spread
        return self.spread / head.d_in**0.5 if name in ("b_enc", "b_pre") and hasattr(head, "k") else 1.0

    def measure(self, image: Rows, text: Rows | None) -> None:
        variances = [total_variance(x) for x in (image, text) if x is not None]
        if min(variances) < 1e-12:
            raise MMHooksError(
                f"expected training vectors that vary, got a modality whose vectors are all equal (variances {variances})"
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
        if out.auxiliary is not None:
            own = weight @ (x - out.auxiliary).square().sum(dim=1)
            loss, parts = loss + own, parts | {"gate": own.detach()}
        if self.aux_weight > 0 and bool(dead.any()):
            aux = self.auxiliary(head, x, errors[-1].detach(), dead)
            loss, parts = loss + self.aux_weight * aux, parts | {"aux": aux.detach()}
        return StepLoss(loss, out.fired, parts)

    def _check(self, head: SAE) -> None:
        """Raises for options that do not apply to this head."""
        if not 0 < self.image_share < 1:
            raise MMHooksError(f"expected image_share between 0 and 1, got {self.image_share}")
        if isinstance(head, ArchetypalSAE) and (self.init, self.centre) != ("random", "pooled"):
            raise MMHooksError(
                "an archetypal head starts at training vectors and has no pre-bias: expected init='random' and "
                f"centre='pooled', got {self.init!r} and {self.centre!r}"
            )
        if isinstance(head, ArchetypalSAE) and self.resample_every is not None:
            raise MMHooksError(
                f"resample_every={self.resample_every}: atoms of an archetypal head are mixtures of its points and cannot be "
                "set to a row; leave it out, AuxK revives dead features"
            )
        if self.penalty is not None and head.penalty_weight == 0:
            raise MMHooksError(
                f"penalty={self.penalty}: a {head.kind} head has no penalty to weight; set its k"
            )
        if self.target_l0 is not None and not isinstance(head, JumpReLUSAE):
            raise MMHooksError(
                f"target_l0={self.target_l0}: expected a jumprelu head, whose L0 has a gradient, got a {head.kind} "
                "head; set its k, or penalty= for relu"
            )

    def _penalty(self, head: SAE, density: Float[Tensor, ""]) -> Float[Tensor, ""]:
        if self.target_l0 is not None:
            weight = 1.0 if self.penalty is None else self.penalty
            # Value and gradient of the square of the whole batch's mean, of which this process may hold a part.
            miss = self.across(density.detach()) / self.target_l0 - 1
            return weight * (miss.square() + 2 * miss * (density - density.detach()) / self.target_l0)
        weight = head.penalty_weight if self.penalty is None else self.penalty
        return weight * (density if isinstance(head, JumpReLUSAE) else density / self.spread)

    @property
    def spread(self) -> float:
        """The data's standard deviation: the root of the modalities' mean variance."""
        return (sum(self.variance) / 2) ** 0.5

    def stack(self, image: Tensor, text: Tensor | None) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        """Both modalities, centred, as one batch, and each row's weight: its modality's share / (rows x variance)."""
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
        """AuxK: ``|e - e'|^2 / |e|^2`` with ``e'`` reconstructed by the strongest dead features only."""
        guess = strongest_dead(head, x, dead, self.aux_k or max(1, head.d_in // 2))
        return (error - guess).square().sum() / self.across(error.square().sum()).clamp_min(1e-30)

    @torch.no_grad()
    def before_step(self, head: SAE) -> None:
        if head.unit_decoder and head.W_dec.grad is not None:
            project_out_(head.W_dec.grad, head.W_dec)

    @torch.no_grad()
    def after_step(self, head: SAE) -> None:
        if head.unit_decoder:
            to_unit_(head.W_dec)
        if isinstance(head, ArchetypalSAE):
            head.project_()
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
        # Not in the second half: a restarted feature needs the rest of training to converge.
        due = self.resample_every is not None and epoch % self.resample_every == 0 and done <= 0.5
        return resample(head, adam, dead, *self.stack(*sample()), generator) if due else 0

    @torch.no_grad()
    def finish(self, head: SAE, image: Rows, text: Rows | None) -> None:
        """ReLU: folds the decoder's norms into the encoder. BatchTopK: sets the threshold at which K are active."""
        if isinstance(head, ReLUSAE):
            head.fold_norms()
        if isinstance(head, BatchTopKSAE):
            sample = self.stack(
                evenly_spaced(image, 32768), None if text is None else evenly_spaced(text, 32768)
            )[0]
            head.threshold.copy_(threshold_at(head, head.k, sample))
        one, two = self.offsets
        if one is not None and two is not None:
            # As a single head it is centred between the modalities; by_modality() shifts it to each.
            middle = (one + two) / 2
            head.b_pre.add_(middle)
            centres = {"image": one - middle, "text": two - middle}
            head.info = head.info | {KEY: {name: offset.tolist() for name, offset in centres.items()}}

    def score(self, head: SAE, image: Tensor, text: Tensor | None) -> dict[str, float]:
        scores = {}
        for name, x, offset in zip(("image", "text"), (image, text), self.offsets, strict=True):
            if x is not None:
                with shifted(head, offset):
                    scores[f"fvu_{name}"] = reconstruction(head, x).fvu
        return scores | {"score": sum(scores.values()) / len(scores)}


def _sketch(head: Any, centred: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """The reconstruction of each row by its K strongest features, before any training."""
    parts = []
    for part in centred.split(4096):
        values, places = sparse.encode(part, head.W_enc, head.b_enc, head.k)
        parts.append(sparse.decode(values, places, head.W_dec))
    return torch.cat(parts)
