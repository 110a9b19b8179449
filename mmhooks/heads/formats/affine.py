"""The affine part common to all SAE formats, and exact conversions of other libraries' conventions to ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.heads.base import build_without_weights
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.weights import load_strictly
from mmhooks.utils.tensors import read_checkpoint, read_safetensors


@dataclass(frozen=True)
class Affine:
    """Weights of ``pre = (x - b_pre) W_enc^T + b_enc`` and ``x' = f W_dec + b_pre``.

    Each method converts weights of another convention to this form without changing the results.
    """

    W_enc: Float[Tensor, "n d"]
    b_enc: Float[Tensor, " n"]
    W_dec: Float[Tensor, "n d"]
    b_pre: Float[Tensor, " d"]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], where: Path) -> Affine:
        """From tensors under our four names; shapes are checked against ``W_enc``."""
        shape = tuple(weights["W_enc"].shape)
        n, d = shape if len(shape) == 2 else (-1, -1)
        for name, expected in {"W_enc": (n, d), "b_enc": (n,), "W_dec": (n, d), "b_pre": (d,)}.items():
            if tuple(weights[name].shape) != expected:
                raise MMHooksError(
                    f"{where}: for an encoder of {n} features and width {d}, {name} must be {list(expected)}, "
                    f"got {list(weights[name].shape)}"
                )
        return cls(**{name: weights[name].float() for name in ("W_enc", "b_enc", "W_dec", "b_pre")})

    def encoder_unshifted(self) -> Affine:
        """From an encoder without pre-bias: ``x W^T + b = (x - b_pre) W^T + (b + W b_pre)``."""
        return replace(self, b_enc=self.b_enc + self.W_enc @ self.b_pre)

    def row_norms_folded(self) -> Affine:
        """From an SAE that selects features by ``pre |W_dec|`` and decodes with ``W_dec / |W_dec|``."""
        norm = self.W_dec.norm(dim=1)
        rows = norm[:, None].clamp_min(1e-8)
        return replace(self, W_enc=self.W_enc * rows, b_enc=self.b_enc * norm, W_dec=self.W_dec / rows)

    def input_scaled(self, scale: float, mean: Tensor | float = 0.0) -> Affine:
        """From an SAE that works on ``(x - mean) scale`` and returns ``x' / scale + mean``."""
        return replace(
            self, W_enc=self.W_enc * scale, W_dec=self.W_dec / scale, b_pre=self.b_pre / scale + mean
        )

    def build(
        self,
        kind: str,
        *,
        where: Path,
        source: str,
        options: Options,
        extra: Mapping[str, Tensor] | None = None,
        about: Any = None,
        **config: Any,
    ) -> SAE:
        """Builds the head of this ``kind`` with these weights; every shape is checked."""
        tensors = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_pre": self.b_pre}
        n, d = self.W_enc.shape
        config = {"d_in": d, "n_features": n, "normalize_input": options.normalize_input or False} | config
        head = build_without_weights(kind, config, where, name=options.name or "sae")
        assert isinstance(head, SAE)
        state = {k: v.float().contiguous() for k, v in (tensors | dict(extra or {})).items()}
        load_strictly(head, state, str(where))
        head.info = {"from": source} | ({"cfg": about} if about is not None else {})
        return head.eval()


@dataclass(frozen=True)
class Options:
    """What a file may not specify and the caller knows.

    Attributes:
        name: of the head (default "sae").
        normalize_input: whether raw vectors are given unit norm (or ``"layer_norm"``) first; in formats of other
            libraries they are not, unless the file says so.
        kind, k, threshold: the activation, if the file does not specify it.
    """

    name: str | None = None
    normalize_input: bool | Literal["layer_norm"] | None = None
    kind: str | None = None
    k: int | None = None
    threshold: float | None = None


def scaling_of(name: str | None, affine: Affine, options: Options, where: Path) -> tuple[Affine, Options]:
    """Converts ``normalize_activations`` of SAELens and ViT-Prisma to our form."""
    name = name or "none"
    if name == "none":
        return affine, options
    if name == "constant_norm_rescale":  # rows of norm sqrt(d): unit norm, and a scale in the weights
        return affine.input_scaled(affine.W_enc.shape[1] ** 0.5), replace(options, normalize_input=True)
    if name == "layer_norm":
        return affine, replace(options, normalize_input="layer_norm")
    raise MMHooksError(
        f"{where}: normalize_activations={name!r} scales the input by statistics that are not in the file; fold "
        "them into the weights with SAELens first (sae.fold_activation_norm_scaling_factor or fold_activation_whitening)"
    )


def take_tensors(
    state: Mapping[str, Tensor], names: Mapping[str, str], where: Path, ignored: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors called ``names`` (ours -> theirs), in fp32; missing and unexpected ones raise an error."""
    missing = sorted(theirs for theirs in names.values() if theirs not in state)
    surplus = sorted(state.keys() - set(names.values()) - set(ignored))
    if missing or surplus:
        faults = [f"missing {', '.join(missing)}"] * bool(missing) + [
            f"unexpected {', '.join(surplus)}"
        ] * bool(surplus)
        raise MMHooksError(f"{where}: {'; '.join(faults)}; it holds {', '.join(sorted(state)) or 'nothing'}")
    return {ours: state[theirs].float() for ours, theirs in names.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DamagedFile: it cannot be read, or is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(
            f"{path}: expected a JSON file, got one that cannot be read ({error}); fetch it again"
        ) from error
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, or of a torch checkpoint, of which only tensors are unpickled.

    Raises:
        MissingWeights, DamagedFile: as in :mod:`mmhooks.utils.tensors`.
    """
    return read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
