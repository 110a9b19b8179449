"""The interface between the training loop and an objective, independent of the kind of head."""

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
    """How a kind of head is trained; a dataclass whose fields are its options.

    ``dead_after``: number of epochs without firing after which a feature is dead.
    """

    dead_after: float = 1.0
    default_batch_size: ClassVar[int] = 512
    default_lr: ClassVar[float] = 1e-3
    shares_batches: ClassVar[bool] = True
    """Whether a batch's loss is the mean of its parts' losses, so that several processes can split it."""
    across: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)
    """Mean over the processes that split a batch; set by ``train_head``."""
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def settings(self) -> dict[str, Any]:
        """The options, as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def lr_scale(self, head: Any, name: str) -> float:
        """The learning rate of the parameter ``name`` relative to the run's; called after ``measure``."""
        return 1.0

    def start(self, head: Any, image: Tensor, text: Tensor | None) -> None:
        """Data-dependent initialisation, once before the first step, on about 65,536 evenly spaced pairs, or all."""

    def measure(self, image: Rows, text: Rows | None) -> None:
        """Computes constants of the data that the loss needs, at the start of every run, resumed ones included."""

    def loss(self, head: Any, image: Tensor, text: Tensor | None, dead: Bool[Tensor, " n"]) -> StepLoss:
        """The loss of one batch of pairs, with its graph."""
        raise NotImplementedError

    def before_step(self, head: Any) -> None:
        """Called when the gradients are computed, before the optimiser steps."""

    def after_step(self, head: Any) -> None:
        """Called after the optimiser has stepped; restores constraints."""

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
        """Called after epoch ``epoch`` (from 1), at fraction ``done`` of training; may revive dead features and returns
        how many.

        ``sample()`` returns some training pairs. Depends only on its arguments, so that a resumed run does the same.
        """
        return 0

    def finish(self, head: Any, image: Rows, text: Rows | None) -> None:
        """Called once after the last step, on the training data."""

    def score(self, head: Any, image: Tensor, text: Tensor | None) -> dict[str, float]:
        """Metrics on held-out data; ``"score"`` is used by early stopping, lower is better."""
        raise NotImplementedError
