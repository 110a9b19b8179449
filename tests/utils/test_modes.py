"""Evaluation mode inside a block, and exactly the modes of before after it."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmhooks.utils.modes import evaluating


def _model(modes: list[bool]) -> nn.Module:
    model = nn.Sequential(*(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)) for _ in range(2)))
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return model


@given(modes=st.lists(st.booleans(), min_size=7, max_size=7), breaks=st.booleans())
def test_each_module_has_its_own_mode_back(modes, breaks):
    model = _model(modes)
    try:
        with evaluating(model, model[0]):
            assert not any(m.training for m in model.modules())
            if breaks:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [m.training for m in model.modules()] == modes


@given(modes=st.lists(st.booleans(), min_size=7, max_size=7), order=st.permutations(range(3)))
def test_blocks_that_overlap_in_any_order(modes, order):
    model = _model(modes)
    blocks = [evaluating(model) for _ in range(3)]
    for block in blocks:
        block.__enter__()
    for n, i in enumerate(order):
        assert not any(m.training for m in model.modules()), n
        blocks[i].__exit__(None, None, None)
    assert [m.training for m in model.modules()] == modes


def test_threads_leave_the_modes_of_before():
    model = _model([True] * 7)
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(200):
            with evaluating(model):
                assert not model.training

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(m.training for m in model.modules())


def test_nothing_else_of_the_model_changes():
    class Merging(nn.Linear):
        """As some adapters do: its weights change when it is put into evaluation mode."""

        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("not called")

    model = nn.Sequential(Merging(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with evaluating(model), torch.no_grad():
        first, second = model(torch.ones(4, 2)), model(torch.ones(4, 2))
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.training
