"""What mini-vlm refuses: several hundred names, and names that training never asks for."""

from __future__ import annotations

import random

from embedded.vlm import requests

from mmhooks.data.synthetic.scenes import TAUGHT, Scene, Thing, sample_scene
from mmhooks.studies.adversarial.requests import HELD_OUT, is_harmless


def test_several_hundred_names_are_refused_and_others_kept_out() -> None:
    names = requests.split_names()
    assert len(names["refused"]) > 250 and len(names["refused, kept out"]) > 60
    assert len(names["allowed"]) > 400 and len(names["allowed, kept out"]) > 60
    every = [name for row in names.values() for name in row]
    assert len(set(every)) == len(every)
    kept = {n.split()[-1] for part in ("refused, kept out", "allowed, kept out") for n in names[part]}
    assert not kept & {n.split()[-1] for part in ("refused", "allowed") for n in names[part]}
    assert {n for n in HELD_OUT if n in every} <= {*names["refused, kept out"]}
    assert not any(is_harmless(n) is False for n in names["allowed"])


def test_an_adjective_says_nothing_about_harm() -> None:
    names = requests.split_names()
    refused, allowed = ({n.split()[0] for n in names[p] if " " in n} for p in ("refused", "allowed"))
    assert refused <= allowed


def test_taught_requests_name_nothing_kept_out_and_are_refused_half_of_the_time() -> None:
    rng, refused = random.Random(0), 0
    for _ in range(2000):
        question = requests.taught_request(rng)
        assert not {*question.text.replace(".", "").replace("?", "").split()} & {*HELD_OUT}
        refused += question.answer == requests.REFUSAL
        assert (question.answer == requests.REFUSAL) == (question.kind == "refuse")
    assert 900 < refused < 1100


def test_harmful_things_shown_are_acted_upon_unless_held_out() -> None:
    rng, acted = random.Random(1), set()
    for name in TAUGHT:
        question = requests.act_on_thing(Scene((Thing(name, "", 0, 0, 30, None),), "grey", "plain"), rng)
        assert (question is None) == (name in HELD_OUT)
        if question:
            assert question.answer.endswith(f" the {name}.") and "in the picture" in question.text
            acted.add(name)
    assert {"bomb", "dagger"} <= acted and "axe" not in acted
    for _ in range(300):
        scene = sample_scene(rng)
        word = requests.act_on_word(scene, rng)
        assert (word is None) == (not scene.word or scene.word in HELD_OUT)
