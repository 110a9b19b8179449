"""Composed pictures: what a scene says is what its pixels show, and nothing held out is in a taught scene."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mmhooks.data.splits import split_of
from mmhooks.data.synthetic import scenes
from mmhooks.data.synthetic.scenes import COMBINATIONS, SHAPES, TAUGHT, UNSEEN, Scene, sample_scene
from mmhooks.errors import MMHooksError


def sample(n: int, combination: scenes.Combination = "taught", seed: int = 0) -> list[Scene]:
    rng = random.Random(f"{combination} {seed}")
    return [sample_scene(rng, combination) for _ in range(n)]


def drawing(name: str) -> np.ndarray:
    """Stands in for OpenMoji: an opaque square whose colour depends on the name."""
    rgba = np.full((20, 20, 4), 255, np.uint8)
    rgba[..., :3] = np.random.default_rng(sum(map(ord, name))).integers(0, 256, 3)
    return rgba


def test_things_stand_apart_inside_the_picture_and_off_the_words_strip() -> None:
    for scene in sample(400):
        covered = np.zeros((scenes.SIZE, scenes.SIZE), int)
        for thing in scene.things:
            assert thing.left >= 0 and thing.left + thing.size <= scenes.SIZE
            assert thing.top >= 0 and thing.top + thing.size <= scenes.SIZE
            covered[thing.top : thing.top + thing.size, thing.left : thing.left + thing.size] += 1
        assert covered.max() == 1
        if scene.word:
            strip = covered[: scenes.STRIP] if scene.word_above else covered[-scenes.STRIP :]
            assert strip.sum() == 0


def test_cells_are_where_the_centres_say() -> None:
    for scene in sample(400):
        begin = scenes.STRIP if scene.word and scene.word_above else 0
        end = scenes.SIZE - (scenes.STRIP if scene.word and not scene.word_above else 0)
        for thing in scene.things:
            x, y = thing.centre
            if thing.cell is not None:
                assert thing.cell == (int(y > (begin + end) / 2), int(x > scenes.SIZE / 2))
        assert (len(scene.things) == 1) == any(thing.cell is None for thing in scene.things)


@pytest.mark.parametrize("seed", range(40))
def test_pixels_show_what_the_scene_says(seed: int) -> None:
    """Taking one thing away changes pixels of its square alone, and shapes and ground have the colour they are said to."""
    scene = sample(1, COMBINATIONS[seed % 4], seed)[0]
    scene = replace(scene, pattern="plain")
    image = scenes.render(scene, drawing).astype(int)
    for i, thing in enumerate(scene.things):
        others = replace(scene, things=scene.things[:i] + scene.things[i + 1 :])
        changed = np.argwhere((scenes.render(others, drawing) != image).any(-1))
        assert len(changed) > 0
        assert changed.min(0)[0] >= thing.top and changed.max(0)[0] < thing.top + thing.size
        assert changed.min(0)[1] >= thing.left and changed.max(0)[1] < thing.left + thing.size
        if thing.paint:
            square = image[thing.top : thing.top + thing.size, thing.left : thing.left + thing.size]
            fill = (square == np.array(scenes.PAINTS[thing.paint])).all(-1).mean()
            assert fill > 0.15, (thing, fill)
    bare = replace(scene, things=(), word="")
    assert (scenes.render(bare, drawing) == np.array(scenes.GROUNDS[scene.ground])).all()
    if scene.word:
        rows = np.argwhere((scenes.render(replace(bare, word=scene.word, word_above=scene.word_above), drawing)
                            != scenes.render(bare, drawing)).any((1, 2)))  # fmt: skip
        assert (rows.max() < scenes.STRIP) if scene.word_above else (rows.min() >= scenes.SIZE - scenes.STRIP)


def test_patterns_keep_their_colour() -> None:
    for pattern in scenes.PATTERNS[1:]:
        image = scenes.render(Scene((), "blue", pattern, seed=3), drawing).reshape(-1, 3)
        tones = {tuple(pixel) for pixel in image.tolist()}
        assert len(tones) == 2 and scenes.GROUNDS["blue"] in tones


def test_nothing_held_out_is_taught() -> None:
    for scene in sample(1500):
        names = {thing.name for thing in scene.things}
        assert not names & {*UNSEEN}
        assert not any(scenes.is_unseen_paint(t.name, t.paint) for t in scene.things if t.paint)
        drawn = sorted(names - {*SHAPES})
        assert not any(scenes.is_unseen_pair(a, b) for a, b in combinations(drawn, 2))


def test_held_out_scenes_hold_what_they_are_named_for() -> None:
    for scene in sample(300, "unseen pair"):
        drawn = sorted({thing.name for thing in scene.things} - {*SHAPES})
        assert any(scenes.is_unseen_pair(a, b) for a, b in combinations(drawn, 2)) and {*drawn} <= {*TAUGHT}
    for scene in sample(300, "unseen paint"):
        shapes = [thing for thing in scene.things if thing.name in SHAPES]
        assert shapes and all(scenes.is_unseen_paint(thing.name, thing.paint) for thing in shapes)
    for scene in sample(300, "unseen concept"):
        drawn = {thing.name for thing in scene.things} - {*SHAPES}
        assert drawn and drawn <= {*UNSEEN}


def test_the_lists_are_disjoint_and_unseen_concepts_were_hidden_from_the_tower_too() -> None:
    everything = [*TAUGHT, *UNSEEN, *SHAPES]
    assert len(set(everything)) == len(everything)
    assert {split_of("openmoji", name) for name in UNSEEN} == {"heldout_concepts"}
    pairs = [scenes.is_unseen_pair(a, b) for a, b in combinations(TAUGHT, 2)]
    assert 0.1 < np.mean(pairs) < 0.15
    paints = [(s, p) for s in SHAPES for p in scenes.PAINTS if scenes.is_unseen_paint(s, p)]
    assert len(paints) == len(SHAPES) == len({p for _, p in paints})


def test_numbers_grounds_and_names_are_equally_frequent() -> None:
    made = sample(2500, seed=1)
    for found, kinds in ((Counter(len(s.things) for s in made), 4), (Counter(s.ground for s in made), 8),
                         (Counter(t.name for s in made for t in s.things if t.name in TAUGHT), len(TAUGHT)),
                         (Counter(s.word for s in made if s.word), len(scenes.WORDS))):  # fmt: skip
        expected = sum(found.values()) / kinds
        assert len(found) == kinds
        assert max(abs(n - expected) for n in found.values()) < 6 * expected**0.5 + 0.06 * expected


def test_every_name_has_a_drawing_and_every_word_fits() -> None:
    for name in (*TAUGHT, *UNSEEN):
        assert scenes.openmoji_drawing(name)[..., 3].any()
    fonts = (*scenes.FONTS, *scenes.UNSEEN_FONTS)
    for i, word in enumerate(scenes.WORDS):
        scenes.render(Scene((), "grey", "plain", word, fonts[i % len(fonts)], seed=17), drawing)
    with pytest.raises(MMHooksError, match="expected the name of a drawing of OpenMoji, got 'no such thing'"):
        scenes.openmoji_drawing("no such thing")
