"""How the loss is divided between the modalities."""

from __future__ import annotations

import pytest
import torch

from mmhooks.errors import MMHooksError
from mmhooks.heads import TopKSAE, reconstruction, train_head
from mmhooks.heads.training.sae_objective import SAEObjective


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_loss_is_the_weighted_fvu(pairs, share: float) -> None:
    sae = TopKSAE(16, 48, 5)
    objective = SAEObjective(image_share=share, aux_weight=0.0)
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in pairs)
    objective.measure(image, text)
    loss = objective.loss(sae, image, text, torch.zeros(48, dtype=torch.bool)).loss
    one, two = reconstruction(sae, image).fvu, reconstruction(sae, text).fvu
    assert float(loss.detach()) == pytest.approx(share * one + (1 - share) * two, rel=1e-4)
    alone = objective.loss(sae, image, None, torch.zeros(48, dtype=torch.bool)).loss
    assert float(alone.detach()) == pytest.approx(one, rel=1e-4)


def test_the_modality_that_counts_more_is_reconstructed_better(pairs) -> None:
    fvu = {}
    for share in (0.1, 0.9):
        sae = TopKSAE(16, 48, 3)
        train_head(
            sae, *pairs, epochs=30, batch_size=60, objective=SAEObjective(image_share=share), progress=False
        )
        fvu[share] = reconstruction(sae, pairs[0]).fvu, reconstruction(sae, pairs[1]).fvu
    assert fvu[0.9][0] < fvu[0.1][0] and fvu[0.1][1] < fvu[0.9][1]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_outside_is_refused(pairs, share: float) -> None:
    with pytest.raises(MMHooksError, match="between 0 and 1"):
        train_head(
            TopKSAE(16, 48, 3), *pairs, epochs=1, objective=SAEObjective(image_share=share), progress=False
        )
