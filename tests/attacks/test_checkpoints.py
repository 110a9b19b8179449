"""Checkpoints of trainings that were damaged, mixed or broken off: a resumed run ends with the bits of an unbroken one,
or is refused with one of our errors that names the file.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads import NCL, BatchTopKSAE, Head, TopKSAE, train_head
from mmhooks.heads.training import checkpoint as checkpoint_files
from mmhooks.heads.training.objective import StepLoss
from mmhooks.heads.training.sae_objective import SAEObjective

SETTINGS = {"epochs": 3, "batch_size": 30, "progress": False, "checkpoint_every": 2}
HEADS = {
    "topk": lambda seed: TopKSAE(8, 24, 3, seed=seed),
    "batchtopk": lambda seed: BatchTopKSAE(8, 24, 3, seed=seed),
    "ncl": lambda seed: NCL(8, 24, hidden=10, seed=seed),
}


class Killed(Exception):
    pass


class Dying(SAEObjective):
    """Stops the run at a given step, as a killed process would."""

    at = 10**9

    def loss(self, head, image, text, dead) -> StepLoss:
        self.at -= 1
        if self.at < 0:
            raise Killed
        return super().loss(head, image, text, dead)


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(120, 8, generator=g), torch.randn(120, 8, generator=g) + 0.3


def train(kind: str, path: Path | None, *, seed: int = 0, rows: int = 0, at: int | None = None) -> Head:
    head = HEADS[kind](seed)
    objective = None if kind == "ncl" else Dying()
    if at is not None:
        objective.at = at
    kwargs = SETTINGS if path is not None else SETTINGS | {"checkpoint_every": None}
    train_head(head, *data(rows), checkpoint=path, objective=objective, **kwargs)
    return head


def bits(head: Head) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in head.state_dict().items()}


def broken_off(kind: str, path: Path, at: int, **kwargs) -> bytes:
    """The checkpoint of a run that was killed at a step."""
    if kind == "ncl":  # finished: what is resumed is its end
        train(kind, path, **kwargs)
    else:
        with pytest.raises(Killed):
            train(kind, path, at=at, **kwargs)
    return path.read_bytes()


def outcome(kind: str, path: Path, whole: dict[str, bytes], **kwargs) -> str:
    try:
        found = train(kind, path, **kwargs)
    except MMHooksError as error:
        assert path.name in str(error), error
        return "refused"
    assert bits(found) == whole, "resumed to other bits"
    return "the same bits"


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k).clone() for k in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("kind", HEADS)
def test_damaged_checkpoints(tmp_path, rounds, kind) -> None:
    """Flipped bits, cut ends, tensors exchanged inside, and every mixture of two runs."""
    dice, path, other = random.Random(kind), tmp_path / "run.safetensors", tmp_path / "other.safetensors"
    whole = bits(train(kind, None))
    good = broken_off(kind, path, at=5)
    broken_off(kind, other, at=7, seed=1)
    mine, theirs = parts(path), parts(other)
    seen: Counter[str] = Counter()
    for i in range(rounds(16)):
        bad = bytearray(good)
        if i % 4 == 0:
            for _ in range(dice.choice((1, 1, 3))):
                bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
            path.write_bytes(bad)
        elif i % 4 == 1:
            path.write_bytes(bad[: dice.randrange(len(bad))])
        elif i % 4 == 2:
            tensors = dict(mine[0])
            a, b = dice.sample([k for k in tensors if tensors[k].shape == tensors["head." + next(iter(
                HEADS[kind](0).state_dict()))].shape], 2)  # fmt: skip
            tensors[a], tensors[b] = tensors[b], tensors[a]
            save_file(tensors, path, mine[1])
        else:
            chosen = dice.choice(list(mine[0]))
            save_file(mine[0] | {chosen: theirs[0][chosen]}, path, dice.choice((mine[1], theirs[1])))
        seen[outcome(kind, path, whole)] += 1
    print(kind, dict(seen))
    path.write_bytes(good)
    assert outcome(kind, path, whole) == "the same bits"


@pytest.mark.parametrize("kind", HEADS)
def test_checkpoints_of_other_runs(tmp_path, kind) -> None:
    """Three seeds and two data sets on one path: none goes on from another's."""
    path = tmp_path / "run.safetensors"
    broken_off(kind, path, at=5)
    for kwargs in ({"seed": 1}, {"seed": 2}, {"rows": 1}):
        with pytest.raises(MMHooksError, match="another training"):
            train(kind, path, **kwargs)


def test_kills_around_and_inside_of_saves(tmp_path, rounds, monkeypatch) -> None:
    dice, whole = random.Random(4), bits(train("topk", None))
    for i in range(rounds(8)):
        path = tmp_path / f"run{i}.safetensors"
        with monkeypatch.context() as patch:
            left = dice.randrange(1, 5)
            real = checkpoint_files.save_file

            def dying(tensors, file, metadata=None, real=real) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    Path(file).write_bytes(b"half of it")
                    raise KeyboardInterrupt
                real(tensors, file, metadata=metadata)

            patch.setattr(checkpoint_files, "save_file", dying)
            with pytest.raises(KeyboardInterrupt):
                train("topk", path)
        assert outcome("topk", path, whole) == "the same bits"
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
