"""Jackknife intervals of a streaming metric against the spread over repeated samples."""

from __future__ import annotations

import pytest
import torch

from mmhooks.analysis.measures.modality_gap import ModalityMeans, modality_gap
from mmhooks.analysis.statistics.jackknife import JackknifeGroups


def test_jackknife_intervals_are_as_wide_as_the_spread_of_repeated_samples():
    torch.manual_seed(3)

    def sample():
        image = torch.randn(600, 3) + torch.tensor([1.0, 0.0, 0.0])
        return image, torch.randn(600, 3) - torch.tensor([1.0, 0.0, 0.0])

    def numbers(image, text):
        parts = JackknifeGroups(lambda **kw: ModalityMeans(3, **kw))
        for number in range(20):
            rows = slice(30 * number, 30 * number + 30)
            parts.update(image[rows], text[rows], number=number)
        return parts.estimate(lambda metric: float(metric.compute()["gap"]), 600)

    estimates = [numbers(*sample()) for _ in range(60)]
    values = torch.tensor([e.value for e in estimates])
    halves = torch.tensor([(e.high - e.low) / 2 for e in estimates])
    assert float(halves.mean()) == pytest.approx(2.093 * float(values.std()), rel=0.25)
    truth = numbers(*(torch.cat(x) for x in zip(*(sample() for _ in range(40)), strict=True)))
    covered = sum(e.low <= values.mean() <= e.high for e in estimates) / len(estimates)
    assert covered >= 0.85 and truth.n == 600
    image, text = sample()
    assert numbers(image, text).value == pytest.approx(modality_gap(image, text).gap.value, abs=1e-6)
