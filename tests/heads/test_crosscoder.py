"""Crosscoders: shares, scales, training on sites of very different sizes, files."""

from __future__ import annotations

import pytest
import torch

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads import Crosscoder, load_head_dir, train_head
from mmhooks.heads.crosscoder import JoinedRows
from mmhooks.heads.training.crosscoder_objective import CrosscoderObjective

from .stores import write_store


def sites(n: int, seed: int = 0, scales: tuple[float, float] = (1.0, 1.0)) -> list[torch.Tensor]:
    """Two sites of widths 10 and 14 that show 12 directions each: 6 shared ones, and 6 of their own."""
    g = torch.Generator().manual_seed(99)
    code = torch.rand(n, 18, generator=torch.Generator().manual_seed(seed))
    code = code * (torch.rand(n, 18, generator=torch.Generator().manual_seed(seed + 1)) < 0.15)
    first, second = torch.randn(18, 10, generator=g), torch.randn(18, 14, generator=g)
    first[12:], second[6:12] = 0, 0
    return [scales[0] * (code @ first + 1), scales[1] * (code @ second - 2)]


def fvu(x: torch.Tensor, back: torch.Tensor) -> float:
    return float((x - back).square().sum() / (x - x.mean(0)).square().sum())


@pytest.fixture(scope="module")
def trained() -> Crosscoder:
    head = Crosscoder(24, 24, 4, widths=(10, 14))
    train_head(head, head.join(sites(3000, scales=(1.0, 100.0))), epochs=60, lr=5e-3, progress=False)
    return head


def test_both_sites_are_reconstructed_whatever_their_scale(trained) -> None:
    valid = sites(500, seed=5, scales=(1.0, 100.0))
    parts = trained.split(trained(trained.join(valid)))
    assert all(fvu(x, back) < 0.05 for x, back in zip(valid, parts, strict=True))
    assert int((trained.encode(trained.join(valid)) > 0).sum(1).max()) <= 4
    ratio = float(trained.scale[1] / trained.scale[0])
    assert 50 < ratio < 200


def test_units_do_not_matter() -> None:
    one, other = Crosscoder(24, 36, 4, widths=(10, 14)), Crosscoder(24, 36, 4, widths=(10, 14))
    a, b = one.join(sites(400)), other.join(sites(400, scales=(0.01, 100.0)))
    histories = [
        train_head(h, x, epochs=3, valid=(x, None), progress=False).history for h, x in ((one, a), (other, b))
    ]
    assert histories[0][-1]["valid_score"] == pytest.approx(histories[1][-1]["valid_score"], rel=1e-2)
    torch.testing.assert_close(one.shares(), other.shares(), atol=0.05, rtol=0)


def test_the_loss_is_the_mean_of_the_sites_fvu() -> None:
    parts = sites(300, scales=(1.0, 7.0))
    head, objective = Crosscoder(24, 36, 4, widths=(10, 14)), CrosscoderObjective()
    rows = head.join(parts)
    objective.measure(rows, None)
    objective.start(head, rows, None)
    loss = objective.loss(head, rows, None, torch.zeros(36, dtype=torch.bool))
    objective.finish(head, rows, None)
    back = head.split(head(rows))
    want = sum(fvu(x, y) for x, y in zip(parts, back, strict=True)) / 2
    assert float(loss.loss) == pytest.approx(want, rel=1e-4)


def test_features_find_shared_and_own_directions(trained) -> None:
    shares = trained.shares()
    torch.testing.assert_close(shares.sum(1), torch.ones(24))
    first, second = (
        trained.W_dec[:, :10].norm(dim=1) / trained.scale[0],
        trained.W_dec[:, 10:].norm(dim=1) / trained.scale[1],
    )
    torch.testing.assert_close(shares[:, 0], first / (first + second))
    fired = (trained.encode(trained.join(sites(500, seed=5, scales=(1.0, 100.0)))) > 0).float().mean(0)
    found = shares[fired > 0.03, 0]
    assert int((found > 0.9).sum()) in (5, 6) and int((found < 0.1).sum()) in (5, 6)  # 6 each were put in
    assert int(((found > 0.3) & (found < 0.7)).sum()) >= 5


def test_training_again_starts_where_it_was(trained) -> None:
    rows = trained.join(sites(3000, scales=(1.0, 100.0)))
    again = Crosscoder(24, 24, 4, widths=(10, 14))
    again.load_state_dict(trained.state_dict())
    result = train_head(again, rows, epochs=3, lr=1e-4, progress=False)
    for x, back in zip(again.split(rows), again.split(again(rows)), strict=True):
        assert fvu(x, back) < 0.06
    assert result.history[0]["fvu"] < 0.1  # a fresh one is at .5 there: its pre-bias alone starts anew


def test_files_and_resume(tmp_path, trained) -> None:
    back = load_head_dir(trained.save(tmp_path / "h"))
    assert isinstance(back, Crosscoder) and back.id == trained.id and back.widths == (10, 14)
    rows = trained.join(sites(20))
    assert torch.equal(back(rows), trained(rows)) and torch.equal(back.shares(), trained.shares())
    rows = trained.join(sites(300))
    heads = [Crosscoder(24, 36, 4, widths=(10, 14)) for _ in range(2)]
    train_head(heads[0], rows, epochs=3, progress=False)

    class Stop(CrosscoderObjective):
        def after_epoch(self, head, adam, dead, epoch, done, sample, generator):
            if epoch == 2:
                raise KeyboardInterrupt
            return super().after_epoch(head, adam, dead, epoch, done, sample, generator)

    Stop.__name__ = Stop.__qualname__ = "CrosscoderObjective"
    path = tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_head(heads[1], rows, epochs=3, progress=False, checkpoint=path, objective=Stop())
    resumed = Crosscoder(24, 36, 4, widths=(10, 14))
    train_head(resumed, rows, epochs=3, progress=False, checkpoint=path)
    assert resumed.id == heads[0].id


def test_stored_sites_are_joined_as_they_are_read(tmp_path) -> None:
    parts = sites(300)
    store = write_store(tmp_path / "s", image_a=parts[0], image_b=parts[1])
    heads = [Crosscoder(24, 36, 4, widths=(10, 14)) for _ in range(2)]
    for head, rows in zip(
        heads, (torch.cat(parts, 1), JoinedRows([store["image.a"], store["image.b"]])), strict=True
    ):
        assert torch.equal(rows[torch.tensor([7, 3])], torch.cat(parts, 1)[[7, 3]])
        train_head(head, rows, epochs=2, progress=False)
    assert heads[0].id == heads[1].id
    with pytest.raises(ShapeMismatch, match="as many rows each"):
        JoinedRows([parts[0], parts[1][:5]])


def test_what_does_not_fit_is_refused(trained) -> None:
    for widths in ((24,), (10, 15), (0, 24)):
        with pytest.raises(ShapeMismatch, match="add up to d_in = 24"):
            Crosscoder(24, 36, 4, widths=widths)
    with pytest.raises(
        ShapeMismatch, match=r"expected as many vectors at each of 2 sites of widths \[10, 14\]"
    ):
        trained.join([torch.zeros(3, 10), torch.zeros(4, 14)])
    x, y = sites(50)
    with pytest.raises(MMHooksError, match=r"head\.join\(\[x, y\]\)"):
        train_head(trained, trained.join([x, y]), trained.join([x, y]), progress=False)
