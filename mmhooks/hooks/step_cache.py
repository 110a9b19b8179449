"""The cache of a run in steps: activations by site and step of a diffusion run or of a generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite
from mmhooks.hooks.cache import ActivationCache, recomputes
from mmhooks.hooks.program import Binding, Hook
from mmhooks.hooks.steps import HALVES, Guidance, Moment, chosen_steps, current_moment, halves
from mmhooks.utils.indexing import as_choice


class StepCache(Mapping[str, Tensor]):
    """What contexts of ``HookedDiffusion`` and ``HookedVLM`` fill: a read-only mapping from site name to tensor.

    A site that runs at every step gives ``[step batch ...]``, in the order of :attr:`steps`; one that
    runs once gives ``[batch ...]``. In a generation, whose first step is the whole prompt, :meth:`sequence` joins the
    steps of a site. In a guided run the batch holds the unconditional rows first, as the U-Net receives
    them, also at sites of the text encoder; :attr:`cond` and :attr:`uncond` are the halves.

    Args:
        steps: keep only these steps.
        guidance: keep only this half.
        options: ``device, dtype, tokens, copy`` of :class:`~mmhooks.hooks.cache.ActivationCache`.
    """

    def __init__(self, *, steps: Any = None, guidance: Guidance = "both", **options: Any) -> None:
        if guidance not in ("cond", "uncond", "both"):
            raise MMHooksError(f'guidance: expected "cond", "uncond" or "both", got {guidance!r}')
        self._asked, self._guidance, self._options = chosen_steps(steps), guidance, options
        self._parts: dict[Moment, ActivationCache] = {}
        self._axes: dict[str, int | None] = {}  # of tokens, by site
        # Sites that ran more than once in a step: the cache holds their last value.
        self.repeated: dict[str, None] = {}

    # -- filling ---------------------------------------------------------------------------------------

    def recorder(self, hook: Hook, binding: Binding) -> Callable[[Tensor], Tensor]:
        """Returns the function that stores a value of a site under the current step and half."""

        name = hook.name
        seen: set[Moment] = set()
        self._axes[name] = hook.tokens

        def record(value: Tensor) -> Tensor:
            at = current_moment()
            if self._leaves_out(at):
                binding.hint = (
                    f"the run had {(at.step or 0) + 1} steps, none of which are kept by steps={self._asked} and "
                    f"guidance={self._guidance!r}"
                )
                return value
            chosen = None
            if self._guidance != "both":
                for half, rows in halves(len(value), name) or ():
                    if half == self._guidance:
                        chosen, at = rows, Moment(at.step, half)
            part = self._parts.get(at)
            part = ActivationCache(**self._options) if part is None else part
            if not part.store(hook, value, chosen):
                binding.hint = "the run held no token of the kind that tokens= names there"
                return value
            if at in seen and not recomputes():
                self.repeated[name] = None
            seen.add(at)
            self._parts[at] = part
            binding.fired = True
            return value

        if self._guidance == "both":
            ActivationCache(**self._options).let_choose(record, hook)
        return record

    def _leaves_out(self, at: Moment) -> bool:
        if self._asked is not None and at.step is not None and at.step not in self._asked:
            return True
        return self._guidance != "both" and at.half not in (None, "both", self._guidance)

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """The steps that were kept."""
        return sorted({at.step for at in self._parts if at.step is not None})

    def at(self, step: int) -> ActivationCache:
        """The activations of one step, and of the sites that run once.

        Raises:
            ShapeMismatch: a bool, or anything but a whole number. UnknownSite: a step that was not kept.
        """
        choice = as_choice(step, "step")
        if choice.dtype == torch.bool or choice.numel() != 1:
            raise ShapeMismatch(
                f"step: expected one whole number, got {step!r}; the cache holds steps {self.steps}"
            )
        step = int(choice)
        if step not in self.steps:
            raise UnknownSite(f"step {step}", [str(s) for s in self.steps], where="this cache")
        values = {}
        for name in self:
            kept = self._of(name)
            if None in kept:
                values[name] = self[name]
            elif step in kept:
                values[name] = kept[step]
        new = ActivationCache(detach=self._options.get("detach", True))._with(values)
        for at, part in self._parts.items():
            if at.step in (step, None):
                new.take_gradients(part)
        return new

    def grad(self, name: str) -> Tensor:
        """The gradient at a site after ``backward()``, in the layout of ``cache[name]``.

        Raises:
            UnknownSite, MMHooksError: as :meth:`~mmhooks.hooks.cache.ActivationCache.grad`.
        """
        kept = self._of(name, ActivationCache.grad)
        return (
            kept[None] if None in kept else torch.stack([kept[step] for step in self.steps if step in kept])
        )

    def now(self, name: str) -> Tensor:
        """The value at the current step, with which ``mm.Patch(cache)`` patches step by step."""
        kept, step = self._of(name), current_moment().step
        if None in kept:
            return kept[None]
        if step is None or step not in kept:
            raise MMHooksError(f"expected a cache of {name!r} at step {step}, got one at steps {self.steps}")
        return kept[step]

    @property
    def cond(self) -> StepCache:
        """The conditional rows."""
        return self._half("cond")

    @property
    def uncond(self) -> StepCache:
        """The unconditional rows."""
        return self._half("uncond")

    def __getitem__(self, name: str) -> Tensor:
        kept = self._of(name)
        if None in kept:
            return kept[None]
        values = [kept[step] for step in self.steps if step in kept]
        if len({tuple(value.shape) for value in values}) > 1:
            raise ShapeMismatch(
                f"{name!r} has other shapes at other steps: {tuple(values[0].shape)} at the first, {tuple(values[-1].shape)} "
                f"at the last; .sequence({name!r}) joins their tokens, .at(step)[{name!r}] gives one step"
            )
        return torch.stack(values)

    def sequence(self, name: str) -> Tensor:
        """A site over all tokens of a generation, prompt and new ones: ``[batch token ...]``.

        Keys and values, which every step sees whole, are those of the last step. A pattern is ``[batch head query key]``,
        zero at the keys that come later.

        Raises:
            UnknownSite: a site that was not cached.
            MMHooksError: a site without tokens, a cache that lacks steps of the generation, or keys of which a layer sees
                the last ones alone.
        """
        kept, axis = self._of(name), self._axes.get(name)
        steps = sorted(step for step in kept if step is not None)
        if axis is None or steps != [*range(len(steps))] or not steps:
            raise MMHooksError(
                f"sequence({name!r}): expected a site with tokens at all steps of a generation from the first, got "
                f"{'one without tokens' if axis is None else f'steps {steps}'}"
            )
        values = [kept[step] for step in steps]
        lengths, widths = zip(*((value.shape[axis], value.shape[-1]) for value in values), strict=True)
        if len(steps) > 1 and _grows(lengths):
            return values[-1]
        is_pattern = axis == 2 and name.endswith(".pattern")
        if any(length != 1 for length in lengths[1:]) or (is_pattern and not _grows(widths)):
            raise MMHooksError(
                f"sequence({name!r}): expected one new token a step, or all of them at every step, got {list(lengths)} tokens "
                f"at {len(steps)} steps: a window over the last keys; .at(step)[{name!r}] gives one step"
            )
        if is_pattern:
            values = [torch.nn.functional.pad(value, (0, widths[-1] - value.shape[-1])) for value in values]
        return torch.cat(values, axis)

    def __contains__(self, name: object) -> bool:
        return any(name in part for part in self._parts.values())

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for part in self._parts.values() for name in part))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        size = sum(t.numel() * t.element_size() for part in self._parts.values() for t in part.values())
        return f"StepCache({len(self)} sites, {len(self.steps)} steps, {size / 2**20:.1f} MiB: {', '.join(self)})"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes at the sites, for one step."""
        return {name: shape for part in self._parts.values() for name, shape in part.shapes.items()}

    def _of(
        self, name: str, read: Callable[[ActivationCache, str], Tensor] = ActivationCache.__getitem__
    ) -> dict[int | None, Tensor]:
        """Maps step to value; a text encoder's two calls are joined in the order in which the U-Net receives them."""
        if name not in self:
            raise UnknownSite(name, self, where="this cache")
        found: dict[int | None, dict[str, Tensor]] = {}
        for at, part in self._parts.items():
            if name in part:
                found.setdefault(at.step, {})[at.half or ""] = read(part, name)
        return {
            step: torch.cat([by_half[half] for half in HALVES])
            if all(half in by_half for half in HALVES)
            else next(reversed(by_half.values()))
            for step, by_half in found.items()
        }

    def _half(self, which: Guidance) -> StepCache:
        new = StepCache(guidance=which)
        for at, part in self._parts.items():
            if at.half == "both":
                new._parts[Moment(at.step, which)] = part.half(HALVES.index(which))
            elif at.half in (which, None):
                new._parts[at] = part
        if not new._parts:
            raise MMHooksError(f"this cache holds no rows of the half {which!r}: the run had no guidance")
        return new


def _grows(lengths: Sequence[int]) -> bool:
    """Whether every step has one more than the step before."""
    return all(after == before + 1 for before, after in pairwise(lengths))
