"""Questions about composed pictures: answers are true by another way of finding them, and blind guessing is at chance."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from mmhooks.data.synthetic import questions, scenes
from mmhooks.data.synthetic.questions import CHOICES, COUNTS, KINDS, Question, ask, named
from mmhooks.data.synthetic.scenes import COMBINATIONS, SHAPES, TAUGHT, Scene, sample_scene


def asked(n: int, combination: scenes.Combination = "taught") -> list[tuple[Scene, Question]]:
    rng = random.Random(f"asked {combination}")
    made = []
    for _ in range(n):
        scene = sample_scene(rng, combination)
        made += [(scene, q) for kind in KINDS if (q := ask(kind, scene, rng, combination))]
    return made


def truth(scene: Scene, question: Question) -> str:
    """Answers from the words of the question and the things' centres in pixels, without cells or ``about``."""
    words = question.text.rstrip("?").split()
    names, centres = [t.name for t in scene.things], {t.name: t.centre for t in scene.things}
    match question.kind:
        case "count":
            return COUNTS[len(names)]
        case "count of":
            return COUNTS[names.count(words[-1])]
        case "exists":
            return "yes" if words[-1] in names else "no"
        case "ground":
            return scene.ground
        case "colour":
            return {t.name: t.paint for t in scene.things}[words[-1]]
        case "what":
            return names[0]
        case "read":
            return scene.word or "none"
        case "what at":
            middle = (
                scenes.SIZE + (0 if not scene.word else scenes.STRIP if scene.word_above else -scenes.STRIP)
            ) / 2
            at = [t.name for t in scene.things
                  if (t.centre[1] < middle) == (words[-2] == "top") and (t.centre[0] < 32) == (words[-1] == "left")]  # fmt: skip
            assert len(at) == 1
            return at[0]
        case "where":
            (x, y), (u, v) = centres[words[3]], centres[words[-1]]
            assert names.count(words[3]) == names.count(words[-1]) == 1
            if abs(x - u) > abs(y - v):
                return "left" if x < u else "right"
            return "above" if y < v else "below"
        case "what beside":
            side, (u, v) = words[2], centres[words[-1]]
            assert names.count(words[-1]) == 1
            sign, along = (-1 if side in ("left", "above") else 1), 0 if side in ("left", "right") else 1
            near = [t.name for t in scene.things if sign * (t.centre[along] - (u, v)[along]) > 12
                    and abs(t.centre[1 - along] - (u, v)[1 - along]) < 12]  # fmt: skip
            assert len(near) == 1
            return near[0]
    raise AssertionError(question.kind)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_answers_are_true(combination: scenes.Combination) -> None:
    made = asked(250, combination)
    never = {"what"} if combination == "unseen pair" else set()  # two kinds of thing are never "the thing"
    assert {question.kind for _, question in made} == {*KINDS} - never
    for scene, question in made:
        assert truth(scene, question) == question.answer, (scene, question)


def test_what_a_question_is_about_holds_its_answer() -> None:
    for scene, question in asked(300):
        things = [scene.things[i] for i in question.about]
        if question.kind in ("what", "what at", "what beside"):
            assert things[0].name == question.answer
        if question.kind == "colour":
            assert {thing.paint for thing in things} == {question.answer}
        if question.kind == "count of":
            assert COUNTS[len(things)] == question.answer


def test_guessing_blind_is_at_chance() -> None:
    """The best answer to each text, learned on one half, and the best of each kind, are no better than chance on the other."""
    made = asked(2500)
    half = len(made) // 2
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in made[:half]:
        by_text[question.text][question.answer] += 1
        by_kind[question.kind][question.answer] += 1
    hits, n = Counter(), Counter()
    for _, question in made[half:]:
        n[question.kind] += 1
        text = by_text[question.text]
        guess = (text if sum(text.values()) >= 20 else by_kind[question.kind]).most_common(1)[0][0]
        hits[question.kind] += guess == question.answer
    for kind in KINDS:
        chance = 1 / CHOICES[kind]
        sd = (chance * (1 - chance) / n[kind]) ** 0.5
        assert n[kind] > 150 and hits[kind] / n[kind] < chance + 4 * sd, (kind, hits[kind] / n[kind], chance)


def test_every_name_is_the_answer_equally_often() -> None:
    made = asked(1500)
    for kind in ("what", "what at", "what beside"):
        found = Counter(q.answer for _, q in made if q.kind == kind)
        shapes = sum(found[name] for name in SHAPES) / len(SHAPES)
        drawings = sum(found[name] for name in TAUGHT) / len(TAUGHT)
        assert 0.6 < shapes / drawings < 1.6


def test_a_written_name_says_nothing_about_what_is_there() -> None:
    """The word is a name of its own picture's things no more often than of the next picture's."""
    rng = random.Random(5)
    made = [scene for _ in range(2500) if (scene := sample_scene(rng)).word]
    names = [{thing.name for thing in scene.things} for scene in made]
    own = sum(scene.word in there for scene, there in zip(made, names, strict=True))
    others = sum(scene.word in there for scene, there in zip(made, names[1:] + names[:1], strict=True))
    assert others > 3 and abs(own - others) < 4 * (own + others) ** 0.5


def test_sides() -> None:
    fox = scenes.Thing("fox", "", 2, 2, 24, (0, 0))
    cow = scenes.Thing("cow", "", 36, 4, 24, (0, 1))
    owl = scenes.Thing("owl", "", 3, 36, 24, (1, 0))
    assert questions.side_of(fox, cow) == "left" and questions.side_of(cow, fox) == "right"
    assert questions.side_of(owl, fox) == "below" and questions.side_of(fox, owl) == "above"
    assert questions.side_of(owl, cow) is None
    assert questions.side_of(scenes.Thing("pig", "", 0, 0, 30, None), cow) is None
    assert named("ant") == "an ant" and named("glasses") == "glasses"
