"""Activations by site name, as they flowed on: after all edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite
from mmhooks.hooks.selection import Tokens, chosen_tokens, token_mask
from mmhooks.hooks.sites import Pattern, match

if TYPE_CHECKING:
    from mmhooks.hooks.program import Binding


def recomputes() -> bool:
    """Whether a checkpoint runs a block again in a backward pass: what flows there is kept already."""
    return torch._C._current_graph_task_id() != -1


class ActivationCache(Mapping[str, Tensor]):
    """What ``run_with_cache`` returns: a read-only mapping from site name to tensor.

    Holds what was asked and never the model. A site that runs several times keeps its last value.

    Args:
        device, dtype: where and as what to keep the tensors (floating-point ones); default as they came.
        detach: cut the graph. ``False`` keeps it, and :meth:`grad` gives what a backward pass brings.
        tokens: keep only these positions, where a site has tokens.
        copy: keep copies, for models that write into their activations.
    """

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        tokens: Tokens = None,
        copy: bool = False,
    ) -> None:
        self._values: dict[str, Tensor] = {}
        self._gradients: dict[str, Any] = {}  # of values with a graph
        self._whole: dict[str, tuple[int, ...]] = {}  # shapes before tokens= cut them
        self.repeated: dict[str, None] = {}  # sites that ran again: the cache holds their last value
        self._device, self._dtype, self._detach, self._copy = device, dtype, detach, copy
        self._tokens = chosen_tokens(tokens)

    @property
    def _plain(self) -> bool:
        return (
            self._device is None
            and self._dtype is None
            and self._tokens is None
            and self._detach
            and not self._copy
        )

    # -- filling ---------------------------------------------------------------------------------------

    def recorder(self, name: str, binding: Binding, axis: int | None = 1) -> Callable[[Tensor], Tensor]:
        """The function that keeps a value under ``name``, marks ``binding`` as fired and gives the value back.

        ``axis`` is the site's dimension of tokens, None where it has none.

        A cache that keeps values as they come gets one flat function: every capture pays for its length.
        """
        runs = 0  # 0, 1, or 2 for more; of this recorder: two patterns that name one site are two
        repeated = self.repeated
        if not self._plain:

            def process(value: Tensor) -> Tensor:
                nonlocal runs
                binding.fired = True
                if runs == 0:
                    runs = 1
                elif runs == 1 and not recomputes():
                    runs = 2
                    repeated[name] = None
                self.store(name, value, axis)
                return value

            return process
        values = self._values

        def keep(value: Tensor) -> Tensor:
            nonlocal runs
            binding.fired = True
            if runs < 2:  # flat, and nothing but this comparison from the third run on
                if runs == 0:
                    runs = 1
                elif not recomputes():
                    runs = 2
                    repeated[name] = None
            values[name] = value.detach()
            return value

        return keep

    def store(self, name: str, value: Tensor, axis: int | None, rows: slice | None = None) -> None:
        """Keeps ``value``, or some of its rows, under ``name``; and its gradient, when one comes.

        Raises:
            ShapeMismatch: a mask of tokens that differs from row to row.
        """
        value = value.detach() if self._detach else value
        chosen = None
        if self._tokens is not None and axis is not None and value.dim() >= axis + 2:
            mask = token_mask(self._tokens, value, axis, name)
            if mask.shape[0] > 1:
                raise ShapeMismatch(
                    "a cache keeps the same tokens of every row; use one mask [L], not [batch, L]"
                )
            chosen = mask.flatten().nonzero().flatten()
            self._whole[name] = tuple(value.shape if rows is None else value[rows].shape)

        def keep(whole: Tensor) -> Tensor:
            kept = whole if rows is None else whole[rows]
            kept = kept if chosen is None else kept.index_select(axis, chosen)  # type: ignore[arg-type]
            return kept.to(
                device=self._device or kept.device, dtype=self._dtype if kept.is_floating_point() else None
            )

        self._gradients.pop(name, None)  # of an earlier run
        if value.requires_grad:
            self._gradients[name] = _Gradient(value, keep)
        kept = keep(value)
        if kept is value and value.requires_grad:
            value.retain_grad()  # cache[name].grad, as of any tensor
        shared = kept is value or (rows is not None and chosen is None)  # some rows are a view
        self._values[name] = kept.clone() if self._copy and shared else kept

    # -- reading ---------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            raise UnknownSite(name, self._values, where="this cache")
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        size = sum(t.numel() * t.element_size() for t in self._values.values())
        return f"ActivationCache({len(self)} sites, {size / 2**20:.1f} MiB: {', '.join(self._values)})"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes at the sites, with all of their tokens."""
        return {name: self._whole.get(name, tuple(value.shape)) for name, value in self._values.items()}

    def select(self, pattern: Pattern) -> ActivationCache:
        """The sites that a glob or predicate selects, without copying."""
        names = match(pattern, self._values)
        if not names:
            raise UnknownSite(str(pattern), self._values, where="this cache")
        return self._with({name: self._values[name] for name in names})

    def half(self, index: int) -> ActivationCache:
        """The first or second half of the rows, without copying: of a guided run, one of its prompts."""
        new = self._with({name: value.chunk(2)[index] for name, value in self._values.items()})
        new._gradients = {name: gradient.half(index) for name, gradient in new._gradients.items()}
        return new

    def take_gradients(self, other: ActivationCache) -> None:
        """The gradients of values that this cache has from another one."""
        for name, gradient in other._gradients.items():
            if self._values.get(name) is other._values[name]:
                self._gradients[name] = gradient

    def stack(self, pattern: Pattern) -> Float[Tensor, "sites ..."]:
        """Tensors of one shape, stacked: ``cache.stack("image.blocks.*.resid_post")``."""
        chosen = self.select(pattern)
        shapes = {tuple(t.shape) for t in chosen.values()}
        if len(shapes) > 1:
            raise ShapeMismatch(
                f"cannot stack {', '.join(chosen)}: shapes {', '.join(map(str, sorted(shapes)))} differ"
            )
        return torch.stack(list(chosen.values()))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ActivationCache:
        """A cache of the same tensors elsewhere, or in another precision; the model does not move."""
        return self._with(
            {
                name: t.to(device=device or t.device, dtype=dtype if t.is_floating_point() else None)
                for name, t in self._values.items()
            }
        )

    def grad(self, name: str) -> Tensor:
        """The gradient at a site after ``backward()``, cut and moved as the value is; several passes add up.

        Raises:
            UnknownSite: a site that was not kept.
            MMHooksError: a cache made with ``detach=True``, a value without a graph, or no gradient so far.

        >>> import mmhooks as mm, torch
        >>> model = mm.load("mini")
        >>> with model.caching("image.embed", detach=False) as cache:
        ...     model.encode_image(torch.zeros(1, 3, 64, 64)).sum().backward()
        >>> cache.grad("image.embed").unique()
        tensor([1.])
        """
        value, gradient = self[name], self._gradients.get(name)
        if self._detach:
            raise MMHooksError(
                f"no gradient at {name!r}: this cache cut its values off from the graph; make it with detach=False"
            )
        if gradient is None:
            raise MMHooksError(
                f"no gradient at {name!r}: its value had no graph when it was kept, under no_grad, in inference mode, in "
                "a checkpointed block, or because nothing in front of it requires grad; run it in grad mode, with "
                "inputs.requires_grad_() if the weights are frozen"
            )
        if gradient.total is None:
            raise MMHooksError(
                f"no gradient has reached {name!r}: call backward() on something that depends on it; an edit or a "
                "function behind it that puts other values in its place cuts it off"
            )
        return gradient.total.to(value.device, value.dtype)

    def to_transformer_lens(self, model: Any = None) -> Any:
        """The same tensors as ``transformer_lens.ActivationCache`` (``model``: what it shall refer to)."""
        from transformer_lens import ActivationCache as TheirCache

        return TheirCache(dict(self._values), model)

    def _with(self, values: dict[str, Tensor]) -> ActivationCache:
        new = ActivationCache(detach=self._detach)
        new._values = values
        new._gradients = {name: self._gradients[name] for name in values if name in self._gradients}
        return new


class _HalfGradient:
    """The gradient of half of the rows."""

    def __init__(self, whole: _Gradient, index: int) -> None:
        self._whole, self._index = whole, index

    @property
    def total(self) -> Tensor | None:
        return None if self._whole.total is None else self._whole.total.chunk(2)[self._index]


class _Gradient:
    """What backward passes bring to one value. The value flows on as it is: the copy that a cache may keep of it (some
    of its tokens, another type) lies beside the graph's path, and what writes into the value comes after this."""

    def __init__(self, value: Tensor, keep: Callable[[Tensor], Tensor]) -> None:
        self.total: Tensor | None = None
        self._keep = keep
        value.register_hook(self._add)

    def half(self, index: int) -> _HalfGradient:
        return _HalfGradient(self, index)

    def _add(self, grad: Tensor) -> None:
        kept = self._keep(grad.detach())
        # Autograd may hand the same tensor to other branches.
        self.total = kept.clone() if self.total is None else self.total + kept
