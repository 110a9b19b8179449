"""All places of one model, its own sites and those of attached heads, and the planning of operations on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite, WrongHead
from mmhooks.hooks.across_sites import CrossLike, check_cross_edit, check_cross_gradient
from mmhooks.hooks.between_sites import MapLike
from mmhooks.hooks.edits import At, Edit, Zero
from mmhooks.hooks.features import FeatureSet
from mmhooks.hooks.kinds import check_kind, is_kind
from mmhooks.hooks.program import Binding, CaptureOp, EditOp, GradOp, Hook, Op
from mmhooks.hooks.sites import Pattern, Site, SiteMap, describe, match
from mmhooks.hooks.splice import HEAD_PARTS, Attachment, HeadSite, check_splice
from mmhooks.hooks.widths import known_widths

Place = Site | HeadSite
HookFn = Callable[..., Tensor | None]
Planned = tuple[list[Op], list[Binding]]


class Places:
    """The sites of a model and of its attached heads, found by name, glob, predicate or tower."""

    def __init__(self, sites: SiteMap) -> None:
        self.sites = sites
        self.attachments: dict[str, Attachment] = {}  # "image.embed.sae" -> head at its site

    # -- heads -----------------------------------------------------------------------------------------

    def attach(
        self,
        head: Any,
        at: Sequence[Pattern],
        name: str,
        *,
        error_term: bool,
        splice: bool,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[str]:
        missing = [part for part in HEAD_PARTS if not hasattr(head, part)]
        if missing:
            raise MMHooksError(
                f"{type(head).__name__} is not a head: missing {', '.join(missing)}; see mmhooks.hooks.splice.HeadLike"
            )
        if isinstance(head, MapLike):
            return self._attach_between(head, at, name, error_term=error_term, splice=splice, shapes=shapes)
        if isinstance(head, CrossLike):
            return self._attach_across(head, at, name, error_term=error_term, splice=splice, shapes=shapes)
        sites = list(dict.fromkeys(site for pattern in at for site in self.sites.find(pattern)))
        widths = known_widths(self.sites)
        for site in sites:
            _check_width(site, head.d_in, f"{name!r} reads", widths, shapes)
        return self._add([Attachment(head, name, site, error_term, splice) for site in sites])

    def named_by(self, head: Any, name: str) -> list[str]:
        """The sites that a head names; a negative layer counts from the last block.

        Raises:
            MMHooksError: it names none.
        """
        named = getattr(head, "sites", ())
        if not named:
            said = getattr(head, "info", {}).get("site_missing", "")
            raise MMHooksError(
                f"head {name!r} names no site: pass at=, such as at='image.blocks.3.resid_post'"
                + (f"; {said}" if said else "")
            )
        return [_from_the_last(site, self.sites.canonical) for site in named]

    def _attach_between(
        self,
        head: Any,
        at: Sequence[Pattern],
        name: str,
        *,
        error_term: bool,
        splice: bool,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[str]:
        """Attaches a head that reads the first of two sites and writes the second."""
        found = [self.sites.find(pattern) for pattern in at]
        if len(found) != 2 or any(len(sites) != 1 for sites in found) or found[0] == found[1]:
            raise MMHooksError(
                f"head {name!r} maps one site to another: expected at=(the site that it reads, the site that it writes), got "
                f"{[site.name for sites in found for site in sites]}; for an MLP these are often ln_2 and mlp_out of a block"
            )
        source, target, widths = found[0][0], found[1][0], known_widths(self.sites)
        _check_width(source, head.d_in, f"{name!r} reads", widths, shapes)
        _check_width(target, head.d_out, f"{name!r} writes", widths, shapes)
        return self._add([Attachment(head, name, target, error_term, splice, (source,))])

    def _attach_across(
        self,
        head: Any,
        at: Sequence[Pattern],
        name: str,
        *,
        error_term: bool,
        splice: bool,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[str]:
        """Attaches a head that reads and writes several sites at once, in the order of its widths."""
        sites = tuple(site for pattern in at for site in self.sites.find(pattern))
        if len(sites) != len(head.widths) or len(set(sites)) != len(sites):
            raise MMHooksError(
                f"head {name!r} reads {len(head.widths)} sites together: expected as many in at=, in their order, got "
                f"{[site.name for site in sites]}"
            )
        widths = known_widths(self.sites)
        for site, width in zip(sites, head.widths, strict=True):
            _check_width(site, width, f"{name!r} reads", widths, shapes)
        return self._add([Attachment(head, name, site, error_term, splice, sites) for site in sites])

    def _add(self, attachments: Sequence[Attachment]) -> list[str]:
        keys = {f"{a.site.name}.{a.name}": a for a in attachments}
        taken = [key for key in keys if key in self.attachments]
        if taken:
            raise MMHooksError(
                f"{taken[0]!r} is already attached; detach it first, or attach with another name="
            )
        self.attachments |= keys
        return list(keys)

    def detach(self, what: Any) -> None:
        """Detaches by head object, head name, or ``site.name``."""
        gone = [key for key, a in self.attachments.items() if what is a.head or what in (a.name, key)]
        if not gone:
            raise UnknownSite(str(what), self.attachments, where="the attached heads")
        for key in gone:
            del self.attachments[key]

    @property
    def head_sites(self) -> dict[str, HeadSite]:
        return {site.name: site for a in self.attachments.values() for site in a.sites()}

    # -- finding ---------------------------------------------------------------------------------------

    def listed(self, pattern: Pattern | None = None) -> list[Place]:
        """Canonical sites and head sites; native paths only if the pattern matches nothing else."""
        if pattern is None:
            return [*self.sites.canonical.values(), *self.head_sites.values()]
        return self.find(pattern)

    def find(self, pattern: Pattern) -> list[Place]:
        heads = self.head_sites
        if isinstance(pattern, str) and pattern in heads:
            return [heads[pattern]]
        if isinstance(pattern, str) and pattern in self.attachments:
            return [heads[f"{pattern}.latents"]]
        found: list[Place] = [heads[name] for name in match(pattern, heads)]
        own = match(pattern, self.sites.canonical)
        if own or not found:
            try:
                found = [*self.sites.find(pattern), *found]
            except UnknownSite:
                raise UnknownSite(
                    describe(pattern), [*(p.name for p in self.listed()), *self.sites.native]
                ) from None
        return found

    def latents(self, edit: Edit, attachments: Iterable[Attachment], where: str) -> list[Place]:
        """The latents sites, among the given attached heads, that an edit's features belong to."""
        known = list(attachments)
        features = edit.features
        if isinstance(features, FeatureSet):
            fit = [a for a in known if a.head.n_features == features.n_features]
            fit = [a for a in fit if not features.head or a.head.id == features.head]
            if known and not fit:  # raises and names the head that the features are for
                features.check(head=known[0].head.id, n_features=known[0].head.n_features)
        else:
            fit = known
        if not fit:
            raise MMHooksError(
                f"{edit.label} selects features of a head, but no head is attached {where}: call model.attach(head, "
                "at=[...]) first, or name the site with at="
            )
        if len({id(a.head) for a in fit}) > 1:
            names = ", ".join(f"{a.site.name}.{a.name}" for a in fit)
            raise MMHooksError(
                f"{edit.label} fits several heads ({names}): choose one with at=, e.g. at={names.split(',')[0]!r}"
            )
        return [self.head_sites[f"{a.site.name}.{a.name}.latents"] for a in fit]

    def targets(self, edit: Edit, at: At) -> list[Place]:
        """The places of an edit: those of ``at=`` in any of its forms, or the heads that its features fit."""
        if at is None:
            return self.latents(edit, self.attachments.values(), "to the model")
        if isinstance(at, str) and at in self.sites.towers and at not in self.sites.canonical:
            return self.latents(
                edit, [a for a in self.attachments.values() if a.site.tower == at], f"in tower {at!r}"
            )
        if not isinstance(at, str) and not callable(at):
            return list(dict.fromkeys(place for one in at for place in self.targets(edit, one)))
        return list(dict.fromkeys(self._latents_at(edit, place) for place in self.find(at)))

    def _latents_at(self, edit: Edit, place: Place) -> Place:
        """Resolves a FeatureSet given at a plain site to the latents of its head there."""
        features = edit.features
        if isinstance(place, HeadSite):
            if isinstance(features, FeatureSet):
                head = place.attachment.head
                features.check(head=head.id, n_features=head.n_features)
            return place
        if isinstance(features, FeatureSet):
            here = [a for a in self.attachments.values() if a.site is place]
            if here:
                return self.latents(edit, here, f"at {place.name!r}")[0]
            if features.head:
                raise WrongHead(
                    f"{features!r} holds features of head {features.head}, and no head is attached at "
                    f"{place.name!r}: call model.attach(head, at=[{place.name!r}]) first"
                )
        return place

    # -- planning --------------------------------------------------------------------------------------

    def plan_edit(self, edit: Edit, *, mask_at: At = None) -> Planned:
        places = self.targets(edit, edit.at if mask_at is None else mask_at)
        for place in places:
            self._check_edit(edit, place)
        binding = Binding(edit.label, tuple(p.name for p in places))
        return [EditOp(place, edit, binding) for place in _with_beside(places)], [binding]

    def plan_mask(self, mask: Any) -> Planned:
        """``mask=``: features, or ``{site or tower: features}``; counts as one edit, fired once any of its places ran."""
        if not isinstance(mask, Mapping):
            return self.plan_edit(Zero(mask))
        if not mask:
            raise MMHooksError(
                "mask: expected {site or tower: features}, got {}; leave it out to mask nothing"
            )
        ops: list[Op] = []
        for where, features in mask.items():
            edit = Zero(features)
            here = [a for a in self.attachments.values() if a.site.name == where]
            places = self.latents(edit, here, f"at {where!r}") if here else self.targets(edit, where)
            for place in places:
                self._check_edit(edit, place)
            ops += [EditOp(place, edit, _UNBOUND) for place in _with_beside(places)]
        binding = Binding("mask", tuple(dict.fromkeys(op.target.name for op in ops)))
        return [EditOp(op.target, op.act, binding) for op in ops], [binding]

    def _check_edit(self, edit: Edit, place: Place) -> None:
        _ = (
            edit.chosen_tokens
        )  # invalid tokens raise on entry, and compiled code finds the positions already read
        if is_kind(edit.tokens) and place.site.kinds is not None:
            check_kind(place.site.kinds, edit.tokens, place.name)
        if isinstance(place, HeadSite):
            check_splice(place.attachment, place.leaf)
            check_cross_edit(place.attachment, place.leaf)
            if place.leaf in ("pre", "latents"):
                edit.check_width(place.attachment.head.n_features, torch.empty(0), Hook(place.name))

    def plan_hook(self, pattern: Pattern, fn: HookFn, kind: type[EditOp] | type[GradOp]) -> Planned:
        places = self.find(pattern)
        for place in places:
            if isinstance(place, HeadSite) and kind is EditOp:
                check_splice(place.attachment, place.leaf)
                check_cross_edit(place.attachment, place.leaf)
            elif isinstance(place, HeadSite):
                check_cross_gradient(place.attachment, place.leaf)
        name = getattr(fn, "__name__", type(fn).__name__)
        label = f"{'backward ' if kind is GradOp else ''}hook {name!r} on {describe(pattern)!r}"
        binding = Binding(label, tuple(p.name for p in places))
        reached = _with_beside(places) if kind is EditOp else places
        return [kind(p, fn, binding) for p in reached], [binding]

    def plan_capture(
        self,
        pattern: Pattern,
        recorder: Callable[[Hook, Binding], Callable[[Tensor], Tensor]],
        *,
        detached: bool,
    ) -> Planned:
        places = self.find(pattern)
        binding = Binding(f"cache of {describe(pattern)!r}", tuple(p.name for p in places))
        hooks = [Hook(p.name, tokens=p.site.tokens, kinds=p.site.kinds) for p in places]
        records = [recorder(hook, binding) for hook in hooks]
        return [CaptureOp(p, record, binding, detached) for p, record in zip(places, records, strict=True)], [
            binding
        ]


def _from_the_last(site: str, known: Iterable[str]) -> str:
    """The site with a negative layer number replaced by the one that it stands for.

    >>> _from_the_last("image.blocks.-2.ln_1", ["image.blocks.0.ln_1", "image.blocks.1.ln_1", "image.blocks.2.ln_1"])
    'image.blocks.1.ln_1'
    """
    words = site.split(".")
    at = next((i for i, word in enumerate(words) if word.startswith("-") and word[1:].isdigit()), None)
    if at is None:
        return site
    stem = words[:at]
    layers = {
        name.split(".")[at] for name in known if name.split(".")[:at] == stem and len(name.split(".")) > at
    }
    words[at] = str(sum(layer.isdigit() for layer in layers) + int(words[at]))
    return ".".join(words)


def _check_width(
    site: Site, expected: int, what: str, widths: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises if a site is known to carry vectors of another width, from a run or from the architecture."""
    shape = shapes.get(site.name)
    known = {f"shape {shape}": shape[site.width]} if shape else {}
    if site.name in widths:
        known[f"width {widths[site.name]}"] = widths[site.name]
    for carried, width in known.items():
        if width != expected:
            raise ShapeMismatch(
                f"head {what} vectors of width {expected}, site {site.name!r} carries {carried}; "
                f"attach it at a site of width {expected}"
            )


def merge_plans(parts: Iterable[Planned]) -> Planned:
    """Concatenates the operations of several plans, and their bindings."""
    parts = list(parts)
    return [op for ops, _ in parts for op in ops], [b for _, bindings in parts for b in bindings]


def _with_beside(places: Iterable[Place]) -> list[Place]:
    """The places and those that receive the same tensor, so that an edit changes all of them consistently."""
    return [one for place in places for one in (place, *place.beside)]


_UNBOUND = Binding("mask", ())
