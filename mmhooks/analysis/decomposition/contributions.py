"""Direct contributions of layers, attention heads and tokens to an embedding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.decomposition.origin import Origin, origin_of
from mmhooks.analysis.results import Records
from mmhooks.errors import NoExactSum, ShapeMismatch, UnknownSite
from mmhooks.models.clip.inputs import Model, Vectors, check_batch, check_directions, check_model
from mmhooks.models.clip.linearized import Frozen
from mmhooks.models.clip.model import HookedCLIP
from mmhooks.models.clip.readout import Readout
from mmhooks.utils.modes import evaluating


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Direct contributions to the embeddings of a batch; they sum to ``embedding``.

    Attributes:
        embedding: the model's embedding, raw unless ``normalize=True``.
        initial: contribution of the stream before the first block: patches (or tokens), class token, positions.
        heads: of every attention head; ``heads.sum(2)`` are those of the attention layers.
        mlps: of every MLP.
        pool: of the MLP inside an attention pooling (SigLIP); None if there is none.
        tokens: of every head by attended token, if requested; ``tokens.sum(3)`` is ``heads``.
        scores: ``tokens @ against.T``, if requested; computed without ``tokens``.
        class_token: of every head, what it gets from the token that the embedding is read from (the class token of an
            image, the end of a text), if requested: one of ``tokens``, computed without the others.
        error: per row, ``‖sum - embedding‖ / ‖embedding‖``.
        origin: tower, normalize, model and weights; functions that take means check it.
    """

    embedding: Float[Tensor, "b e"]
    initial: Float[Tensor, "b e"]
    heads: Float[Tensor, "b l h e"]
    mlps: Float[Tensor, "b l e"]
    pool: Float[Tensor, "b e"] | None = None
    tokens: Float[Tensor, "b l h t e"] | None = None
    scores: Float[Tensor, "b l h t m"] | None = None
    class_token: Float[Tensor, "b l h e"] | None = None
    error: Float[Tensor, " b"] = field(default_factory=lambda: torch.zeros(0), repr=False)
    origin: Origin = field(kw_only=True, repr=False)

    @property
    def attention(self) -> Float[Tensor, "b l e"]:
        """Contribution of every attention layer."""
        return self.heads.sum(2)

    @property
    def layers(self) -> Float[Tensor, "b l e"]:
        """Contribution of every block: its attention layer and its MLP."""
        return self.attention + self.mlps

    @property
    def total(self) -> Float[Tensor, "b e"]:
        """The sum of all contributions: ``embedding`` up to rounding."""
        rest = 0 if self.pool is None else self.pool
        return self.initial + self.layers.sum(1) + rest

    def normalized(self) -> Decomposition:
        """The decomposition of the unit-norm embedding: everything divided by the norm of its row."""
        norm = self.embedding.norm(dim=-1).clamp_min(1e-12)
        scaled = {
            f.name: value / norm.view(-1, *[1] * (value.dim() - 1))
            for f in fields(self)
            if f.name not in ("error", "origin") and (value := getattr(self, f.name)) is not None
        }
        return replace(self, **scaled, origin=replace(self.origin, normalize=True))

    def shares(self) -> dict[str, Tensor]:
        """``⟨contribution, embedding⟩ / ‖embedding‖²`` of ``initial [b]``, ``heads [b l h]``, ``mlps [b l]`` and, if
        there is one, ``pool [b]``: the fraction of the embedding's length that each contributes. They sum to 1."""
        direction = self.embedding / self.embedding.pow(2).sum(-1, keepdim=True).clamp_min(1e-24)
        named = {"initial": self.initial, "heads": self.heads, "mlps": self.mlps, "pool": self.pool}
        return {
            name: torch.einsum("b...e,be->b...", value, direction)
            for name, value in named.items()
            if value is not None
        }

    def table(self) -> Records:
        """Mean shares, one row per block."""
        shares = {name: value.mean(0) for name, value in self.shares().items()}
        return shares_table(shares)


def shares_table(shares: dict[str, Tensor]) -> Records:
    """Makes the rows: "initial", per block its attention and MLP with the strongest head, and "pool"."""
    rows = [
        {"part": "initial", "attention": "", "mlp": "", "all": float(shares["initial"]), "strongest head": ""}
    ]
    for n, (heads, mlp) in enumerate(zip(shares["heads"], shares["mlps"], strict=True)):
        best = int(heads.argmax())
        attention, own = float(heads.sum()), float(mlp)
        top = f"{best} ({float(heads[best]):.3f})"
        rows.append(
            {
                "part": f"block {n}",
                "attention": attention,
                "mlp": own,
                "all": attention + own,
                "strongest head": top,
            }
        )
    if "pool" in shares:
        rows.append(
            {"part": "pool", "attention": "", "mlp": "", "all": float(shares["pool"]), "strongest head": ""}
        )
    return Records(rows)


@torch.no_grad()
def decompose_batch(
    model: Model,
    inputs: Vectors,
    *,
    tower: str = "image",
    tokens: bool = False,
    against: Vectors | None = None,
    class_token: bool = False,
) -> Decomposition:
    """Decomposes one batch in one forward pass, in evaluation mode; arguments as in ``mm.decompose``."""
    check_model(model)
    check_batch(model, inputs, tower)
    if not len(inputs):
        raise ShapeMismatch("decompose: expected at least one row, got a batch of no rows")
    readout = model.readout(tower)
    if class_token and readout.positions is None:
        raise NoExactSum(
            f"class_token=True: expected a tower whose embedding is read from one token, got an {tower} tower that pools "
            "all of them: split heads by token, tokens=True"
        )
    with evaluating(model.model):
        kept, embedding, allowed = _run(
            model, readout, inputs, by_token=tokens or against is not None, class_token=class_token
        )
    if against is not None:
        check_directions(against, embedding.shape[1], "against=")
        against = against.to(embedding)
    frozen = readout.freeze(kept.pop("stream"))
    depth, n_heads = len(readout.blocks), readout.n_heads
    share = frozen.shift / (1 + 2 * depth)
    initial = frozen.linear(kept.pop("initial")) + share
    pool = (
        None if readout.project is None or not readout.nonlinear_site else readout.project(kept.pop("aside"))
    )
    b, e = embedding.shape
    heads, mlps = embedding.new_empty(b, depth, n_heads, e), embedding.new_empty(b, depth, e)
    split: list[Tensor] = []
    scored: list[Tensor] = []
    own: list[Tensor] = []
    reach = frozen.weights.sum(-1)
    for n in range(depth):
        w_o, b_o = readout.writer(n)
        constant = (torch.einsum("bp,d,pde->be", reach, b_o, frozen.maps) + share) / n_heads
        heads[:, n] = frozen.heads(kept.pop(f"z{n}"), w_o) + constant[:, None]
        mlps[:, n] = frozen.linear(kept.pop(f"mlp{n}")) + share
        if tokens or against is not None:
            pattern, v = kept.pop(f"pattern{n}"), kept.pop(f"v{n}")
            share_of_token = constant / v.shape[1]
            if tokens:
                split.append(_by_token(frozen, pattern, v, w_o, share_of_token, None))
            if against is not None:
                scored.append(_by_token(frozen, pattern, v, w_o, share_of_token, against))
        if class_token:
            pattern, v = kept.pop(f"own_pattern{n}"), kept.pop(f"own_v{n}")
            own.append(_by_token(frozen, pattern, v, w_o, constant / int(kept["n_tokens"]), None)[:, :, 0])
    found = Decomposition(
        embedding,
        initial,
        heads,
        mlps,
        pool,
        torch.stack(split, 1) if tokens else None,
        torch.stack(scored, 1) if against is not None else None,
        torch.stack(own, 1) if class_token else None,
        origin=origin_of(model, tower, False, inputs),
    )
    error = (found.total - embedding).norm(dim=-1) / embedding.norm(dim=-1).clamp_min(1e-12)
    if error.is_meta:  # shapes without values, on which costs are counted: nothing to check
        return replace(found, error=error)
    _check(found, error, against, allowed)
    return replace(found, error=error)


# -- one forward pass ----------------------------------------------------------------------------------------


def _run(
    model: HookedCLIP, readout: Readout, inputs: Tensor, *, by_token: bool, class_token: bool
) -> tuple[dict[str, Tensor], Float[Tensor, "b e"], float]:
    """Runs the model and returns what the sites wrote at the tokens that are read, the embedding, and the error that
    rounding may cause."""
    inputs = model.to_input(inputs)
    at = None if readout.positions is None else readout.positions(inputs)
    row = torch.arange(len(inputs), device=inputs.device)
    kept: dict[str, Tensor] = {}
    dtypes: set[torch.dtype] = set()  # of the activations; under autocast not those of the weights

    def keep(name: str, axis: int | None) -> Any:
        """Makes a hook that keeps the tokens that are read along ``axis``; None keeps all tokens."""

        def hook(value: Tensor, *, hook: Any) -> None:
            if at is None or axis is None:
                chosen = value.clone() if name.startswith("v") else value  # v is a slice of q, k and v
            else:
                chosen = value[row, at][:, None] if axis == 1 else value[row, :, at][:, :, None]
            dtypes.add(value.dtype)
            kept[name] = chosen.detach().float()

        return hook

    def keep_to_itself(name: str) -> Any:
        """Makes a hook that keeps the attention that the token that is read pays to itself, ``[b h 1 1]``."""

        def hook(value: Tensor, *, hook: Any) -> None:
            kept[name] = value[row, :, at, at][:, :, None, None].detach().float()
            kept["n_tokens"] = torch.tensor(value.shape[-1])

        return hook

    prefix, last = f"{readout.tower}.blocks", len(readout.blocks) - 1
    places: list[tuple[str, Any]] = [
        (f"{prefix}.0.resid_pre", keep("initial", 1)),
        (f"{prefix}.{last}.resid_post", keep("stream", 1)),
    ]
    if readout.nonlinear_site:
        places.append((readout.nonlinear_site, keep("aside", None)))
    for n in range(last + 1):
        places.append((f"{prefix}.{n}.attn.z", keep(f"z{n}", 1)))
        places.append((f"{prefix}.{n}.mlp_out", keep(f"mlp{n}", 1)))
        if by_token:
            places.append((f"{prefix}.{n}.attn.pattern", keep(f"pattern{n}", 2)))
            places.append((f"{prefix}.{n}.attn.v", keep(f"v{n}", None)))
        if class_token:
            places.append((f"{prefix}.{n}.attn.pattern", keep_to_itself(f"own_pattern{n}")))
            places.append((f"{prefix}.{n}.attn.v", keep(f"own_v{n}", 1)))
    encode = model.encode_image if readout.tower == "image" else model.encode_text
    try:
        with model.hooks(fwd_hooks=places):
            embedding = encode(inputs)
    except UnknownSite as missing:
        raise NoExactSum(
            f"the {readout.tower} tower has no site {missing.name!r}: its attention does not show what a head writes"
            + (" by token (no fused attention)" if by_token or class_token else "")
        ) from missing
    exact = dtypes | {embedding.dtype} <= {torch.float32, torch.float64}
    return kept, embedding.detach().float(), 1e-4 if exact else 5e-2


def _by_token(
    frozen: Frozen,
    pattern: Float[Tensor, "b h q t"],
    v: Float[Tensor, "b t h k"],
    w_o: Float[Tensor, "h k d"],
    share: Float[Tensor, "b e"],
    against: Float[Tensor, "m e"] | None,
) -> Float[Tensor, "b h t m"]:
    """Splits every head by attended token, in the embedding space or along ``against``; ``share``: each token's part of
    what belongs to no component."""
    total = (share if against is None else share @ against.T)[:, None, None]
    for p, to_embedding in enumerate(frozen.maps):
        reach = torch.einsum("bq,bhqt->bht", frozen.weights[:, p], pattern)
        out = w_o @ (to_embedding if against is None else to_embedding @ against.T)
        weighted = v.transpose(1, 2) * reach[..., None]
        total = total + torch.einsum("bhtk,hkm->bhtm", weighted, out)
    return total


def _check(found: Decomposition, error: Float[Tensor, " b"], against: Tensor | None, allowed: float) -> None:
    """Raises NoExactSum unless the contributions sum to the embedding. They do not if a block adds something that no
    site shows, or if an edit acts behind the sites that are read."""
    worst = float(error.max())
    if not worst <= allowed:
        raise NoExactSum(
            f"contributions: expected them to sum to the embedding within a relative error of {allowed:g}, got "
            f"{worst:.2g}: a block of this tower adds something that attn.z and mlp_out do not show, or an open edit "
            "acts behind them (attn.head_out, attn_out, resid_mid); if so, decompose outside of it"
        )
    scale = found.heads.abs().amax()
    for split, whole in (
        (found.tokens, found.heads),
        (found.scores, None if against is None else found.heads @ against.to(found.heads).T),
    ):
        if split is None or whole is None:
            continue
        gap = float(
            (split.sum(3) - whole).abs().amax() / torch.maximum(scale, whole.abs().amax()).clamp_min(1e-12)
        )
        if not gap <= 10 * allowed:
            raise NoExactSum(
                f"tokens: expected them to sum to their heads within a relative error of {10 * allowed:g}, got "
                f"{gap:.2g}: this attention changes z between pattern and output projection (an inner norm), so heads "
                "have no sum over tokens"
            )


def concatenate(parts: Iterable[Decomposition]) -> Decomposition:
    parts = list(parts)
    joined = {}
    for f in fields(Decomposition):
        if f.name == "origin":
            continue
        values = [getattr(part, f.name) for part in parts]
        joined[f.name] = None if values[0] is None else torch.cat(values)
    return Decomposition(**joined, origin=parts[0].origin)
