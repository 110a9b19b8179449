"""Optimisation of pixels: Adam on images whose pixels stay in range, shared by attack and defence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.results import Result
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.utils.progress import rate_bar

Loss = Callable[[Float[Tensor, "b 3 h w"], Tensor], Float[Tensor, " b"]]


@dataclass(frozen=True)
class Optimised(Result):
    """Images after Adam on their pixels, with losses and distances.

    Attributes:
        images: ``[n 3 h w]``, with values from 0 to 1.
        history: each image's loss before every step and after the last one, ``[steps + 1 n]``.
        kept: images after the steps in ``keep``.
        psnr, linf: distance of each image from its original, in dB and from 0 to 1.
    """

    images: Float[Tensor, "n 3 h w"] = field(repr=False)
    history: Float[Tensor, "points n"] = field(repr=False)
    kept: dict[int, Float[Tensor, "n 3 h w"]] = field(repr=False)
    psnr: Float[Tensor, " n"] = field(repr=False)
    linf: Float[Tensor, " n"] = field(repr=False)
    steps: int
    lr: float
    epsilon: float | None

    def to_json(self) -> dict:
        """Everything except the images."""
        found = {"steps": self.steps, "lr": self.lr, "epsilon": self.epsilon, "kept": sorted(self.kept)}
        return found | {name: getattr(self, name).tolist() for name in ("history", "psnr", "linf")}


def optimise_pixels(
    images: Float[Tensor, "n 3 h w"],
    loss: Loss,
    *,
    steps: int = 40,
    lr: float = 0.02,
    epsilon: float | None = None,
    keep: Sequence[int] = (),
    batch: int = 64,
    progress: bool = True,
    label: str = "optimising pixels",
) -> Optimised:
    """Minimises ``loss`` with Adam on the pixels of all images; after each step pixels are clipped to their range.

    Args:
        images: with values from 0 to 1.
        loss: maps ``(images [b 3 h w], their numbers [b])`` to one value per image. As each value depends only on its
            own image, and Adam scales every pixel separately, the batch size changes only the run time.
        epsilon: keeps every pixel within this distance of its original value; None: anywhere from 0 to 1.
        keep: steps after which the images are kept (0: the originals).

    Raises:
        ShapeMismatch: the images are not [n 3 h w] from 0 to 1, or the loss is not one value per image.
        NotFinite: a loss or gradient is NaN or infinite; names the image.
        MMHooksError: the loss does not depend on the pixels, or ``steps`` or ``keep`` is out of range.

    >>> made = optimise_pixels(torch.zeros(2, 3, 4, 4), lambda x, i: (x - 1).square().mean((1, 2, 3)), progress=False)
    >>> bool((made.history[-1] < made.history[0]).all()), made.history.shape
    (True, torch.Size([41, 2]))
    """
    check_images(images)
    if steps < 0 or any(not 0 <= k <= steps for k in keep):
        raise MMHooksError(f"expected steps of at least 0 and keep within them, got {steps} and {list(keep)}")
    done, histories = [], []
    kept: dict[int, list[Tensor]] = {k: [] for k in keep}
    with rate_bar(label, len(images) * steps, unit="images", show=progress) as advance:
        for begin in range(0, len(images), batch):
            start = images[begin : begin + batch].detach()
            ids = torch.arange(begin, begin + len(start))
            x = start.clone().requires_grad_()
            adam = torch.optim.Adam([x], lr=lr)
            history = []
            for step in range(steps):
                if step in kept:
                    kept[step].append(x.detach().clone())
                with torch.enable_grad():
                    values = _checked(loss(x, ids), ids)
                    if not values.requires_grad:
                        raise MMHooksError(
                            "loss: expected one that depends on the pixels, got one that does not depend on them"
                        )
                    (x.grad,) = torch.autograd.grad(values.sum(), x)
                _finite(x.grad.flatten(1).sum(1), ids, "gradient")
                history.append(values.detach())
                adam.step()
                with torch.no_grad():
                    if epsilon is not None:
                        x.copy_(x.clamp(start - epsilon, start + epsilon))
                    x.clamp_(0, 1)
                advance(len(start))
            with torch.no_grad():
                history.append(_checked(loss(x, ids), ids))
            if steps in kept:
                kept[steps].append(x.detach().clone())
            done.append(x.detach())
            histories.append(torch.stack(history))
    made = torch.cat(done)
    return Optimised(
        made,
        torch.cat(histories, 1),
        {k: torch.cat(v) for k, v in kept.items()},
        psnr(made, images),
        (made - images).abs().flatten(1).amax(1),
        steps,
        lr,
        epsilon,
    )


def psnr(a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n2 3 h2 w2"]) -> Float[Tensor, " n"]:
    """Computes the peak signal-to-noise ratio of images with values from 0 to 1, in dB; infinite for equal images.

    >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)).round()
    tensor([20.])
    """
    if a.shape != b.shape:
        raise ShapeMismatch(
            f"psnr: expected two sets of images of the same shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return -10 / math.log(10) * (a - b).square().flatten(1).mean(1).log()


def check_images(images: Tensor, what: str = "images") -> None:
    """Raises ShapeMismatch unless ``[n 3 h w]`` with n >= 1 and values from 0 to 1."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ShapeMismatch(f"{what}: expected [n 3 h w] with at least one, got {tuple(images.shape)}")
    low, high = (float(v) for v in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ShapeMismatch(
            f"{what}: expected values between 0 and 1, before any normalisation, got {low:.3f} to {high:.3f}"
        )


def _checked(values: Tensor, ids: Tensor) -> Float[Tensor, " b"]:
    if values.shape != ids.shape:
        raise ShapeMismatch(f"loss: expected one value per image, [{len(ids)}], got {tuple(values.shape)}")
    _finite(values, ids, "loss")
    return values


def _finite(values: Tensor, ids: Tensor, what: str) -> None:
    values = values.detach()
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise NotFinite(
            f"{what} of image {int(ids[bad][0])} is {float(values[bad][0])}; a smaller lr may help"
        )
