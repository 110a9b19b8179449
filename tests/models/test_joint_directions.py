"""Joint-space dimensions as directions of a conditioner of another width, against closed forms."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import NotFinite, ShapeMismatch
from mmhooks.models.diffusion.joint_directions import JointDirections
from mmhooks.models.diffusion.references import text_projection

CHOSEN = [2, 5, 11]


def edited(
    joint: JointDirections, toward: torch.Tensor, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of mini without and with joint dimensions moved toward a target: the same splice as at text.cond."""
    model = mm.load("mini")
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model.attach(joint, at=["image.embed"], name="joint")
    group = mm.FeatureSet(CHOSEN, joint.n_features)
    edit = mm.Interpolate(group, toward=toward, strength=strength, at="image.embed.joint.latents")
    try:
        with torch.no_grad():
            before = model.encode_image(pixels)
            with model.hooks(edit):
                return before, model.encode_image(pixels)
    finally:
        model.detach("joint")


def test_a_wide_conditioner_changes_these_dimensions_alone_by_the_smallest_step() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, toward = torch.randn(256, 24, generator=generator), torch.randn(3, 24, generator=generator)
    joint = JointDirections(matrix)
    assert torch.allclose(joint.reached, torch.ones(24), atol=1e-5)
    before, after = edited(joint, toward, 0.7)
    wanted = before @ matrix
    wanted[:, CHOSEN] = 0.3 * wanted[:, CHOSEN] + 0.7 * toward[:, CHOSEN]
    assert torch.allclose(after @ matrix, wanted, atol=1e-3)
    # The smallest change lies in the span of the columns that read.
    step = after - before
    inside = matrix @ torch.linalg.lstsq(matrix, step.T).solution
    assert torch.allclose(inside.T, step, atol=1e-4) and step.norm() > 0.1


def test_a_narrow_conditioner_comes_as_near_as_it_can() -> None:
    """mini-sd conditions on 192 dimensions, its joint space has 256."""
    matrix = text_projection(mm.load_diffusion("mini"), mm.load("mini")).float()
    assert matrix.shape == (192, 256)
    joint = JointDirections(matrix)
    assert joint.reached.min() > 0 and joint.reached.max() < 1
    assert float(joint.reached.sum()) == pytest.approx(torch.linalg.matrix_rank(matrix).item(), abs=0.01)
    generator = torch.Generator().manual_seed(0)
    state, change = torch.randn(1, 192, generator=generator), torch.zeros(1, 256)
    change[:, CHOSEN] = torch.randn(3, generator=generator)
    moved = joint.decode(joint.encode(state) + change) - joint.decode(joint.encode(state))
    nearest = torch.linalg.lstsq(matrix.T.double(), change.T.double(), driver="gelsd").solution.T
    assert torch.allclose(moved.double(), nearest, atol=1e-3 * float(nearest.norm()))


def test_the_same_matrix_has_the_same_id_and_what_is_no_matrix_is_refused() -> None:
    matrix = torch.randn(6, 4)
    assert JointDirections(matrix).id == JointDirections(matrix.clone()).id != JointDirections(2 * matrix).id
    with pytest.raises(ShapeMismatch, match=r"expected \[d_cond, d_joint\], got shape \(6,\)"):
        JointDirections(matrix[:, 0])
    with pytest.raises(NotFinite, match="matrix: expected finite numbers"):
        JointDirections(matrix / 0)
