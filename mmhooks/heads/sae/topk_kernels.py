"""Sparse TopK encoding and decoding: the cost per vector scales with K instead of n, except for the encoder's product.

With ``S`` the sparse ``[b, n]`` matrix of selected values, a training step needs ``S W`` (decode),
``S^T G`` (gradients of both weight matrices) and ``G W^T`` at the entries of S (gradient of the values). Dense,
each is a product of 2 b n d operations; here each is 2 b K d. ``docs/training.md`` has the measurements.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

F_ = TypeVar("F_", bound=Callable[..., Any])

CROSSOVER = 8
"""Sparse products win where ``n_features >= CROSSOVER * k``: measured from 4 on (AMD) and from 8 on (Intel)."""

BLOCK_NUMEL = 1 << 21
"""Number of pre-activations computed at a time on a CPU: 8 MiB."""

# torch warns once per process; the tests compare every product with the dense one.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def sparse_is_faster(k: int, n_features: int, device: torch.device) -> bool:
    """Whether the sparse step is faster on this device. On a GPU dense products are, at the widths of CLIP."""
    return device.type == "cpu" and n_features >= CROSSOVER * k


def affine(
    x: Float[Tensor, "b d"], w: Float[Tensor, "n d"], bias: Float[Tensor, " n"]
) -> Float[Tensor, "b n"]:
    """``x w^T + bias``; on a CPU computed by oneDNN, which is never much slower than torch's default, and twice as fast
    if that is MKL on a non-Intel processor (where MKL does not use AVX-512)."""
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and _in_onednn(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return torch.addmm(bias, x, w.T)


def _in_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN supports ``dtype`` on this processor: bfloat16 needs instructions that older ones lack."""
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def fast_topk(
    pre: Float[Tensor, "b n"], k: int, *, chunk: int = 8
) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """``pre.topk(k, sorted=False)``, about 1.6 times as fast on a CPU.

    Columns are grouped by ``chunk``: the k largest entries lie in the k groups with the largest maxima, so
    two small selections (over ``n / chunk`` maxima, over ``k * chunk`` candidates) replace the one over n.

    >>> x = torch.randn(3, 64)
    >>> values, indices = fast_topk(x, 4)
    >>> torch.equal(values.sort().values, x.topk(4).values.sort().values), torch.equal(x.gather(1, indices), values)
    (True, True)
    """
    b, n = pre.shape
    groups = n // chunk
    if pre.device.type != "cpu" or n % chunk or groups < 2 * k:
        values, indices = pre.topk(k, dim=-1, sorted=False)
        return values, indices
    grouped = pre.view(b, chunk, groups)  # group g holds the columns g, g + groups, g + 2 groups, ...
    best = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, best[:, None, :].expand(b, chunk, k)).reshape(b, chunk * k)
    values, place = candidates.topk(k, dim=1, sorted=False)
    return values, place.div(k, rounding_mode="floor") * groups + best.gather(1, place % k)


def _uncompiled(f: F_) -> F_:
    """Excludes ``f`` from torch.compile's graphs, and preserves its type."""
    return torch.compiler.disable(f)  # type: ignore[return-value]


class Selection:
    """Which ``k`` of ``n`` columns each row selects, and products with the sparse matrix ``S`` of their values."""

    def __init__(self, n: int, indices: Int[Tensor, "b k"]) -> None:
        self.n, self.indices = n, indices

    @cached_property
    def by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries sorted by column: their order, the row of each, and the offset of each column."""
        flat = self.indices.reshape(-1)
        order = flat.to(torch.int32).argsort(stable=True)  # 32 bits sort twice as fast
        counts = torch.bincount(flat, minlength=self.n)
        return order, order.div(self.indices.shape[1], rounding_mode="floor"), counts.cumsum(0) - counts

    def times(self, values: Float[Tensor, "b k"], w: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """``S w``."""
        return F.embedding_bag(self.indices, w.detach(), per_sample_weights=values.detach(), mode="sum")

    def transposed_times(self, values: Float[Tensor, "b k"], g: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
        """``S^T g``."""
        order, rows, offsets = self.by_column
        weights = values.detach().reshape(-1)[order]
        return F.embedding_bag(rows, g.detach(), offsets=offsets, per_sample_weights=weights, mode="sum")

    def sample(self, g: Float[Tensor, "b d"], w: Float[Tensor, "n d"]) -> Float[Tensor, "b k"]:
        """``g w^T`` at the selected entries only."""
        if not torch.backends.mkl.is_available():
            return (g @ w.T).gather(1, self.indices)
        b, k = self.indices.shape
        starts = torch.arange(0, b * k + 1, k, device=g.device)
        zeros = torch.zeros(b * k, dtype=g.dtype, device=g.device)
        empty = torch.sparse_csr_tensor(
            starts, self.indices.reshape(-1), zeros, (b, self.n), check_invariants=False
        )
        return torch.sparse.sampled_addmm(empty, g, w.T, beta=0.0).values().reshape(b, k)


@_uncompiled
def encode(
    x: Float[Tensor, "b d"], w: Float[Tensor, "n d"], bias: Float[Tensor, " n"], k: int
) -> tuple[Float[Tensor, "b k"], Selection]:
    """The ``k`` largest entries of each row of ``x w^T + bias``, clipped at zero, and which columns they are in.

    Under autocast entries are selected in half precision; the values of the selected ones are exact.
    """
    box: list[Selection] = []
    half = torch.is_autocast_enabled(x.device.type)
    values = _Encode.apply(x, w, bias, k, box, torch.get_autocast_dtype(x.device.type) if half else None)
    assert isinstance(values, Tensor)
    return values, box[0]


@_uncompiled
def decode(
    values: Float[Tensor, "b k"], selection: Selection, w: Float[Tensor, "n d"]
) -> Float[Tensor, "b d"]:
    """``S w``, differentiable with respect to both factors."""
    out = _Decode.apply(values, w, selection)
    assert isinstance(out, Tensor)
    return out


class _Encode(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor, k: int, box: list[Selection], half: torch.dtype | None
    ) -> Tensor:
        # A few rows at a time: selection runs while their pre-activations are in cache, and the full table is
        # never allocated.
        step = max(1, BLOCK_NUMEL // len(w)) if x.device.type == "cpu" else len(x)
        x_, w_, bias_ = (x, w, bias) if half is None else (x.to(half), w.to(half), bias.to(half))
        parts = [fast_topk(affine(rows, w_, bias_), k) for rows in x_.split(step)]
        values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        box.append(Selection(len(w), indices))
        if half is not None:
            values = box[0].sample(x, w) + bias[indices]
        values = values.relu_()
        ctx.selection = box[0]  # shared with the decoder, so that the entries are sorted once per step
        ctx.save_for_backward(x, w, values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, values = ctx.saved_tensors
        selection: Selection = ctx.selection
        grad = grad * (values > 0)
        dx = selection.times(grad, w) if ctx.needs_input_grad[0] else None
        dw = selection.transposed_times(grad, x) if ctx.needs_input_grad[1] else None
        db = grad.new_zeros(len(w)).index_add_(0, selection.indices.reshape(-1), grad.reshape(-1))
        return dx, dw, db, None, None, None


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, w: Tensor, selection: Selection) -> Tensor:
        ctx.selection = selection
        ctx.save_for_backward(values, w)
        return selection.times(values, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, w = ctx.saved_tensors
        selection: Selection = ctx.selection
        grad = grad.contiguous()
        dvalues = selection.sample(grad, w) if ctx.needs_input_grad[0] else None
        dw = selection.transposed_times(values, grad) if ctx.needs_input_grad[1] else None
        return dvalues, dw, None
