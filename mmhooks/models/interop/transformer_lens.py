"""TransformerLens view of a hooked model: the same weights, with our sites as HookPoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite
from mmhooks.hooks.program import layer_of
from mmhooks.models.interop.tree import Hooked, flowing, plant

try:
    from transformer_lens import HookedRootModule
    from transformer_lens.utilities import get_act_name
except ImportError:  # TransformerLens 2 has both elsewhere
    from transformer_lens.hook_points import HookedRootModule
    from transformer_lens.utils import get_act_name  # pyright: ignore[reportMissingImports]

# TransformerLens's names inside a block, where ours differ: blocks.3.attn.hook_result, blocks.3.ln1.hook_normalized.
_LEAVES = {"attn.result": "attn.head_out", "ln1.normalized": "ln_1", "ln2.normalized": "ln_2"}


class NotInView(MMHooksError, AttributeError):
    """An attribute of TransformerLens's models that a view does not have."""


class SitePoint(HookPoint):
    """A HookPoint at one of our sites."""

    def layer(self) -> int:
        """The block's number, wherever it stands in the name.

        Raises:
            MMHooksError: a site outside the blocks.
        """
        return layer_of(str(self.name))


class LensView(HookedRootModule):
    """What :meth:`HookedModel.as_transformer_lens` returns.

    ``run_with_hooks``, ``run_with_cache``, ``add_hook`` and ``hooks`` are TransformerLens's own; they act on
    ``forward(images, texts)``, ``encode_image`` and ``encode_text`` of this view. Names may also be globs or native
    module paths; one that matches nothing raises. A HookPoint without hooks costs nothing.

    Parameters, buffers and ``state_dict`` are the model's; ``to``, ``train``, ``eval`` and ``requires_grad_`` act on
    it. What needs TransformerLens's weights (``cfg``, ``accumulated_resid``, ``logit_attrs``) raises.
    """

    hooked: Any
    _points: dict[str, nn.Module]

    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        object.__setattr__(self, "hooked", hooked)  # not as a submodule: setup() writes on those
        object.__setattr__(self, "_points", {})
        self._add(hooked.sites())
        super().train(hooked.model.training)

    def _add(self, names: list[str]) -> None:
        self._points.update(plant(self, names, SitePoint))
        self.setup()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hooked model's ``forward``."""
        with flowing(self.hooked, self._points, _has_hooks):
            return self.hooked.forward(*args, **kwargs)

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """The hooked model's ``encode_image``."""
        with flowing(self.hooked, self._points, _has_hooks):
            return self.hooked.encode_image(pixels, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """The hooked model's ``encode_text``."""
        with flowing(self.hooked, self._points, _has_hooks):
            return self.hooked.encode_text(tokens, normalize=normalize)

    # -- names -----------------------------------------------------------------------------------------

    def _found(self, names: Any) -> list[str]:
        """The points that a name, glob, predicate or list of them selects; native paths get one when asked for.

        Raises:
            UnknownSite: nothing matches.
        """
        if names is None:
            return list(self._points)
        patterns = [names] if isinstance(names, str) or callable(names) else list(names)
        found = list(dict.fromkeys(name for pattern in patterns for name in self.hooked.sites(pattern)))
        new = [name for name in found if name not in self._points]
        if new:
            self._add(new)
        return found

    def _enable_hook(self, name: Any, hook: Callable[..., Any], dir: Any) -> None:
        for found in self._found(name):
            self._enable_hook_with_name(found, hook, dir)

    def add_hook(self, name: Any, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """As TransformerLens's; a name that matches nothing raises."""
        for found in self._found(name):
            super().add_hook(found, hook, *args, **kwargs)

    def add_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As TransformerLens's; a filter that matches nothing raises."""
        return super().add_caching_hooks(self._found(names_filter), *args, **kwargs)

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], Any, Any]:
        """As TransformerLens's; a filter that matches nothing raises."""
        # The row is taken out here: before release 4, TransformerLens's own way fails for sites without positions.
        values, *hooks = super().get_caching_hooks(
            self._found(names_filter), incl_bwd, device, cache=cache, pos_slice=pos_slice
        )
        if remove_batch_dim:
            hooks = [[(name, _of_one_row(save)) for name, save in pairs] for pairs in hooks]
        return values, hooks[0], hooks[1]

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: Any = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        **model_kwargs: Any,
    ) -> tuple[Any, LensCache | dict[str, Tensor]]:
        """As TransformerLens's: the output, and a :class:`LensCache` (a dict without ``return_cache_object``).

        Raises:
            UnknownSite: names that match nothing.
            ShapeMismatch: ``incl_bwd`` where the output is not one number, or ``remove_batch_dim`` of several rows.
        """
        rows = next(
            (len(a) for a in (*model_args, *model_kwargs.values()) if isinstance(a, Tensor) and a.dim()), 1
        )
        if remove_batch_dim and rows != 1:
            raise ShapeMismatch(f"remove_batch_dim=True takes a batch of one, got {rows} rows")
        options = {"remove_batch_dim": remove_batch_dim, "pos_slice": pos_slice}
        values, fwd, bwd = self.get_caching_hooks(names_filter, incl_bwd, device, **options)
        with self.hooks(fwd, bwd, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts):
            out = self(*model_args, **model_kwargs)
            if incl_bwd:
                if not isinstance(out, Tensor) or out.numel() != 1:
                    raise ShapeMismatch(
                        f"incl_bwd=True calls backward() on the output, which must be one number, got {_shape(out)}; "
                        "with view.hooks(fwd, bwd) of view.get_caching_hooks(names, incl_bwd=True) around it, call "
                        "backward() on your own loss"
                    )
                out.backward()
        return out, LensCache(values, self, not remove_batch_dim) if return_cache_object else values

    # -- the model's own -------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LensView:
        """What ``to``, ``cuda``, ``half`` and the like come down to: the model and the heads attached to it."""
        heads = {id(a.head): a.head for a in self.hooked.places.attachments.values()}
        for module in (self.hooked.model, *heads.values()):
            if isinstance(module, nn.Module):
                module._apply(fn)
        return self

    def train(self, mode: bool = True) -> LensView:
        """The model's own ``train``."""
        self.hooked.model.train(mode)
        return super().train(mode)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own."""
        return self.hooked.model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The model's own."""
        return self.hooked.model.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.hooked.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.hooked.model.load_state_dict(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.hooked.device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
        raise NotInView(
            f"a view of {type(self.__dict__.get('hooked')).__name__} has no {name!r}: it holds places, and no weights in "
            "TransformerLens's form; view.hooked has the model's own methods, and mm.decompose, mm.text_span and "
            "view.hooked.model what TransformerLens would compute from weights"
        )


class LensCache(ActivationCache):
    """TransformerLens's cache under our names, and under its own: ``cache["resid_post", 1]``.

    Where both towers were cached, :meth:`tower` says whose layers are meant. What reads values alone works
    (``stack_activation``, ``remove_batch_dim``, ``apply_slice_to_batch_dim``); what reads weights raises
    :class:`NotInView`.
    """

    def __getitem__(self, key: Any) -> Tensor:
        return self.cache_dict[key if key in self.cache_dict else self._name(key)]

    def __contains__(self, key: object) -> bool:
        return key in self.cache_dict

    def tower(self, name: str) -> LensCache:
        """The activations of one tower: ``cache.tower("text")["resid_post", -1]``.

        Raises:
            UnknownSite: none of that tower was cached.
        """
        values = {k: v for k, v in self.cache_dict.items() if k.partition(".")[0] == name}
        if not values:
            raise UnknownSite(name, self._towers(), where="this cache")
        return LensCache(values, self.model, self.has_batch_dim)

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Tensor:
        """The activations of all layers before ``layer`` (all by default), stacked: as TransformerLens's.

        Raises:
            UnknownSite: a layer that was not cached.
        """
        _refuse_bool(layer)
        last = self._depth(self._one_tower()) if layer in (None, -1) else layer
        return torch.stack([self[activation_name, n, sublayer_type] for n in range(int(last or 0))])

    def accumulated_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The residual stream before each layer up to ``layer``, as TransformerLens's.

        Raises:
            NotInView: without ``layer``, or with what needs weights (``apply_ln``). UnknownSite: a layer not cached.
        """
        _refuse_bool(layer)
        return super().accumulated_resid(layer, *args, **kwargs)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> LensCache:
        """Some rows of the batch, as TransformerLens's."""
        part = super().apply_slice_to_batch_dim(batch_slice)
        return LensCache(part.cache_dict, part.model, part.has_batch_dim)

    def _name(self, key: Any) -> str:
        """Our name of what TransformerLens calls ``key``."""
        parts = list(key) if isinstance(key, tuple) else [key]
        tower = self._one_tower()
        if len(parts) > 1:
            _refuse_bool(parts[1])
        if len(parts) > 1 and isinstance(parts[1], int) and parts[1] < 0:
            parts[1] += self._depth(tower)
        theirs = get_act_name(*parts)
        found = re.fullmatch(r"blocks\.(\d+)\.(?:(\w+)\.)?hook_(\w+)", theirs)
        name = theirs
        if found:
            layer, part, leaf = found.groups()
            inner = f"{part}.{leaf}" if part else leaf
            name = f"{tower}.blocks.{layer}.{_LEAVES.get(inner, inner)}"
        if name not in self.cache_dict:
            raise UnknownSite(name, self.cache_dict, where="this cache")
        return name

    def _towers(self) -> list[str]:
        return list(dict.fromkeys(name.partition(".")[0] for name in self.cache_dict))

    def _one_tower(self) -> str:
        towers = [t for t in self._towers() if self._depth(t)]
        if len(towers) != 1:
            raise MMHooksError(
                f"layers of {', '.join(towers) or 'no tower'} are in this cache: say which are meant, "
                f"cache.tower({(towers or ['image'])[0]!r})[name, layer]"
            )
        return towers[0]

    def _depth(self, tower: str) -> int:
        found = (re.match(rf"{re.escape(tower)}\.blocks\.(\d+)\.", name) for name in self.cache_dict)
        return max((int(match[1]) + 1 for match in found if match), default=0)


def _of_one_row(save: Callable[..., None]) -> Callable[..., None]:
    """The hook ``save`` on the only row of a batch of one; other tensors stay as they are."""
    return lambda t, hook: save(t[0] if t.dim() and len(t) == 1 else t, hook=hook)


def _refuse_bool(layer: Any) -> None:
    """Raises ShapeMismatch for a bool, which Python would take for layer 0 or 1."""
    if isinstance(layer, (bool, np.bool_)):
        raise ShapeMismatch(f"layer: expected a whole number, got the bool {layer}")


def _shape(out: Any) -> str:
    return f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__


def _has_hooks(point: nn.Module) -> bool:
    return bool(
        point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks
    )
