"""Decompositions over a data set: batch by batch, as running means, or the outputs of its attention heads alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.decompose import Decomposition, decompose_batch, shares_table
from mmhooks.analysis.results import Result, Table
from mmhooks.data.loading import Decoder, loader, works
from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream
from mmhooks.data.progress import rate_bar
from mmhooks.errors import DataError, MMHooksError, ShapeMismatch
from mmhooks.models.clip import HookedCLIP
from mmhooks.utils.indexing import as_places

Inputs = Pairs | PairStream | Iterable[Any]  # batches of tensors


@dataclass(frozen=True, eq=False)
class MeanDecomposition(Result):
    """Means of a :class:`~mmhooks.analysis.decompose.Decomposition` over ``n`` images or texts; they add up to the
    mean ``embedding``. What mean-ablation puts in the place of a component.

    ``shares``: mean share of every part in the length of its embedding, see ``Decomposition.shares``.
    """

    n: int
    embedding: Float[Tensor, " e"]
    initial: Float[Tensor, " e"]
    heads: Float[Tensor, "l h e"]
    mlps: Float[Tensor, "l e"]
    pool: Float[Tensor, " e"] | None
    shares: dict[str, Tensor]
    error: float

    @property
    def total(self) -> Float[Tensor, " e"]:
        return (
            self.initial + self.heads.sum((0, 1)) + self.mlps.sum(0) + (0 if self.pool is None else self.pool)
        )

    def table(self) -> Table:
        """Mean shares, a row a block."""
        return shares_table(self.shares)

    def save(self, path: str | Path) -> Path:
        """All tensors as one safetensors file."""
        from safetensors.torch import save_file

        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        tensors |= {f"shares.{name}": value for name, value in self.shares.items()}
        path = Path(path)
        save_file(
            {name: t.contiguous() for name, t in tensors.items()},
            path,
            metadata={"n": str(self.n), "error": str(self.error), "kind": type(self).__name__},
        )
        return path

    @classmethod
    def load(cls, path: str | Path) -> MeanDecomposition:
        """What :meth:`save` wrote.

        Raises:
            DataError: not a file of it.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("kind") != cls.__name__:
                raise DataError(f"{path} holds {about.get('kind', 'something else')}, not a {cls.__name__}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        shares = {n.removeprefix("shares."): t for n, t in tensors.items() if n.startswith("shares.")}
        own = {f.name: tensors.get(f.name) for f in fields(cls) if f.name not in ("n", "shares", "error")}
        return cls(n=int(about["n"]), error=float(about["error"]), shares=shares, **own)  # type: ignore[arg-type]


def decompositions(
    model: HookedCLIP,
    inputs: Tensor | Inputs,
    *,
    tower: str = "image",
    tokens: bool = False,
    against: Float[Tensor, "m e"] | None = None,
    normalize: bool = False,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
) -> Iterator[Decomposition]:
    """One :class:`~mmhooks.analysis.decompose.Decomposition` a batch of ``inputs``, in order; nothing is kept.

    Args:
        inputs: pixels or tokens as one tensor, an iterable of batches of them (any size), or pairs.
        tower: "image" or "text".
        workers: processes that decode the pictures of pairs.
        tokens, against, normalize: of :func:`~mmhooks.analysis.decompose.decompose`.

    >>> for parts in decompositions(model, mm.data.pairs("mini")):          # doctest: +SKIP
    ...     moments.add(parts.heads)                                         # [b layers heads d]
    """
    total = len(inputs) if isinstance(inputs, (Tensor, Pairs)) else None
    with rate_bar("decomposing", total, unit=f"{tower}s", show=progress) as advance:
        for batch in batches(model, inputs, tower, batch_size, workers):
            found = decompose_batch(model, batch, tower=tower, tokens=tokens, against=against)
            advance(len(batch))
            yield found.normalized() if normalize else found


def mean_decomposition(
    model: HookedCLIP,
    inputs: Tensor | Inputs,
    *,
    tower: str = "image",
    normalize: bool = False,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
) -> MeanDecomposition:
    """Running means over a data set; what ``mm.decompose`` gives for one. Memory does not depend on its length.

    Raises:
        DataError: no input at all.
    """
    n, worst = 0, 0.0
    sums: dict[str, Tensor] = {}
    for parts in decompositions(
        model,
        inputs,
        tower=tower,
        normalize=normalize,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    ):
        n, worst = n + len(parts.embedding), max(worst, float(parts.error.max()))
        here = {name: getattr(parts, name) for name in ("embedding", "initial", "heads", "mlps", "pool")}
        here |= {f"shares.{name}": value for name, value in parts.shares().items()}
        for name, value in here.items():
            if value is not None:
                part = value.double().sum(0)
                sums[name] = part if name not in sums else sums[name] + part
    if not n:
        raise DataError("nothing to decompose: the data set has no images or texts")
    means = {name: (value / n).float() for name, value in sums.items()}
    shares = {name.removeprefix("shares."): v for name, v in means.items() if name.startswith("shares.")}
    own = {name: means.get(name) for name in ("embedding", "initial", "heads", "mlps", "pool")}
    return MeanDecomposition(n=n, shares=shares, error=worst, **own)  # type: ignore[arg-type]


def head_outputs(
    model: HookedCLIP,
    inputs: Tensor | Inputs,
    *,
    layers: Any = None,
    tower: str = "image",
    normalize: bool = False,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
) -> Float[Tensor, "n l h e"]:
    """Direct contributions of the attention heads of ``layers`` (whole numbers, negative ones from the end, or a bool
    mask; all by default), every
    input a row. For data that does not fit in memory take :func:`decompositions`.

    Raises:
        ShapeMismatch: a layer that the tower does not have. DataError: no input.

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
            raise ShapeMismatch(f"{what}: none was chosen")
        rows.append(parts.heads[:, chosen].cpu())
    if not rows:
        raise DataError("nothing to decompose: the data set has no images or texts")
    return torch.cat(rows)


def batches(
    model: HookedCLIP, inputs: Tensor | Inputs, tower: str, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """Pixels or tokens of ``inputs``, batch by batch.

    Raises:
        ShapeMismatch: an iterable of something else than tensors. MMHooksError: pairs, and no preprocess or tokenizer.
    """
    if isinstance(inputs, Tensor):
        yield from inputs.split(batch_size)
        return
    if not isinstance(inputs, (Pairs, PairStream)):
        for batch in inputs:
            if not isinstance(batch, Tensor):
                raise ShapeMismatch(
                    f"an iterable of batches gives tensors [b 3 h w] (or tokens [b l]), came {type(batch).__name__}"
                )
            yield from batch.split(batch_size)
        return
    needed = model.preprocess if tower == "image" else model.tokenizer
    if needed is None:
        what = "preprocess" if tower == "image" else "tokenizer"
        raise MMHooksError(f"pairs need the model's {what}: give it to mm.HookedCLIP(..., {what}=...)")
    decoder = Decoder(
        inputs, model.preprocess if tower == "image" else None, model.tokenizer if tower == "text" else None
    )
    for batch in loader(
        decoder, works(inputs, batch_size=batch_size, shard_rows=2**40), workers=workers, pin=False
    ):
        found = batch.images if tower == "image" else batch.texts
        if found is not None:
            yield found
