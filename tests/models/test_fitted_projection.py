"""The projection fitted to the layer that a pipeline conditions on, against CLIP's own."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import DataError
from mmhooks.models.diffusion.fitted_projection import fit_text_projection
from mmhooks.models.embedded import mini_sd

CAPTIONS = [f"a drawing of a {row['name']}" for row in mini_sd.drawings()]


def test_where_the_last_layer_conditions_it_is_clips_own() -> None:
    sd, clip = mm.load_diffusion("mini"), mm.load("mini")
    found = fit_text_projection(sd, clip, CAPTIONS[:450])
    assert found.n == 300 and found.own == pytest.approx(1, abs=1e-5) and found.fitted > 0.999
    # The states span all dimensions but the one that LayerNorm takes away, so the matrices agree on them.
    states = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) @ _states(sd, CAPTIONS[:300])
    own = clip.model.text_projection.detach()
    assert torch.nn.functional.cosine_similarity(states @ found.matrix, states @ own).min() > 0.999


def test_where_an_earlier_layer_conditions_clips_own_reads_it_badly() -> None:
    """As in Stable Diffusion 2, whose text encoder ends one block early."""
    sd, clip = mm.load_diffusion("mini"), mm.load("mini")
    encoder = sd.pipe.text_encoder
    layers = getattr(encoder, "text_model", encoder).encoder.layers
    whole = list(layers)
    try:
        del layers[-1]
        found = fit_text_projection(sd, clip, CAPTIONS)
        assert found.own < 0.96 < 0.965 < found.fitted
    finally:
        layers.extend(whole[len(layers) :])


def test_too_few_captions_leave_it_undetermined() -> None:
    with pytest.raises(DataError, match="at least 192 distinct captions.*got 20 beside"):
        fit_text_projection(mm.load_diffusion("mini"), mm.load("mini"), [*CAPTIONS[:30], *CAPTIONS[:30]])


@torch.no_grad()
def _states(sd: mm.HookedDiffusion, captions: list[str]) -> torch.Tensor:
    from mmhooks.models.diffusion.references import conditioner, text_end

    return conditioner(sd, captions)[torch.arange(len(captions)), text_end(sd, captions)]
