"""DAAM: where words act in a generated image, from averaged cross-attention patterns of a diffusion run.

The heat of a text token is the attention it gets from every position of the image, averaged over attention heads, layers
and denoising steps, with each layer resized to the latents (Tang et al. 2022, "What the DAAM", eq. 4-6; bilinear instead
of bicubic, which would give negative heat). Only sums are kept, not the patterns, so memory does not grow with the
number of steps.
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
    """Sums of cross-attention, filled by :func:`attention_maps`; each new run resets them.

    Args:
        tokenize: text -> token ids, with start and end; the pipeline's own.
        pieces: token ids -> the tokenizer's pieces, whose markers show where words begin and end.
        half: the half of a guided batch whose attention is kept.
        steps: only these denoising steps are counted.
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
        self.layers = 0  # number of patterns added, one per layer and step
        self._size: tuple[int, int] | None = None

    def begin_step(self, latents: Float[Tensor, "b c h w"], *, hook: Any) -> None:
        """Records the latents' height and width; at the first step, resets what an earlier run left."""
        if hook.step == 0:
            self.sum, self.layers = None, 0
        self._size = (latents.shape[-2], latents.shape[-1])

    def update(self, pattern: Float[Tensor, "b heads pixel token"], *, hook: Any) -> None:
        """Adds the pattern of one layer and step."""
        if self._steps is not None and hook.step not in self._steps:
            return
        parts = dict(halves(len(pattern), hook.name) or [(hook.guidance or "cond", slice(None))])
        if self.half not in parts:
            return
        if self._size is None:
            raise MMHooksError(
                f"{hook.name!r}: expected the U-Net's first convolution to run before, got none: the latents' size is unknown"
            )
        rows, _ = layer_size(pattern.shape[2], self._size)
        pattern = pattern[parts[self.half]].detach().float()
        small = reduce(pattern, "b head (h w) token -> b token h w", "mean", h=rows)
        heat = F.interpolate(small, self._size, mode="bilinear", align_corners=False)
        self.sum = heat if self.sum is None else self.sum.add_(heat)
        self.layers += 1

    @property
    def maps(self) -> Float[Tensor, "b token h w"]:
        """Mean attention to every token, at the size of the latents; it sums to 1 over all tokens."""
        if self.sum is None:
            raise HookDidNotFire(
                f"no attention of the half {self.half!r} was recorded: run the pipeline inside the context, with "
                "steps= that the run has" + ("" if self.half == "cond" else " and with guidance")
            )
        return self.sum / self.layers

    def word(self, word: str, prompt: str | Sequence[str]) -> Float[Tensor, "b h w"]:
        """Computes the heat of a word, averaged over its tokens and occurrences; parts of longer words do not count.

        Args:
            word: one or several words that follow each other in the prompt.
            prompt: that of the run; one per row if the rows differ.

        Raises:
            MMHooksError: the word is not in the prompt, or was truncated.
            ShapeMismatch: the run had a different number of prompts.
        """
        maps = self.maps
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if len(maps) % len(prompts):
            raise ShapeMismatch(
                f"expected one prompt per image, or per equally many, got {len(prompts)} prompts for a run of {len(maps)} images"
            )
        each = len(maps) // len(prompts)  # num_images_per_prompt
        heats = []
        for n, text in enumerate(prompts):
            places = self.places(word, text, maps.shape[1])
            heats.append(maps[n * each : (n + 1) * each, places].mean(1))
        return torch.cat(heats)

    def places(self, word: str, prompt: str, length: int = 77) -> list[int]:
        """Finds the positions of a word's tokens in the prompt.

        Raises:
            MMHooksError: the word is not in the prompt.
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
    """Whether a word begins at piece ``i``, judged by CLIP's ``</w>`` at ends, ``▁`` or ``Ġ`` at beginnings (T5, GPT-2), or
    ``##`` inside words (BERT). True if pieces have no markers, and after the last piece.

    >>> begins_word(["con", "cat</w>", "cat</w>"], 1), begins_word(["con", "cat</w>", "cat</w>"], 2)
    (False, True)
    >>> begins_word(["▁cat", "s"], 1), begins_word(["▁a", "▁cat"], 1)
    (False, True)
    """
    if i <= 0 or i >= len(pieces):
        return True
    if any(p.endswith("</w>") for p in pieces):
        # Special tokens are words of their own.
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
    """Collects the cross-attention of the images generated inside the context; of the last run, if there are several.

    Args:
        model: a :class:`~mmhooks.models.diffusion.model.HookedDiffusion`.
        sites: which layers; one pattern or several. A layer that several patterns match counts once.
        guidance: which half of a guided run; ``cond`` is the prompt's, with or without guidance.
        steps: denoising steps; default all.

    Raises:
        UnknownSite: on entry, there is no such layer. MMHooksError: an attention processor hides its pattern.

    >>> sd = mm.load_diffusion("mini")                                   # doctest: +SKIP
    >>> with attention_maps(sd) as maps:                                 # doctest: +SKIP
    ...     image = sd.pipe("a red panda").images[0]
    >>> maps.word("panda", "a red panda").shape                          # doctest: +SKIP
    torch.Size([1, 8, 8])
    """
    if not hasattr(model, "pipe"):
        raise MMHooksError(
            f"expected a mm.HookedDiffusion, got a {type(model).__name__}: make one by mm.load_diffusion(...)"
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
    """Resolves the patterns to hook: a single one as it is, several to the sites they match, each once."""
    if isinstance(sites, str) or callable(sites):
        return [sites]
    if not sites:
        raise MMHooksError("sites: expected a pattern or several, got none")
    return list(dict.fromkeys(name for pattern in sites for name in model.sites(pattern)))


def layer_size(pixels: int, full: tuple[int, int]) -> tuple[int, int]:
    """Computes height and width of a layer of ``pixels`` pixels: the latents' own, halved repeatedly, rounded up.

    >>> layer_size(24, (16, 24))
    (4, 6)
    """
    height, width = full
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != pixels:
        raise ShapeMismatch(
            f"expected a layer that halves latents of {full[0]} x {full[1]}, got {pixels} pixels: their layout is unknown"
        )
    return height, width


@dataclass(frozen=True)
class PointingGame(Result):
    """How often the position with the most heat lies on the object.

    Attributes:
        rate: share of hits of the hottest position, with its Wilson interval.
        chance: mean share of the image that the object covers, the hit rate of a random position.
        centre: share of hits of the image's centre, a better baseline where objects are centred.
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
    """Compares each map's hottest position, at the masks' resolution, with the object's mask (Zhang et al. 2016).

    Masks that cover nothing or everything are left out.

    Raises:
        ShapeMismatch: the numbers of maps and masks differ, or no mask is left.
        NotFinite: heat is NaN or infinite.
    """
    if len(heat) != len(masks):
        raise ShapeMismatch(f"expected one mask per map, got {len(heat)} maps and {len(masks)} masks")
    check_finite(heat.flatten(1), "heat")
    flat = masks.flatten(1)
    decides = flat.any(1) & ~flat.all(1)
    if not decides.any():
        raise ShapeMismatch(
            f"masks: expected one with both object and background, got none of the {len(masks)} masks"
        )
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
