"""Dimensions of CLIP's joint space as features of a conditioner of another width.

The joint space is scored dimension by dimension, but a pipeline conditions on hidden states before the text projection.
Where both are equally wide the indices can be carried over as they are, probably as in the paper. Otherwise a joint
dimension is a *direction* of the conditioner: a column of ``W_proj`` reads it, a row of its pseudo-inverse moves it.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmhooks.errors import NotFinite, ShapeMismatch


class JointDirections(nn.Module):
    """Reads joint-space dimensions of hidden states, ``f = h W``, and writes their changes back, ``h + (f' - f) W⁺``.

    Attached at ``text.cond`` like a head; features are signed. An edit of some dimensions is the smallest change of the
    state whose text embedding comes nearest to the edited one: exactly, and with all other dimensions as they were, where
    ``W`` has full column rank (a conditioner at least as wide as the joint space).

    Attributes:
        reached: per dimension, the share of a change of it alone that arrives; 1 with full column rank, below 1 where the
            conditioner is narrower, and then other dimensions change too.

    Args:
        matrix: ``text embed = hidden state @ matrix``, ``[d_cond d_joint]``, from
            :func:`~mmhooks.models.diffusion.references.text_projection` or a fitted one.

    Raises:
        ShapeMismatch: not a matrix. NotFinite: NaN or infinity in it.

    >>> joint = JointDirections(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    >>> joint.encode(torch.tensor([1.0, 3.0, 5.0])), joint.decode(torch.tensor([4.0, 0.0]))
    (tensor([2., 3.]), tensor([2., 0., 0.]))
    """

    has_decoder = True
    normalize_input = False
    matrix: Tensor
    W_dec: Tensor

    def __init__(self, matrix: Float[Tensor, "..."], *, name: str = "joint") -> None:
        super().__init__()
        if matrix.ndim != 2:
            raise ShapeMismatch(f"matrix: expected [d_cond, d_joint], got shape {tuple(matrix.shape)}")
        if not bool(matrix.isfinite().all()):
            raise NotFinite("matrix: expected finite numbers, got NaN or infinity; load the projection again")
        own = matrix.detach().float()
        self.d_in, self.n_features = own.shape
        self.name = name
        # The inverse in double precision: columns of a text projection are far from orthogonal.
        back = torch.linalg.pinv(own.cpu().double())
        self.register_buffer("matrix", own)
        self.register_buffer("W_dec", back.to(own))
        self.reached = (back @ own.cpu().double()).diagonal().float()
        self.id = f"{name}-{blake2b(own.cpu().numpy().tobytes(), digest_size=6).hexdigest()}"

    def pre(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """The same as :meth:`encode`: there is no non-linearity."""
        return self.encode(x)

    def encode(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """Dimensions of the text embedding that the projection makes of ``x``."""
        return x @ self.matrix.to(x.dtype)

    def decode(self, f: Float[Tensor, "*b n"]) -> Float[Tensor, "*b d"]:
        """The smallest state whose text embedding is nearest to ``f``."""
        return f @ self.W_dec.to(f.dtype)
