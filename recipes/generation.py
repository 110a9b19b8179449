"""Interpolation by modality in Stable Diffusion (Section 5.3 of the paper, Figures 7 and 8), with numbers.

Features of the text conditioner that belong to pictures (ImgD), texts (TextD) or both (CrossD) are moved toward a
reference picture while a prompt is drawn. The paper's claim: TextD moves the concept and keeps the structure; ImgD
and CrossD break it.

    python recipes/generation.py --out runs/generation
    python recipes/generation.py --pipeline stabilityai/stable-diffusion-2-base --model ViT-H-14 \\
        --pretrained laion2b_s32b_b79k --data coco --limit 5000 --mode projected --mode naive
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_tensor

import mmhooks as mm
from mmhooks.analysis.conditioner import conditioner_mds, conditioner_sides
from mmhooks.analysis.controls import size_matched
from mmhooks.analysis.embedders import image_embedder
from mmhooks.analysis.intervals import Estimate, bootstrap
from mmhooks.analysis.results import plain
from mmhooks.data.progress import rate_bar
from mmhooks.errors import MMHooksError, ShapeMismatch

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
GROUPS = ("ImgD", "TextD", "CrossD", "random")
MEASURES = {
    "shift": "semantic shift",
    "distortion": "structural distortion",
    "quality": "picture quality",
}
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Case:
    """One prompt and one picture of something else, with the words for it."""

    prompt: str
    reference: str
    picture: Image


@dataclass(frozen=True)
class Setting:
    """A space that is scored and edited: groups of its features, where they are edited, toward what."""

    name: str
    site: str
    groups: dict[str, mm.FeatureSet]
    sizes: dict[str, int]  # of the whole groups
    toward: Tensor
    mds: Any
    head: Any = None


def choose_cases(pairs: Any, known: set[str] | None, count: int, template: str, seed: int) -> list[Case]:
    """``count`` prompts and as many references from other pairs; of a pipeline that lists what it draws, from those.

    Raises:
        MMHooksError: too few pairs.
    """
    texts = list(pairs.texts)
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if known is None or text in known:
            first.setdefault(text, i)
    rows = list(first.values())
    if len(rows) < 2 * count:
        raise MMHooksError(
            f"{count} prompts and references need {2 * count} different texts that the pipeline draws; the data has "
            f"{len(rows)}: lower --pairs or raise --limit"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        Case(template.format(texts[rows[a]]), template.format(texts[rows[b]]), pairs[rows[b]].image)
        for a, b in zip(order[:count], order[count : 2 * count], strict=True)
    ]


def same_size(groups: dict[str, mm.FeatureSet], alive: mm.FeatureSet, *, whole: bool, seed: int):
    """The groups cut at random to the size of the smallest, and a random group as large (``whole``: as TextD)."""
    size = min(len(g) for g in groups.values())
    if not size:
        empty = [name for name, g in groups.items() if not len(g)]
        raise MMHooksError(f"no feature in {', '.join(empty)}: nothing to interpolate")
    cut = (
        groups
        if whole
        else {k: g if len(g) == size else g.sample(size, seed=seed) for k, g in groups.items()}
    )
    return cut | {"random": size_matched(cut["TextD"], draws=1, seed=seed, alive=alive)[0]}


def settings_of(sd: Any, clip: Any, pairs: Any, cases: list[Case], mode: Any, *, whole: bool, features: int, k: int,
                epochs: int, seed: int, quiet: bool, impossible: dict[str, str]) -> list[Setting]:  # fmt: skip
    """The conditioner's own dimensions (the paper's), and an SAE trained on them; scored where they are edited.

    A space without features in each group goes to ``impossible``, with its scores.
    """
    sides = conditioner_sides(sd, pairs, mode=mode, clip=clip, progress=not quiet)
    toward = mm.reference(sd, [case.picture for case in cases], mode=mode, clip=clip)
    width = sides[0].shape[1]
    torch.manual_seed(seed)
    head = mm.TopKSAE(width, features or 4 * width, k)
    mm.train_head(head, *sides, epochs=epochs, seed=seed, progress=not quiet)
    head = head.to(sd.device).eval()
    spaces = [("dimensions", "text.cond", None, toward)]
    with torch.no_grad():
        spaces.append(("SAE", "text.cond.sae.latents", head, head.encode(toward)))
    found = []
    for space, site, scorer, target in spaces:
        result = conditioner_mds(sides, head=scorer, data=pairs.name)
        groups = {g.name: g for g in result.groups}
        n = result.groups[0].n_features
        alive = mm.FeatureSet(~result.dead, n, head=result.groups[0].head)
        try:
            edited = same_size(groups, alive, whole=whole, seed=seed)
        except MMHooksError as error:
            low, high = result.thresholds
            impossible[f"{mode}, {space}"] = (
                f"{error}: scores of its {len(alive)} live features are {result.mu:.3f} ± {result.sigma:.3f}, so the "
                f"groups would begin below {low:.3f} and above {high:.3f}"
            )
            continue
        sizes = {name: len(g) for name, g in groups.items()}
        found.append(Setting(space, site, edited, sizes, target, result, scorer))
    return found


class Painter:
    """Draws all cases at once; the noise of a case depends on its place and the seed alone."""

    def __init__(self, sd: Any, steps: int, guidance: float, batch: int) -> None:
        self.sd, self.batch = sd, batch
        self.options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pil"}
        sd.pipe.set_progress_bar_config(disable=True)

    def __call__(self, prompts: list[str], seed: int, edit: Any = None) -> Float[Tensor, "n 3 h w"]:
        """``edit(rows)`` makes the edit of some rows of the prompts."""
        out = []
        for begin in range(0, len(prompts), self.batch):
            rows = slice(begin, begin + self.batch)
            some = prompts[rows]
            noise = [torch.Generator().manual_seed(seed * 1_000_003 + begin + i) for i in range(len(some))]
            if edit is None:
                pictures = self.sd.pipe(some, generator=noise, **self.options).images
            else:
                with self.sd.hooks(edit(rows)):
                    pictures = self.sd.pipe(some, generator=noise, **self.options).images
            out += [to_tensor(picture) for picture in pictures]
        return torch.stack(out)


class Judge:
    """What an edit did, by EfficientNet-Lite0 and SSIM.

    ``shift``: how much nearer the picture is to the pipeline's own drawing of the reference's words than to that of
    the prompt's (cosines, of other noise), against the same at strength 0. ``distortion``: 1 - SSIM to the picture
    at strength 0 from the same noise. ``quality``: cosine to the nearest unedited drawing of all.
    """

    def __init__(
        self, embedder: str, plain: Float[Tensor, "n 3 h w"], told: Float[Tensor, "n 3 h w"]
    ) -> None:
        self.embed = image_embedder(embedder, progress=False)
        own, theirs = self.vectors(plain), self.vectors(told)
        self.mean = torch.cat([own, theirs]).mean(0)
        self.prompt, self.reference = (normalize(v - self.mean, dim=1) for v in (own, theirs))

    def vectors(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        from torchvision.transforms.functional import to_pil_image

        return self.embed([to_pil_image(one.clamp(0, 1)) for one in pixels])

    def lean(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return (vectors * self.reference).sum(1) - (vectors * self.prompt).sum(1)

    def __call__(
        self, edited: Float[Tensor, "n 3 h w"], start: Float[Tensor, "n 3 h w"]
    ) -> dict[str, Tensor]:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        now, before = (normalize(self.vectors(x) - self.mean, dim=1) for x in (edited, start))
        alike = ssim(edited, start, data_range=1.0, reduction="none")
        assert isinstance(alike, Tensor)
        clean = torch.cat([self.prompt, self.reference])
        return {
            "shift": self.lean(now) - self.lean(before),
            "distortion": 1 - alike.reshape(len(edited)),
            "quality": (now @ clean.T).amax(1),
        }


Curves = dict[str, dict[str, dict[str, Float[Tensor, "strengths n"]]]]


def study(painter: Painter, settings: list[Setting], cases: list[Case], judge: str, *, strengths: tuple[float, ...],
          seeds: int, shown: int, quiet: bool) -> tuple[Curves, dict[str, dict[str, Tensor]]]:  # fmt: skip
    """Every setting, group, strength and seed: per case means over seeds, and the pictures of case ``shown``."""
    prompts = [case.prompt for case in cases]
    judges = Judge(judge, painter(prompts, seeds), painter([case.reference for case in cases], seeds))
    starts = [painter(prompts, seed) for seed in range(seeds)]
    still = torch.stack([judges(s, s)["quality"] for s in starts]).mean(0)
    at_zero = {"shift": torch.zeros(len(cases)), "distortion": torch.zeros(len(cases)), "quality": still}
    curves: Curves = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    total = len(settings) * len(GROUPS) * len(strengths) * seeds * len(cases)
    with rate_bar("interpolate", total, unit="pictures", show=not quiet) as advance:
        for setting in settings:
            curves[setting.name], pictures[setting.name] = {}, {}
            if setting.head is not None:  # an attached head would take edits at the site itself for its own
                painter.sd.attach(setting.head, at="text.cond", name="sae")
            for name, group in setting.groups.items():
                rows: dict[str, list[Tensor]] = {m: [at_zero[m]] for m in MEASURES}
                strip = [starts[0][shown]]
                for strength in strengths:

                    def edit(part: slice, group=group, setting=setting, strength=strength):
                        return mm.Interpolate(group, toward=setting.toward[part], strength=strength, at=setting.site,
                                              guidance="cond")  # fmt: skip

                    found = []
                    for seed, start in enumerate(starts):
                        drawn = painter(prompts, seed, edit)
                        found.append(judges(drawn, start))
                        if seed == 0:
                            strip.append(drawn[shown])
                        advance(len(cases))
                    for m in MEASURES:
                        rows[m].append(torch.stack([f[m] for f in found]).mean(0))
                curves[setting.name][name] = {m: torch.stack(rows[m]) for m in MEASURES}
                pictures[setting.name][name] = torch.stack(strip)
            if setting.head is not None:
                painter.sd.detach("sae")
    return curves, pictures


def verdicts(curves: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Does the paper's claim hold at the largest strength? Differences to the random group are paired by case."""
    at = {g: {m: values[-1] for m, values in by.items()} for g, by in curves.items()}
    out = {}
    for group in GROUPS[:3]:
        shift = bootstrap(at[group]["shift"])
        more_shift = bootstrap(at[group]["shift"] - at["random"]["shift"])
        more = bootstrap(at[group]["distortion"] - at["random"]["distortion"])
        moves = more_shift.low > 0
        if group == "TextD":
            holds, claim = moves and more.high <= 0, "moves the concept and keeps the structure"
        else:
            holds, claim = more.low > 0, "breaks the structure"
        out[group] = {
            "claim": claim, "holds": bool(holds), "shift": shift, "shift beyond random": more_shift,
            "distortion beyond random": more,
            "sentence": f"{group} {claim}: {'holds' if holds else 'does not hold'} here (against a random group of its "
            f"size, concept {said(more_shift)}, distortion {said(more)}).",
        }  # fmt: skip
    return out


def said(e: Estimate) -> str:
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


@app.command(help=__doc__)
def main(
    pipeline: Annotated[str, typer.Option(help='"mini", a directory, or a Hub repository')] = "mini",
    model: Annotated[str, typer.Option(help="CLIP of the conditioner: mini, or an open_clip name")] = "mini",
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag, or a checkpoint")] = None,
    data: Annotated[str, typer.Option(help="mini, a folder with metadata.csv, coco, …")] = "mini",
    limit: Annotated[int | None, typer.Option(help="at most so many pairs", min=8)] = None,
    mode: Annotated[list[str] | None, typer.Option(help="projected, naive; repeatable; default both")] = None,
    pairs: Annotated[int, typer.Option(help="prompts, each with a reference", min=2)] = 20,
    seeds: Annotated[int, typer.Option(help="drawings of each", min=1)] = 2,
    strength: Annotated[list[float] | None, typer.Option(help="repeatable; 0 is always drawn")] = None,
    whole: Annotated[bool, typer.Option(help="whole groups instead of groups of one size")] = False,
    template: Annotated[str, typer.Option(help="prompt of a text; {} is the text")] = "{}",
    features: Annotated[int, typer.Option(help="of the SAE; 0: four times the width")] = 0,
    k: Annotated[int, typer.Option(help="active features of the SAE")] = 16,
    epochs: Annotated[int, typer.Option(help="of the SAE")] = 40,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 15,
    guidance: Annotated[float, typer.Option(help="guidance scale")] = 3.0,
    batch: Annotated[int, typer.Option(help="pictures at once")] = 20,
    shown: Annotated[int, typer.Option(help="which prompt the grid shows")] = 0,
    image_embedder: Annotated[str, typer.Option(help="judge of pictures")] = "efficientnet-lite0",
    seed: Annotated[int, typer.Option(help="of cases, groups and the SAE")] = 0,
    device: Annotated[str, typer.Option()] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet")] = False,
    out: Annotated[Path, typer.Option(help="results.json, tables.md, PNG, index.html")] = Path(
        "runs/generation"
    ),
) -> None:
    from diffusers.utils import logging
    from generation_page import write

    logging.set_verbosity_error()  # a caption that is cut to the context is said once a caption
    start = time.perf_counter()
    strengths = tuple(sorted(s for s in strength or STRENGTHS if s > 0))
    modes: dict[str, Any] = {}
    impossible: dict[str, str] = {}
    try:
        if not 0 <= shown < pairs:
            raise MMHooksError(f"--shown is one of {pairs} prompts, from 0; came {shown}")
        sd, clip = (
            mm.load_diffusion(pipeline, device=device),
            mm.load(model, pretrained=pretrained, device=device),
        )
        corpus = mm.data.pairs(data, limit=limit, progress=not quiet)
        known = None
        if sd.name == "mini":
            from mmhooks.models.mini_sd import drawings

            known = {row["name"] for row in drawings()}
        cases = choose_cases(corpus, known, pairs, template, seed)
        painter = Painter(sd, steps, guidance, batch)
        for one in mode or ("projected", "naive"):
            try:
                found = settings_of(sd, clip, corpus, cases, one, whole=whole, features=features, k=k, epochs=epochs,
                                    seed=seed, quiet=quiet, impossible=impossible)  # fmt: skip
            except ShapeMismatch as error:  # naive: widths that differ
                impossible[one] = str(error)
                continue
            if not found:
                continue
            curves, strips = study(painter, found, cases, image_embedder, strengths=strengths, seeds=seeds,
                                   shown=shown, quiet=quiet)  # fmt: skip
            modes[one] = (found, curves, strips)
        if not modes:
            raise MMHooksError(f"no mode is possible: {impossible}")
    except MMHooksError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    results: dict[str, Any] = {
        "pipeline": pipeline, "model": model, "pretrained": pretrained, "data": corpus.name, "data_pairs": len(corpus),
        "licence": corpus.licence, "attribution": corpus.attribution, "command": shlex.join(sys.argv),
        "strengths": [0.0, *strengths], "seeds": seeds, "steps": steps, "guidance": guidance, "whole": whole,
        "cases": [{"prompt": c.prompt, "reference": c.reference} for c in cases], "shown": shown,
        "impossible": impossible,
        "modes": {
            m: {s.name: {
                "sizes": s.sizes, "edited": {g: len(f) for g, f in s.groups.items()}, "mu": s.mds.mu,
                "sigma": s.mds.sigma, "shuffled_r": s.mds.shuffled_r,
                "curves": {g: {q: [bootstrap(row) for row in v] for q, v in by.items()}
                           for g, by in curves[s.name].items()},
                "verdicts": verdicts(curves[s.name]),
            } for s in found}
            for m, (found, curves, _) in modes.items()
        },
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    results = plain(results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write(results, {m: strips for m, (_, _, strips) in modes.items()}, cases[shown].picture, out)
    for m, by in results["modes"].items():
        for space, found in by.items():
            for verdict in found["verdicts"].values():
                typer.echo(f"{m}, {space}: {verdict['sentence']}")
    for m, why in impossible.items():
        typer.echo(f"{m}: not possible here: {why}")
    typer.echo(f"{out / 'index.html'}, {results['seconds']:.0f} s")


if __name__ == "__main__":
    app()
