"""Tasks by construction: who may be an intruder, what is counted when there is none, and what cannot be made at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmhooks.analysis.measures.top_activating import top_activating
from mmhooks.errors import DataError
from mmhooks.studies.human.comparisons import COMPARED, PRIMARIES, undecidable
from mmhooks.studies.human.options import Options
from mmhooks.studies.human.tasks import CHECK, NAMED, RANDOM, Coverage, Material, Task, choose_tasks

N, FEATURES = 60, 12
FAMILIES = torch.arange(N) // 2  # two samples each
OPTIONS = Options(features=4, names=2, lists=3, checks=2, shown=3)


def latents() -> torch.Tensor:
    """Feature k is active on the families k, k + 12 and k + 24 (up to 29): five have three families, seven only two."""
    found = torch.zeros(N, FEATURES)
    for k in range(FEATURES):
        for family in range(k, 30, FEATURES):
            found[family == FAMILIES, k] = 1.0 + family
    return found


def material(values: torch.Tensor, side: str = "image", looks: list[int] | None = None) -> Material:
    top = top_activating(values, 2 * NAMED, families=FAMILIES)
    return Material(side, top, FAMILIES, (lambda row: row) if looks is None else looks.__getitem__)


def choose(values: torch.Tensor, groups: dict[str, list[int]], options: Options = OPTIONS, **how: object):
    asked: list[tuple[str, int]] = []

    def activations(side: str, features: object) -> torch.Tensor:
        asked.append((side, len(list(features))))  # type: ignore[call-overload]
        return values[:, list(features)]  # type: ignore[call-overload]

    return *choose_tasks({"image": material(values, **how)}, activations, groups, options), asked  # type: ignore[arg-type]


GROUPS = {"ImgD": [0, 1, 2, 7], "TextD": [3, 4, 8], "CrossD": [5, 9, 10, 11]}


def test_an_intruder_is_a_stranger_to_the_feature() -> None:
    values = latents()
    tasks, _, _ = choose(values, GROUPS)
    found = [t for t in tasks if t.kind == "intruder" and t.feature is not None]
    assert len(found) == 6
    strong = {r for t in found for r in t.rows}
    for task in found:
        assert task.intruder is not None
        others = [row for i, row in enumerate(task.rows) if i != task.intruder]
        active = {int(FAMILIES[r]) for r in range(N) if values[r, task.feature] != 0}
        assert all(values[row, task.feature] > 0 for row in others)
        assert len({int(FAMILIES[row]) for row in task.rows}) == len(task.rows) == 4
        stranger = task.rows[task.intruder]
        assert int(FAMILIES[stranger]) not in active  # nor any other of its family
        assert (values[stranger] > 0).any() and stranger in strong  # a strong sample of another feature


def test_features_that_cannot_be_shown_are_counted() -> None:
    """Features with two families have too few samples; one that is active everywhere has no intruder."""
    values = latents()
    values[:, 1] += 0.01
    _, coverage, asked = choose(values, GROUPS)
    assert {c.group: (c.members, c.asked, c.shown, c.few_samples, c.no_intruder) for c in coverage} == {
        "ImgD": (4, 4, 2, 1, 1), "TextD": (3, 4, 2, 1, 0), "CrossD": (4, 4, 1, 3, 0),
    }  # fmt: skip
    assert all(c.members == c.shown + c.few_samples + c.no_intruder for c in coverage if c.shown < c.asked)
    assert "1 no intruder" in coverage[0].text() and "2 of 4 features" in coverage[0].text()
    assert sum(n for _, n in asked) == 6  # activations of the others are never computed


def test_tasks_are_made_until_there_are_enough() -> None:
    values = latents()
    values[:, :4] += 0.01  # four of five features of one group are active everywhere
    _, (coverage,), _ = choose(values, {"ImgD": [0, 1, 2, 3, 4, 5]}, replace(OPTIONS, features=2))
    assert coverage.shown == 2 and coverage.no_intruder <= 4


def test_random_lists_and_checks_tell_samples_apart() -> None:
    looks = [row // 4 for row in range(N)]  # two families look the same
    tasks, _, _ = choose(latents(), GROUPS, replace(OPTIONS, shown=2), looks=looks)
    lists = [t for t in tasks if t.group == RANDOM]
    assert [len(t.rows) for t in lists] == [3] * 3 + [NAMED] * 2
    assert all(len({looks[r] for r in t.rows}) == len(t.rows) for t in tasks if t.group != CHECK)
    checks = [t for t in tasks if t.group == CHECK]
    assert len(checks) == 2
    for task in checks:
        assert task.intruder is not None
        others = [row for i, row in enumerate(task.rows) if i != task.intruder]
        assert len(set(others)) == 1 and looks[task.rows[task.intruder]] != looks[others[0]]


def test_a_seed_decides_everything() -> None:
    def tasks(seed: int) -> list[Task]:
        return choose(latents(), GROUPS, replace(OPTIONS, seed=seed))[0]

    assert tasks(0) == tasks(0) != tasks(1)


def test_too_few_samples_for_a_random_list_are_refused() -> None:
    with pytest.raises(
        DataError, match="expected 4 strong samples of different families for a random list, got 3"
    ):
        choose(latents(), {"ImgD": [0]}, replace(OPTIONS, names=0))


def test_comparisons_without_tasks_are_named() -> None:
    enough = {(side, group): 2 for side in ("image", "text") for group in ("ImgD", "TextD", RANDOM)}
    assert undecidable(enough) == []
    assert undecidable(enough | {("image", "TextD"): 1}) == ["ImgD against TextD, images"]
    assert undecidable({}) == list(COMPARED) == [p.name for p in PRIMARIES]
    assert Coverage("text", "ImgD", 3, 4, 0, 3, 0).text().startswith("ImgD, texts: 0 of 4")
