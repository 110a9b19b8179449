"""Transcoders: the formula, training on a small MLP, files, and the measures that refuse them."""

from __future__ import annotations

import pytest
import torch

from mmhooks.analysis.interventions.masked_classification import Masked
from mmhooks.analysis.measures.causal_mds import causal_mds
from mmhooks.analysis.measures.fidelity import fidelity
from mmhooks.errors import MMHooksError
from mmhooks.heads import Transcoder, load_head_dir, prediction, reconstruction, train_head
from mmhooks.heads.training.transcoder_objective import TranscoderObjective


def mlp_rows(n: int, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of a random MLP of width 16."""
    g = torch.Generator().manual_seed(99)
    first, second = torch.randn(16, 48, generator=g) / 4, torch.randn(48, 16, generator=g) / 7
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    return x, scale * (torch.nn.functional.gelu(2 * x @ first) @ second)


@pytest.mark.parametrize("n", [32, 64])  # the dense step, and the sparse one
@pytest.mark.parametrize("skip", [False, True])
def test_the_formula_by_hand(n, skip) -> None:
    head = Transcoder(16, n, 4, d_out=10, skip=skip, seed=1)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_()
    x = torch.randn(20, 16)
    want = head.b_dec.detach().repeat(20, 1)
    for row in range(20):
        pre = [((x[row] - head.b_pre) @ head.W_enc[i] + head.b_enc[i]).item() for i in range(n)]
        for i in sorted(range(n), key=pre.__getitem__)[-4:]:
            want[row] += max(pre[i], 0.0) * head.W_dec[i].detach()
    if skip:
        want += x @ head.W_skip.detach()
    torch.testing.assert_close(head(x), want, atol=1e-4, rtol=1e-4)
    out = head.training_pass(x)
    torch.testing.assert_close(out.recons[0], head(x))
    values, indices = head.encode_topk(x)
    assert torch.equal(torch.zeros(20, n).scatter(1, indices, values), head.encode(x))
    assert float(out.l0) == float((head.encode(x) > 0).sum(1).float().mean())


def test_training_lowers_the_error_and_the_skip_helps() -> None:
    x, y = mlp_rows(2000)
    valid = mlp_rows(400, seed=1)
    found = {}
    for skip in (False, True):
        head = Transcoder(16, 128, 8, skip=skip)
        result = train_head(head, x, y, epochs=12, valid=valid, progress=False)
        first, last = (result.history[i]["valid_fvu"] for i in (0, -1))
        assert last < 0.9 * first
        found[skip] = last
        assert prediction(head, *valid).fvu == pytest.approx(last, rel=1e-6)
    linear = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    left = valid[1] - torch.cat([valid[0], torch.ones(400, 1)], 1) @ linear
    spread = (valid[1] - valid[1].mean(0)).square().sum()
    assert found[True] < 0.75 * float(left.square().sum() / spread)  # better than the best affine map alone
    assert found[True] < found[False]


def test_units_do_not_matter() -> None:
    """A site a hundred times as large, and one a hundred times as small, give the same training."""
    fvu = []
    for scale in (1.0, 100.0):
        x, y = mlp_rows(600)
        head = Transcoder(16, 64, 4, skip=True)
        fvu.append(train_head(head, x * scale, y / scale, epochs=4, progress=False).last["fvu"])
    assert fvu[0] == pytest.approx(fvu[1], rel=2e-3)


def test_dead_features_learn_from_the_error() -> None:
    x, y = mlp_rows(50)
    head, objective = Transcoder(16, 64, 4), TranscoderObjective()
    objective.measure(x, y)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[40:] = True
    with torch.no_grad():
        head.b_enc[40:] -= 50.0
    loss = objective.loss(head, x, y, dead)
    assert "aux" in loss.parts and not loss.fired[40:].any()
    with torch.no_grad():
        head.b_enc[40:] += 50.0 + 1.0
    objective.loss(head, x, y, dead).loss.backward()
    assert head.W_dec.grad is not None and bool(head.W_dec.grad[40:].any())
    error = (y - head(x)).detach()
    pre = (head.pre(x)[:, 40:]).topk(8, dim=1)
    guess = torch.zeros(50, 24).scatter(1, pre.indices, pre.values.relu()) @ head.W_dec[40:]
    want = (error - guess).square().sum() / error.square().sum()
    torch.testing.assert_close(objective.auxiliary(head, x, error, dead), want)


def test_files_and_checkpoints(tmp_path) -> None:
    x, y = mlp_rows(200)
    head = Transcoder(16, 64, 4, skip=True)
    train_head(head, x, y, epochs=2, progress=False, checkpoint=tmp_path / "c.safetensors")
    again = Transcoder(16, 64, 4, skip=True)
    train_head(again, x, y, epochs=2, progress=False, checkpoint=tmp_path / "c.safetensors")
    assert again.id == head.id
    for loaded in (load_head_dir(head.save(tmp_path / "h")), Transcoder.from_pretrained(tmp_path / "h")):
        assert isinstance(loaded, Transcoder) and loaded.id == head.id
        assert torch.equal(loaded(x), head(x))


def test_what_compares_with_the_input_refuses_it() -> None:
    x, y = mlp_rows(50)
    head = Transcoder(16, 64, 4)
    for call in (
        lambda: reconstruction(head, x),
        lambda: fidelity(head, x),
        lambda: Masked(head, x),
        lambda: causal_mds(x, y, head=head),
    ):
        with pytest.raises(MMHooksError, match="expected a head that reconstructs what it reads"):
            call()
    with pytest.raises(MMHooksError, match=r"expected train_head\(head, x, y\), got x alone"):
        train_head(head, x, progress=False)
