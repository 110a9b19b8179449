"""Edits of a head's features, or of the coordinates of any site.

An edit is an immutable value: create it once, use it in any number of contexts, or call it directly on a tensor.
With ``features=None`` it acts on all features; ``at=`` selects the sites (default: the attached heads that the features
belong to); ``tokens=`` restricts it to positions or a kind of tokens, ``steps=`` to steps of a diffusion run or a generation,
``guidance=`` to one half. At sites with attention heads (``z``, ``pattern``, ...) the features are the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.dispatch import outside_inference_mode
from mmhooks.hooks.kinds import is_kind
from mmhooks.hooks.program import Hook
from mmhooks.hooks.selection import (
    ChosenTokens,
    FeatureChoice,
    Features,
    Tokens,
    as_values,
    check_values,
    chosen_features,
    chosen_tokens,
    none_of_kind,
    outside_inference,
    reference,
    token_mask,
)
from mmhooks.hooks.steps import HALVES, Guidance, chosen_steps, current_moment, halves, inactive, moment

At = str | Callable[[str], bool] | Sequence[str] | None
_BY_HAND = Hook("tensor")
Values = Any  # a number, a tensor, an array or list of numbers, or a cache
_VALUES = ("mean", "toward", "direction", "strength", "min", "max", "value", "source")


@dataclass(frozen=True, eq=False)
class Edit:
    """Base class of edits; subclasses compute the new values of the selected features in :meth:`change`."""

    features: Features = None
    _: KW_ONLY
    at: At = None
    tokens: Tokens = None
    steps: Any = None
    guidance: Guidance = "both"

    def __post_init__(self) -> None:
        _ = self.choice  # a bad index or mask raises here, not inside a forward
        if self.guidance not in ("cond", "uncond", "both"):
            raise MMHooksError(f'guidance: expected "cond", "uncond" or "both", got {self.guidance!r}')
        object.__setattr__(self, "steps", chosen_steps(self.steps))
        for name in _VALUES:
            if hasattr(self, name):
                what = f"{name}= of {self.label}"
                object.__setattr__(self, name, as_values(getattr(self, name), what))
                if name != "source":  # values of another run are taken as they are, even if not finite
                    check_values(getattr(self, name), what, bounds=name in ("min", "max"))

    @cached_property
    def choice(self) -> FeatureChoice:
        """The selected features, and their total number if known."""
        with outside_inference_mode():  # an edit created in inference mode may be used in grad mode
            choice = chosen_features(self.features)
            return choice if choice.index is None else choice._replace(index=outside_inference(choice.index))

    @cached_property
    def chosen_tokens(self) -> ChosenTokens | None:
        """The selected tokens; read once, at the latest when a context opens."""
        with outside_inference_mode():
            tokens = chosen_tokens(self.tokens)
            return outside_inference(tokens) if isinstance(tokens, Tensor) else tokens

    @property
    def index(self) -> Int[Tensor, " m"] | None:
        """The features, sorted and distinct; None means all of them."""
        return self.choice.index

    @property
    def keeps_zero(self) -> bool:
        """Whether a value of 0 stays 0 for every feature."""
        return False

    def change(self, value: Float[Tensor, "..."], index: Tensor | None, hook: Hook) -> Float[Tensor, "..."]:
        """New values of the selected features (last dimension; ``index`` gives their numbers)."""
        raise NotImplementedError

    never_writes = True  # tells the caller that a call leaves its input unchanged

    def _changed(self, value: Tensor, index: Tensor | None, hook: Hook) -> Tensor:
        """:meth:`change`, on a copy for user subclasses, which may write into their input."""
        ours = type(self).change.__module__ == __name__
        return self.change(value if ours else value.clone(), index, hook)

    def __call__(self, value: Float[Tensor, "..."], *, hook: Hook = _BY_HAND) -> Float[Tensor, "..."]:
        """The edited tensor; also for direct use: ``Zero(imgd)(head.encode(x))``."""
        return self._by_half(value, hook, lambda part, rows: self._everywhere(part, hook))

    def _everywhere(self, value: Float[Tensor, "..."], hook: Hook) -> Float[Tensor, "..."]:
        axis = hook.axis
        moved = value if axis == -1 else value.movedim(axis, -1)
        if (index := self.index) is None:
            new = self._changed(moved, None, hook)
        else:
            self.check_width(moved.shape[-1], value, hook)
            index = index.to(value.device)
            part = self._changed(moved.index_select(-1, index), index, hook)
            new = moved.index_copy(-1, index, part.to(moved.dtype))
        return self._at_tokens(new if axis == -1 else new.movedim(-1, axis), value, hook)

    # -- for the splice: only some columns, or only the active features --------------------------------

    def on_columns(self, value: Float[Tensor, "*b u"], columns: Int[Tensor, " u"], hook: Hook) -> Tensor:
        """The same edit applied to a table of some features: ``columns``, sorted, a superset of the edit's."""
        return self._by_half(value, hook, lambda part, rows: self._some_columns(part, columns, hook))

    def _some_columns(self, value: Tensor, columns: Tensor, hook: Hook) -> Tensor:
        assert self.index is not None
        index = self.index.to(value.device)
        if len(index) == len(columns):
            new = self._changed(value, index, hook)
        else:
            here = torch.searchsorted(columns, index)
            part = self._changed(value.index_select(-1, here), index, hook)
            new = value.index_copy(-1, here, part.to(value.dtype))
        return self._at_tokens(new, value, hook)

    def on_active(
        self, value: Float[Tensor, "*b k"], indices: Int[Tensor, "*b k"], n: int, hook: Hook
    ) -> Tensor:
        """The same edit applied to active features only, given with their indices; needs :attr:`keeps_zero`."""
        assert self.index is not None
        member = torch.zeros(n, dtype=torch.bool, device=value.device)
        member[self.index.to(value.device)] = True

        def act(part: Tensor, rows: slice) -> Tensor:
            new = torch.where(member[indices[rows]], self._changed(part, None, hook), part)
            return self._at_tokens(new, part, hook)

        return self._by_half(value, hook, act)

    # -- steps, kinds of tokens, halves of a diffusion run ---------------------------------------------

    @property
    def limited(self) -> bool:
        """Whether the edit is restricted to some steps, to one half of the rows, or to a kind of tokens."""
        return self.steps is not None or self.guidance != "both" or is_kind(self.tokens)

    def inactive(self, value: Tensor, hook: Hook) -> bool:
        """Whether the edit does not apply at the current step, to the current rows, or to any token of ``value``."""
        away = inactive(self.steps, self.guidance, hook.name)
        return away or none_of_kind(self.chosen_tokens, value, hook.tokens, hook.name, hook.kinds)

    def _by_half(self, value: Tensor, hook: Hook, act: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Applies ``act`` to each half of a guided batch separately, as if it were the whole batch."""
        if self.limited and self.inactive(value, hook):
            return value
        parts = halves(len(value), hook.name) if current_moment().half == "both" else None
        if parts is None:
            return act(value, slice(None))
        new = []
        for half, rows in parts:
            part = value[rows]
            if self.guidance in ("both", half):
                with moment(current_moment().step, half):
                    part = act(part, rows)
            new.append(part)
        return torch.cat(new)

    def _at_tokens(self, new: Tensor, old: Tensor, hook: Hook) -> Tensor:
        if self.chosen_tokens is None:
            return new
        return torch.where(token_mask(self.chosen_tokens, old, hook.tokens, hook.name, hook.kinds), new, old)

    def check_width(self, width: int, value: Tensor, hook: Hook) -> None:
        """Raises ShapeMismatch unless the selection fits a site of ``width`` features."""
        choice = self.choice
        if choice.width in (None, width) and choice.last < width and choice.numbers != width:
            return
        shape = f" (shape {tuple(value.shape)})" if value.numel() else ""
        choice.check(width, f"{self.label} at {hook.name!r}", shape)

    @property
    def label(self) -> str:
        named = getattr(self.features, "name", "") or ("" if self.features is None else "...")
        return f"{type(self).__name__}({named})"

    def _reference(self, given: Any, value: Tensor, index: Tensor | None, hook: Hook) -> Tensor | float:
        where = f"{self.label} at {hook.name!r}"
        if isinstance(given, Mapping):
            if hook.name not in given:
                held = ", ".join(given) or "nothing"
                raise MMHooksError(f"{where}: expected a cache with this site, got {held}")
            at_step = getattr(given, "now", None)  # a cache of a diffusion run
            given = given[hook.name] if at_step is None else at_step(hook.name)
        if isinstance(given, Tensor) and given.is_inference() and not torch.is_inference_mode_enabled():
            given = given.clone()  # autograd cannot save inference tensors
        half = current_moment().half
        whole = isinstance(given, Tensor) and given.dim() == value.dim() and len(given) == 2 * len(value)
        if whole and half in HALVES:  # given for the whole batch of a guided run
            given = given.chunk(2)[HALVES.index(half)]
        return reference(given, value, index, self.choice.last, hook.axis, where)

    def _each(self, name: str, value: Tensor, index: Tensor | None, hook: Hook) -> Any:
        """The edit's parameter ``name``: a number, or a table with one entry per selected feature."""
        given = getattr(self, name)
        table = isinstance(given, Mapping) or (isinstance(given, Tensor) and given.dim() > 0)
        return self._reference(given, value, index, hook) if table else given


@dataclass(frozen=True, eq=False)
class Zero(Edit):
    """Sets features to zero: ``f' = 0``; what ``mask=`` does.

    >>> Zero([0, 2])(torch.ones(2, 4))
    tensor([[0., 1., 0., 1.],
            [0., 1., 0., 1.]])
    """

    @property
    def keeps_zero(self) -> bool:
        return True

    def change(self, value: Tensor, index: Tensor | None, hook: Hook) -> Tensor:
        return torch.zeros_like(value)


@dataclass(frozen=True, eq=False)
class Mean(Edit):
    """Mean ablation: ``f' = mean``, either given (a number, a tensor or a cache) or of the current batch.

    >>> Mean([1])(torch.tensor([[1., 2.], [3., 4.]]))
    tensor([[1., 3.],
            [3., 3.]])
    """

    mean: Values = field(default=None, kw_only=True)

    def change(self, value: Tensor, index: Tensor | None, hook: Hook) -> Tensor:
        if self.mean is None:
            return value.mean(dim=0, keepdim=True).expand_as(value)
        return _filled(self._reference(self.mean, value, index, hook), value)


@dataclass(frozen=True, eq=False)
class Resample(Edit):
    """Resample ablation: replaces features by those of other samples, from rows of ``source [n ...]`` drawn with
    ``seed``, or without it from another row of the batch (a random cycle, so no row keeps its own).

    >>> Resample()(torch.tensor([[1.], [2.]]))
    tensor([[2.],
            [1.]])
    """

    source: Values = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def change(self, value: Tensor, index: Tensor | None, hook: Hook) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        batch = len(value)
        if self.source is None:
            if batch < 2:
                raise ShapeMismatch(
                    f"{self.label} at {hook.name!r}: a batch of {batch} has no other row; pass source="
                )
            order = torch.randperm(batch, generator=generator)
            rows = torch.empty_like(order)
            rows[order] = order.roll(1)
            return value.index_select(0, rows.to(value.device))
        source = self.source[hook.name] if isinstance(self.source, Mapping) else self.source
        rows = torch.randint(len(source), (batch,), generator=generator)
        drawn = source.index_select(0, rows.to(source.device))
        return _filled(self._reference(drawn, value, index, hook), value)


@dataclass(frozen=True, eq=False)
class Interpolate(Edit):
    """``f' = (1 - strength) f + strength * toward`` (seed 001, Section 3.3; strength 0 changes nothing).

    >>> Interpolate(toward=torch.tensor([10., 0.]), strength=0.5)(torch.zeros(1, 2))
    tensor([[5., 0.]])
    """

    toward: Values = field(default=None, kw_only=True)
    strength: Values = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.toward is None:
            raise MMHooksError(
                "Interpolate needs toward=: a number, a tensor of the site's shape, or a cache"
            )

    def change(self, value: Tensor, index: Tensor | None, hook: Hook) -> Tensor:
        target = _filled(self._reference(self.toward, value, index, hook), value)
        return (value + self._each("strength", value, index, hook) * (target - value)).to(value.dtype)


@dataclass(frozen=True, eq=False)
class Steer(Edit):
    """Adds a direction: ``f' = f + strength * direction`` (1 by default).

    >>> Steer([1], strength=2.0)(torch.zeros(1, 3)), Steer(direction=torch.ones(3))(torch.zeros(1, 3))
    (tensor([[0., 2., 0.]]), tensor([[1., 1., 1.]]))
    """

    direction: Values = field(default=1.0, kw_only=True)
    strength: Values = field(default=1.0, kw_only=True)

    def change(self, value: Tensor, index: Tensor | None, hook: Hook) -> Tensor:
        strength = self._each("strength", value, index, hook)
        return (value + strength * self._reference(self.direction, value, index, hook)).to(value.dtype)


@dataclass(frozen=True, eq=False)
class Clamp(Edit):
    """Clamps features to ``[min, max]``, or sets them to ``value``.

    >>> Clamp([0], max=1.0)(torch.tensor([[3., 3.]])), Clamp([0], value=5.0)(torch.zeros(1, 2))
    (tensor([[1., 3.]]), tensor([[5., 0.]]))
    """

    min: Values = field(default=None, kw_only=True)
    max: Values = field(default=None, kw_only=True)
    value: Values = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.value is None) == (self.min is None and self.max is None):
            raise MMHooksError("Clamp needs value=, or min= and/or max=")

    @property
    def _bounds(self) -> tuple[float | None, float | None]:
        return (self.min, self.max) if self.value is None else (self.value, self.value)

    @property
    def keeps_zero(self) -> bool:
        low, high = self._bounds
        if any(isinstance(bound, Tensor) for bound in (low, high)):  # one bound per feature
            return False
        return (low is None or low <= 0) and (high is None or high >= 0)

    def change(self, value: Tensor, index: Tensor | None, hook: Hook) -> Tensor:
        names = ("min", "max") if self.value is None else ("value", "value")
        low, high = (self._each(name, value, index, hook) for name in names)
        if isinstance(low, Tensor) or isinstance(high, Tensor):  # torch takes two tensors or two numbers
            low, high = (None if b is None else torch.as_tensor(b).to(value) for b in (low, high))
        return value.clamp(low, high)


@dataclass(frozen=True, eq=False)
class Patch(Edit):
    """Activation patching: inserts the values of another run, from its cache or a tensor of the site's shape.

    With a cache and no ``at=``, the sites are those of the cache. A cached batch of 1 is broadcast.

    >>> Patch({"tensor": torch.ones(1, 3)}, features=[2])(torch.zeros(2, 3))
    tensor([[0., 0., 1.],
            [0., 0., 1.]])
    """

    source: Values = None

    def __init__(
        self,
        source: Values,
        features: Features = None,
        *,
        at: At = None,
        tokens: Tokens = None,
        steps: Any = None,
        guidance: Guidance = "both",
    ) -> None:
        where = list(source) if at is None and isinstance(source, Mapping) else at
        for name, given in {
            "source": source,
            "features": features,
            "at": where,
            "tokens": tokens,
            "steps": steps,
            "guidance": guidance,
        }.items():
            object.__setattr__(self, name, given)
        self.__post_init__()

    def change(self, value: Tensor, index: Tensor | None, hook: Hook) -> Tensor:
        return _filled(self._reference(self.source, value, index, hook), value)


def _filled(reference: Tensor | float, value: Tensor) -> Tensor:
    return reference if isinstance(reference, Tensor) else torch.full_like(value, reference)
