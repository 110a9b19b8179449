"""Zero-shot classifiers against open_clip's own."""

from __future__ import annotations

import open_clip
import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MMHooksError
from mmhooks.models.clip.zero_shot import imagenet_names, imagenet_templates, zero_shot_classifier


@pytest.fixture(scope="module")
def mini() -> mm.HookedCLIP:
    return mm.load("mini")


def test_the_mean_over_prompts_is_open_clips(mini):
    names, templates = imagenet_names()[:3], imagenet_templates()[:5]
    theirs = open_clip.build_zero_shot_classifier(
        mini.model, mini.tokenizer, names, templates, num_classes_per_batch=2
    )
    torch.testing.assert_close(zero_shot_classifier(mini, names, templates), theirs.T, rtol=1e-4, atol=1e-5)
    own = zero_shot_classifier(mini, names, ["a bad photo of a {}."])
    torch.testing.assert_close(own, zero_shot_classifier(mini, names, templates[:1]))


def test_imagenet_comes_whole():
    assert len(set(imagenet_names())) > 990 and len(imagenet_names()) == 1000
    assert len(imagenet_templates()) == 80


@pytest.mark.parametrize("templates", [[], ["a photo"], "a {}"])
def test_prompts_need_a_place_for_the_name(mini, templates):
    with pytest.raises(MMHooksError, match="in place of the name"):
        zero_shot_classifier(mini, ["dog"], templates)


def test_names_are_a_list(mini):
    for names in ("dog", []):
        with pytest.raises(MMHooksError, match="at least one class"):
            zero_shot_classifier(mini, names)
