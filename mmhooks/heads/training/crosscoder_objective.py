"""The crosscoder's training objective: the mean over sites of each site's FVU, and AuxK."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.crosscoder import Crosscoder
from mmhooks.heads.linalg import mean_row
from mmhooks.heads.training.objective import StepLoss
from mmhooks.heads.training.sae_objective import SAEObjective
from mmhooks.heads.vectors import Rows


@dataclass
class CrosscoderObjective(SAEObjective):
    """:class:`SAEObjective` on joined rows ``[n, sum of widths]``, every site divided by its standard deviation.

    While it trains, the head takes vectors so scaled; at the end the scales go into its weights, which changes no feature.
    ``train_head(head, head.join([x, y]))``.
    """

    column_variance: Tensor = field(default_factory=lambda: torch.ones(1), init=False, repr=False)
    columns: Tensor = field(default_factory=lambda: torch.ones(1), init=False, repr=False)

    def measure(self, image: Rows, text: Rows | None) -> None:
        if text is not None or self.centre != "pooled":
            raise MMHooksError(
                "a crosscoder trains on rows that hold the vectors of all its sites: expected train_head(head, "
                f"head.join([x, y])) with centre='pooled', got {'two sets of rows' if text is not None else self.centre!r}"
            )
        mean = mean_row(image)
        squares = sum(
            ((chunk.double() - mean).square().sum(dim=0) for chunk in image.split(16384)),
            torch.zeros_like(mean),
        )
        self.column_variance = squares / len(image)

    def _adopt(self, head: Crosscoder) -> None:
        """Takes over the head's scales, which a checkpoint holds too."""
        self.columns = head.columns
        self.variance = (float(len(head.widths)), float(len(head.widths)))

    def lr_scale(self, head: Crosscoder, name: str) -> float:
        self._adopt(head)
        return super().lr_scale(head, name)

    @torch.no_grad()
    def start(self, head: Crosscoder, image: Tensor, text: Tensor | None) -> None:
        variance = torch.stack([part.sum() for part in head.split(self.column_variance)])
        if float(variance.min()) < 1e-12:
            raise MMHooksError(f"expected vectors that vary at every site, got variances {variance.tolist()}")
        again = not bool((head.scale == 1).all())
        head.scale.copy_(variance.sqrt())
        self._adopt(head)
        if again:  # trained before: it takes vectors as the sites carry them
            head.rescale_(1 / self.columns)
        super().start(head, image, None)

    def stack(self, image: Tensor, text: Tensor | None) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        return super().stack(image / self.columns, None)

    def loss(
        self, head: Crosscoder, image: Tensor, text: Tensor | None, dead: Bool[Tensor, " n"]
    ) -> StepLoss:
        self._adopt(head)
        return super().loss(head, image, None, dead)

    def after_epoch(
        self,
        head: Crosscoder,
        adam: torch.optim.Optimizer,
        dead: Bool[Tensor, " n"],
        epoch: int,
        done: float,
        sample: Callable[[], tuple[Tensor, Tensor | None]],
        generator: torch.Generator,
    ) -> int:
        self._adopt(head)
        return super().after_epoch(head, adam, dead, epoch, done, sample, generator)

    def finish(self, head: Crosscoder, image: Rows, text: Rows | None) -> None:
        head.rescale_(head.columns)

    @torch.no_grad()
    def score(self, head: Crosscoder, image: Tensor, text: Tensor | None) -> dict[str, float]:
        self._adopt(head)
        scores = {}
        rows = image / self.columns
        back = torch.cat([head(part) for part in rows.split(4096)])
        pairs = zip(head.split(rows), head.split(back), strict=True)
        for site, (x, x_back) in enumerate(pairs):
            spread = (x - x.mean(dim=0)).double().square().sum()
            scores[f"fvu_{site}"] = float((x - x_back).double().square().sum() / spread)
        return scores | {"score": sum(scores.values()) / len(scores)}
