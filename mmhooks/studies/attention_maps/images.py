"""Images of the attention-map study, the heat maps of their words, and the pointing game on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.attribution.attention_maps import head_maps
from mmhooks.analysis.attribution.heat_masks import HeatOverlap, heat_overlap
from mmhooks.analysis.attribution.pointing_game import PointingGame, pointing_game
from mmhooks.errors import MMHooksError
from mmhooks.models.embedded.mini_sd import drawings
from mmhooks.report.heat import heat_grid
from mmhooks.studies.attention_maps.options import Options
from mmhooks.utils.json_files import check_fields, describe_json, read_json
from mmhooks.utils.overlay import overlay
from mmhooks.utils.progress import rate_bar

WHITE = 0.9  # a pixel lighter than this in every channel is background


@dataclass(frozen=True)
class Drawn:
    """One image, its prompt, and the heat map of each requested word, the object's first."""

    prompt: str
    image: Image.Image
    heats: dict[str, Float[Tensor, "h w"]]


def foreground(image: Image.Image) -> Bool[Tensor, "h w"]:
    """Returns the mask of what was drawn on white.

    >>> int(foreground(Image.new("RGB", (4, 4), "white")).sum())
    0
    """
    from torchvision.transforms.functional import to_tensor

    return to_tensor(image.convert("RGB")).amin(0) < WHITE


def known_drawings(sd: mm.HookedDiffusion) -> list[str]:
    """Returns the names that a pipeline's directory lists in ``drawings.json``.

    Raises:
        MMHooksError: there is no such list, or it is malformed.
    """
    if sd.name == "mini":
        return [row["name"] for row in drawings()]
    where = Path(str(getattr(sd.pipe, "_name_or_path", "") or sd.name)) / "drawings.json"
    if not where.is_file():
        raise MMHooksError(f"{sd!r} lists no drawings of its own ({where}): give --prompt and --word")
    remedy = "give --prompt and --word, or rewrite the list"
    listed = read_json(where, "a list of drawings", remedy=remedy)
    rows = listed.get("drawings") if isinstance(listed, dict) else listed
    if not isinstance(rows, list):
        raise MMHooksError(
            f"{where} is not a list of drawings: expected a list, got {describe_json(rows)}; {remedy}"
        )
    for row in rows:
        check_fields(row, {"name": str}, f"{where} is not a list of drawings", remedy=remedy)
    return [row["name"] for row in rows]


def prompts_and_words(sd: mm.HookedDiffusion, options: Options) -> tuple[list[str], list[list[str]]]:
    """Returns the prompts, and for each the words whose heat is recorded, the object's first.

    Without ``--prompt``: the drawings that the pipeline knows, and the word "a", which names nothing.
    """
    if options.prompt:
        prompts = list(options.prompt)
        return prompts, [options.word or list(dict.fromkeys(p.split())) for p in prompts]
    names = known_drawings(sd)[: options.pictures]
    fixed = [w for w in options.template.split() if w == "a"][:1]
    return [options.template.format(name) for name in names], [[name, *fixed] for name in names]


def draw_prompts(
    sd: mm.HookedDiffusion, prompts: list[str], words: list[list[str]], options: Options
) -> list[Drawn]:
    """Generates every prompt, each from its own seed, and records the heat maps of its words.

    Raises:
        MMHooksError: layers are to be resized neither bilinearly nor bicubically.
    """
    collectors = {"bilinear": mm.attention_maps, "bicubic": head_maps}
    if options.resize not in collectors:
        raise MMHooksError(f"resize: expected {' or '.join(collectors)}, got {options.resize!r}")
    sd.pipe.set_progress_bar_config(disable=True)
    drawn = []
    with rate_bar("drawing", len(prompts), unit="images") as advance, collectors[options.resize](sd) as maps:
        for begin in range(0, len(prompts), options.batch):
            these = prompts[begin : begin + options.batch]
            noise = [torch.Generator().manual_seed(options.seed + begin + n) for n in range(len(these))]
            images = sd.pipe(
                these,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                generator=noise,
            ).images
            heat = maps.maps.cpu()
            for n, (prompt, image) in enumerate(zip(these, images, strict=True)):
                length = heat.shape[1]
                heats = {
                    word: heat[n, maps.places(word, prompt, length)].mean(0) for word in words[begin + n]
                }
                drawn.append(Drawn(prompt, image, heats))
            advance(len(these))
    return drawn


def save_images(drawn: list[Drawn], out: Path) -> list[Path]:
    """Saves the heat maps of the first eight images side by side, and an overlay per word; returns the paths."""
    (out / "overlays").mkdir(parents=True, exist_ok=True)
    paths = [out / "heat.png"]
    heat_grid([(d.prompt, d.image, d.heats) for d in drawn[:8]]).savefig(paths[0], dpi=130)
    for n, d in enumerate(drawn):
        for k, heat in enumerate(d.heats.values()):
            paths.append(out / "overlays" / f"{n:04d}-{k}.png")
            overlay(d.image, heat).save(paths[-1])
    return paths


def heat_with_controls(drawn: list[Drawn]) -> dict[str, Float[Tensor, "n h w"]]:
    """Returns the heat of the object's words, and that of controls.

    ``another picture's heat``: the object's words in the next image, which measures the effect of a central position.
    ``the word "a"``: a word that names nothing, where all prompts have one.
    """
    heat = torch.stack([next(iter(d.heats.values())) for d in drawn])
    found = {"object": heat}
    if len(drawn) > 1:
        found["another picture's heat"] = heat.roll(1, 0)
    if all("a" in d.heats for d in drawn):
        found['the word "a"'] = torch.stack([d.heats["a"] for d in drawn])
    return found


def play_pointing_game(drawn: list[Drawn]) -> dict[str, PointingGame]:
    """Plays the pointing game with the object's words, and with the controls of :func:`heat_with_controls`."""
    masks = torch.stack([foreground(d.image) for d in drawn])
    return {name: pointing_game(heat, masks) for name, heat in heat_with_controls(drawn).items()}


def overlaps(drawn: list[Drawn], threshold: float) -> dict[str, HeatOverlap]:
    """Returns the IoU of thresholded heat with the drawings, likewise; empty images are left out."""
    masks = torch.stack([foreground(d.image) for d in drawn])
    some = masks.flatten(1).any(1)
    return {
        name: heat_overlap(heat[some], masks[some], threshold=threshold)
        for name, heat in heat_with_controls(drawn).items()
    }


def verdict_sentence(games: dict[str, PointingGame]) -> str:
    game = games["object"]
    word = "more often than" if game.rate.low > game.chance else "not more often than"
    return (
        f"The hottest place of the object's words lies on the object {word} a blind guess: {game.rate} against "
        f"{game.chance:.3f}."
    )
