"""The tasks that people solve: which of five samples does not belong, and what do these samples have in common.

An intruder task shows the strongest samples of a feature, each of another family, and one sample that does not belong:
neither it nor any other member of its family activates the feature at all. It is a strong sample of some *other*
feature, so that it does not stand out by being unusual (Chang et al. 2009, Reading tea leaves). Lists of random samples
measure chance; a sample repeated beside one other is seen by whoever pays attention.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.measures.top_activating import TopActivating
from mmhooks.errors import DataError
from mmhooks.studies.human.options import Options

Kind = Literal["intruder", "name"]
SIDES = ("image", "text")
RANDOM, CHECK = "random", "check"
NAMED = 8  # samples shown for a name
Activations = Callable[[str, Sequence[int]], Float[Tensor, "n f"]]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        group: ImgD, TextD, CrossD, random or check.
        feature: None for random lists and checks.
        rows: the pairs whose image or text is shown, in that order.
        intruder: the place in ``rows`` of the one that does not belong; None for a naming task.
    """

    kind: Kind
    side: str
    group: str
    feature: int | None
    rows: tuple[int, ...]
    intruder: int | None = None


@dataclass(frozen=True)
class Coverage:
    """How much of one group one side shows.

    Attributes:
        members: features of the group. asked: intruder tasks that were asked for. shown: those that there are.
        few_samples: features with fewer strong samples of different families than a task shows.
        no_intruder: of the other features, in random order until enough tasks were made, those for which every sample
            that could be the intruder is of a family that activates them.
    """

    side: str
    group: str
    members: int
    asked: int
    shown: int
    few_samples: int
    no_intruder: int

    def text(self) -> str:
        """Says it in one line.

        >>> Coverage("image", "TextD", 100, 12, 1, 98, 1).text()
        'TextD, images: 1 of 12 features; of 100 in the group, 98 have too few samples and 1 no intruder'
        """
        return (
            f"{self.group}, {self.side}s: {self.shown} of {self.asked} features; of {self.members} in the group, "
            f"{self.few_samples} have too few samples and {self.no_intruder} no intruder"
        )


@dataclass(frozen=True)
class Material:
    """One side of the data, from which tasks are made.

    Attributes:
        top: the strongest samples of every feature, at most one of a family.
        families: of each sample.
        label: what the eye sees of a sample: equal where two samples of different families look the same.
    """

    side: str
    top: TopActivating
    families: Int[Tensor, " n"]
    label: Callable[[int], Hashable]

    def strongest(self, feature: int, most: int) -> tuple[int, ...]:
        """The strongest samples of a feature, without repeated labels."""
        seen: dict[Hashable, int] = {}
        for row in self.top.of(feature).tolist():
            seen.setdefault(self.label(row), row)
        return tuple(seen.values())[:most]


def choose_tasks(
    material: Mapping[str, Material],
    activations: Activations,
    groups: Mapping[str, Sequence[int]],
    options: Options,
) -> tuple[list[Task], list[Coverage]]:
    """Draws the tasks of all groups, on both sides; features are tried in the same random order on both.

    Args:
        activations: given a side and features, the activation of all samples.
        groups: the features of each group.

    Returns:
        The tasks, and how much of each group they show: fewer features than asked for are counted, never hidden.

    Raises:
        DataError: too few different samples for random lists or attention checks.
    """
    tasks: list[Task] = []
    coverage: list[Coverage] = []
    shown = options.shown
    for side, m in material.items():
        rng = torch.Generator().manual_seed(options.seed)  # the same order of features on both sides
        shuffled = {group: _shuffled(members, rng) for group, members in groups.items()}
        able = {
            group: [k for k in members if len(m.strongest(k, shown)) == shown]
            for group, members in shuffled.items()
        }
        pool = torch.tensor(
            sorted({r for members in able.values() for k in members for r in m.strongest(k, shown)})
        )
        rng = torch.Generator().manual_seed(options.seed + 1 + SIDES.index(side))
        for group, members in able.items():
            found, without = _intruder_tasks(m, activations, group, members, pool, options, rng)
            coverage.append(
                Coverage(
                    side, group, len(shuffled[group]), options.features, len(found),
                    len(shuffled[group]) - len(members), without,
                )
            )  # fmt: skip
            tasks += found
            tasks += [
                Task("name", side, group, t.feature, m.strongest(t.feature, NAMED))
                for t in found[: options.names]
                if t.feature is not None
            ]
        for _ in range(options.lists):
            first, *others = _random_rows(m, pool, shown + 1, rng)
            tasks.append(_placed(side, RANDOM, None, others, first, rng))
        for _ in range(min(options.names, options.lists)):
            tasks.append(Task("name", side, RANDOM, None, tuple(_random_rows(m, pool, NAMED, rng))))
        for _ in range(options.checks):
            one, other = _random_rows(m, pool, 2, rng)
            tasks.append(_placed(side, CHECK, None, [one] * shown, other, rng))
    return tasks, coverage


def _intruder_tasks(
    m: Material,
    activations: Activations,
    group: str,
    members: Sequence[int],
    pool: Int[Tensor, " p"],
    options: Options,
    rng: torch.Generator,
) -> tuple[list[Task], int]:
    """Makes tasks of the first members that have an intruder, and counts those before them that have none."""
    found: list[Task] = []
    without = 0
    # A block at a time: activations of all samples take one pass over the data, and most features have an intruder.
    for begin in range(0, len(members), options.features):
        block = members[begin : begin + options.features]
        for k, values in zip(block, activations(m.side, block).T, strict=True):
            rows = m.strongest(k, options.shown)
            labels = {m.label(row) for row in rows}
            strangers = pool[~torch.isin(m.families[pool], m.families[values != 0])].tolist()
            free = [row for row in strangers if m.label(row) not in labels]
            if not free:
                without += 1
                continue
            intruder = free[int(torch.randint(len(free), (1,), generator=rng))]
            found.append(_placed(m.side, group, k, rows, intruder, rng))
            if len(found) == options.features:
                return found, without
    return found, without


def _random_rows(m: Material, pool: Int[Tensor, " p"], size: int, rng: torch.Generator) -> list[int]:
    """Random samples of different families and labels."""
    rows: list[int] = []
    families, labels = set(), set()
    for row in _shuffled(pool.tolist(), rng):
        family, label = int(m.families[row]), m.label(row)
        if family in families or label in labels:
            continue
        families.add(family)
        labels.add(label)
        rows.append(row)
        if len(rows) == size:
            return rows
    raise DataError(
        f"{m.side}s: expected {size} strong samples of different families for a random list, got {len(rows)}; use more "
        "pairs, fewer --shown, or another head"
    )


def _placed(
    side: str, group: str, feature: int | None, rows: Sequence[int], intruder: int, rng: torch.Generator
) -> Task:
    """Shuffles the samples of an intruder task."""
    together = [*rows, intruder]
    order = _shuffled(range(len(together)), rng)
    return Task("intruder", side, group, feature, tuple(together[i] for i in order), order.index(len(rows)))


def _shuffled(items: Sequence[int], rng: torch.Generator) -> list[int]:
    return [items[i] for i in torch.randperm(len(items), generator=rng).tolist()]
