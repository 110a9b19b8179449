"""The archetypal SAE: a TopK SAE whose atoms are convex combinations of training vectors (Fel et al. 2025, RA-SAE)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.linalg import to_unit
from mmhooks.heads.sae.base import TrainingPass, firing
from mmhooks.heads.sae.topk import TopKSAE


class ArchetypalSAE(TopKSAE):
    """``W_dec = mix @ points + relax``: rows of ``mix`` are not negative and sum to 1, rows of ``relax`` are short.

    So atom ``i`` lies within ``delta`` of the convex hull of ``points``, which are training vectors: it cannot drift to
    where there is no data, and trainings with other seeds end at more similar dictionaries. There is no pre-bias; atoms
    have the length of the data. ``points`` are set when training starts (evenly spaced training vectors, in the head's
    own space), or by :meth:`set_points`, and are part of the file.

    Args:
        n_points: number of vectors that atoms are mixed from (default: ``n_features``).
        delta: the longest row of ``relax``, relative to the mean length of ``points``; 0 for atoms inside the hull.

    >>> sae = ArchetypalSAE(d_in=8, n_features=16, k=4)
    >>> sae.set_points(torch.nn.functional.normalize(torch.randn(16, 8), dim=-1))
    >>> bool(torch.allclose(sae.W_dec, sae.points)), sae.encode(torch.randn(5, 8)).shape
    (True, torch.Size([5, 16]))
    """

    kind = "archetypal"
    unit_decoder = False
    points: Tensor

    def __init__(
        self,
        d_in: int,
        n_features: int,
        k: int = 32,
        *,
        n_points: int | None = None,
        delta: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, n_features, k, **kwargs)
        self.n_points = n_features if n_points is None else n_points
        if self.n_points < 2 or not 0 <= delta < float("inf"):
            raise ShapeMismatch(f"expected n_points >= 2 and delta >= 0, got {self.n_points} and {delta}")
        self.delta = delta
        del self.W_dec
        self.register_buffer("W_dec", torch.zeros(n_features, d_in))
        self.register_buffer("points", torch.zeros(self.n_points, d_in))
        # Atoms start at points of all kinds, also where there are more points than atoms.
        places = torch.arange(n_features) * self.n_points // n_features
        self.mix = nn.Parameter(torch.nn.functional.one_hot(places, self.n_points).float())
        self.relax = nn.Parameter(torch.zeros(n_features, d_in))
        self.b_pre.requires_grad_(False)
        self._has_points = False

    def config(self) -> dict[str, Any]:
        return super().config() | {"n_points": self.n_points, "delta": self.delta}

    def dictionary(self) -> Float[Tensor, "n d"]:
        """The atoms with their graph; ``W_dec`` holds the same values."""
        return self.mix @ self.points + self.relax

    @property
    def slack(self) -> Float[Tensor, ""]:
        """The longest row of ``relax`` that ``delta`` allows."""
        return self.delta * self.points.norm(dim=1).mean()

    @torch.no_grad()
    def project_(self) -> None:
        """Makes the rows of ``mix`` convex weights and those of ``relax`` short enough, and brings ``W_dec`` up to date."""
        self.mix.clamp_min_(0)
        total = self.mix.sum(dim=1, keepdim=True)
        self.mix.copy_(torch.where(total > 0, self.mix / total, 1 / self.n_points))
        length = self.relax.norm(dim=1, keepdim=True)
        self.relax.mul_((self.slack / length.clamp_min(1e-30)).clamp_max(1))
        self.W_dec.copy_(self.dictionary())

    @torch.no_grad()
    def set_points(self, points: Float[Tensor, "m d"]) -> None:
        """Sets the vectors that atoms are mixed from, and starts the encoder at the atoms' directions from their mean.

        Raises:
            ShapeMismatch: not ``n_points`` vectors of width ``d_in``.
        """
        if tuple(points.shape) != (self.n_points, self.d_in):
            raise ShapeMismatch(
                f"set_points: expected {[self.n_points, self.d_in]}, got {list(points.shape)}; build the head with "
                f"n_points={len(points)}"
            )
        self.points.copy_(points)
        self.project_()
        centre = self.points.mean(dim=0)
        self.W_enc.copy_(to_unit(self.W_dec - centre))
        self.b_enc.copy_(-self.W_enc @ centre)

    def pre(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """As of any SAE.

        Raises:
            MMHooksError: the points were never set.
        """
        if not self._has_points:  # checked only until they are set, since on a GPU the check synchronises
            self._has_points = bool(self.points.any())
        if not self._has_points:
            raise MMHooksError(
                f"head {self.name!r} (archetypal) has no points yet: train it, or call head.set_points(vectors)"
            )
        return super().pre(x)

    def training_pass(self, x: Float[Tensor, "b d"]) -> TrainingPass:
        f = self.encode(x)
        return TrainingPass([f @ self.dictionary()], *firing(f))
