"""What happens to the tensor at one place: the operations of all active contexts, merged in order.

Edits and functions run in the order given, outer contexts first. Neighbouring edits of one head share a
single encode and decode. Gradient hooks and caches come last: they see the value that flows on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.steps import Guidance, now


def layer_of(name: str) -> int:
    """The first number in a site's name.

    Raises:
        MMHooksError: there is none.

    >>> layer_of("image.blocks.3.attn.z")
    3
    """
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if number is None:
        raise MMHooksError(
            f"site {name!r} belongs to no layer: expected a number in its name, as in image.blocks.3.resid_post; "
            "ask for the layer at sites of blocks alone"
        )
    return number


@dataclass(frozen=True, eq=False)
class Hook:
    """What a hook function is told: ``fn(tensor, *, hook)``.

    Attributes:
        name: the site.
        axis: the dimension that features select.
        tokens: the dimension of the tokens, or None.
    """

    name: str
    axis: int = -1
    tokens: int | None = 1

    def layer(self) -> int:
        """The number in the name, as TransformerLens's HookPoint.layer().

        Raises:
            MMHooksError: a site outside the layers.
        """
        return layer_of(self.name)

    @property
    def step(self) -> int | None:
        """The denoising step of the diffusion run that is going on."""
        return now().step

    @property
    def guidance(self) -> Guidance | None:
        """Whose rows the tensor holds in a diffusion run: ``both`` is the unconditional, then the conditional ones."""
        return now().half


@dataclass(eq=False)
class Binding:
    """One edit or hook as the user gave it; ``fired`` once it ran at any of its sites."""

    label: str
    sites: tuple[str, ...]
    fired: bool = False
    live: bool = True  # its context is open
    hint: str = "no forward that runs them happened inside the context"


@runtime_checkable
class TargetView(Protocol):
    """Another layout of a tap's tensor, and the way back."""

    @property
    def show(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def back(self) -> Callable[[Tensor, Tensor], Tensor]: ...


@runtime_checkable
class TargetSite(Protocol):
    """What an operation needs to know of a site."""

    @property
    def tap(self) -> Any: ...
    @property
    def leaf(self) -> str: ...
    @property
    def axis(self) -> int: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def view(self) -> TargetView | None: ...


@runtime_checkable
class Target(Protocol):
    """Where an operation acts: a site, or a place inside a head, whose ``site`` is the one the head is attached at."""

    @property
    def name(self) -> str: ...
    @property
    def leaf(self) -> str: ...
    @property
    def site(self) -> TargetSite: ...


@dataclass(frozen=True, eq=False)
class Op:
    """One operation at one target: an edit, a capture or a backward hook.

    ``detached``: it keeps nothing of the value's graph.
    """

    target: Target
    act: Callable[..., Any]
    binding: Binding
    detached: bool = False
    hook: Hook = field(init=False)

    def __post_init__(self) -> None:
        site = self.target.site
        axis = site.axis if site is self.target else -1  # inside a head, features are the last dimension
        object.__setattr__(self, "hook", Hook(self.target.name, axis, site.tokens))


@dataclass(frozen=True, eq=False)
class EditOp(Op):
    """May change the value: ``act(value, hook=)`` returns another one, or None."""

    limited: bool = field(init=False)
    compares: bool = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "limited", getattr(self.act, "limited", False))
        # Inside explicit forwards, heads and views, the value itself given back means that nothing was changed.
        compares = bool(self.target.leaf) or self.target.site.view is not None
        object.__setattr__(self, "compares", compares)

    def asleep(self) -> bool:
        """Whether it does nothing now: it names other steps of a diffusion run, or the other half."""
        if not self.limited or not self.act.asleep(self.hook.name):  # type: ignore[attr-defined]
            return False
        self.binding.hint = "its steps= or guidance= did not come up in the run"
        return True


class CaptureOp(Op):
    """Stores the value that flows on: ``act(value)``."""


class GradOp(Op):
    """A backward hook: ``act(grad, hook=)`` returns another gradient, or None."""


class FunctionStep:
    """An edit or a plain function at a site."""

    detached = False

    def __init__(self, op: EditOp) -> None:
        self.op, self.view = op, op.target.site.view

    def __call__(self, raw: Tensor) -> Tensor:
        value = raw if self.view is None else self.view.show(raw)
        new = apply(self.op, value)
        if new is value:
            return raw
        return new if self.view is None else self.view.back(raw, new)


class GradStep:
    """Backward hooks: bound to the tensor, so they work in whichever thread autograd runs them."""

    detached = False

    def __init__(self, ops: list[GradOp]) -> None:
        self.ops, self.view = ops, ops[0].target.site.view

    def __call__(self, raw: Tensor) -> Tensor:
        if self.view is None:
            watch(raw, self.ops)
            return raw
        value = self.view.show(raw)
        watch(value, self.ops)
        return self.view.back(raw, value)  # the graph now runs through the layout that is watched


class Capture:
    """Stores the value that flows on."""

    def __init__(self, op: CaptureOp) -> None:
        self.view, self.record, self.detached = op.target.site.view, op.act, op.detached

    def __call__(self, raw: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            return raw  # a checkpoint recomputes what is kept already
        if self.view is None:
            self.record(raw)
            return raw
        value = self.view.show(raw)
        self.record(value)
        # With its graph, the value that is kept has to be the one that flows on, or no gradient would reach it.
        return raw if self.detached or not value.requires_grad else self.view.back(raw, value)


class Program:
    """Steps, then captures. ``detached``: nothing can change the value and nothing keeps its graph."""

    __slots__ = ("captures", "detached", "steps")

    def __init__(self, steps: list[Any], captures: list[Capture]) -> None:
        self.steps, self.captures = tuple(steps), tuple(captures)
        self.detached = all(part.detached for part in (*steps, *captures))

    def __call__(self, value: Tensor) -> Tensor:
        for step in self.steps:
            value = step(value)
        for capture in self.captures:
            value = capture(value)
        return value


def apply(op: EditOp, value: Tensor, *, flows: bool = True) -> Tensor:
    """Runs an edit or a function and checks what it returns; ``None`` leaves the value as it is.

    Edits never write into their input. A function may: it gets a copy of its own, which flows on, so a write in
    place is what returning the written tensor is, and reaches nothing else that holds the same memory (a cache, a
    residual stream behind an Identity, the conditioning that a pipeline passes at every step).

    ``flows``: with gradients a copy that was only read flows on too, so that what the function kept of it is part of
    the graph. Where nothing else is done to the value (a head that is only read) that would change the flow's bits.
    """
    if op.limited and op.asleep():
        return value
    op.binding.fired = True
    if getattr(op.act, "never_writes", False):
        new = op.act(value, hook=op.hook)
        return value if new is None or new is value else checked(op, value, new)
    given = own_copy(value)
    graph = given.requires_grad
    version = given._version if graph else 0  # a write of the same numbers may cut the graph
    new = op.act(given, hook=op.hook)
    if new is not None and new is not given:
        return checked(op, value, new)
    if not op.compares or (given.requires_grad and (flows or not graph or given._version != version)):
        return given
    return value if same(given, value) else given


def own_copy(value: Tensor) -> Tensor:
    """A copy with the strides of ``value``, so that whatever runs on it runs as it would have."""
    copy = value.clone()
    if (
        value.is_contiguous() or copy.stride() == value.stride() or 0 in value.stride()
    ):  # expanded: not to be written into
        return copy
    return value.new_empty_strided(value.shape, value.stride()).copy_(value)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits. Versions would not do: inference tensors have none, and
    ``.data`` and numpy write past them. Code that is being compiled cannot ask, and takes them as different."""
    if torch.compiler.is_compiling() or a.is_meta:
        return False
    kind = _INTEGERS[a.element_size()]
    return torch.equal(a.detach().view(kind), b.detach().view(kind))


def checked(op: Op, value: Tensor, new: Any) -> Tensor:
    """What a hook returned in the place of ``value``, which it must resemble."""
    if not isinstance(new, Tensor):
        raise ShapeMismatch(
            f"{op.binding.label} at {op.hook.name!r} returned {type(new).__name__}; a hook returns a tensor of "
            f"shape {tuple(value.shape)}, or None to leave the value as it is"
        )
    if new.shape != value.shape or new.dtype != value.dtype or new.device != value.device:
        raise ShapeMismatch(
            f"{op.binding.label} at {op.hook.name!r}: expected {spell(value)}, it returned {spell(new)}; "
            "return the shape, dtype and device that came in"
        )
    return new


def watch(value: Tensor, ops: Iterable[GradOp]) -> None:
    """Registers backward hooks on a tensor; they go silent when their context closes."""
    for op in ops:
        if not value.requires_grad:
            op.binding.hint = "they ran, but without a graph (no_grad, or nothing requires grad)"
            continue
        op.binding.hint = "no gradient reached them inside the context; call backward() within the with block"

        def backward(grad: Tensor, op: GradOp = op) -> Tensor | None:
            if not op.binding.live:
                return None
            op.binding.fired = True
            given = own_copy(grad)  # autograd may hand the same tensor to other branches
            new = op.act(given, hook=op.hook)
            return checked(op, grad, given if new is None else new)

        value.register_hook(backward)


def spell(value: Tensor) -> str:
    """A tensor in words: ``shape (4, 8), torch.float32 on cpu``."""
    return f"shape {tuple(value.shape)}, {value.dtype} on {value.device}"
