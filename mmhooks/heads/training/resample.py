"""Dead features: what the strongest of them would write (AuxK, Gao et al. 2024, A.2), and resampling, which restarts them at
badly reconstructed vectors (Bricken et al. 2023, "Neuron resampling")."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mmhooks.heads.linalg import to_unit
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.sae.gated import GatedSAE
from mmhooks.heads.transcoder import Transcoder


def strongest_dead(
    head: SAE | Transcoder, x: Float[Tensor, "b d"], dead: Bool[Tensor, " n"], k: int
) -> Float[Tensor, "b e"]:
    """What the ``k`` dead features with the largest pre-activations of each row write, with its graph."""
    rows = dead.nonzero().squeeze(1)
    tied = getattr(head, "tied", False)
    weight, bias = (head.W_dec[rows], None) if tied else (head.W_enc[rows], head.b_enc[rows])
    pre = F.linear(x - head.b_pre, weight, bias)
    values, chosen = pre.topk(min(k, len(rows)), dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, chosen, values.relu()) @ head.W_dec[rows]


@torch.no_grad()
def resample(
    head: SAE,
    adam: torch.optim.Optimizer,
    dead: Bool[Tensor, " n"],
    x: Float[Tensor, "b d"],
    weight: Float[Tensor, " b"],
    generator: torch.Generator,
) -> int:
    """Gives every dead feature the direction of a badly reconstructed row of ``x``; returns how many there were.

    Rows are drawn with probability proportional to ``weight`` times their squared error. The decoder row becomes that
    row minus ``b_pre``, at unit norm; the encoder row the same at the mean norm of the live features if features
    compete for K places, and at a fifth of it (as in the paper) if not; its bias becomes 0, and Adam's moments of all
    three are reset.
    """
    places = dead.nonzero().squeeze(1)
    if len(places) == 0:
        return 0
    bare = head.bare()  # rows are normalised and centred
    error = torch.cat([(part - bare(part)).square().sum(dim=1) for part in x.split(4096)])
    error = weight.double() * error
    if not float(error.sum()) > 0:
        return 0
    drawn = torch.multinomial(error.cpu(), len(places), len(places) > len(x), generator=generator)
    rows = to_unit(x[drawn.to(x.device)] - head.b_pre)
    head.W_dec[places] = rows
    changed = [head.W_dec]
    if not head.tied:
        live = head.W_enc[~dead]
        length = live.norm(dim=1).mean() if len(live) else rows.new_ones(())
        # At a fifth of the others' length a feature would never be among the K largest, and would stay dead.
        head.W_enc[places] = (1.0 if hasattr(head, "k") else 0.2) * length * rows
        biases = [head.b_enc, head.b_mag, head.r_mag] if isinstance(head, GatedSAE) else [head.b_enc]
        for bias in biases:
            bias[places] = 0.0
        changed += [head.W_enc, *biases]
    for p in changed:
        for name, value in adam.state.get(p, {}).items():
            if name != "step":
                value[places] = 0.0
    return len(places)
