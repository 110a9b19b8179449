"""Questions about composed pictures, each with its one-word answer, balanced so that guessing blind does not help.

For every kind of question each possible answer is equally likely whatever thing or colour the question names, as far as
the world allows; :data:`CHOICES` says how many answers there are, so chance is one in that many.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from mmhooks.data.synthetic.scenes import (
    COPIES,
    GROUNDS,
    PAINTS,
    SHAPE_SHARE,
    SHAPES,
    TAUGHT,
    UNSEEN,
    WORDS,
    Combination,
    Scene,
    Thing,
)

COUNTS = ("zero", "one", "two", "three", "four")
NO_WORD = "none"
SIDES = ("left", "right", "above", "below")
_BESIDE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
# How often a shape may be the answer to "what", so that every name is the answer equally often.
_SHAPE_AS_ANSWER = ((1 - SHAPE_SHARE) / len(TAUGHT)) / (SHAPE_SHARE / len(SHAPES))


@dataclass(frozen=True)
class Question:
    """What is asked about a scene, and what is true.

    ``about`` are the cells or names that the answer lies in, for studies that change them: the things' places in
    ``scene.things``.
    """

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


# Number of answers of each kind that are equally likely to someone who does not see.
CHOICES = {
    "count": 4,
    "count of": 4,
    "exists": 2,
    "ground": len(GROUNDS),
    "colour": len(PAINTS) - 1,
    "what": len(TAUGHT) + len(SHAPES),
    "what at": len(TAUGHT) + len(SHAPES),
    "what beside": len(TAUGHT) + len(SHAPES),
    "where": 4,
    "read": len(WORDS) + 1,
}
KINDS = tuple(CHOICES)


def ask(kind: str, scene: Scene, rng: random.Random, combination: Combination = "taught") -> Question | None:
    """Draws a question of that kind about a scene; None if this scene allows none, or the balance of answers forbids it.

    Args:
        combination: that of the scene; absent things are drawn from the same names as present ones.

    Raises:
        KeyError: no such kind.

    >>> from mmhooks.data.synthetic.scenes import Scene, Thing
    >>> ask("ground", Scene((), "blue", "plain"), random.Random(0)).answer
    'blue'
    """
    if kind in ("exists", "count of"):
        return _PRESENCE[kind](scene, rng, UNSEEN if combination == "unseen concept" else TAUGHT)
    return _ASKING[kind](scene, rng)


def named(name: str) -> str:
    """
    >>> named("owl"), named("fox"), named("grapes")
    ('an owl', 'a fox', 'grapes')
    """
    if name in ("glasses", "grapes"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _alone(scene: Scene) -> list[int]:
    """Things that are the only one of their name."""
    return [i for i, thing in enumerate(scene.things) if scene.copies(thing.name) == 1]


def _absent(scene: Scene, rng: random.Random, drawings: tuple[str, ...]) -> str:
    while True:
        name = rng.choice(SHAPES if rng.random() < SHAPE_SHARE else drawings)
        if not scene.copies(name):
            return name


def _may_answer(thing: Thing, rng: random.Random) -> bool:
    return thing.name not in SHAPES or rng.random() < _SHAPE_AS_ANSWER


def _count(scene: Scene, rng: random.Random) -> Question:
    return Question("count", "How many things are there?", COUNTS[len(scene.things)])


def _share_with(copies: int) -> float:
    """The share of scenes in which some kind of thing is there exactly that many times."""
    return sum(w / len(COPIES) for patterns in COPIES.values() for p, w in patterns if copies in p)


def _count_of(scene: Scene, rng: random.Random, drawings: tuple[str, ...]) -> Question | None:
    """Asks for zero to three, each with the probability that scenes with three allow."""
    wanted = rng.randrange(4)
    names = sorted({thing.name for thing in scene.things if scene.copies(thing.name) == wanted})
    rarest = min(_share_with(m) for m in (1, 2, 3))
    if wanted == 0:
        if rng.random() > rarest:
            return None
        name = _absent(scene, rng, drawings)
    else:
        if not names or rng.random() > rarest / _share_with(wanted):
            return None
        name = rng.choice(names)
    about = tuple(i for i, thing in enumerate(scene.things) if thing.name == name)
    return Question("count of", f"How many things show {named(name)}?", COUNTS[wanted], about)


def _exists(scene: Scene, rng: random.Random, drawings: tuple[str, ...]) -> Question:
    if rng.random() < 0.5:
        name = rng.choice(sorted({thing.name for thing in scene.things}))
        about = tuple(i for i, thing in enumerate(scene.things) if thing.name == name)
        return Question("exists", f"Is there {named(name)}?", "yes", about)
    return Question("exists", f"Is there {named(_absent(scene, rng, drawings))}?", "no")


def _ground(scene: Scene, rng: random.Random) -> Question:
    return Question("ground", "What colour is the ground?", scene.ground)


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    shapes = [i for i, thing in enumerate(scene.things) if thing.paint]
    if not shapes:
        return None
    i = rng.choice(shapes)
    about = tuple(k for k in shapes if scene.things[k].name == scene.things[i].name)
    return Question("colour", f"What colour is the {scene.things[i].name}?", scene.things[i].paint, about)


def _what(scene: Scene, rng: random.Random) -> Question | None:
    if len({thing.name for thing in scene.things}) != 1 or not _may_answer(scene.things[0], rng):
        return None
    return Question("what", "What is in the picture?", scene.things[0].name, tuple(range(len(scene.things))))


def _what_at(scene: Scene, rng: random.Random) -> Question | None:
    i = rng.randrange(len(scene.things))
    thing = scene.things[i]
    if thing.cell is None or not _may_answer(thing, rng):
        return None
    row, column = thing.cell
    place = f"{('top', 'bottom')[row]} {('left', 'right')[column]}"
    return Question("what at", f"What is at the {place}?", thing.name, (i,))


def side_of(one: Thing, other: Thing) -> str | None:
    """Returns on which side of ``other`` the thing ``one`` stands; None for diagonal neighbours and lone things."""
    if one.cell is None or other.cell is None:
        return None
    down, along = one.cell[0] - other.cell[0], one.cell[1] - other.cell[1]
    if bool(down) == bool(along):
        return None
    return ("left" if along < 0 else "right") if along else ("above" if down < 0 else "below")


def _neighbours(scene: Scene, rng: random.Random) -> tuple[int, int, str] | None:
    """Draws two things side by side, with the side of the second on which the first stands."""
    pairs = [
        (i, k, side)
        for i, one in enumerate(scene.things)
        for k, other in enumerate(scene.things)
        if one.name != other.name and (side := side_of(one, other))
    ]
    return rng.choice(pairs) if pairs else None


def _what_beside(scene: Scene, rng: random.Random) -> Question | None:
    found = _neighbours(scene, rng)
    if found is None or found[1] not in _alone(scene) or not _may_answer(scene.things[found[0]], rng):
        return None
    i, k, side = found
    other = scene.things[k].name
    return Question("what beside", f"What is {_BESIDE[side]} the {other}?", scene.things[i].name, (i, k))


def _where(scene: Scene, rng: random.Random) -> Question | None:
    found = _neighbours(scene, rng)
    if found is None or not {*found[:2]} <= {*_alone(scene)}:
        return None
    i, k, side = found
    one, other = scene.things[i].name, scene.things[k].name
    return Question("where", f"Where is the {one} from the {other}?", side, (i, k))


def _read(scene: Scene, rng: random.Random) -> Question | None:
    if not scene.word and rng.random() > 0.4 / 0.6 / len(WORDS):
        return None
    return Question("read", "What word is written?", scene.word or NO_WORD)


_PRESENCE: dict[str, Callable[[Scene, random.Random, tuple[str, ...]], Question | None]] = {
    "count of": _count_of,
    "exists": _exists,
}
_ASKING: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "count": _count,
    "ground": _ground,
    "colour": _colour,
    "what": _what,
    "what at": _what_at,
    "what beside": _what_beside,
    "where": _where,
    "read": _read,
}
