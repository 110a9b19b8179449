"""Decompositions over a data set: batch by batch, as running means, or only the outputs of attention heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.decomposition.contributions import Decomposition, decompose_batch, shares_table
from mmhooks.analysis.decomposition.origin import Origin, origin_of
from mmhooks.analysis.results import Records, Result
from mmhooks.data.loading import Decoder, load_batches, plan_batches
from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream
from mmhooks.errors import DataError, MMHooksError, ShapeMismatch, WrongOrigin
from mmhooks.models.clip.inputs import Model, Vectors, check_batch, check_model, check_tower
from mmhooks.utils.files import atomic_path
from mmhooks.utils.indexing import as_places
from mmhooks.utils.progress import rate_bar

if TYPE_CHECKING:
    Inputs = Pairs | PairStream | Iterable[Any]  # batches of tensors
else:
    Inputs = Any  # :func:`batches` checks them, with a better message

_MEANS = ("embedding", "initial", "heads", "mlps", "pool", "class_token")


@dataclass(frozen=True, eq=False)
class MeanDecomposition(Result):
    """Means of a :class:`~mmhooks.analysis.decomposition.contributions.Decomposition` over ``n`` images or texts.

    They sum to the mean ``embedding``. Mean-ablation replaces a component by its mean.

    ``class_token``: of what each head gets from the class token, if requested. ``shares``: mean share of every component
    in the length of its embedding, see ``Decomposition.shares``. ``origin``:
    tower, normalize, model, weights and data; saved in the file too, and checked by functions that take means.
    """

    n: int
    embedding: Float[Tensor, " e"]
    initial: Float[Tensor, " e"]
    heads: Float[Tensor, "l h e"]
    mlps: Float[Tensor, "l e"]
    pool: Float[Tensor, " e"] | None
    class_token: Float[Tensor, "l h e"] | None
    shares: dict[str, Tensor]
    error: float
    origin: Origin

    @property
    def total(self) -> Float[Tensor, " e"]:
        return (
            self.initial + self.heads.sum((0, 1)) + self.mlps.sum(0) + (0 if self.pool is None else self.pool)
        )

    def table(self) -> Records:
        """Mean shares, one row per block."""
        return shares_table(self.shares)

    def save(self, path: str | Path) -> Path:
        """Writes all tensors to one safetensors file."""
        from safetensors.torch import save_file

        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        tensors |= {f"shares.{name}": value for name, value in self.shares.items()}
        about = {"n": str(self.n), "error": str(self.error), "kind": type(self).__name__}
        about |= self.origin.to_metadata()
        with atomic_path(path) as aside:
            save_file({name: t.contiguous() for name, t in tensors.items()}, aside, metadata=about)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> MeanDecomposition:
        """Reads a file written by :meth:`save`.

        Raises:
            DataError: not such a file, or an older one that does not say what its means belong to.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("kind") != cls.__name__:
                raise DataError(
                    f"{path}: expected a {cls.__name__}, got {about.get('kind', 'something else')}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        shares = {n.removeprefix("shares."): t for n, t in tensors.items() if n.startswith("shares.")}
        origin = Origin.from_metadata(about, path)
        own = {
            f.name: tensors.get(f.name)
            for f in fields(cls)
            if f.name not in ("n", "shares", "error", "origin")
        }
        return cls(n=int(about["n"]), error=float(about["error"]), shares=shares, origin=origin, **own)  # type: ignore[arg-type]

    def check_for(self, parts: Decomposition, what: str = "means") -> None:
        """Raises WrongOrigin unless the means have the tower, normalization and model of ``parts``."""
        self.origin.check(parts.origin, what, "these parts")


def check_means(means: Any, what: str = "means=") -> MeanDecomposition:
    """Returns ``means``, checked to be a MeanDecomposition.

    Raises:
        WrongOrigin: anything else; a Decomposition of single images would broadcast and leave each image unchanged.
    """
    if isinstance(means, MeanDecomposition):
        return means
    got = type(means).__name__
    raise WrongOrigin(
        f"{what}: expected a MeanDecomposition, means over a data set, got a {got}: "
        "make them by mm.decompose(model, mm.data.pairs(...)), or for a tensor by mm.decompose(model, [pixels])"
    )


def decompositions(
    model: Model,
    inputs: Tensor | Inputs,
    *,
    tower: str = "image",
    tokens: bool = False,
    against: Vectors | None = None,
    class_token: bool = False,
    normalize: bool = False,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
) -> Iterator[Decomposition]:
    """Yields one :class:`~mmhooks.analysis.decomposition.contributions.Decomposition` per batch of ``inputs``, in order.

    Args:
        inputs: pixels or tokens as one tensor, an iterable of batches of them (any size), or pairs.
        tower: "image" or "text".
        workers: processes that decode the images of pairs.
        tokens, against, class_token, normalize: as in :func:`~mmhooks.analysis.decomposition.decompose.decompose`.

    Raises:
        DataError: there is no input. Also the errors of ``decompose``.

    >>> for parts in decompositions(model, mm.data.pairs("mini")):          # doctest: +SKIP
    ...     moments.add(parts.heads)                                         # [b layers heads d]
    """
    total = len(inputs) if isinstance(inputs, (Tensor, Pairs)) else None
    seen = 0
    with rate_bar("decomposing", total, unit=f"{tower}s", show=progress) as advance:
        for batch in batches(model, inputs, tower, batch_size, workers):
            found = decompose_batch(
                model, batch, tower=tower, tokens=tokens, against=against, class_token=class_token
            )
            seen += len(batch)
            advance(len(batch))
            yield found.normalized() if normalize else found
    if not seen:
        raise DataError("decompose: expected at least one input, got a data set with no images or texts")


def mean_decomposition(
    model: Model,
    inputs: Tensor | Inputs,
    *,
    tower: str = "image",
    class_token: bool = False,
    normalize: bool = False,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
) -> MeanDecomposition:
    """Computes running means over a data set, as ``mm.decompose`` does; memory does not depend on its length.

    Raises:
        DataError: there is no input.
    """
    n, worst = 0, 0.0
    sums: dict[str, Tensor] = {}
    for parts in decompositions(
        model,
        inputs,
        tower=tower,
        class_token=class_token,
        normalize=normalize,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    ):
        n, worst = n + len(parts.embedding), max(worst, float(parts.error.max()))
        here = {name: getattr(parts, name) for name in _MEANS}
        here |= {f"shares.{name}": value for name, value in parts.shares().items()}
        for name, value in here.items():
            if value is not None:
                part = value.double().sum(0)
                sums[name] = part if name not in sums else sums[name] + part
    means = {name: (value / n).float() for name, value in sums.items()}
    shares = {name.removeprefix("shares."): v for name, v in means.items() if name.startswith("shares.")}
    own = {name: means.get(name) for name in _MEANS}
    origin = origin_of(model, tower, normalize, inputs)
    return MeanDecomposition(n=n, shares=shares, error=worst, origin=origin, **own)  # type: ignore[arg-type]


def head_outputs(
    model: Model,
    inputs: Tensor | Inputs,
    *,
    layers: Any = None,
    tower: str = "image",
    normalize: bool = False,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
) -> Float[Tensor, "n l h e"]:
    """Computes direct contributions of the attention heads of ``layers`` (integers, negative ones from the end, or a
    bool mask; default all), one row per input. For data that does not fit in memory use :func:`decompositions`.

    Raises:
        ShapeMismatch: the tower does not have a layer. DataError: there is no input.

    >>> head_outputs(model, mm.data.pairs("mini"), layers=[-4, -3, -2, -1]).shape   # doctest: +SKIP
    torch.Size([3953, 4, 6, 256])
    """
    rows = []
    for parts in decompositions(
        model,
        inputs,
        tower=tower,
        normalize=normalize,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    ):
        depth = parts.heads.shape[1]
        what = f"layers of a tower of {depth} layers"
        chosen = list(range(depth)) if layers is None else as_places(layers, depth, what).tolist()
        if not chosen:
            raise ShapeMismatch(f"{what}: expected at least one, got none")
        rows.append(parts.heads[:, chosen].cpu())
    return torch.cat(rows)


def batches(
    model: Model, inputs: Tensor | Inputs, tower: str, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """Yields the pixels or tokens of ``inputs``, batch by batch.

    Raises:
        ShapeMismatch: neither pixels or tokens that the model reads, nor batches of them.
        MMHooksError: not a hooked CLIP, or pairs for a model without preprocess or tokenizer.
    """
    check_model(model)
    check_tower(tower)
    if batch_size < 1:
        raise ShapeMismatch(f"batch_size: expected at least 1, got {batch_size}")
    if isinstance(inputs, Tensor) or not isinstance(inputs, (Pairs, PairStream, Iterable)):
        check_batch(model, inputs, tower)
        yield from inputs.split(batch_size) if len(inputs) else ()
        return
    if not isinstance(inputs, (Pairs, PairStream)):
        for batch in inputs:
            check_batch(model, batch, tower)
            yield from batch.split(batch_size) if len(batch) else ()
        return
    needed = model.preprocess if tower == "image" else model.tokenizer
    if needed is None:
        what = "preprocess" if tower == "image" else "tokenizer"
        raise MMHooksError(
            f"pairs: expected a model with {what}, got one without: give it to mm.HookedCLIP(..., {what}=...)"
        )
    decoder = Decoder(
        inputs, model.preprocess if tower == "image" else None, model.tokenizer if tower == "text" else None
    )
    for batch in load_batches(
        decoder, plan_batches(inputs, batch_size=batch_size, shard_rows=2**40), workers=workers, pin=False
    ):
        found = batch.images if tower == "image" else batch.texts
        if found is not None:
            yield found
