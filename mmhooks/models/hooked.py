"""HookedModel: named sites, hooks and heads on a user's own model object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from mmhooks.errors import MMHooksError
from mmhooks.hooks.cache import ActivationCache
from mmhooks.hooks.context import CacheContext, HookContext
from mmhooks.hooks.dispatch import TapRegistry, registry
from mmhooks.hooks.edits import Edit
from mmhooks.hooks.places import HookFn, Places, Planned, merge_plans
from mmhooks.hooks.program import EditOp, GradOp
from mmhooks.hooks.recompute import Recomputed, can_checkpoint, checkpointed
from mmhooks.hooks.selection import Tokens
from mmhooks.hooks.sites import Pattern, SiteList, SiteMap
from mmhooks.hooks.step_cache import StepCache
from mmhooks.hooks.taps import Tap
from mmhooks.models.placement import device_of, input_dtype

Hooks = Iterable[tuple[Pattern, HookFn]]
AnyCache = TypeVar("AnyCache", ActivationCache, StepCache)
if TYPE_CHECKING:
    AnyModule = nn.Module
else:
    AnyModule = Any  # checked in HookedModel, with a better message


class HookedModel:
    """Any module, hooked: every native module path is a site, with contexts, edits, caches and heads.

    ``model`` is the given object, never converted or wrapped. Outside contexts nothing is installed, so it is what it
    was, bit for bit. :func:`mmhooks.hook` picks a subclass with canonical names where it knows the architecture: it
    builds the :class:`~mmhooks.hooks.sites.SiteMap` and adds the entry points.

    Args:
        model: any module.
        sites: canonical names, in addition to the native paths.
        name: for messages and manifests.

    Raises:
        MMHooksError: no module.

    >>> import torch, mmhooks as mm
    >>> model = mm.HookedModel(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
    >>> out, cache = model.run_with_cache(torch.ones(1, 2), sites="0")
    >>> cache["0"].shape
    torch.Size([1, 3])
    >>> with model.hooks(mm.Zero(at="0")):
    ...     model.forward(torch.ones(1, 2)).count_nonzero()
    tensor(0)
    """

    def __init__(self, model: AnyModule, sites: SiteMap | None = None, *, name: str = "") -> None:
        if not isinstance(model, nn.Module) and sites is None:
            raise MMHooksError(
                f"HookedModel: expected a torch.nn.Module, got {type(model).__name__}; give the module inside it, for "
                "example its .model, or a diffusers pipeline to mm.hook"
            )
        self.model, self.name = model, name
        self.places = Places(SiteMap(model) if sites is None else sites)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._can_checkpoint = can_checkpoint(model)
        self._recomputed: dict[nn.Module, Tap] = {}
        # In-place activations would overwrite what a cache keeps (ResNets; transformers have none).
        self._writes_inplace = any(getattr(m, "inplace", False) for m in model.modules())

    # -- the model -------------------------------------------------------------------------------------

    @property
    def _registry(self) -> TapRegistry:
        """The process-wide registry of installed taps."""
        return registry

    @property
    def device(self) -> torch.device:
        """Where inputs go; of an offloaded model, where its weights are run."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The type that floating-point inputs must have, whatever other types the model keeps some weights in."""
        return input_dtype(self.model)

    def to_input(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """``value`` on the model's device, and in its dtype if it holds floating-point numbers.

        All code that runs a model over data passes its pixels and tokens through this.

        >>> import torch, mmhooks as mm
        >>> model = mm.load("mini")
        >>> model.to_input(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).dtype
        torch.float32
        >>> model.to_input(torch.zeros(1, 16, dtype=torch.long)).dtype
        torch.int64
        """
        device, dtype = self.device, self.dtype if value.is_floating_point() else None
        # Non-blocking copies to the host could be read before they are complete.
        return value.to(device, dtype, non_blocking=device.type == "cuda")

    def __repr__(self) -> str:
        heads = ", ".join(self.places.attachments) or "none"
        return f"{type(self).__name__}({self.name or type(self.model).__name__}, heads: {heads})"

    def __getstate__(self) -> dict[str, Any]:
        """Pickles hold the model, its heads and its sites, and nothing of open contexts."""
        return {k: v for k, v in vars(self).items() if k != "_recomputed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _recomputed={})

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedModel:
        """A hooked copy of the model and its heads, without open contexts."""
        new = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            setattr(new, name, {} if name == "_recomputed" else deepcopy(value, memo))
        return new

    # -- sites and heads -------------------------------------------------------------------------------

    def sites(self, pattern: Pattern | None = None) -> SiteList:
        """Names of the sites that a glob or predicate selects (all canonical ones without it).

        A list of names; printed, it shows the shapes of those that a cache has seen flow (also in ``.shapes``
        and ``model.shapes``) and the layout in words of the others. Native module paths are sites too; they are
        listed where the pattern matches no canonical name.

        Raises:
            UnknownSite: nothing matches.
        """
        return SiteList({place.name: place.layout for place in self.places.listed(pattern)}, self.shapes)

    def attach(
        self,
        head: Any,
        at: Pattern | Sequence[Pattern] | None = None,
        name: str | None = None,
        *,
        error_term: bool = True,
        splice: bool = True,
    ) -> list[str]:
        """Attaches a sparse head at sites; gives the places ``<site>.<name>.{pre, latents, recon, error}``.

        Nothing is computed until a context edits or reads them, and the model's output does not change.

        Args:
            head: anything with the interface of :class:`~mmhooks.hooks.splice.HeadLike`.
            at: sites, by name, glob or predicate; default: those that the head names (``head.sites``). A head that maps one
                site to another, such as a transcoder: the site that it reads and the site that it writes, whose places are
                then ``<site written>.<name>.latents``. A crosscoder: all its sites, in their order; edits of it need
                :class:`mmhooks.given_run`.
            name: default: the head's own.
            error_term: edited output is ``x + (f' - f) W_dec``; ``False``: ``dec(f')``.
            splice: ``False`` leaves the model's flow alone; edits show in the head's latents only (the one
                way to edit a head without decoder).

        Returns:
            ``["image.embed.sae", ...]``.

        Raises:
            UnknownSite: a site that does not exist.
            MMHooksError: no ``at=``, and the head names no site.
            ShapeMismatch: a site known to carry another width.
            MMHooksError: that name is taken at that site, or ``head`` is not a head.
        """
        known = name or getattr(head, "name", "head")
        if at is None:
            at = self.places.named_by(head, known)
        patterns = [at] if isinstance(at, str) or callable(at) else list(at)
        return self.places.attach(
            head, patterns, known, error_term=error_term, splice=splice, shapes=self.shapes
        )

    def detach(self, what: Any = None) -> None:
        """Takes heads off: by object, by name, by ``site.name``; all of them without an argument."""
        if what is None:
            self.places.attachments.clear()
        else:
            self.places.detach(what)

    # -- the context -----------------------------------------------------------------------------------

    def hooks(
        self,
        *edits: Any,
        mask: Any = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        strict: bool = True,
    ) -> HookContext:
        """The one context: edits, a mask, functions and backward hooks, for the thread that opens it.

        They run in this order: ``edits``, ``mask``, ``fwd_hooks``; outer contexts first. Backward passes belong
        inside the block.

        Args:
            edits: :class:`~mmhooks.hooks.edits.Edit` objects.
            mask: features to set to zero: a FeatureSet, indices, a bool tensor, or ``{site or tower: ...}``.
            fwd_hooks: ``(site, fn)`` with ``fn(tensor, *, hook) -> tensor or None``.
            bwd_hooks: ``(site, fn)`` with ``fn(grad, *, hook) -> grad or None``.
            strict: raise on exit if one of them fired nowhere.

        Raises:
            UnknownSite, WrongHead, NoDecoder, ShapeMismatch: on entry.
            HookDidNotFire: on exit, with ``strict``.
        """
        for edit in edits:
            if not isinstance(edit, Edit):
                raise MMHooksError(
                    f"model.hooks: expected edits, got {type(edit).__name__}; pass a FeatureSet as mask=, a "
                    "function as fwd_hooks=[(site, fn)]"
                )
        forward, backward = _pairs(fwd_hooks, "fwd_hooks"), _pairs(bwd_hooks, "bwd_hooks")

        def plan() -> Planned:
            parts = [self.places.plan_edit(edit) for edit in edits]
            if mask is not None:
                parts.append(self.places.plan_mask(mask))
            parts += [self.places.plan_hook(pattern, fn, EditOp) for pattern, fn in forward]
            parts += [self.places.plan_hook(pattern, fn, GradOp) for pattern, fn in backward]
            return merge_plans(parts)

        return HookContext(plan, strict=strict, extra_taps=self._extra_taps)

    def caching(
        self,
        sites: Pattern | Sequence[Pattern],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        tokens: Tokens = None,
        strict: bool = True,
    ) -> CacheContext[ActivationCache]:
        """A context that fills the :class:`~mmhooks.hooks.cache.ActivationCache` it gives.

        Values are those that flow on, after the edits of all open contexts, whichever is the outer one. A site that
        runs several times keeps its last value; closing warns of that, with ``strict``.
        """
        cache = ActivationCache(
            device=device, dtype=dtype, detach=detach, tokens=tokens, copy=self._writes_inplace
        )
        return self._filling(cache, sites, detach=detach, strict=strict)

    def _filling(
        self, cache: AnyCache, sites: Pattern | Sequence[Pattern], *, detach: bool, strict: bool
    ) -> CacheContext[AnyCache]:
        """The context in which ``cache`` gets the values at ``sites``."""
        patterns = [sites] if isinstance(sites, str) or callable(sites) else list(sites)

        def plan() -> Planned:
            return merge_plans(
                [self.places.plan_capture(p, cache.recorder, detached=detach) for p in patterns]
            )

        return CacheContext(cache, self.shapes, plan, strict=strict, extra_taps=self._extra_taps)

    def run_with_hooks(self, *args: Any, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **kwargs: Any) -> Any:
        """``forward`` under hooks, with TransformerLens's interface."""
        with self.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
            return self.forward(*args, **kwargs)

    def trace(self, *inputs: Any, sites: Pattern | Sequence[Pattern] = "*", **kwargs: Any) -> Any:
        """An nnsight trace of ``forward(*inputs)``; our sites are at ``tracer.sites``.

        with model.trace(images, sites=["image.embed"]) as tracer:
            z = tracer.sites.image.embed.output.save()
        """
        view = self.as_nnsight(sites)
        tracer = view.trace(*inputs, **kwargs)
        tracer.sites = view
        return tracer

    # -- other toolkits --------------------------------------------------------------------------------

    def as_transformer_lens(self) -> Any:
        """A TransformerLens ``HookedRootModule`` on the same weights, whose HookPoints are our sites.

        Its ``run_with_hooks``, ``run_with_cache`` and ``hooks`` work on ``forward``, ``encode_image`` and
        ``encode_text``. Heads attached later need a new view.
        """
        from mmhooks.models.interop.transformer_lens import LensView

        return LensView(self)

    def as_nnsight(self, sites: Pattern | Sequence[Pattern] = "*") -> Any:
        """An ``NNsight`` model in which the sites are modules: ``view.image.blocks[0].attn.z.output``.

        Only the named sites are put in the flow; attention of their blocks runs on the explicit path.
        """
        from mmhooks.models.interop.nnsight import nnsight_view

        return nnsight_view(self, sites)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One run of the whole model: its own forward, unless the family defines another."""
        return self.model(*args, **kwargs)

    def run_with_cache(
        self,
        *args: Any,
        sites: Pattern | Sequence[Pattern] = "*",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        strict: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """``forward(*args, **kwargs)`` and the activations at ``sites``, by default all canonical sites or else all modules.

        Args:
            device, dtype, detach, strict: as in :meth:`caching`, which also serves a forward with arguments of these names.

        Raises:
            UnknownSite, HookDidNotFire: as :meth:`caching`.
        """
        options = {"device": device, "dtype": dtype, "detach": detach, "strict": strict}
        return self._run_cached(lambda: self.forward(*args, **kwargs), sites, options)

    def _extra_taps(self) -> list[Tap]:
        """Taps that every context installs besides its own: blocks that a backward pass would recompute."""
        if not torch.is_grad_enabled():
            return []
        return [
            self._recomputed.setdefault(b, registry.shared(Recomputed(b)))
            for b in checkpointed(self._can_checkpoint)
        ]

    def _run_cached(
        self, run: Callable[[], Any], sites: Any, options: dict[str, Any]
    ) -> tuple[Any, ActivationCache]:
        with self.caching(sites, **options) as cache:
            out = run()
        return out, cache


def _pairs(hooks: Iterable[Any], what: str) -> list[tuple[Pattern, HookFn]]:
    pairs = list(hooks)
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not callable(pair[1]):
            raise MMHooksError(
                f"{what}: expected a list of (site, function) pairs, e.g. [('image.embed', fn)], got {pair!r}"
            )
    return pairs
