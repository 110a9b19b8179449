"""DAAM: where words act in a generated image, from averaged cross-attention patterns of a diffusion run.

The heat of a text token is the attention it gets from every position of the image, averaged over attention heads, layers
and denoising steps, with each layer resized to the latents (Tang et al. 2022, "What the DAAM", eq. 4-6). Only sums are
kept, not the patterns, so memory does not grow with the number of steps. :func:`attention_maps` resizes bilinearly,
which keeps heat positive and a pixel's sum over all tokens at 1; :func:`head_maps` keeps attention heads apart and
resizes as DAAM's public code does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mmhooks.errors import HookDidNotFire, MMHooksError, ShapeMismatch
from mmhooks.hooks.sites import Pattern
from mmhooks.hooks.steps import chosen_steps, halves
from mmhooks.utils.indexing import one_place

Maps = TypeVar("Maps", bound="AttentionMaps")


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
        self.sum: Tensor | None
        self.layers: int  # number of patterns added, one per layer and step
        self._reset()
        self._size: tuple[int, int] | None = None

    def begin_step(self, latents: Float[Tensor, "b c h w"], *, hook: Any) -> None:
        """Records the latents' height and width; at the first step, resets what an earlier run left."""
        if hook.step == 0:
            self._reset()
        self._size = (latents.shape[-2], latents.shape[-1])

    def _reset(self) -> None:
        self.sum, self.layers = None, 0

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
        self._add(pattern[parts[self.half]].detach().float(), rows, hook.name)
        self.layers += 1

    def _add(self, pattern: Float[Tensor, "b heads pixel token"], rows: int, site: str) -> None:
        """Adds the pattern of one layer, an image of ``rows`` rows."""
        assert self._size is not None
        # By hand: einops.reduce orders the axes before it averages, a strided read that takes 2 to 9 times as long, and its
        # result is resized up to 10 times as slowly as this one, whose tokens lie beside each other.
        small = pattern.mean(1).unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
        heat = F.interpolate(small, self._size, mode="bilinear", align_corners=False)
        self.sum = heat if self.sum is None else self.sum.add_(heat)

    @property
    def maps(self) -> Float[Tensor, "b token h w"]:
        """Mean attention to every token, at the size of the latents; it sums to 1 over all tokens."""
        if self.sum is None:
            raise self._nothing()
        return self.sum / self.layers

    def _nothing(self) -> HookDidNotFire:
        return HookDidNotFire(
            f"no attention of the half {self.half!r} was recorded: run the pipeline inside the context, with "
            "steps= that the run has" + ("" if self.half == "cond" else " and with guidance")
        )

    def word(
        self, word: str, prompt: str | Sequence[str], maps: Float[Tensor, "b token h w"] | None = None
    ) -> Float[Tensor, "b h w"]:
        """Computes the heat of a word, averaged over its tokens and occurrences; parts of longer words do not count.

        Args:
            word: one or several words that follow each other in the prompt.
            prompt: that of the run; one per row if the rows differ.
            maps: whose heat; default :attr:`maps`. One attention head's: ``heads.of(site, head)``.

        Raises:
            MMHooksError: the word is not in the prompt, or was truncated.
            ShapeMismatch: the run had a different number of prompts.
        """
        maps = self.maps if maps is None else maps
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


class HeadMaps(AttentionMaps):
    """Sums of cross-attention by layer and attention head, filled by :func:`head_maps`; each new run resets them.

    Attributes:
        sums: by site, over steps, at the layer's own size.
    """

    sums: dict[str, Float[Tensor, "b head token h w"]]

    def _reset(self) -> None:
        super()._reset()
        self.sums, self._times = {}, Counter[str]()

    def _add(self, pattern: Float[Tensor, "b heads pixel token"], rows: int, site: str) -> None:
        heat = rearrange(pattern, "b head (h w) token -> b head token h w", h=rows)
        self.sums[site] = heat.clone() if site not in self.sums else self.sums[site].add_(heat)
        self._times[site] += 1

    @property
    def maps(self) -> Float[Tensor, "b token h w"]:
        """Mean heat of every token over steps and over all attention heads of all layers, as DAAM's public code computes
        it: each head's sum over steps is resized bicubically to the latents, and what falls below 0 is set to 0.

        The public code does not divide by the number of steps, and leaves out the middle block: give ``sites=``.
        """
        return self.of()

    def of(self, sites: str | Sequence[str] | None = None, head: Any = None) -> Float[Tensor, "b token h w"]:
        """:attr:`maps` of some layers or of one attention head of each.

        Args:
            sites: one of ``sums`` or several; default all. head: its number; default all.

        Raises:
            HookDidNotFire: nothing was recorded. MMHooksError: there is no such layer.
            ShapeMismatch: a layer does not have this attention head, or there is no layer.
        """
        if not self.sums or self._size is None:
            raise self._nothing()
        names = list(self.sums) if sites is None else [sites] if isinstance(sites, str) else list(sites)
        missing = [name for name in names if name not in self.sums]
        if missing:
            raise MMHooksError(
                f"expected layers that were recorded, {', '.join(self.sums)}, got {missing[0]!r}"
            )
        if not names:
            raise ShapeMismatch("sites: expected at least one layer, got none")
        total, n = 0.0, 0
        for name in names:
            heat = self.sums[name]
            if head is not None:
                place = one_place(head, heat.shape[1], f"attention heads of {name}")
                heat = heat[:, place : place + 1]
            b, heads = heat.shape[:2]
            large = F.interpolate(heat.flatten(0, 1), self._size, mode="bicubic", align_corners=False)
            # Bicubic interpolation undershoots beside steep edges.
            total = total + large.clamp_(min=0).unflatten(0, (b, heads)).sum(1) / self._times[name]
            n += heads
        return total / n  # type: ignore[return-value]


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
    with _collecting(model, AttentionMaps, sites, guidance, steps) as maps:
        yield maps


@contextmanager
def head_maps(
    model: Any,
    sites: Pattern | Sequence[Pattern] = "unet.*.cross.pattern",
    *,
    guidance: Literal["cond", "uncond"] = "cond",
    steps: Any = None,
) -> Iterator[HeadMaps]:
    """Collects cross-attention as :func:`attention_maps`, by attention head, and resizes it as DAAM's public code does.

    The sums of Stable Diffusion 1 at 512 pixels take 66 MB an image.

    Args:
        model, sites, guidance, steps: as in :func:`attention_maps`. The public code reads all layers but the middle
            block's: ``sites=["unet.down_blocks.*.cross.pattern", "unet.up_blocks.*.cross.pattern"]``.

    Raises:
        UnknownSite: on entry, there is no such layer. MMHooksError: an attention processor hides its pattern.

    >>> with head_maps(sd) as heads:                                     # doctest: +SKIP
    ...     image = sd.pipe("a red panda").images[0]
    >>> site = next(iter(heads.sums))                                    # doctest: +SKIP
    >>> heads.word("panda", "a red panda", heads.of(site, head=3)).shape  # doctest: +SKIP
    torch.Size([1, 8, 8])
    """
    with _collecting(model, HeadMaps, sites, guidance, steps) as maps:
        yield maps


@contextmanager
def _collecting(
    model: Any,
    kind: type[Maps],
    sites: Pattern | Sequence[Pattern],
    guidance: Literal["cond", "uncond"],
    steps: Any,
) -> Iterator[Maps]:
    if not hasattr(model, "pipe"):
        raise MMHooksError(
            f"expected a mm.HookedDiffusion, got a {type(model).__name__}: make one by mm.load_diffusion(...)"
        )
    if guidance not in ("cond", "uncond"):
        raise MMHooksError(f'guidance: expected "cond" or "uncond", got {guidance!r}')
    pipe = model.pipe
    tokenizer = getattr(pipe, "tokenizer", None) or pipe.tokenizer_2
    maps = kind(
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
