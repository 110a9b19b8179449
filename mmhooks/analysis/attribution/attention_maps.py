"""Where words act in a generated picture: cross-attention patterns of a diffusion run, averaged (DAAM).

The heat of a text token is its attention from every place of the picture, averaged over attention heads, layers and
denoising steps, each layer brought to the size of the latents (Tang et al. 2022, "What the DAAM", eq. 4-6; bilinear
instead of bicubic, which would make negative heat). Sums are kept, never the patterns: memory does not grow with
the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import wilson
from mmhooks.errors import HookDidNotFire, MMHooksError, ShapeMismatch
from mmhooks.hooks.sites import Pattern
from mmhooks.hooks.steps import chosen_steps, halves


class AttentionMaps:
    """Sums of cross-attention, filled by :func:`attention_maps`; a new run of another shape begins anew.

    Args:
        tokenize: text -> token ids, with start and end; the pipeline's own.
        pieces: token ids -> the tokenizer's own pieces, whose marks say where words begin and end.
        half: whose attention is kept.
        steps: of these denoising steps only.
    """

    def __init__(
        self,
        tokenize: Callable[[str], Sequence[int]],
        pieces: Callable[[list[int]], list[str]],
        *,
        half: Literal["cond", "uncond"] = "cond",
        steps: Any = None,
    ) -> None:
        self._tokenize, self._pieces = tokenize, pieces
        self.half, self._steps = half, chosen_steps(steps)
        self.sum: Tensor | None = None
        self.layers = 0  # patterns that went in, one a layer and step
        self._size: tuple[int, int] | None = None

    def begin_step(self, latents: Float[Tensor, "b c h w"], *, hook: Any) -> None:
        """Notes the latents' height and width, and forgets what an earlier run left."""
        if hook.step == 0:
            self.sum, self.layers = None, 0
        self._size = (latents.shape[-2], latents.shape[-1])

    def update(self, pattern: Float[Tensor, "b heads pixel token"], *, hook: Any) -> None:
        """Adds one layer's pattern of one step."""
        if self._steps is not None and hook.step not in self._steps:
            return
        parts = dict(halves(len(pattern), hook.name) or [(hook.guidance or "cond", slice(None))])
        if self.half not in parts:
            return
        if self._size is None:
            raise MMHooksError(f"{hook.name!r} ran before the U-Net's first convolution: its size is unknown")
        rows, _ = layer_size(pattern.shape[2], self._size)
        pattern = pattern[parts[self.half]].detach().float()
        small = reduce(pattern, "b head (h w) token -> b token h w", "mean", h=rows)
        heat = F.interpolate(small, self._size, mode="bilinear", align_corners=False)
        self.sum = heat if self.sum is None else self.sum.add_(heat)
        self.layers += 1

    @property
    def maps(self) -> Float[Tensor, "b token h w"]:
        """Mean attention on every token, at the size of the latents; over all tokens it sums to 1."""
        if self.sum is None:
            raise HookDidNotFire(
                f"no attention of the half {self.half!r} came by: run the pipeline inside the context, with "
                "steps= that it has" + ("" if self.half == "cond" else " and with guidance")
            )
        return self.sum / self.layers

    def word(self, word: str, prompt: str | Sequence[str]) -> Float[Tensor, "b h w"]:
        """Heat of a word, averaged over its tokens and occurrences; a part of a longer word is none.

        Args:
            word: one or several words that stand in the prompt one after the other.
            prompt: that of the run; one a row, where the rows have several.

        Raises:
            MMHooksError: the word is not in the prompt, or was cut off with its end.
            ShapeMismatch: the run had another number of prompts.
        """
        maps = self.maps
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if len(maps) % len(prompts):
            raise ShapeMismatch(f"{len(prompts)} prompts for a run of {len(maps)} pictures")
        each = len(maps) // len(prompts)  # num_images_per_prompt
        heats = []
        for n, text in enumerate(prompts):
            places = self.places(word, text, maps.shape[1])
            heats.append(maps[n * each : (n + 1) * each, places].mean(1))
        return torch.cat(heats)

    def places(self, word: str, prompt: str, length: int = 77) -> list[int]:
        """Positions of a word's tokens in the prompt.

        Raises:
            MMHooksError: it is not there.
        """
        text, wanted = list(self._tokenize(prompt)), list(self._tokenize(word))[1:-1]
        text = text[: length - 1]  # the last one is the end
        found = [i for i in range(1, len(text)) if text[i : i + len(wanted)] == wanted] if wanted else []
        pieces = self._pieces(text)
        starts = [i for i in found if begins_word(pieces, i) and begins_word(pieces, i + len(wanted))]
        if not starts:
            inside = " (only inside a longer word)" if found else ""
            raise MMHooksError(
                f"the word {word!r} is not among the first {length} tokens of {prompt!r}{inside}"
            )
        return [start + k for start in starts for k in range(len(wanted))]


def begins_word(pieces: Sequence[str], i: int) -> bool:
    """Does a word begin at piece ``i``: by CLIP's ``</w>`` at ends, by ``▁`` or ``Ġ`` at beginnings (T5, GPT-2), by ``##``
    inside (BERT). Where pieces bear no marks, and behind the last one, it does.

    >>> begins_word(["con", "cat</w>", "cat</w>"], 1), begins_word(["con", "cat</w>", "cat</w>"], 2)
    (False, True)
    >>> begins_word(["▁cat", "s"], 1), begins_word(["▁a", "▁cat"], 1)
    (False, True)
    """
    if i <= 0 or i >= len(pieces):
        return True
    if any(p.endswith("</w>") for p in pieces):
        # Special tokens and what the text begins with stand alone.
        return pieces[i - 1].endswith("</w>") or _special(pieces[i - 1]) or _special(pieces[i])
    if any(p.startswith(("▁", "Ġ")) for p in pieces):
        return pieces[i].startswith(("▁", "Ġ")) or _special(pieces[i - 1]) or _special(pieces[i])
    return not pieces[i].startswith("##")


def _special(piece: str) -> bool:
    return len(piece) > 2 and piece[0] in "<[" and piece[-1] in ">]" and piece != "</w>"


@contextmanager
def attention_maps(
    model: Any,
    sites: Pattern | Sequence[Pattern] = "unet.*.cross.pattern",
    *,
    guidance: Literal["cond", "uncond"] = "cond",
    steps: Any = None,
) -> Iterator[AttentionMaps]:
    """Collects the cross-attention of the pictures drawn inside the context; of the last run, if there are several.

    Args:
        model: a :class:`~mmhooks.models.diffusion.model.HookedDiffusion`.
        sites: which layers; one pattern or several, a layer that several name counts once.
        guidance: whose attention, in a guided run; with guidance or without, ``cond`` is the prompt's.
        steps: denoising steps, all by default.

    Raises:
        UnknownSite: on entry, no such layer. MMHooksError: an attention processor that hides its pattern.

    >>> sd = mm.load_diffusion("mini")                                   # doctest: +SKIP
    >>> with attention_maps(sd) as maps:                                 # doctest: +SKIP
    ...     picture = sd.pipe("a red panda").images[0]
    >>> maps.word("panda", "a red panda").shape                          # doctest: +SKIP
    torch.Size([1, 8, 8])
    """
    if not hasattr(model, "pipe"):
        raise MMHooksError(
            f"expected a mm.HookedDiffusion, got a {type(model).__name__}: mm.load_diffusion(...) makes one"
        )
    if guidance not in ("cond", "uncond"):
        raise MMHooksError(f'guidance: expected "cond" or "uncond", got {guidance!r}')
    pipe = model.pipe
    tokenizer = getattr(pipe, "tokenizer", None) or pipe.tokenizer_2
    maps = AttentionMaps(
        lambda text: tokenizer(text)["input_ids"], tokenizer.convert_ids_to_tokens, half=guidance, steps=steps
    )
    with model.hooks(
        fwd_hooks=[("unet.conv_in", maps.begin_step), *((s, maps.update) for s in _each(model, sites))]
    ):
        yield maps


def _each(model: Any, sites: Pattern | Sequence[Pattern]) -> list[Pattern]:
    """Patterns to hook: one as it is, of several the sites that they name, each once."""
    if isinstance(sites, str) or callable(sites):
        return [sites]
    if not sites:
        raise MMHooksError("sites: expected a pattern or several, got none")
    return list(dict.fromkeys(name for pattern in sites for name in model.sites(pattern)))


def layer_size(pixels: int, full: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer with so many pixels: the latents' own, halved some times, rounded up.

    >>> layer_size(24, (16, 24))
    (4, 6)
    """
    height, width = full
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != pixels:
        raise ShapeMismatch(
            f"a layer of {pixels} pixels is no halving of latents of {full[0]} x {full[1]}: where they lie is unknown"
        )
    return height, width


@dataclass(frozen=True)
class PointingGame(Result):
    """How often the hottest place lies on the object.

    Attributes:
        rate: hits of the hottest place, with its Wilson interval.
        chance: mean share of the picture that the object covers: a place drawn blindly.
        centre: hits of the middle of the picture, the better guess where objects stand in the middle.
        energy: mean share of the heat that lies on the object.
    """

    rate: Estimate
    chance: float
    centre: Estimate
    energy: float

    def table(self) -> Records:
        row = {"n": self.rate.n, "hits": self.rate.value, "low": self.rate.low, "high": self.rate.high}
        return Records([row | {"chance": self.chance, "centre": self.centre.value, "energy": self.energy}])


def pointing_game(heat: Float[Tensor, "n h w"], masks: Bool[Tensor, "n2 H W"]) -> PointingGame:
    """Zhang et al. 2016: the hottest place of each map, at the masks' resolution, against the object's mask.

    Masks that cover nothing or everything decide nothing and are left out.

    Raises:
        ShapeMismatch: as many maps as masks are needed, and one that decides.
        NotFinite: heat that is NaN or infinite.
    """
    if len(heat) != len(masks):
        raise ShapeMismatch(f"{len(heat)} maps and {len(masks)} masks: one mask a map")
    check_finite(heat.flatten(1), "heat")
    flat = masks.flatten(1)
    decides = flat.any(1) & ~flat.all(1)
    if not decides.any():
        raise ShapeMismatch(f"none of the {len(masks)} masks has both object and ground")
    heat, masks, flat = heat[decides].float(), masks[decides], flat[decides]
    size = (masks.shape[-2], masks.shape[-1])
    large = F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False)[:, 0].flatten(1)
    hit = flat.gather(1, large.argmax(1, keepdim=True))
    share = (large * flat).sum(1) / large.sum(1).clamp_min(torch.finfo(large.dtype).tiny)
    return PointingGame(
        rate=wilson(int(hit.sum()), len(hit)),
        chance=float(flat.float().mean()),
        centre=wilson(int(masks[:, size[0] // 2, size[1] // 2].sum()), len(masks)),
        energy=float(share.mean()),
    )
