"""A tower's last steps as one linear map of its residual stream, with input-dependent factors held fixed.

Final LayerNorm, pooling and projection are linear once the LayerNorm's σ and the weights of an attention pooling are
frozen at their values for this input. :class:`Frozen` is that map; it is exact at that
input: ``frozen(stream)`` is the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmhooks.errors import NoExactSum
from mmhooks.hooks.shadow import own_forward


@dataclass(frozen=True, eq=False)
class Frozen:
    """``embedding[b] = Σ_p Σ_t weights[b, p, t] · stream[b, t] @ maps[p] + shift[b]``.

    Attributes:
        weights: of a token in the pooling over σ; one ``p`` for each attention head of the pooling, else a single one.
        maps: from the residual stream to the embedding, with the LayerNorm's gain.
        shift: the part of no component: LayerNorm's mean and bias, and the biases behind it.
    """

    weights: Float[Tensor, "b p t"]
    maps: Float[Tensor, "p d e"]
    shift: Float[Tensor, "b e"]

    def __call__(self, stream: Float[Tensor, "b t d"]) -> Float[Tensor, "b e"]:
        return self.linear(stream) + self.shift

    def linear(self, stream: Float[Tensor, "b t d"]) -> Float[Tensor, "b e"]:
        """What ``stream``, written into the residual stream, adds to the embedding."""
        return torch.einsum("bpd,pde->be", self.weights @ stream, self.maps)

    def heads(self, z: Float[Tensor, "b t h k"], w_o: Float[Tensor, "h k d"]) -> Float[Tensor, "b h e"]:
        """What every attention head adds; tokens are summed first, to avoid one vector per token and head."""
        pooled = torch.einsum("bpt,bthk->bphk", self.weights, z)
        total = 0.0
        for p, to_embedding in enumerate(self.maps):
            total = total + torch.einsum("bhk,hkd->bhd", pooled[:, p], w_o) @ to_embedding
        return total  # type: ignore[return-value]

    def normed(self, norm: nn.Module, value: Float[Tensor, "b e"]) -> Frozen:
        """Followed by a LayerNorm, which sees ``value``."""
        gain, bias = affine(norm, value)
        inverse, mean = statistics(norm, value)
        return Frozen(
            self.weights * inverse[:, None, None],
            self.maps * gain,
            (self.shift - mean[:, None]) * inverse[:, None] * gain + bias,
        )

    def projected(
        self, matrix: Float[Tensor, "e f"] | None, bias: Float[Tensor, " f"] | None = None
    ) -> Frozen:
        """Followed by ``@ matrix + bias``."""
        maps, shift = self.maps, self.shift
        if matrix is not None:
            maps, shift = maps @ matrix, shift @ matrix
        return Frozen(self.weights, maps, shift if bias is None else shift + bias)


def pooled(
    norm: nn.Module,
    stream: Float[Tensor, "b t d"],
    weights: Float[Tensor, "b p t"],
    maps: Float[Tensor, "p d e"] | None = None,
) -> Frozen:
    """``Σ_p Σ_t weights[b, p, t] · norm(stream)[b, t] @ maps[p]``, frozen; one identity map without ``maps``."""
    gain, bias = affine(norm, stream)
    inverse, mean = statistics(norm, stream)
    scaled = weights * inverse[:, None]
    # gain * (x - mean) / σ + bias: the mean's part and the bias belong to no component.
    biases = bias[None] if maps is None else torch.einsum("d,pde->pe", bias, maps)
    maps = torch.diag(gain)[None] if maps is None else gain[:, None] * maps
    means = torch.einsum("bpt,bt->bp", scaled, mean)
    return Frozen(scaled, maps, weights.sum(-1) @ biases - means @ maps.sum(1))


def check_norm(norm: nn.Module, what: str) -> None:
    """Raises NoExactSum unless a norm is an Identity, or a LayerNorm that computes what its weight, bias and epsilon imply.

    Only these are read later, so the effect of an adapter around them would be silently ignored.
    """
    if isinstance(norm, nn.Identity):
        return
    if isinstance(norm, nn.LayerNorm):
        width, like = norm.normalized_shape[-1], next(norm.parameters(), torch.zeros(()))
        probe = torch.linspace(-1, 2, 2 * width, device=like.device, dtype=like.dtype).view(2, width)
        with torch.no_grad():
            out = own_forward(norm)(probe).float()
            gain, bias = affine(norm, probe)
            inverse, mean = statistics(norm, probe.float())
            said = (probe.float() - mean[:, None]) * inverse[:, None] * gain.float() + bias.float()
        if like.is_meta or torch.allclose(out, said, rtol=0.02, atol=0.02 * float(said.abs().max())):
            return
    raise NoExactSum(
        f"{what} is a {type(norm).__name__} that does not compute a LayerNorm of its weight and bias: expected "
        "one, so that contributions through it can be separated; merge an adapter into the model first (merge_and_unload of peft)"
    )


def affine(norm: nn.Module, like: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """A LayerNorm's gain and bias; 1 and 0 where there is none."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    d = like.shape[-1]
    gain = like.new_ones(d) if weight is None else weight.detach().to(like.dtype)
    return gain, like.new_zeros(d) if bias is None else bias.detach().to(like.dtype)


def statistics(norm: nn.Module, x: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """``1 / σ`` and mean that a LayerNorm uses at ``x``; 1 and 0 for an Identity."""
    if isinstance(norm, nn.Identity):
        return x.new_ones(x.shape[:-1]), x.new_zeros(x.shape[:-1])
    assert isinstance(norm, nn.LayerNorm)
    variance, mean = torch.var_mean(x, dim=-1, correction=0)
    return (variance + norm.eps).rsqrt(), mean
