"""The cache of activations by site name, recorded after all edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite
from mmhooks.hooks.kinds import Positions, check_kind, is_kind, tokens_of_kind, whole_length
from mmhooks.hooks.program import Hook
from mmhooks.hooks.selection import Tokens, chosen_tokens, token_mask
from mmhooks.hooks.sites import Pattern, match

if TYPE_CHECKING:
    from mmhooks.hooks.program import Binding


def recomputes() -> bool:
    """Whether activation checkpointing is recomputing a block in a backward pass: its values are cached already."""
    return torch._C._current_graph_task_id() != -1


class ActivationCache(Mapping[str, Tensor]):
    """What ``run_with_cache`` returns: a read-only mapping from site name to tensor.

    Holds the requested tensors and no reference to the model. A site that runs several times keeps its last value.

    Args:
        device, dtype: where to keep the tensors, and the type of floating-point ones; unchanged by default.
        detach: cut the graph. ``False`` keeps it, and :meth:`grad` returns the gradient after a backward pass.
        tokens: keep only these positions, or this kind of tokens, at sites with tokens.
        copy: keep copies, for models that modify their activations in place.
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
        self._full_shapes: dict[str, tuple[int, ...]] = {}  # before tokens= selected positions
        self.repeated: dict[str, None] = {}  # sites that ran more than once: the cache holds their last value
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

    def recorder(self, hook: Hook, binding: Binding) -> Callable[[Tensor], Tensor]:
        """Returns the function that stores a value of a site, marks ``binding`` as fired and returns the value.

        A cache that stores values unchanged gets a minimal function, since it runs at every capture.
        """
        name = hook.name
        runs = 0  # 0, 1, or 2 for more; per recorder: two patterns that match one site have two recorders
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
                self.store(hook, value)
                return value

            self.let_choose(process, hook)
            return process
        values = self._values

        def keep(value: Tensor) -> Tensor:
            nonlocal runs
            binding.fired = True
            if runs < 2:  # inlined, and only this comparison from the third run on
                if runs == 0:
                    runs = 1
                elif not recomputes():
                    runs = 2
                    repeated[name] = None
            values[name] = value.detach()
            return value

        return keep

    def store(self, hook: Hook, value: Tensor, rows: slice | None = None) -> bool:
        """Stores ``value``, or some of its rows, under the site's name, and later its gradient if there is one.

        Returns:
            False if it holds no token of the kind that ``tokens=`` names, so that nothing was stored.

        Raises:
            ShapeMismatch: a token mask that differs between rows, or rows with different numbers of a kind of tokens.
        """
        name, axis = hook.name, hook.tokens
        value = value.detach() if self._detach else value
        chosen = None
        if axis is None and hook.kinds is not None and is_kind(self._tokens):  # a feature map: all patches
            check_kind(hook.kinds, self._tokens, name)
        if self._tokens is not None and axis is not None and value.dim() >= axis + 2:
            length = whole_length()
            if length is None:
                length, chosen = value.shape[axis], self.positions(value, hook)
            if chosen is not None and not chosen.numel():
                return False
            shape = (value if rows is None else value[rows]).shape
            self._full_shapes[name] = (*shape[:axis], length, *shape[axis + 1 :])

        def keep(whole: Tensor) -> Tensor:
            kept = whole if rows is None else whole[rows]
            kept = kept if chosen is None else _selected(kept, axis, chosen)  # type: ignore[arg-type]
            return kept.to(
                device=self._device or kept.device, dtype=self._dtype if kept.is_floating_point() else None
            )

        self._gradients.pop(name, None)  # of an earlier run
        if value.requires_grad:
            self._gradients[name] = _Gradient(value, keep)
        kept = keep(value)
        if kept is value and value.requires_grad:
            value.retain_grad()  # so that cache[name].grad works as for any tensor
        shared = kept is value or (rows is not None and chosen is None)  # a slice of rows is a view
        self._values[name] = kept.clone() if self._copy and shared else kept
        return True

    def let_choose(self, record: Any, hook: Hook) -> None:
        """Tells a place that can compute some tokens alone which ones ``record`` keeps: ``record.rows(value)``."""
        if self._tokens is not None and hook.tokens is not None:
            record.rows = lambda value: self.positions(value, hook)

    def positions(self, value: Tensor, hook: Hook) -> Positions:
        """The tokens of ``value`` that ``tokens=`` names, none if it holds none of their kind.

        Raises:
            ShapeMismatch: as :meth:`store`.
        """
        name, axis = hook.name, hook.tokens
        assert self._tokens is not None and axis is not None
        if is_kind(self._tokens):
            found = tokens_of_kind(self._tokens, value.shape[axis], value.device, name, hook.kinds)
            return found.positions(name) if found.any else torch.zeros(0, dtype=torch.long)
        mask = token_mask(self._tokens, value, axis, name)
        if mask.shape[0] > 1:
            raise ShapeMismatch(
                f"{name!r}: a cache keeps the same tokens of every row: expected a mask [L], got one [batch, L]"
            )
        return mask.flatten().nonzero().flatten()

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
        """Shapes at the sites, counting all tokens."""
        return {name: self._full_shapes.get(name, tuple(value.shape)) for name, value in self._values.items()}

    def select(self, pattern: Pattern) -> ActivationCache:
        """A cache of the sites that a glob or predicate selects, without copying."""
        names = match(pattern, self._values)
        if not names:
            raise UnknownSite(str(pattern), self._values, where="this cache")
        return self._with({name: self._values[name] for name in names})

    def half(self, index: int) -> ActivationCache:
        """The first or second half of the rows, without copying: in a guided run, one of its two prompts."""
        new = self._with({name: value.chunk(2)[index] for name, value in self._values.items()})
        new._gradients = {name: gradient.half(index) for name, gradient in new._gradients.items()}
        return new

    def take_gradients(self, other: ActivationCache) -> None:
        """Takes over the gradients of the values that this cache shares with another one."""
        for name, gradient in other._gradients.items():
            if self._values.get(name) is other._values[name]:
                self._gradients[name] = gradient

    def stack(self, pattern: Pattern) -> Float[Tensor, "sites ..."]:
        """Stacks tensors of equal shape: ``cache.stack("image.blocks.*.resid_post")``."""
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
        """A cache of the same tensors on another device or in another dtype; the model stays where it is."""
        return self._with(
            {
                name: t.to(device=device or t.device, dtype=dtype if t.is_floating_point() else None)
                for name, t in self._values.items()
            }
        )

    def grad(self, name: str) -> Tensor:
        """The gradient at a site after ``backward()``, with the value's tokens, device and dtype; several passes add up.

        Raises:
            UnknownSite: a site that was not cached.
            MMHooksError: a cache made with ``detach=True``, a value without a graph, or no gradient yet.

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
                f"no gradient at {name!r}: this cache detached its values from the graph; make it with detach=False"
            )
        if gradient is None:
            raise MMHooksError(
                f"no gradient at {name!r}: its value had no graph when it was cached (no_grad, inference mode, a "
                "checkpointed block, or nothing before it requires grad); run it in grad mode, with "
                "inputs.requires_grad_() if the weights are frozen"
            )
        if gradient.total is None:
            raise MMHooksError(
                f"no gradient has reached {name!r}: call backward() on something that depends on it; a later edit or "
                "function that replaces its value cuts it off"
            )
        return gradient.total.to(value.device, value.dtype)

    def to_transformer_lens(self, model: Any = None) -> Any:
        """The same tensors as a ``transformer_lens.ActivationCache``; ``model`` is the model it refers to."""
        from transformer_lens import ActivationCache as TheirCache

        return TheirCache(dict(self._values), model)

    def _with(self, values: dict[str, Tensor]) -> ActivationCache:
        new = ActivationCache(detach=self._detach)
        new._values = values
        new._gradients = {name: self._gradients[name] for name in values if name in self._gradients}
        return new


def _selected(value: Tensor, axis: int, chosen: Int[Tensor, "*b m"]) -> Tensor:
    """The chosen tokens of a value: the same ones of every row, or some of each."""
    if chosen.dim() == 1:
        return value.index_select(axis, chosen)
    rows = zip(value, chosen, strict=True)
    return torch.stack([row.index_select(axis - 1, positions) for row, positions in rows])


class _HalfGradient:
    """The gradient of one half of the rows."""

    def __init__(self, whole: _Gradient, index: int) -> None:
        self._whole, self._index = whole, index

    @property
    def total(self) -> Tensor | None:
        return None if self._whole.total is None else self._whole.total.chunk(2)[self._index]


class _Gradient:
    """Collects the gradient of one value over backward passes. It hooks the value that flows on, since the copy that a
    cache may keep (some tokens, another dtype) is not on the graph's path, and before anything writes into the value."""

    def __init__(self, value: Tensor, keep: Callable[[Tensor], Tensor]) -> None:
        self.total: Tensor | None = None
        self._keep = keep
        value.register_hook(self._add)

    def half(self, index: int) -> _HalfGradient:
        return _HalfGradient(self, index)

    def _add(self, grad: Tensor) -> None:
        kept = self._keep(grad.detach())
        # Autograd may pass the same tensor to other branches.
        self.total = kept.clone() if self.total is None else self.total + kept
