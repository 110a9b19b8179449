"""Second-order effects of MLP neurons on single images, factored: numbers times directions.

"Interpreting the Second-Order Effects of Neurons in CLIP" (Gandelsman, Efros, Steinhardt 2024), Section 3: the
neuron writes ``p · w_out`` into the residual stream, a later attention head reads it at every token according to its
pattern and writes it on, and the embedding is linear in what heads write. LayerNorms and patterns are frozen at each
image's own run. The whole effect of a neuron on an image is then ``Σ_head s · direction[head, neuron]``: one number per
head, ``s = Σ_token reach · p / σ``, and directions that depend only on the weights. Nothing of size
[image, token, neuron, d] is ever computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import DataError, NoExactSum, ShapeMismatch, UnknownSite
from mmhooks.models.clip.inputs import Model, Vectors, check_batch, check_model
from mmhooks.models.clip.linearized import Frozen, affine, check_norm, statistics
from mmhooks.models.clip.model import HookedCLIP
from mmhooks.models.clip.readout import Readout
from mmhooks.utils.indexing import as_indices, one_place
from mmhooks.utils.modes import evaluating


class Effects(NamedTuple):
    """Effects of one batch, factored: ``coefficients`` [b n c] along ``directions`` [c n e] of c later attention heads.

    ``common``: what all neurons of an image have in common, with ``shared=True``; else None.
    """

    coefficients: Float[Tensor, "b n c"]
    directions: Float[Tensor, "c n e"]
    common: Float[Tensor, "b e"] | None = None

    def vectors(self) -> Float[Tensor, "b n e"]:
        """Multiplies the factors: the effects as vectors."""
        found = torch.einsum("bnc,cne->bne", self.coefficients, self.directions)
        return found if self.common is None else found + self.common[:, None]


class Reached(NamedTuple):
    """What one batch's neurons reach: ``second`` [b n c] along the directions of later heads, ``direct`` [b n p] along those
    of the readout, ``common`` of :class:`Effects`, and the images' embeddings."""

    second: Float[Tensor, "b n c"]
    direct: Float[Tensor, "b n p"]
    common: Float[Tensor, "b e"] | None
    embedding: Float[Tensor, "b e"]


@dataclass(frozen=True, eq=False)
class NeuronPaths:
    """How some neurons of one layer's MLP act on the embedding; made by :func:`neuron_paths`.

    Attributes:
        neurons: their numbers in the MLP, which has ``width`` neurons.
        directions: of each neuron through each attention head of each later block, without σ and pattern.
        direct_directions: of each neuron without a later block.
        shared: see :func:`second_order_effects`.
    """

    model: HookedCLIP
    readout: Readout
    layer: int
    neurons: tuple[int, ...]
    width: int
    directions: Float[Tensor, "c n e"]
    direct_directions: Float[Tensor, "p n e"]
    shared: bool

    @property
    def later(self) -> range:
        return range(self.layer + 1, len(self.readout.blocks))

    @property
    def site(self) -> str:
        """Where the neurons' activations are."""
        return f"image.blocks.{self.layer}.mlp.post"

    def reach(self, pixels: Tensor, baseline: Float[Tensor, "t n"] | None = None) -> Reached:
        """Runs one batch and computes ``Σ_token reach · p / σ`` of every neuron and later head, in evaluation mode.

        Args:
            baseline: activations of the neurons, token by token, that are subtracted from those of the images.
        """
        readout, depth = self.readout, len(self.readout.blocks)
        pixels, prefix = self.model.to_input(pixels), "image.blocks"
        sites = [self.site, f"{prefix}.{depth - 1}.resid_post"]
        sites += [f"{prefix}.{n}.{leaf}" for n in self.later for leaf in ("resid_pre", "attn.pattern")]
        try:
            with evaluating(self.model.model):
                out, cache = self.model.run_with_cache(pixels, sites=sites)
        except UnknownSite as missing:
            raise NoExactSum(f"the image tower has no site {missing.name!r}") from missing
        at = None if readout.positions is None else readout.positions(pixels)
        row = torch.arange(len(pixels), device=pixels.device)
        stream = cache[f"{prefix}.{depth - 1}.resid_post"].float()
        frozen: Frozen = readout.freeze(stream if at is None else stream[row, at][:, None])
        active = cache[self.site].float()[..., list(self.neurons)]
        active = active if baseline is None else active - baseline.to(active)
        rows: list[Tensor] = []
        common = torch.zeros_like(frozen.shift)
        for n in self.later:
            pattern = cache[f"{prefix}.{n}.attn.pattern"].float()
            pattern = pattern if at is None else pattern[row, :, at][:, :, None]
            inverse, mean = statistics(readout.blocks[n].ln_1, cache[f"{prefix}.{n}.resid_pre"].float())
            reaches = [
                torch.einsum("bq,bhqt->bht", frozen.weights[:, p], pattern)
                for p in range(frozen.weights.shape[1])
            ]
            rows += [(reach * inverse[:, None]) @ active for reach in reaches]
            if self.shared:
                common = common + _shared_terms(self, frozen, n, reaches, inverse, mean)
        assert out.image is not None
        token = active if at is None else active[row, at][:, None]
        direct = torch.einsum("bpt,btn->bnp", frozen.weights, token)
        second = torch.cat(rows, 1).transpose(1, 2)
        return Reached(second, direct, common if self.shared else None, out.image.float())


@torch.no_grad()
def second_order_effects(
    model: Model, pixels: Vectors, *, layer: Any, neurons: Any = None, shared: bool = False
) -> Effects:
    """Computes the second-order effects of one batch, factored (see ``Effects.vectors``).

    Args:
        layer: of the MLP; negative from the end. The last one has no attention after it.
        neurons: integers, or a bool mask of the MLP's width; default all.
        shared: what a LayerNorm subtracts as mean. False: the mean of what the neuron wrote, so that an effect is the
            neuron's alone. True, as in the paper's public code: the mean of the image's whole stream, of which each
            neuron gets an even part, as of all biases on the way (``common``).

    Raises:
        ShapeMismatch: a layer or neuron does not exist, or has no attention after it.
        NoExactSum: no module of a block maps to its values alone (timm's), or the tower pools by attention.
        DataError: there is no image.

    >>> import mmhooks as mm
    >>> effects = second_order_effects(mm.load("mini"), torch.randn(2, 3, 64, 64), layer=3, neurons=[0, 1])
    >>> effects.vectors().shape
    torch.Size([2, 2, 256])
    """
    check_model(model)
    check_batch(model, pixels, "image")
    if not len(pixels):
        raise DataError("expected at least one image, got no images")
    paths = neuron_paths(model, layer, neurons, shared=shared)
    found = paths.reach(pixels)
    return Effects(found.second, paths.directions, found.common)


@torch.no_grad()
def neuron_paths(model: Model, layer: Any, neurons: Any = None, *, shared: bool = False) -> NeuronPaths:
    """Prepares what depends only on the weights. Arguments and errors as in :func:`second_order_effects`."""
    check_model(model)
    readout = model.readout("image")
    if readout.pools_by_attention:
        raise NoExactSum(
            "second-order effects: expected an image tower that reads a class token or the average, got one that pools by "
            "attention, with LayerNorms on both sides"
        )
    depth = len(readout.blocks)
    for n in range(depth):
        readout.reader(n)  # raises where values have no map of their own
    layer = one_place(layer, depth, f"layers of a tower of {depth} layers")
    if layer == depth - 1:
        raise ShapeMismatch(
            f"layer: expected one in 0..{depth - 2}, as a neuron acts through later attention, got layer {layer} of {depth}"
        )
    for n in range(layer + 1, depth):
        check_norm(readout.blocks[n].ln_1, f"the first norm of block {n}")
    width = readout.mlp_writer(layer)[0].shape[1]
    what = f"neurons of an MLP of {width} neurons"
    chosen = list(range(width)) if neurons is None else as_indices(neurons, width, what).tolist()
    if not chosen:
        raise ShapeMismatch(f"{what}: expected at least one, got none")
    write = readout.mlp_writer(layer)[0][:, chosen].T  # [n d]
    write = write if shared else write - write.mean(1, keepdim=True)
    maps = _frozen_maps(readout, write)
    directions = torch.cat(
        [_through(readout, n, write, maps, centred=not shared) for n in range(layer + 1, depth)]
    )
    direct = torch.einsum("nd,pde->pne", write, maps)
    return NeuronPaths(model, readout, layer, tuple(chosen), width, directions, direct, shared)


def read_twice(images: Any) -> None:
    """Raises DataError for an iterator of images, which is empty after the first read."""
    if isinstance(images, Iterator):
        raise DataError(
            f"expected images that can be read twice, got a {type(images).__name__}, which is empty after the first read: "
            "give pixels, pairs, or list(batches)"
        )


def _through(
    readout: Readout, n: int, write: Float[Tensor, "n d"], maps: Float[Tensor, "p d e"], *, centred: bool
) -> Float[Tensor, "c n e"]:
    """Maps vectors of the stream before block ``n`` to the embedding through each of its heads, without σ and pattern."""
    gain, _ = affine(readout.blocks[n].ln_1, write)
    w_v, w_o = readout.reader(n)[0], readout.writer(n)[0]
    if centred:
        w_o = w_o - w_o.mean(2, keepdim=True)  # the final LayerNorm's mean, which is linear in the stream
    value = torch.einsum("nd,dhk->hnk", write * gain, w_v)
    return torch.cat([torch.einsum("hnk,hke->hne", value, w_o @ to_embedding) for to_embedding in maps])


def _shared_terms(
    paths: NeuronPaths,
    frozen: Frozen,
    n: int,
    reaches: list[Float[Tensor, "b h t"]],
    inverse: Float[Tensor, "b t"],
    mean: Float[Tensor, "b t"],
) -> Float[Tensor, "b e"]:
    """Computes each neuron's even part of the means and biases on the way through block ``n``.

    The stream before block n is a sum of 1 + 2n components, the one before the readout of 1 + 2·depth; a layer of
    ``width`` neurons is one of them.
    """
    readout, depth = paths.readout, len(paths.readout.blocks)
    of_stream = (1 + 2 * n) * paths.width
    w_v, b_v = readout.reader(n)
    w_o, b_o = readout.writer(n)
    gain, bias = affine(readout.blocks[n].ln_1, mean[..., None].expand(*mean.shape, w_v.shape[0]))
    _, b_mlp = readout.mlp_writer(paths.layer)
    values = torch.stack([gain * b_mlp / paths.width, -gain / of_stream, bias / of_stream])
    values = torch.einsum("id,dhk->ihk", values, w_v)
    values[2] += b_v / of_stream
    total = frozen.shift / ((1 + 2 * depth) * of_stream)
    for p, reach in enumerate(reaches):
        amounts = torch.stack(
            [
                torch.einsum("bht,bt->bh", reach, inverse),
                torch.einsum("bht,bt->bh", reach, mean * inverse),
                reach.sum(2),
            ]
        )
        written = torch.einsum("ibh,ihk,hkd->bd", amounts, values, w_o)
        written = written + frozen.weights[:, p].sum(-1, keepdim=True) * b_o / of_stream
        total = total + written @ frozen.maps[p]
    return total


def _frozen_maps(readout: Readout, like: Tensor) -> Float[Tensor, "p d e"]:
    """The maps of the readout, which depend only on the weights, not on the stream."""
    tokens = 1 if readout.positions is not None else 2
    frozen = readout.freeze(torch.randn(1, tokens, like.shape[1], device=like.device))
    return frozen.maps
