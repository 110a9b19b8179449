"""Sites: named places where a tensor flows, and the map from names to taps."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite
from mmhooks.hooks.dispatch import registry
from mmhooks.hooks.encoder_kinds import EncoderTokens, ImageTokens
from mmhooks.hooks.taps import ModuleInput, ModuleOutput, Tap

_WILD = frozenset("*?[")
_MAP = re.compile("2[dD](Model)?$")
Pattern = str | Callable[[str], bool]


@dataclass(frozen=True, eq=False)
class View:
    """A site that shows part of a tap's tensor, or another layout of it.

    ``show(raw) -> value`` and ``back(raw, value) -> raw`` with ``back(raw, show(raw))`` equal to ``raw``.
    """

    show: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Site:
    """One named place.

    Attributes:
        name: ``image.blocks.3.attn.z``.
        tap, leaf: how the tensor is reached.
        axis: the dimension that an edit's features index: the last, the channels of a map, or the attention heads.
        tokens: the token dimension, None if there is none; used if the tensor has enough dimensions.
        layout: names of the dimensions, for the docs.
        kinds: what tells the kinds of tokens, in towers of encoders; :meth:`SiteMap.add` sets it.
        view: set if the site is another layout of the tap's tensor.
        width: the dimension of the vectors that a head reads: the last, or the channels of a map.
        beside: sites of other modules that receive the same tensor from outside, such as a ControlNet its
            conditioning. Edits of the site reach them too; caches and backward hooks see only this site.
    """

    name: str
    tap: Tap
    leaf: str = ""
    axis: int = -1
    tokens: int | None = 1
    layout: str = ""
    view: View | None = None
    width: int = -1
    beside: tuple[Site, ...] = ()
    kinds: EncoderTokens | None = None

    @property
    def site(self) -> Site:
        """Itself; for a place inside a head, this is the site where the head is attached."""
        return self

    @property
    def tower(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_map(self) -> bool:
        """Whether its vectors lie on a spatial grid, in whichever dimension the channels are."""
        return "height" in self.layout.split()

    @property
    def vectors(self) -> View | None:
        """The view with vectors along the last dimension; for a map, one vector per position."""
        if self.width == -1:
            return self.view
        show = self.view.show if self.view else lambda raw: raw
        back = self.view.back if self.view else lambda raw, new: new
        return View(
            lambda raw: self.vectors_last(show(raw)), lambda raw, new: back(raw, new.movedim(-1, self.width))
        )

    def vectors_last(self, value: Tensor) -> Tensor:
        """A value of the site with its vectors along the last dimension.

        Raises:
            ShapeMismatch: the site was assumed to be a feature map and carries something else.
        """
        if self.width == -1:
            return value
        if value.dim() <= -self.width:
            raise ShapeMismatch(
                f"site {self.name!r}: expected a feature map ({self.layout}), got shape {tuple(value.shape)}"
            )
        return value.movedim(self.width, -1)


def feature_map(name: str, tap: Tap) -> Site:
    """A site with channels first, ``[batch channel height width]``; features and vectors run along the channels."""
    return Site(name, tap, axis=-3, width=-3, tokens=None, layout="batch channel height width")


def _native(path: str, module: nn.Module, tap: Tap) -> Site:
    """A site named by a module's path. Modules named ``...2d`` return maps with channels first, by torch convention."""
    named = any(_MAP.search(kind.__name__) for kind in type(module).__mro__)
    return feature_map(path, tap) if named else Site(path, tap)


@dataclass
class SiteMap:
    """The sites of one model by name: the canonical ones first, then every native module path.

    >>> from torch import nn
    >>> sites = SiteMap(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> [s.name for s in sites.find("*")]
    ['0', '1']
    """

    root: nn.Module
    canonical: dict[str, Site] = field(default_factory=dict)
    towers: set[str] = field(default_factory=set)
    widths: dict[str, int] = field(default_factory=dict)  # of sites whose width hooks/widths.py cannot infer
    tokens: dict[str, EncoderTokens] = field(
        default_factory=dict
    )  # of encoders, by tower; recorded before its sites
    _native: dict[str, Site] | None = None
    _parents: dict[nn.Module, tuple[nn.Module, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for parent in self.root.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._parents.setdefault(child, (parent, name))

    # -- building --------------------------------------------------------------------------------------

    def output(self, module: nn.Module, *, first: bool = False) -> Tap:
        """The tap of a module's output, shared by all of its sites."""
        tap = registry.shared(ModuleOutput(module, first))
        tap.first, tap.named = tap.first or first, True
        return tap

    def input(self, module: nn.Module, keyword: str = "") -> Tap:
        """The tap of a module's first input."""
        return registry.shared(ModuleInput(module, keyword))

    def add(self, site: Site, *, kinds: bool = True) -> None:
        """Adds a canonical site, with the process-wide tap of its place.

        ``kinds=False``: its tokens are not those of the tower, such as the queries of a pooling.
        """
        self.towers.add(site.tower)
        held = self._kinds_at(site) if kinds else None
        self.canonical[site.name] = replace(site, tap=registry.shared(site.tap), kinds=held)

    def _kinds_at(self, site: Site) -> EncoderTokens | None:
        """What tells the kinds of tokens at a site: patches alone in feature maps and before other tokens join them."""
        if site.is_map:
            return ImageTokens() if site.tower == "image" else None
        held = self.tokens.get(site.tower)
        if held is None or site.tokens is None:
            return None
        return ImageTokens() if "patch" in site.layout.split() else held

    # -- finding ---------------------------------------------------------------------------------------

    @property
    def native(self) -> dict[str, Site]:
        """Every module path, except those inside nn.MultiheadAttention, which never calls its children."""
        if self._native is None:
            silent = tuple(
                f"{path}." for path, m in self.root.named_modules() if isinstance(m, nn.MultiheadAttention)
            )
            self._native = {
                path: _native(path, module, registry.shared(ModuleOutput(module, named=False)))
                for path, module in self.root.named_modules()
                if path and not (silent and path.startswith(silent)) and not isinstance(module, nn.ModuleList)
            }
        return self._native

    def names(self) -> list[str]:
        return list(self.canonical)

    def find(self, pattern: Pattern) -> list[Site]:
        """Sites by exact name, glob or predicate; canonical names hide native ones.

        Raises:
            UnknownSite: nothing matches; the message lists close matches.
            MMHooksError: a module of these sites was replaced since the model was hooked, say by a LoRA layer.
        """
        if isinstance(pattern, str):
            exact = self.canonical.get(pattern) or self.native.get(pattern)
            if exact is not None:
                return self._in_place([exact])
        for known in (self.canonical, self.native):
            names = match(pattern, known)
            if names:
                return self._in_place([known[name] for name in names])
        raise UnknownSite(describe(pattern), [*self.canonical, *self.native])

    def _in_place(self, sites: list[Site]) -> list[Site]:
        """Returns the sites after checking that their modules are still part of the model."""
        seen: set[nn.Module] = set()
        for site in sites:
            module = site.tap.owner
            while module in self._parents and module not in seen:
                seen.add(module)
                parent, name = self._parents[module]
                now = parent._modules.get(name)
                # A compiled module still runs the original.
                if now is not module and getattr(now, "_orig_mod", None) is not module:
                    raise MMHooksError(
                        f"site {site.name!r}: expected {name!r} of a {type(parent).__name__} to be the "
                        f"{type(module).__name__} that was hooked, got a {type(now).__name__}: the model was changed since "
                        "(LoRA, quantisation, ...); hook it again, e.g. mm.HookedCLIP(model.model)"
                    )
                module = parent
        return sites


class SiteList(list[str]):
    """Names of sites; printed with their shapes, or with the names of their dimensions if no shape was seen yet.

    >>> SiteList({"image.embed": "batch d", "text.embed": "batch d"}, {"image.embed": (2, 256)})
    image.embed  (2, 256)
    text.embed   batch d
    """

    def __init__(self, layouts: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(layouts)
        self.layouts = layouts
        self.shapes = {name: shapes[name] for name in layouts if name in shapes}

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        lines = (f"{name:{width}}  {self.shapes.get(name) or self.layouts[name]}".rstrip() for name in self)
        return "\n".join(lines)


def match(pattern: Pattern, names: Collection[str]) -> list[str]:
    """The names that a glob or a predicate selects, in their order.

    >>> match("image.blocks.*.attn.z", ["image.blocks.0.attn.z", "image.blocks.0.ln_1"])
    ['image.blocks.0.attn.z']
    """
    if isinstance(pattern, str):
        if not _WILD.intersection(pattern):
            return [pattern] if pattern in names else []
        return [name for name in names if fnmatchcase(name, pattern)]
    return [name for name in names if pattern(name)]


def describe(pattern: Pattern) -> str:
    return pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
