"""Interpolation experiment: images generated with features moved toward a reference, their scores, and the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_tensor

import mmhooks as mm
from mmhooks.analysis.measures.mds import GROUPS as MODALITIES
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.analysis.statistics.primaries import Decision
from mmhooks.models.embedders import Embedder, image_embedder
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.generation.options import Options
from mmhooks.studies.generation.verdicts import as_json, power_line, verdicts
from mmhooks.utils.progress import rate_bar

GROUPS = (*MODALITIES, "random")
MEASURES = {
    "shift": "semantic shift",
    "gain": "reference gained",
    "distortion": "structural distortion",
    "quality": "image quality",
}
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Case:
    """One prompt, and a reference image of something else with its text."""

    prompt: str
    reference: str
    image: Image


@dataclass(frozen=True)
class Setting:
    """A space whose features are scored and edited: its groups, the edited site, and the target."""

    name: str
    site: str
    groups: dict[str, mm.FeatureSet]  # "random" is the first of the random sets
    random: tuple[mm.FeatureSet, ...]  # as large, outside all edited groups
    pool: int  # features that the random sets are drawn from
    sizes: dict[str, int]  # of the groups before they are cut to one size
    rule: str  # that defined the groups
    toward: Tensor
    mds: Any
    head: Any = None

    def edit(self, group: mm.FeatureSet, strength: float, rows: slice) -> mm.Interpolate:
        """Returns the edit of these rows' prompts; the negative prompt is not edited."""
        place = self.site if self.head is None else f"{self.site}.sae.latents"
        return mm.Interpolate(group, toward=self.toward[rows], strength=strength, at=place, guidance="cond")

    @contextmanager
    def attached(self, sd: Any) -> Iterator[None]:
        """Attaches the head while its features are edited: edits at the site itself would go to it as well."""
        if self.head is not None:
            sd.attach(self.head, at=self.site, name="sae")
        yield
        if self.head is not None:
            sd.detach("sae")


class ImageGenerator:
    """Generates images in batches; the noise of a case depends only on its index and the seed."""

    def __init__(self, sd: Any, steps: int, guidance: float, batch: int) -> None:
        self.sd, self.batch = sd, batch
        self.options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pil"}
        sd.pipe.set_progress_bar_config(disable=True)

    def __call__(self, prompts: list[str], seed: int, edit: Any = None) -> Float[Tensor, "n 3 h w"]:
        """Generates one image per prompt; ``edit(rows)`` returns the edit for a slice of the prompts."""
        out = []
        for begin in range(0, len(prompts), self.batch):
            rows = slice(begin, min(begin + self.batch, len(prompts)))
            some = prompts[rows]
            noise = [torch.Generator().manual_seed(seed * 1_000_003 + begin + i) for i in range(len(some))]
            with nullcontext() if edit is None else self.sd.hooks(edit(rows)):
                images = self.sd.pipe(some, generator=noise, **self.options).images
            out += [to_tensor(image) for image in images]
        return torch.stack(out)


class Judge:
    """Scores the effect of an edit by EfficientNet-Lite0 features and SSIM.

    ``shift``: how much closer the image gets to the pipeline's own drawing of the reference's text than to that of the
    prompt (difference of cosines, drawings from other noise), relative to strength 0; an image that is merely
    destroyed shifts too, so ``gain`` is the reference's part of it. ``distortion``: 1 - SSIM to the image at strength
    0 from the same noise. ``quality``: cosine to the nearest of all unedited drawings.
    """

    def __init__(
        self, embed: Embedder, plain: Float[Tensor, "n 3 h w"], of_references: Float[Tensor, "n 3 h w"]
    ) -> None:
        self.embed = embed
        own, theirs = self.vectors(plain), self.vectors(of_references)
        self.mean = torch.cat([own, theirs]).mean(0)
        self.prompt, self.reference = (normalize(v - self.mean, dim=1) for v in (own, theirs))

    def vectors(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        from torchvision.transforms.functional import to_pil_image

        return self.embed([to_pil_image(one.clamp(0, 1)) for one in pixels])

    def __call__(
        self, edited: Float[Tensor, "n 3 h w"], start: Float[Tensor, "n 3 h w"]
    ) -> dict[str, Tensor]:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        first = slice(len(edited))  # images may be of the first prompts only
        now, before = (normalize(self.vectors(x) - self.mean, dim=1) for x in (edited, start))
        similarity = ssim(edited, start, data_range=1.0, reduction="none")
        assert isinstance(similarity, Tensor)
        gain, loss = ((side[first] * (now - before)).sum(1) for side in (self.reference, self.prompt))
        return {
            "shift": gain - loss,
            "gain": gain,
            "distortion": 1 - similarity.reshape(len(edited)),
            "quality": (now @ torch.cat([self.prompt, self.reference]).T).amax(1),
        }


# By space, group and measure, the values of the prompts, one row per strength: fewer prompts below the largest.
Curves = dict[str, dict[str, dict[str, list[Float[Tensor, " _"]]]]]


@dataclass(frozen=True)
class Interpolated:
    """Results of one mode.

    Attributes:
        settings: the spaces that were edited.
        curves: of the first prompts at the strengths below the largest, of all prompts at 0 and at the largest.
        random: by space and measure, at the largest strength, one row per random set.
        strips: the images of one case by space and group. shown: the index of that case.
    """

    settings: list[Setting]
    curves: Curves
    random: dict[str, dict[str, Float[Tensor, "sets n"]]]
    strips: dict[str, dict[str, Tensor]]
    shown: int

    def decided(self) -> dict[str, dict[str, Decision]]:
        """Returns the verdicts on the paper's claims, by space."""
        last = {
            s: {g: {m: v[-1] for m, v in by.items()} for g, by in groups.items()}
            for s, groups in self.curves.items()
        }
        return verdicts(last, self.random)


@dataclass(frozen=True)
class Bench:
    """Everything that an edit is compared with: the prompts, their unedited images, and the judge."""

    generate: ImageGenerator
    judge: Judge
    prompts: list[str]
    starts: list[Float[Tensor, "n 3 h w"]]  # one of every seed
    advance: Callable[[int], None]

    def measure(
        self, edit: Callable[[slice], Any], count: int
    ) -> tuple[dict[str, Float[Tensor, " n"]], UInt8[Tensor, "n 3 h w"]]:
        """Draws the first ``count`` prompts under an edit; returns means over seeds, and the first seed's images."""
        found, images = [], []
        for seed, start in enumerate(self.starts):
            drawn = self.generate(self.prompts[:count], seed, edit)
            found.append(self.judge(drawn, start[:count]))
            images.append(drawn)
            self.advance(count)
        return {m: torch.stack([f[m] for f in found]).mean(0) for m in MEASURES}, _bytes(images[0])


def interpolate(
    generate: ImageGenerator,
    settings: list[Setting],
    cases: list[Case],
    strengths: tuple[float, ...],
    options: Options,
    place: Placement,
) -> Interpolated:
    """Draws every setting and group at every strength, and the random sets at the largest, where claims are decided.

    The strengths below the largest make curves and the grid, for which the first ``options.curve_pairs`` prompts are
    enough. The case shown is ``options.shown``, or of these the one that moved most, over all settings and groups.
    """
    seeds, n, some = options.seeds, len(cases), min(options.curve_pairs, len(cases))
    embed = image_embedder(options.image_embedder, device=place.device, dtype=place.dtype, progress=False)
    curves: Curves = {}
    strips: dict[str, dict[str, list[Tensor]]] = {}
    random: dict[str, dict[str, Tensor]] = {}
    own = sum(len(GROUPS) * ((len(strengths) - 1) * some + n) + (len(s.random) - 1) * n for s in settings)
    total = own * seeds + (seeds + 2) * n
    with rate_bar("interpolate", total, unit="images", show=not options.quiet) as advance:
        bench = _bench(generate, embed, cases, seeds, advance)
        unedited = torch.stack([bench.judge(s, s)["quality"] for s in bench.starts]).mean(0)
        at_zero = {m: unedited if m == "quality" else torch.zeros(n) for m in MEASURES}
        for setting in settings:
            curves[setting.name], strips[setting.name] = {}, {}
            with setting.attached(generate.sd):
                for name, group in setting.groups.items():
                    rows: dict[str, list[Tensor]] = {m: [at_zero[m]] for m in MEASURES}
                    strip = [_bytes(bench.starts[0][:some])]
                    for strength in strengths:
                        count = n if strength == strengths[-1] else some
                        found, images = bench.measure(partial(setting.edit, group, strength), count)
                        strip.append(images[:some])
                        for m in MEASURES:
                            rows[m].append(found[m])
                    curves[setting.name][name], strips[setting.name][name] = rows, strip
                first = {m: curves[setting.name]["random"][m][-1] for m in MEASURES}
                edits = [partial(setting.edit, one, strengths[-1]) for one in setting.random[1:]]
                sets = [first, *(bench.measure(edit, n)[0] for edit in edits)]
            random[setting.name] = {m: torch.stack([found[m] for found in sets]) for m in MEASURES}
    shown = options.shown
    if shown is None:
        moved = [by["shift"][-1][:some] for groups in curves.values() for by in groups.values()]
        shown = int(torch.stack(moved).mean(0).argmax())
    chosen = {
        s: {g: torch.stack([p[shown] for p in strip]) for g, strip in by.items()} for s, by in strips.items()
    }
    return Interpolated(settings, curves, random, chosen, shown)


def _bench(
    generate: ImageGenerator, embed: Embedder, cases: list[Case], seeds: int, advance: Callable[[int], None]
) -> Bench:
    """Draws everything unedited: prompts and references from noise of their own for the judge, then every seed."""

    def drawn(texts: list[str], seed: int) -> Tensor:
        images = generate(texts, seed)
        advance(len(texts))
        return images

    prompts = [case.prompt for case in cases]
    judge = Judge(embed, drawn(prompts, seeds), drawn([case.reference for case in cases], seeds))
    return Bench(generate, judge, prompts, [drawn(prompts, seed) for seed in range(seeds)], advance)


def numbers_of(found: Interpolated) -> dict[str, Any]:
    """Returns the numbers of a mode for ``results.json``, by space."""
    decided = found.decided()
    return {
        s.name: {
            "rule": s.rule,
            "sizes": s.sizes,
            "edited": {g: len(features) for g, features in s.groups.items()},
            "mu": s.mds.mu,
            "sigma": s.mds.sigma,
            "thresholds": s.mds.thresholds,
            "shuffled_r": s.mds.shuffled_r,
            "shown": found.shown,
            "curves": {
                g: {measure: [bootstrap(row) for row in rows] for measure, rows in by.items()}
                for g, by in found.curves[s.name].items()
            },
            "random_sets": {
                "n": len(s.random),
                "pool": s.pool,
                **{m: bootstrap(rows.mean(1)) for m, rows in found.random[s.name].items()},
                "means": {m: rows.mean(1).tolist() for m, rows in found.random[s.name].items()},
            },
            "verdicts": as_json(decided[s.name]),
            "power": power_line(decided[s.name]),
        }
        for s in found.settings
    }


def _bytes(pixels: Float[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 3 h w"]:
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
