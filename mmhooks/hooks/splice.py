"""Splices sparse heads into the graph: one encode, edits in feature space, and only the difference decoded.

With features ``f = enc(x)`` edited to ``f'``, the splice replaces ``x`` by

    ``out = x + s (f' - f) W_dec``            (with the error term; ``x`` itself if nothing changed)
    ``out = s dec(f')``                       (``error_term=False``)

where ``s = 1``. For a head with ``normalize_input``, ``f = enc(x / |x|)`` and ``s = |x|``; with ``"layer_norm"``,
``f = enc((x - mean) / s)`` with the standard deviation ``s``, and ``dec`` adds the mean at the end. Because the decoder
is linear this equals ``dec(f') + (x - dec(f))``, without either decode.

A head that reads one site and writes another, such as a transcoder, is spliced in by
:mod:`mmhooks.hooks.between_sites`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import NoDecoder, ShapeMismatch
from mmhooks.hooks.edits import Edit
from mmhooks.hooks.program import CaptureOp, EditOp, GradOp, Op, Target, apply, describe_tensor, watch
from mmhooks.hooks.sites import Site
from mmhooks.hooks.steps import halves

LEAVES = ("pre", "latents", "recon", "error")
HEAD_PARTS = ("d_in", "n_features", "has_decoder", "normalize_input", "id", "pre", "encode", "decode")


@runtime_checkable
class HeadLike(Protocol):
    """The interface that the splice needs of a head. ``W_dec [n d]`` only if ``has_decoder``.

    Optional: ``encode_topk(x) -> (values [*b k], indices [*b k])`` lets masks touch only the ``k`` active features;
    ``activate(pre) -> f`` lets edits act on pre-activations; ``bare()`` returns the head for vectors that are already
    normalised, as the splice passes them.
    """

    name: str
    d_in: int
    n_features: int
    has_decoder: bool
    normalize_input: bool | Literal["layer_norm"]

    @property
    def id(self) -> str: ...
    def pre(self, x: Tensor) -> Tensor: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, f: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Attachment:
    """A head at a site. ``splice=False``: edits change only the head's latents, not the model's output.

    Attributes:
        sources: the sites that the head reads, if they are not just ``site``.
    """

    head: Any
    name: str
    site: Site
    error_term: bool = True
    splice: bool = True
    sources: tuple[Site, ...] = ()

    @cached_property
    def beside(self) -> tuple[Attachment, ...]:
        """The same head at the other sites that edits of its site must reach; none for heads between sites."""
        return () if self.sources else tuple(replace(self, site=site) for site in self.site.beside)

    def sites(self) -> list[HeadSite]:
        leaves = LEAVES if self.head.has_decoder else LEAVES[:2]
        return [HeadSite(f"{self.site.name}.{self.name}.{leaf}", self.site, self, leaf) for leaf in leaves]


@dataclass(frozen=True, eq=False)
class HeadSite:
    """A place inside an attached head: ``image.embed.sae.latents``."""

    name: str
    site: Site
    attachment: Attachment
    leaf: str

    @property
    def tower(self) -> str:
        return self.site.tower

    @property
    def sources(self) -> tuple[Site, ...]:
        """The sites that the head reads, if they are not just this one."""
        return self.attachment.sources

    @property
    def beside(self) -> tuple[HeadSite, ...]:
        """The same place at the other sites that edits of its site must reach."""
        return tuple(HeadSite(self.name, other.site, other, self.leaf) for other in self.attachment.beside)

    @property
    def layout(self) -> str:
        """The site's layout with vectors last; for ``pre`` and ``latents`` the last dimension is features."""
        words = self.site.layout.split()
        words.append(words.pop(self.site.width) if words else "")
        return " ".join(words if self.leaf in LEAVES[2:] else [*words[:-1], "feature"])


def union_of(chosen: Sequence[Int[Tensor, " _"]]) -> Int[Tensor, " u"]:
    """The union of index tensors that are sorted and distinct, sorted and distinct as well."""
    return chosen[0] if len(chosen) == 1 else torch.cat([*chosen]).unique()


class HeadStep:
    """One run of a head at its site: encode, edit, read, splice."""

    def __init__(self, op: Op) -> None:
        assert isinstance(op.target, HeadSite)
        self.attachment = op.target.attachment
        self.site, self.head = self.attachment.site, self.attachment.head
        # The step normalises vectors itself, because it needs their scale to map back.
        self.bare = self.head.bare() if hasattr(self.head, "bare") else self.head
        self.view = self.site.vectors
        self.ops: dict[str, list[Op]] = {leaf: [] for leaf in LEAVES}
        self.all: list[Op] = []
        self.add(op)

    def fits(self, target: Target) -> bool:
        return isinstance(target, HeadSite) and target.attachment is self.attachment

    def add(self, op: Op) -> None:
        self.ops[op.target.leaf].append(op)
        self.all.append(op)

    def seal(self) -> None:
        """Determines, once per context, how much of the head must be computed."""
        self.edits = edits = _edits(self.all)
        reads = _reads(self.all)
        self.detached = not edits and all(op.detached for op in reads)
        # Whether the head's output enters the model's flow even if functions only read it.
        self.flows = not self.attachment.error_term or any(isinstance(op.act, Edit) for op in edits)
        own = [op.act for op in _edits(self.ops["latents"])]
        # If all edits name their features, only those columns of f are touched.
        named = bool(own) and all(isinstance(e, Edit) and e.index is not None for e in own)
        only_latents = len(edits) == len(own)
        self.limited = bool(edits) and all(op.limited for op in edits)
        self.reads: HeadStep | None = None  # the step without its edits, for when all of them are inactive
        if self.limited and reads:
            self.reads = type(self)(reads[0])
            for op in reads[1:]:
                self.reads.add(op)
            self.reads.seal()
        self.union = union_of([e.index for e in own]) if named and only_latents else None
        self.active_only = (
            named
            and only_latents
            and not reads
            and self.attachment.error_term
            and self.attachment.splice
            and hasattr(self.head, "encode_topk")
            and all(e.keeps_zero for e in own)
        )

    def __call__(self, raw: Tensor) -> Tensor:
        view = self.view
        x = raw if view is None else view.show(raw)
        self._check(x)
        if self.limited and all(op.inactive(x) for op in self.edits):
            return raw if self.reads is None else self.reads(raw)
        for op in self.all:
            if isinstance(op, CaptureOp) or (isinstance(op, EditOp) and not op.inactive(x)):
                op.binding.fired = True
        if self.detached:
            with torch.no_grad():
                out = self._run(x.detach())
            return raw
        out = self._active(x) if self.active_only else self._run(x)
        if out is x:
            return raw
        if self.limited and not self.attachment.error_term:
            out = self._only_halves(out, x)
        return out if view is None else view.back(raw, out)

    def _only_halves(self, out: Tensor, x: Tensor) -> Tensor:
        """Without an error term every row is decoded anew; rows that no edit applies to are restored from ``x``."""
        named = {op.act.guidance for op in self.edits if op.limited and not op.inactive(x)}
        parts = halves(len(x), self.site.name)
        if parts is None or "both" in named:
            return out
        return torch.cat([out[rows] if half in named else x[rows] for half, rows in parts])

    def _check(self, x: Tensor) -> None:
        """Checks the width and device of the vectors that the head reads and writes."""
        head = self.head
        if x.shape[-1] != head.d_in:
            raise ShapeMismatch(
                f"head {self.attachment.name!r} reads vectors of width {head.d_in}, site {self.site.name!r} "
                f"carries {describe_tensor(x)}; attach it at a site of width {head.d_in}"
            )
        weight = _weight(head)
        if weight is not None and weight.device != x.device:
            raise ShapeMismatch(
                f"head {self.attachment.name!r} is on {weight.device}, site {self.site.name!r} carries {describe_tensor(x)}; "
                f"move it with head.to({str(x.device)!r})"
            )

    def _input(self, x: Tensor) -> Tensor:
        """The vectors that the head reads, for the site's own ``x``."""
        return x

    def _decode(self, f: Tensor, unit: Tensor) -> Tensor:
        """The vectors that the head makes of the features ``f`` of ``unit``."""
        return self.head.decode(f)

    def _prepared(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The head's input, scale ``s`` (None: 1) and shift (None: 0), in its dtype unless autocast is on."""
        head, weight = self.head, _weight(self.head)
        if weight is not None and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        if not head.normalize_input:
            return x, None, None
        if head.normalize_input == "layer_norm":
            return head.scaled(x)
        scale = x.norm(dim=-1, keepdim=True)
        return x / scale.clamp_min(torch.finfo(x.dtype).tiny), scale, None

    # -- the K active features -------------------------------------------------------------------------

    def _active(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Applies edits that keep zeros at zero, computing only the active features."""
        unit, scale, _ = self._prepared(self._input(x))
        values, indices = self.bare.encode_topk(unit)
        new = values
        for op in self.ops["latents"]:
            new = op.act.on_active(new, indices, self.head.n_features, op.hook)
        change = new - values
        if torch.compiler.is_compiling():
            delta = _gather(change, indices, self.head.W_dec)
        else:
            rows = change.reshape(-1, change.shape[-1])
            where = rows.detach().nonzero()
            if len(where) == 0:
                return x
            delta = _gather_rows(rows, indices.reshape(rows.shape), where, self.head.W_dec)
            delta = delta.view(*unit.shape[:-1], -1)
        return x + (delta if scale is None else delta * scale).to(x.dtype)

    # -- all features ----------------------------------------------------------------------------------

    def _run(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        unit, scale, shift = self._prepared(self._input(x))
        before, after = self._encode(unit)
        after, change = self._latents(before, after)
        recon_ops, error_ops = self.ops["recon"], self.ops["error"]
        scaled = (lambda t: t) if scale is None else (lambda t: t * scale)
        back = scaled if shift is None else (lambda t: t * scale + shift)
        whole = not self.attachment.error_term and bool(self.edits)
        if recon_ops or error_ops or (whole and self.attachment.splice):
            recon = back(self._decode(after, unit)).to(x.dtype)
            error = x - (recon if after is before else back(self._decode(before, unit)).to(x.dtype))
            recon_after = self._edit_and_read(recon_ops, recon)
            error_after = self._edit_and_read(error_ops, error)
        else:
            recon = recon_after = error = error_after = x
        if not self.attachment.splice:
            return x
        if whole:
            return recon_after
        out = x if change is None else x + scaled(change).to(x.dtype)
        if recon_after is not recon:
            out = out + (recon_after - recon)
        if error_after is not error:
            out = out + (error_after - error)
        return out

    def _encode(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Features before any edit, and after edits of pre-activations."""
        ops = self.ops["pre"]
        if not ops:
            f = self.bare.encode(unit)
            return f, f
        pre = self.bare.pre(unit)
        new = self._edit_and_read(ops, pre)
        if new is pre:
            f = self.bare.encode(unit)
            return f, f
        return self.head.activate(pre), self.head.activate(new)

    def _latents(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor | None]:
        """Applies the edits to ``after``; returns it with ``(f' - f) W_dec``, or None if ``f'`` equals ``f``."""
        ops = self.ops["latents"]
        edits, reads = _edits(ops), _reads(ops)
        columns = None
        if self.union is not None:
            columns = self.union.to(before.device)
            old = new = after.index_select(-1, columns)
            for op in edits:
                new = op.act.on_columns(new, columns, op.hook)
            full = bool(reads or self.ops["recon"] or self.ops["error"] or not self.attachment.error_term)
            final = after.index_copy(-1, columns, new.to(after.dtype)) if full else after
        else:
            final = after
            for op in edits:
                final = apply(op, final, flows=self.flows)
            old, new = before, final
        if any(not op.detached for op in reads):
            # A separate graph node inside the flow: its gradients are those of the edited features.
            final = final.view_as(final)
            old, new, columns = before, final, None
        self._read(reads, final)
        if new is old or not self.head.has_decoder or not self.attachment.splice:
            return final, None
        difference = new - old
        if not torch.compiler.is_compiling() and not difference.requires_grad and not bool(difference.any()):
            return final, None
        weight = self.head.W_dec if columns is None else self.head.W_dec.index_select(0, columns)
        return final, difference.to(weight.dtype) @ weight

    def _edit_and_read(self, ops: list[Op], value: Tensor) -> Tensor:
        for op in _edits(ops):
            value = apply(op, value, flows=self.flows)
        self._read(_reads(ops), value)
        return value

    def _read(self, reads: list[Op], value: Tensor) -> None:
        watch(value, (op for op in reads if isinstance(op, GradOp)))
        for op in reads:
            if isinstance(op, CaptureOp):
                op.act(value)


def _edits(ops: Sequence[Op]) -> list[EditOp]:
    return [op for op in ops if isinstance(op, EditOp)]


def _reads(ops: Sequence[Op]) -> list[Op]:
    return [op for op in ops if not isinstance(op, EditOp)]


def _weight(head: Any) -> Tensor | None:
    """A weight of the head, whose dtype and device its input must have; None if it exposes none."""
    if head.has_decoder:
        return head.W_dec
    parameters = getattr(head, "parameters", None)
    return None if parameters is None else next(iter(parameters()), None)


def check_splice(attachment: Attachment, leaf: str) -> None:
    """Raises if an edit of this leaf could not reach the model."""
    head = attachment.head
    if attachment.splice and not head.has_decoder:
        raise NoDecoder(
            f"head {attachment.name!r} ({head.id}) has no decoder, so an edit of its features cannot be spliced into "
            f"{attachment.site.name!r}; fit a decoder for it, or attach it with splice=False and read the edited "
            f"features from a cache, or apply the edit to features directly: Zero(...)(head.encode(x))"
        )
    if leaf == "pre" and not hasattr(head, "activate"):
        raise NoDecoder(
            f"head {attachment.name!r} ({head.id}) has no activate(pre), so its pre-activations can be read but not "
            f"edited; edit {attachment.site.name}.{attachment.name}.latents"
        )


def _gather(change: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    flat = change.reshape(-1, change.shape[-1]).to(weight.dtype)
    bags = torch.nn.functional.embedding_bag(
        indices.reshape(flat.shape), weight, per_sample_weights=flat, mode="sum"
    )
    return bags.view(*change.shape[:-1], weight.shape[-1])


def _gather_rows(change: Tensor, indices: Tensor, where: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``W_dec`` for the changed entries only, weighted and summed per vector."""
    rows, columns = where.unbind(-1)
    starts = torch.searchsorted(rows, torch.arange(len(change), device=rows.device))
    return torch.nn.functional.embedding_bag(
        indices[rows, columns],
        weight,
        offsets=starts,
        per_sample_weights=change[rows, columns].to(weight.dtype),
        mode="sum",
    )
