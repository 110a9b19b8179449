"""What patches are taught to say: what stands on their centre."""

from __future__ import annotations

import random

import torch
from embedded.vlm import senses
from embedded.vlm.tokenizer import tokenizer_of
from torch import nn

from mmhooks.data.synthetic.scenes import COMBINATIONS, GROUNDS, PAINTS, STRIP, WORDS, Scene, sample_scene


def patch_by_hand(scene: Scene, row: int, column: int) -> tuple[int, int, int]:
    """Name, paint and ground of one patch, by asking every thing whether it covers the centre."""
    x, y = 8 * column + 4, 8 * row + 4
    none = senses.NOTHING
    for thing in scene.things:
        if thing.left <= x < thing.left + thing.size and thing.top <= y < thing.top + thing.size:
            name = senses.NAMES.index(thing.name) + 1 if thing.name in senses.NAMES else none
            return name, [*PAINTS].index(thing.paint) if thing.paint else none, none
    if scene.word and (8 * row < STRIP if scene.word_above else 8 * (row + 1) > 64 - STRIP):
        return none, none, none
    return 0, none, [*GROUNDS].index(scene.ground)


def test_targets_are_what_stands_on_each_centre() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng, COMBINATIONS[i % 4]) for i in range(80)]
    found = senses.targets_of(scenes)
    for b, scene in enumerate(scenes):
        for patch in range(64):
            expected = patch_by_hand(scene, *divmod(patch, 8))
            assert tuple(int(found[part][b, patch]) for part in ("name", "paint", "ground")) == expected
        assert int(found["word"][b, 0]) == (WORDS.index(scene.word) + 1 if scene.word else 0)


def test_patches_can_learn_to_say_it() -> None:
    """The loss reaches patches and words: free patches say everything right after some steps."""
    rng = random.Random(1)
    scenes = [sample_scene(rng) for _ in range(6)]
    vocabulary = tokenizer_of().get_vocab()
    torch.manual_seed(0)
    reader, table = senses.Senses(vocabulary), nn.Parameter(0.1 * torch.randn(len(vocabulary), 48))
    patches = nn.Parameter(0.1 * torch.randn(6, 65, 48))
    optimizer = torch.optim.Adam([patches, table], lr=0.08)
    for _ in range(50):
        optimizer.zero_grad()
        reader.loss(patches, table, scenes).backward()
        optimizer.step()
    scores = reader.accuracy(patches, table, scenes)
    assert set(scores) == {"name", "paint", "ground", "word"}
    assert min(v for v in scores.values() if v == v) > 0.95, scores
