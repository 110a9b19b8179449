"""One dictionary with a centre per modality, since images and texts form separate clouds in a multimodal space.

``SAEObjective(centre="modality")`` subtracts each modality's own mean from its vectors, so that no feature is spent on
encoding a vector's modality. For a head with a pre-bias this means one ``b_pre`` per modality; :func:`by_modality`
returns both heads, to be attached at the sites of their modalities.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.sae.base import SAE

KEY = "centre"  # in ``Head.info``


def by_modality(head: SAE) -> dict[str, SAE]:
    """The heads for images and for texts: the same features, each with its modality's centre.

    Raises:
        MMHooksError: the head was not trained with a centre per modality.

    >>> from mmhooks.heads import TopKSAE, train_head
    >>> from mmhooks.heads.training.sae_objective import SAEObjective
    >>> x, sae = torch.randn(64, 8), TopKSAE(8, 32, k=4, normalize_input=False)
    >>> options = SAEObjective(centre="modality")
    >>> _ = train_head(sae, x, x + 2, epochs=1, objective=options, progress=False)
    >>> heads = by_modality(sae)
    >>> (heads["text"].b_pre - heads["image"].b_pre).detach().round(decimals=3).tolist()
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    if KEY not in head.info:
        raise MMHooksError(
            f"head {head.name!r} has one centre for both modalities; train it with SAEObjective(centre='modality')"
        )
    heads = {}
    for name, offset in head.info[KEY].items():
        heads[name] = copy.deepcopy(head)
        heads[name].info = {k: v for k, v in head.info.items() if k != KEY} | {"modality": name}
        with torch.no_grad():
            heads[name].b_pre.add_(torch.tensor(offset).to(heads[name].b_pre))
    return heads


@contextmanager
def shifted(head: SAE, offset: Float[Tensor, " d"] | None) -> Iterator[SAE]:
    """Temporarily adds ``offset`` to the pre-bias of ``head``, for vectors from which it was not subtracted."""
    if offset is None:
        yield head
        return
    before = head.b_pre.detach().clone()
    with torch.no_grad():
        head.b_pre.add_(offset)
        try:
            yield head
        finally:
            head.b_pre.copy_(before)
