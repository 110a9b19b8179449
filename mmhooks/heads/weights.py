"""Checked loading of a head's weights: names, shapes, and finite values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmhooks.errors import DamagedFile, NotFinite


def check_fit(head: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raises DamagedFile if names or shapes in ``state`` differ from those of ``head``; allocates nothing."""
    own = head.state_dict()
    faults = [f"missing {k}" for k in own.keys() - state.keys()]
    faults += [f"unexpected {k}" for k in state.keys() - own.keys()]
    faults += [
        f"{k} is {list(state[k].shape)}, not {list(own[k].shape)}"
        for k in own.keys() & state.keys()
        if state[k].shape != own[k].shape
    ]
    faults += [
        f"{k} holds {state[k].dtype}, not real numbers"
        for k in own.keys() & state.keys()
        if not state[k].is_floating_point()
    ]
    if faults:
        raise DamagedFile(f"{where} does not fit a {type(head).__name__}: {'; '.join(sorted(faults))}")


def load_strictly(head: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copies the values of ``state`` into ``head``, in its own dtype; also into one of ``build_without_weights``.

    Raises:
        DamagedFile: a missing, unexpected or misshapen tensor. NotFinite: NaN or infinity in a weight; names it.
    """
    check_fit(head, state, where)
    for name, value in state.items():
        # A BatchTopK threshold is NaN until it is set; a JumpReLU threshold of zero has the logarithm -infinity.
        bad = (
            ~value.isfinite()
            if name not in ("threshold", "threshold_log")
            else value.isnan() & (name != "threshold")
        )
        if bool(bad.any()):
            raise NotFinite(
                f"{where}: {int(bad.sum())} of {value.numel()} values of {name} are NaN or infinite: a failed training "
                "run or a damaged file; download or train it again"
            )
    own = head.state_dict()
    copies = {k: v.to(own[k].dtype, copy=True) for k, v in state.items()}
    # In place unless the head is on the meta device: an optimiser may hold the parameters.
    head.load_state_dict(copies, assign=any(t.is_meta for t in own.values()))


def check_finite_rows(x: Tensor, what: str) -> None:
    """Raises :class:`NotFinite` for vectors ``[*b d]`` with the number of bad rows and the first of them.

    Faster than :func:`mmhooks.analysis.inputs.checks.check_finite`, which names rows and columns of a table: training
    calls it for every batch.
    """
    # The sum is finite for ordinary data, and needs one pass without a temporary of x's size.
    if bool(torch.isfinite(x.sum())):
        return
    bad = ~torch.isfinite(x).reshape(-1, x.shape[-1]).all(dim=-1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise NotFinite(
            f"{what}: NaN or infinity in {int(bad.sum())} of {bad.numel()} rows, the first is row {first}; "
            "drop these rows or find what produced them"
        )
