"""Reads and edits intermediate values of other libraries' modules while their own code runs.

Attention in timm and Hugging Face has many variants (rotary, relative, gated, normalised), but all of them call
``scaled_dot_product_attention``, and a block's first addition to its input is the middle of the residual stream.
:class:`Intercepted` watches these calls inside the module's own ``forward`` with a torch function mode, so no forward is
reimplemented; it is active only there, and only if a context needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mmhooks.errors import MMHooksError
from mmhooks.hooks.attention import attend, by_token, multihead
from mmhooks.hooks.shadow import own_forward
from mmhooks.hooks.taps import Emit, ExplicitForward

Linear = tuple[Tensor, Tensor | None]
Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_PRODUCTS = (Tensor.__matmul__, Tensor.matmul, torch.matmul)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_SUMS = (Tensor.__add__, Tensor.add, torch.add)


class _CallMode(TorchFunctionMode):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._call(func, args, kwargs or {})


class Intercepted(ExplicitForward):
    """The module's own ``forward``, with its torch calls intercepted.

    Args:
        watch: ``watch(module, emit, want, args, kwargs) -> call(func, args, kwargs)``, which executes each torch call.
    """

    def _call(
        self, module: nn.Module, emit: Emit, want: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        seen: set[str] = set()

        def noted(leaf: str, value: Tensor) -> Tensor:
            seen.add(leaf)
            return emit(leaf, value)

        with _CallMode(self._explicit(module, noted, want, args, kwargs)):
            out = original(*args, **kwargs)
        missing = [leaf for leaf in want if leaf not in seen]
        if missing:
            raise MMHooksError(
                f"{type(module).__name__} ran without the torch calls at which {', '.join(missing)} can be intercepted "
                "(its attention is compiled or uses a custom kernel); use sdpa, e.g. "
                "model.set_attn_implementation('sdpa')"
            )
        return out


def residual_middle(module: nn.Module, emit: Emit, want: Container[str], args: Any, kwargs: Any) -> Call:
    """``resid_mid``: a block's first sum with the block's input as a term."""
    stream = args[0] if args else next(iter(kwargs.values()))
    done = False

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal done
        out = func(*args, **kwargs)
        if not done and func in _SUMS and any(a is stream for a in args[:2]):
            done = True
            return emit("resid_mid", out)
        return out

    return call


def residual_addends(module: nn.Module, emit: Emit, want: Container[str], args: Any, kwargs: Any) -> Call:
    """``attn_out``, ``resid_mid``, ``mlp_out``: what a block's two sums add to the stream, where no module gives it because
    a bare parameter scales it."""
    stream = args[0] if args else next(iter(kwargs.values()))
    sums = [("attn_out", "resid_mid"), ("mlp_out", "resid_post")]

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal stream
        if not sums or func not in _SUMS or not any(a is stream for a in args[:2]):
            return func(*args, **kwargs)
        addend, after = sums.pop(0)
        terms = [a if a is stream else emit(addend, a) for a in args[:2]]
        stream = func(*terms, *args[2:], **kwargs)
        if after == "resid_mid":  # the other is the block's output, which has a tap of its own
            stream = emit(after, stream)
        return stream

    return call


def attention_scores(
    module: nn.Module, emit: Emit, want: Any, args: Any, kwargs: Any, heads: int | None = None
) -> Call:
    """``q, k, v`` as they enter the scores, and ``pattern``, from the fused kernel or from ``q @ k``, softmax, ``@ v``.

    ``heads``: query heads, where the kernel may get queries in another layout than by head and token.
    """
    done: list[str] = []  # those of the three calls of explicit attention that have run

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.scaled_dot_product_attention:
            plain = heads is None or args[0].shape[1] == heads
            return attend(emit, want, *args, **kwargs, rows=plain)[0]
        if func in _PRODUCTS and len(args) == 2 and args[0].dim() == 4 and len(done) in (0, 2):
            left, right = args
            if done:
                right = by_token(emit, want, "v", right)
            else:
                left = by_token(emit, want, "q", left)
                right = by_token(emit, want, "k", right.transpose(-1, -2)).transpose(-1, -2)
            done.append("product")
            return func(left, right, **kwargs)
        out = func(*args, **kwargs)
        if func in _SOFTMAX and len(done) == 1:
            done.append("softmax")
            return emit("pattern", out) if "pattern" in want else out
        return out

    return call


class NativeForward(Intercepted):
    """Replaces a module's class-level forward by the explicit reimplementation ``explicit``.

    If something replaced or wrapped that forward (LoRA, accelerate's offloading, a user's own forward), the wrapper
    runs as it is and its torch calls are intercepted instead.

    Args:
        native: the forward that ``explicit`` reimplements.
        watch: as in :class:`Intercepted`.
        inexact: leaves for which ``explicit`` differs from the original in the last bits.
        watch_is_exact: whether ``watch`` preserves the bits. If not, reads use a separate run: under a function mode
            torch leaves the fast path of attention, which changes the last bits.
    """

    def __init__(
        self,
        module: nn.Module,
        leaves: Sequence[str],
        explicit: Callable[..., Any],
        native: Callable[..., Any],
        watch: Callable[..., Call],
        *,
        inexact: Sequence[str] = (),
        watch_is_exact: bool = False,
    ) -> None:
        super().__init__(module, leaves, watch, inexact=inexact)
        self._repeated, self._native, self._watch_is_exact = explicit, native, watch_is_exact

    def _is_native(self, module: nn.Module) -> bool:
        return getattr(own_forward(module), "__func__", None) is self._native

    def _exact(self, module: nn.Module, programs: Any) -> bool:
        return super()._exact(module, programs) if self._is_native(module) else self._watch_is_exact

    def _call(
        self, module: nn.Module, emit: Emit, want: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self._is_native(module):
            return self._repeated(module, emit, want, *args, **kwargs)
        return super()._call(module, emit, want, original, args, kwargs)


def multihead_calls(module: nn.Module, emit: Emit, want: Any, args: Any, kwargs: Any) -> Call:
    """Intermediate values of ``nn.MultiheadAttention``, with the weights that it actually passes to torch's function."""
    inner = _multihead_in(module)
    changed = False

    def noted(leaf: str, value: Tensor) -> Tensor:
        nonlocal changed
        new = emit(leaf, value)
        changed |= new is not value or (new.requires_grad and not want[leaf].detached)
        return new

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)
        aside = inner is not None and all(program.detached for program in want.values())
        with torch.no_grad() if aside else nullcontext():
            seen = multihead(noted, want, *args, **kwargs)
        if changed or inner is None:
            return seen
        # Outside the function mode torch takes its fast path again, as it does without a context.
        turned = (lambda t: t.transpose(0, 1)) if inner.batch_first else (lambda t: t)
        query, key, value = args[:3]
        same = query is key and key is value
        query, key, value = (turned(query),) * 3 if same else (turned(t) for t in args[:3])
        options = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
        given = {name: kwargs[name] for name in options if name in kwargs}
        out, weights = nn.MultiheadAttention.forward(inner, query, key, value, **given)
        return turned(out), weights

    return call


class MultiheadWeights(NamedTuple):
    """Matrix ``[d e]`` and bias of the four linear maps of torch's attention."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear


def multihead_weights(
    module: nn.Module, query: Float[Tensor, "1 1 d"], key: Float[Tensor, "1 1 e"]
) -> MultiheadWeights:
    """The weights that ``nn.MultiheadAttention``, or a wrapper around one, passes to torch when it runs.

    Args:
        query, key: arbitrary tokens to run the module on, since the weights may exist only while it runs.

    Raises:
        MMHooksError: it never calls torch's attention.
    """
    found: list[MultiheadWeights] = []

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.multi_head_attention_forward:
            fused, biases = args[5:7]
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            weights = [kwargs[n] for n in names] if fused is None else _dense(fused).chunk(3)
            b = (None, None, None) if biases is None else biases.detach().clone().chunk(3)
            out = args[12] if args[12] is None else args[12].detach().clone()
            maps = [(_dense(w), bias) for w, bias in zip((*weights, args[11]), (*b, out), strict=True)]
            found.append(MultiheadWeights(*maps))
        return func(*args, **kwargs)

    with torch.no_grad(), _CallMode(call):
        own_forward(module)(query, key, key, need_weights=False)
    if not found:
        raise MMHooksError(
            f"expected a module that calls torch's multi-head attention, got {type(module).__name__}, which never does"
        )
    return found[0]


def _dense(weight: Tensor) -> Tensor:
    """A plain dense copy of a matrix, however it is stored (quantised, sharded)."""
    if type(weight) in (Tensor, nn.Parameter):
        return weight.detach().clone()
    return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).T


def is_multihead(module: nn.Module) -> bool:
    """Whether it is ``nn.MultiheadAttention``, or a wrapper around one."""
    return _multihead_in(module) is not None


def _multihead_in(module: nn.Module) -> nn.MultiheadAttention | None:
    """The attention itself, or the one inside a wrapper. (Not by ``modules()``: in a LoRA layer it restores weights.)"""
    if isinstance(module, nn.MultiheadAttention):
        return module
    children = (_multihead_in(child) for child in module._modules.values() if child is not None)
    return next((found for found in children if found is not None), None)
