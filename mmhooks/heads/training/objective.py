"""What a training loop asks of an objective; apart from any kind of head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.heads.vectors import Rows


class StepLoss(NamedTuple):
    """The loss of one step, which features fired in it, and its parts for the log (detached)."""

    loss: Float[Tensor, ""]
    fired: Bool[Tensor, " n"]
    parts: dict[str, Tensor]


class Objective:
    """How a kind of head is trained; a dataclass whose fields are the options.

    ``dead_after``: a feature is dead when it fired for no pair of so many epochs.
    """

    dead_after: float = 1.0
    default_batch_size: ClassVar[int] = 512
    default_lr: ClassVar[float] = 1e-3
    shares_batches: ClassVar[bool] = True
    """Whether a batch's loss is the mean of its parts' losses, so that several processes may share it."""
    across: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)
    """Mean over the processes that share a batch; ``train_head`` sets it."""
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def settings(self) -> dict[str, Any]:
        """The options, as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def rate(self, head: Any, name: str) -> float:
        """The learning rate of the parameter ``name``, as a share of the training's; asked after ``measure``."""
        return 1.0

    def start(self, head: Any, image: Tensor, text: Tensor | None) -> None:
        """Data-dependent initialisation: once, before the first step; on some 65,536 evenly spaced pairs, or all."""

    def measure(self, image: Rows, text: Rows | None) -> None:
        """Constants of the data that the loss needs: at the start of every run, also of a resumed one."""

    def loss(self, head: Any, image: Tensor, text: Tensor | None, dead: Bool[Tensor, " n"]) -> StepLoss:
        """The loss of one batch of pairs, with its graph."""
        raise NotImplementedError

    def before_step(self, head: Any) -> None:
        """The gradients are there, the optimiser has not stepped."""

    def after_step(self, head: Any) -> None:
        """The optimiser has stepped: restores constraints."""

    def after_epoch(
        self,
        head: Any,
        adam: torch.optim.Optimizer,
        dead: Bool[Tensor, " n"],
        epoch: int,
        done: float,
        sample: Callable[[], tuple[Tensor, Tensor | None]],
        generator: torch.Generator,
    ) -> int:
        """After epoch ``epoch`` (from 1), ``done`` of the training: may bring dead features back; returns how many.

        ``sample()`` gives some training pairs. A function of its arguments alone, so that a resumed run does the same.
        """
        return 0

    def finish(self, head: Any, image: Rows, text: Rows | None) -> None:
        """Once, after the last step, on the training data."""

    def score(self, head: Any, image: Tensor, text: Tensor | None) -> dict[str, float]:
        """Held-out numbers; ``"score"`` is what early stopping watches, less is better."""
        raise NotImplementedError
