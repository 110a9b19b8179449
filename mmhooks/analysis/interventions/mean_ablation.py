"""Mean-ablation of attention heads and MLPs, of direct contributions or live, and its cost in accuracy.

The paper ("Interpreting CLIP's Image Representation via Text-Based Decomposition", Section 3.3) replaces a *direct
contribution* by its mean over a data set, while later layers still read the original; :func:`ablate_direct` does that.
:func:`mean_edits` ablates live: later layers read the mean too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.decomposition.contributions import Decomposition
from mmhooks.analysis.decomposition.dataset import (
    Inputs,
    MeanDecomposition,
    batches,
    check_means,
)
from mmhooks.analysis.decomposition.origin import Origin, origin_of
from mmhooks.errors import DataError, MMHooksError, ShapeMismatch, WrongOrigin
from mmhooks.hooks.edits import Edit, Mean
from mmhooks.models.clip.inputs import Model, Vectors, check_directions, check_model
from mmhooks.utils.indexing import as_choice
from mmhooks.utils.modes import evaluating
from mmhooks.utils.progress import rate_bar

if TYPE_CHECKING:
    Means, Live = MeanDecomposition, Mapping[str, Tensor]
else:
    Means = Live = Any  # checked where they are used, with a better message


@dataclass(frozen=True)
class Parts:
    """The components of a tower that an ablation replaces: attention heads as ``(layer, head)``, MLPs as layers.

    Either may also be a bool mask, ``[layers, heads]`` or ``[layers]``; duplicates count once.

    Attributes:
        initial: also the stream before the first block.
        tokens: what of each head is replaced: "all" that it writes, or only what it gets from the class token, "cls". An
            MLP has no such parts: it acts directly at the class token only.

    Raises:
        ShapeMismatch: neither integers nor a mask is given, heads are not pairs, or ``tokens`` is something else.

    >>> Parts("some", heads=[(3, 1)], mlps=[False, True]).mlps
    (1,)
    """

    name: str
    heads: Any = ()
    mlps: Any = ()
    initial: bool = False
    tokens: str = "all"
    _shapes: tuple[tuple[int, ...], ...] = field(
        default=(), init=False, repr=False, compare=False
    )  # of the masks

    def __post_init__(self) -> None:
        what = f"of ablation {self.name!r}"
        if self.tokens not in ("all", "cls"):
            raise ShapeMismatch(f'tokens {what}: expected "all" or "cls", got {self.tokens!r}')
        heads, mlps = as_choice(self.heads, f"heads {what}"), as_choice(self.mlps, f"mlps {what}")
        masks = tuple(tuple(given.shape) for given in (heads, mlps) if given.dtype == torch.bool)
        object.__setattr__(self, "_shapes", masks)
        object.__setattr__(self, "heads", _named(heads, 2, f"heads {what}: expected pairs (layer, head)"))
        object.__setattr__(
            self, "mlps", tuple(n for (n,) in _named(mlps, 1, f"mlps {what}: expected layers"))
        )

    @property
    def of_class_token(self) -> bool:
        """Whether it replaces what heads get from the class token, and not all that they write."""
        return self.tokens == "cls" and bool(self.heads)

    @property
    def has_live(self) -> bool:
        """Whether it exists live: not for the stream that every layer reads, nor for a part of what a head writes."""
        return not (self.initial or self.of_class_token)

    def check(self, depth: int, n_heads: int) -> None:
        """Raises ShapeMismatch for a component that a tower of ``depth`` layers with ``n_heads`` heads does not have."""
        bad: list[Any] = [
            pair for pair in self.heads if not (0 <= pair[0] < depth and 0 <= pair[1] < n_heads)
        ]
        bad += [n for n in self.mlps if not 0 <= n < depth]
        bad += [f"a mask of shape {s}" for s in self._shapes if s != (depth, n_heads)[: len(s)]]
        if bad:
            raise ShapeMismatch(
                f"ablation {self.name!r}: expected heads= and mlps= among layers 0 to {depth - 1} of {n_heads} attention "
                f"heads each, got {bad[:4]}"
            )


def paper_parts(depth: int, n_heads: int, *, last: int = 4) -> list[Parts]:
    """Lists the paper's ablations: all MLPs; attention of all layers except the ``last`` ones; both, so that only the
    direct effect of the last layers' attention heads is left (with the initial stream ablated too); and each layer.

    >>> [part.name for part in paper_parts(6, 6)[:3]]
    ['MLPs', 'attention before the last 4', 'all but attention of the last 4']
    """

    def heads(layers: range) -> tuple[tuple[int, int], ...]:
        return tuple((n, h) for n in layers for h in range(n_heads))

    early, every = range(max(0, depth - last)), range(depth)
    return [
        Parts("MLPs", mlps=tuple(every)),
        Parts(f"attention before the last {last}", heads=heads(early)),
        Parts(f"all but attention of the last {last}", heads(early), tuple(every), initial=True),
        *(Parts(f"attention of layer {n}", heads=heads(range(n, n + 1))) for n in every),
        *(Parts(f"MLP of layer {n}", mlps=(n,)) for n in every),
    ]


def cumulative_parts(depth: int, n_heads: int) -> list[Parts]:
    """Lists ablations of ever more layers' attention, from the first layer on: Figure 2 of the paper.

    >>> [len(part.heads) for part in cumulative_parts(3, 6)]
    [6, 12, 18]
    """
    return [
        Parts(
            f"attention up to layer {last}", heads=[(n, h) for n in range(last + 1) for h in range(n_heads)]
        )
        for last in range(depth)
    ]


def class_token_parts(depth: int, n_heads: int) -> list[Parts]:
    """Lists the class token's ablations of the paper's public code (``compute_ablations.py``): what all heads get from
    the class token; and this together with all MLPs.

    >>> [(part.tokens, len(part.mlps)) for part in class_token_parts(3, 6)]
    [('cls', 0), ('cls', 3)]
    """
    heads = tuple((n, h) for n in range(depth) for h in range(n_heads))
    return [
        Parts("class token", heads, tokens="cls"),
        Parts("MLPs and class token", heads, tuple(range(depth)), tokens="cls"),
    ]


class SiteMeans(dict[str, Tensor]):
    """Mean activations by site, with their origin; see :func:`site_means`."""

    def __init__(self, means: Mapping[str, Tensor], origin: Origin, n: int) -> None:
        super().__init__(means)
        self.origin, self.n = origin, n


def ablate_direct(parts: Decomposition, means: Means, what: Parts) -> Float[Tensor, "b e"]:
    """Replaces the direct contributions of ``what`` in the embeddings by their means, without running the model again.

    Raises:
        ShapeMismatch: the tower does not have a component, or what heads get from the class token is to be replaced and
            parts or means were made without ``class_token=True``.
        WrongOrigin: not means, or means of another tower, model or normalization than the parts.
    """
    means = check_means(means)
    means.check_for(parts)
    depth, n_heads = parts.heads.shape[1:3]
    what.check(depth, n_heads)
    out = parts.embedding
    if what.heads:
        chosen = _mask(what, depth, n_heads).to(out)
        mean, own = (means.heads, parts.heads) if what.tokens == "all" else _of_class_token(means, parts)
        out = out + torch.einsum("lh,blhe->be", chosen, mean.to(out) - own)
    if what.mlps:
        out = out + (means.mlps.to(out) - parts.mlps)[:, list(what.mlps)].sum(1)
    if what.initial:
        out = out + (means.initial.to(out) - parts.initial)
    return out


def site_means(
    model: Model,
    inputs: Tensor | Inputs,
    sites: Sequence[str],
    *,
    tower: str = "image",
    batch_size: int = 32,
    progress: bool = False,
) -> SiteMeans:
    """Computes mean activations over a data set at each site, token by token, in evaluation mode.

    Raises:
        UnknownSite: there is no such site. DataError: there is no input. ShapeMismatch: numbers of tokens differ.
    """
    sums: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    n = 0

    def add(value: Tensor, *, hook: object) -> None:
        name, part = hook.name, value.detach().double().sum(0)  # type: ignore[attr-defined]
        if name in sums and sums[name].shape != part.shape:
            raise ShapeMismatch(
                f"{name}: expected rows of shape {tuple(sums[name].shape)}, as before, got {tuple(part.shape)}"
            )
        sums[name] = part if name not in sums else sums[name] + part
        kinds[name] = value.dtype

    check_model(model)
    if isinstance(sites, str):
        raise MMHooksError(f"sites: expected a list of names, got one name: give [{sites!r}]")
    encode = model.encode_image if tower == "image" else model.encode_text
    bar = rate_bar("means of sites", None, unit=f"{tower}s", show=progress)
    with evaluating(model.model), bar as advance, torch.no_grad():
        for batch in batches(model, inputs, tower, batch_size, 0):
            with model.hooks(fwd_hooks=[(site, add) for site in sites]):
                encode(model.to_input(batch))
            n += len(batch)
            advance(len(batch))
    if not n:
        raise DataError("expected at least one input, got no means: the data set has no images or texts")
    means = {name: (total / n).to(kinds[name]) for name, total in sums.items()}
    return SiteMeans(means, origin_of(model, tower, False, inputs), n)


def ablation_sites(what: Parts, *, tower: str = "image") -> list[str]:
    """Lists the sites that a live ablation of ``what`` edits: ``attn.head_out`` and ``mlp_out`` of its layers."""
    heads = [f"{tower}.blocks.{n}.attn.head_out" for n in sorted({n for n, _ in what.heads})]
    return heads + [f"{tower}.blocks.{n}.mlp_out" for n in sorted(what.mlps)]


def mean_edits(what: Parts, means: Live, *, tower: str = "image") -> list[Edit]:
    """Makes edits that replace the outputs of heads and MLPs by their means, for ``model.hooks(*edits)``.

    Args:
        means: from :func:`site_means`, at the sites of :func:`ablation_sites`.

    Raises:
        ShapeMismatch: ``initial`` cannot be ablated live, as every layer reads it, nor can a part of a head.
        WrongOrigin: the means are not by site, are of another tower, or lack a site.

    >>> heads = Parts("two heads", heads=((5, 0), (5, 3)))
    >>> edits = mean_edits(heads, site_means(model, pairs, ablation_sites(heads)))    # doctest: +SKIP
    >>> with model.hooks(*edits): z = model.encode_image(pixels)                       # doctest: +SKIP
    """
    if not what.has_live:
        got = (
            "the initial stream, which all layers read" if what.initial else "only a part of what heads write"
        )
        raise ShapeMismatch(
            f"live ablation: expected heads and MLPs, got {what.name!r} with {got}: use ablate_direct"
        )
    sites = ablation_sites(what, tower=tower)
    check_sites(means, sites, tower)
    edits: list[Edit] = []
    for site in sites:
        layer = int(site.split(".")[2])
        if site.endswith("mlp_out"):
            edits.append(Mean(mean=means[site], at=site))
        else:
            edits.append(Mean([h for n, h in what.heads if n == layer], mean=means[site], at=site))
    return edits


def head_importance(
    parts: Decomposition, direction: Vectors, means: Means | None = None
) -> Float[Tensor, "l h"]:
    """Computes the mean contribution of every attention head along a direction ``[e]``, such as a class's text embedding.

    With ``means`` of other data, the result is the difference from these means.

    Raises:
        ShapeMismatch: not one direction in the embedding space.
        WrongOrigin: not means, or means of another tower, model or normalization than the parts.
    """
    heads = parts.heads.mean(0)
    check_directions(
        direction[None] if isinstance(direction, Tensor) else direction, heads.shape[2], "direction"
    )
    if means is not None:
        others = check_means(means)
        others.check_for(parts)
        heads = heads - others.heads.to(heads)
    return heads @ normalize(direction.to(heads), dim=0)


def check_sites(means: Any, sites: Sequence[str], tower: str) -> None:
    """Raises WrongOrigin unless ``means`` are by site, of this tower, and have all of ``sites``."""
    if not isinstance(means, Mapping):
        raise WrongOrigin(
            f"expected means by site, got a {type(means).__name__}: live ablations need site_means(model, data, sites); "
            "means of direct contributions are for ablate_direct"
        )
    if isinstance(means, SiteMeans) and means.origin.tower != tower:
        raise WrongOrigin(f"expected means of the {tower} tower, got means of the {means.origin.tower} tower")
    missing = [site for site in sites if site not in means]
    if missing:
        raise WrongOrigin(
            f"expected means at {len(set(sites))} sites, got none at {', '.join(missing[:3])}: "
            "make them by site_means(model, data, ablation_sites(what))"
        )


def _named(
    given: Bool[Tensor, "..."] | Int[Tensor, "..."], width: int, expected: str
) -> tuple[tuple[int, ...], ...]:
    """Converts integers or a mask of ``width`` dimensions to tuples of ``width`` numbers, without duplicates."""
    if given.dtype == torch.bool:
        if given.ndim != width:
            raise ShapeMismatch(
                f"{expected} or a mask of {width} dimensions, got a mask of shape {tuple(given.shape)}"
            )
        given = given.nonzero()
    elif width == 1 and given.ndim < 2:
        given = given.reshape(-1, 1)
    elif given.numel() and (width == 1 or given.ndim != 2 or given.shape[1] != width):
        raise ShapeMismatch(f"{expected}, got integers of shape {tuple(given.shape)}")
    return tuple(dict.fromkeys(map(tuple, given.reshape(-1, width).tolist())))


def _of_class_token(
    means: MeanDecomposition, parts: Decomposition
) -> tuple[Float[Tensor, "l h e"], Float[Tensor, "b l h e"]]:
    if means.class_token is None or parts.class_token is None:
        lacking = "means" if means.class_token is None else "parts"
        raise ShapeMismatch(
            f'tokens="cls": expected contributions of the class token, got {lacking} without them: make them by '
            "mm.decompose(..., class_token=True)"
        )
    return means.class_token, parts.class_token


def _mask(what: Parts, depth: int, n_heads: int) -> Bool[Tensor, "l h"]:
    mask = torch.zeros(depth, n_heads, dtype=torch.bool)
    for n, h in what.heads:
        mask[n, h] = True
    return mask
