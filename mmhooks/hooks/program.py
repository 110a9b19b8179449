"""The program of one place: the operations of all active contexts on its tensor, merged in order.

Edits and functions run in the order given, outer contexts first. Adjacent edits of one head share a single
encode and decode. Gradient hooks and caches come last: they see the value that flows on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.kinds import HeldKinds
from mmhooks.hooks.steps import Guidance, current_moment


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
            f"expected a site with a layer number in its name, as in image.blocks.3.resid_post, got {name!r}; only "
            "sites of blocks have a layer"
        )
    return number


@dataclass(frozen=True, eq=False)
class Hook:
    """Information passed to a hook function: ``fn(tensor, *, hook)``.

    Attributes:
        name: the site.
        axis: the dimension that features select.
        tokens: the dimension of the tokens, or None.
        kinds: what tells the kinds of tokens there, at a site of an encoder.
    """

    name: str
    axis: int = -1
    tokens: int | None = 1
    kinds: HeldKinds | None = None

    def layer(self) -> int:
        """The layer number in the site's name, like TransformerLens's HookPoint.layer().

        Raises:
            MMHooksError: a site outside the layers.
        """
        return layer_of(self.name)

    @property
    def step(self) -> int | None:
        """The current step of a diffusion run or of a generation, None outside one."""
        return current_moment().step

    @property
    def guidance(self) -> Guidance | None:
        """Which rows the tensor holds in a diffusion run; ``both``: the unconditional, then the conditional ones."""
        return current_moment().half


@dataclass(eq=False)
class Binding:
    """One edit or hook as given by the user; ``fired`` once it ran at any of its sites."""

    label: str
    sites: tuple[str, ...]
    fired: bool = False
    live: bool = True  # its context is open
    hint: str = "no forward pass inside the context ran them"


@runtime_checkable
class TargetView(Protocol):
    """Another layout of a tap's tensor, and the inverse."""

    @property
    def show(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def back(self) -> Callable[[Tensor, Tensor], Tensor]: ...


@runtime_checkable
class TargetSite(Protocol):
    """The attributes of a site that an operation needs."""

    @property
    def tap(self) -> Any: ...
    @property
    def leaf(self) -> str: ...
    @property
    def axis(self) -> int: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def kinds(self) -> HeldKinds | None: ...
    @property
    def view(self) -> TargetView | None: ...


@runtime_checkable
class Target(Protocol):
    """Where an operation acts: a site, or a place inside a head, whose ``site`` is where the head is attached."""

    @property
    def name(self) -> str: ...
    @property
    def leaf(self) -> str: ...
    @property
    def site(self) -> TargetSite: ...


@dataclass(frozen=True, eq=False)
class Op:
    """One operation at one target: an edit, a capture or a backward hook.

    ``detached``: it keeps no reference to the value's graph.
    """

    target: Target
    act: Callable[..., Any]
    binding: Binding
    detached: bool = False
    hook: Hook = field(init=False)

    def __post_init__(self) -> None:
        site = self.target.site
        axis = site.axis if site is self.target else -1  # inside a head, features are the last dimension
        object.__setattr__(self, "hook", Hook(self.target.name, axis, site.tokens, site.kinds))


@dataclass(frozen=True, eq=False)
class EditOp(Op):
    """May change the value: ``act(value, hook=)`` returns a new value, or None."""

    limited: bool = field(init=False)
    compares: bool = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "limited", getattr(self.act, "limited", False))
        # Explicit forwards, heads and views detect an unchanged value by identity.
        compares = bool(self.target.leaf) or self.target.site.view is not None
        object.__setattr__(self, "compares", compares)

    def inactive(self, value: Tensor) -> bool:
        """Whether it does not apply to ``value``: it is limited to other steps, to the other half of a diffusion run, or
        to a kind of tokens of which there is none here."""
        if not self.limited or not self.act.inactive(value, self.hook):  # type: ignore[attr-defined]
            return False
        self.binding.hint = "its steps=, guidance= or tokens= did not occur in the run"
        return True


class CaptureOp(Op):
    """Records the value that flows on: ``act(value)``."""


class GradOp(Op):
    """A backward hook: ``act(grad, hook=)`` returns another gradient, or None."""


class FunctionStep:
    """Runs an edit or a plain function at a site."""

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
    """Registers backward hooks on the tensor itself, so they work in whichever thread autograd runs them."""

    detached = False

    def __init__(self, ops: list[GradOp]) -> None:
        self.ops, self.view = ops, ops[0].target.site.view

    def __call__(self, raw: Tensor) -> Tensor:
        if self.view is None:
            watch(raw, self.ops)
            return raw
        value = self.view.show(raw)
        watch(value, self.ops)
        return self.view.back(raw, value)  # so that the graph runs through the watched layout


class Capture:
    """Records the value that flows on."""

    def __init__(self, op: CaptureOp) -> None:
        self.view, self.record, self.detached = op.target.site.view, op.act, op.detached

    def __call__(self, raw: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            return raw  # checkpointing recomputes a value that is recorded already
        if self.view is None:
            self.record(raw)
            return raw
        value = self.view.show(raw)
        self.record(value)
        # A value recorded with its graph must be the one that flows on, or no gradient would reach it.
        return raw if self.detached or not value.requires_grad else self.view.back(raw, value)


class Program:
    """Runs steps, then captures. ``detached``: nothing can change the value or keep its graph."""

    __slots__ = ("captures", "detached", "steps")

    def __init__(self, steps: list[Any], captures: list[Any]) -> None:
        self.steps, self.captures = tuple(steps), tuple(captures)
        self.detached = all(part.detached for part in (*steps, *captures))

    def __call__(self, value: Tensor) -> Tensor:
        for step in self.steps:
            value = step(value)
        for capture in self.captures:
            value = capture(value)
        return value


def apply(op: EditOp, value: Tensor, *, flows: bool = True) -> Tensor:
    """Runs an edit or a function and checks what it returns; ``None`` leaves the value unchanged.

    Edits never write into their input. A function may: it gets its own copy, which flows on, so writing in place is
    equivalent to returning the written tensor and reaches nothing else that shares the memory (a cache, a residual
    stream behind an Identity, the conditioning that a pipeline passes at every step).

    ``flows``: in grad mode a copy that was only read flows on too, so that what the function kept of it is part of
    the graph. For a head that is only read this would change the bits of the model's output, so it is turned off.
    """
    if op.limited and op.inactive(value):
        return value
    op.binding.fired = True
    if getattr(op.act, "never_writes", False):
        new = op.act(value, hook=op.hook)
        return value if new is None or new is value else check_returned(op, value, new)
    given = own_copy(value)
    graph = given.requires_grad
    version = given._version if graph else 0  # writing equal numbers may still cut the graph
    new = op.act(given, hook=op.hook)
    if new is not None and new is not given:
        return check_returned(op, value, new)
    if not op.compares or (given.requires_grad and (flows or not graph or given._version != version)):
        return given
    return value if same_bits(given, value) else given


def own_copy(value: Tensor) -> Tensor:
    """A copy with the strides of ``value``, so that later operations run on the same layout."""
    copy = value.clone()
    if (
        value.is_contiguous() or copy.stride() == value.stride() or 0 in value.stride()
    ):  # expanded: not to be written into
        return copy
    return value.new_empty_strided(value.shape, value.stride()).copy_(value)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits. Version counters do not suffice: inference tensors have none,
    and ``.data`` and numpy bypass them. While compiling, they are treated as different."""
    if torch.compiler.is_compiling() or a.is_meta:
        return False
    kind = _INTEGERS[a.element_size()]
    return torch.equal(a.detach().view(kind), b.detach().view(kind))


def check_returned(op: Op, value: Tensor, new: Any) -> Tensor:
    """Returns a hook's replacement for ``value`` after checking that shape, dtype and device are the same."""
    if not isinstance(new, Tensor):
        raise ShapeMismatch(
            f"{op.binding.label} at {op.hook.name!r}: expected a tensor of shape {tuple(value.shape)}, got "
            f"{type(new).__name__}; return None to leave the value unchanged"
        )
    if new.shape != value.shape or new.dtype != value.dtype or new.device != value.device:
        raise ShapeMismatch(
            f"{op.binding.label} at {op.hook.name!r}: expected {describe_tensor(value)}, it returned {describe_tensor(new)}; "
            "return the shape, dtype and device that came in"
        )
    return new


def watch(value: Tensor, ops: Iterable[GradOp]) -> None:
    """Registers backward hooks on a tensor; they become inactive when their context closes."""
    for op in ops:
        if not value.requires_grad:
            op.binding.hint = "its sites ran, but without a graph (no_grad, or nothing requires grad)"
            continue
        op.binding.hint = (
            "no gradient reached its sites inside the context; call backward() within the with block"
        )

        def backward(grad: Tensor, op: GradOp = op) -> Tensor | None:
            if not op.binding.live:
                return None
            op.binding.fired = True
            given = own_copy(grad)  # autograd may hand the same tensor to other branches
            new = op.act(given, hook=op.hook)
            return check_returned(op, grad, given if new is None else new)

        value.register_hook(backward)


def describe_tensor(value: Tensor) -> str:
    """Shape, dtype and device of a tensor: ``shape (4, 8), torch.float32 on cpu``."""
    return f"shape {tuple(value.shape)}, {value.dtype} on {value.device}"
