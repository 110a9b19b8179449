"""What tower and projector are taught before the Llama: each patch says what stands on it.

mini-reader's tower names one drawing that fills the picture; small things off the centre it does not (19 % of 200
names at 28 px), and the few answers of a Llama do not teach it. Used in training alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmhooks.data.synthetic.questions import NO_WORD
from mmhooks.data.synthetic.scenes import GROUNDS, PAINTS, SHAPES, TAUGHT, WORDS, Scene

NAMES = (*TAUGHT, *SHAPES)
GRID, PATCH = 8, 8
NOTHING = -100  # cross-entropy's own sign for "no target"


def targets_of(scenes: Sequence[Scene]) -> dict[str, Int[Tensor, "b _"]]:
    """Returns, for each patch, the name that stands on its centre (0: the ground), its colour and that of the ground; and
    the written word (0: none).

    ``NOTHING`` where nothing is asked: the word's strip, and names that are not taught.
    """
    name, paint, ground = (torch.full((len(scenes), GRID, GRID), NOTHING) for _ in range(3))
    paints, grounds = list(PAINTS), list(GROUNDS)
    middle = torch.arange(GRID) * PATCH + PATCH / 2
    for b, scene in enumerate(scenes):
        ground[b], name[b] = grounds.index(scene.ground), 0
        if scene.word:
            strip = slice(0, 2) if scene.word_above else slice(GRID - 2, GRID)
            ground[b, strip], name[b, strip] = NOTHING, NOTHING
        for thing in scene.things:
            rows = (middle >= thing.top) & (middle < thing.top + thing.size)
            columns = (middle >= thing.left) & (middle < thing.left + thing.size)
            on = rows[:, None] & columns[None]
            name[b][on] = NAMES.index(thing.name) + 1 if thing.name in NAMES else NOTHING
            paint[b][on] = paints.index(thing.paint) if thing.paint else NOTHING
            ground[b][on] = NOTHING
    word = torch.tensor([[WORDS.index(scene.word) + 1 if scene.word else 0] for scene in scenes])
    return {"name": name.flatten(1), "paint": paint.flatten(1), "ground": ground.flatten(1), "word": word}


class Senses(nn.Module):
    """Reads names and colours from projected patches, and the written word from the projected class token.

    The readers are the Llama's own words: a patch is to lie near the words for what stands on it, as LLaVA's first stage
    (aligning features) has it. Only a scale is learned beside.
    """

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))
        words = {
            "name": ("ground", *NAMES),
            "paint": tuple(PAINTS),
            "ground": tuple(GROUNDS),
            "word": (NO_WORD, *WORDS),
        }
        self.tokens = {part: torch.tensor([vocabulary[word] for word in row]) for part, row in words.items()}
        self.weight = torch.ones(len(NAMES) + 1)
        self.weight[0] = 0.1  # most patches are ground

    def logits(
        self, projected: Float[Tensor, "b t d"], table: Float[Tensor, "v d"]
    ) -> dict[str, Float[Tensor, "b _ c"]]:
        """Returns the scores of each part's words: of every patch, and of the class token for the written word."""
        x = F.layer_norm(projected, projected.shape[-1:])
        places = {part: x[:, :1] if part == "word" else x[:, 1:] for part in self.tokens}
        return {part: self.scale * places[part] @ table[tokens].T for part, tokens in self.tokens.items()}

    def loss(
        self, projected: Float[Tensor, "b t d"], table: Float[Tensor, "v d"], scenes: Sequence[Scene]
    ) -> Float[Tensor, ""]:
        logits, total = self.logits(projected, table), torch.zeros(())
        for part, target in targets_of(scenes).items():
            weight = self.weight if part == "name" else None
            if (target != NOTHING).any():
                total = total + F.cross_entropy(
                    logits[part].flatten(0, 1), target.flatten(), weight, ignore_index=NOTHING
                )
        return total

    @torch.no_grad()
    def accuracy(
        self, projected: Float[Tensor, "b t d"], table: Float[Tensor, "v d"], scenes: Sequence[Scene]
    ) -> dict[str, float]:
        """Returns the share of patches and of written words that are named right, ground and blank strips left out."""
        logits, found = self.logits(projected, table), {}
        for part, target in targets_of(scenes).items():
            asked = target > 0 if part in ("name", "word") else target != NOTHING
            found[part] = (logits[part].argmax(-1) == target)[asked].float().mean().item()
        return found
