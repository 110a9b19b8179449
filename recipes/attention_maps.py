"""Where the words of a prompt act in the picture: cross-attention heat maps of any Stable Diffusion (DAAM).

    python recipes/attention_maps.py --out runs/attention_maps
    python recipes/attention_maps.py --pipeline stabilityai/stable-diffusion-2-base \
        --prompt "a red panda on a blue house" --word panda --word house --out runs/panda

Without --prompt the drawings that a pipeline knows are drawn (mini lists its own). Where pictures stand on white, as
mini's do, the pointing game is played: is the hottest place of the object's words on what was drawn?
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
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.attention_maps import PointingGame, pointing_game
from mmhooks.analysis.results import Table, plain
from mmhooks.cli.say import say, say_error, say_lines
from mmhooks.data.progress import rate_bar
from mmhooks.errors import MMHooksError
from mmhooks.models.mini_sd import drawings
from mmhooks.report.heat import heat_grid, overlay
from mmhooks.utils.escape import markdown
from mmhooks.utils.files import write_text
from mmhooks.utils.json_files import check_fields, describe_json, read_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
TEMPLATE = "a drawing of a {}"
WHITE = 0.9  # lighter than that in every channel is ground


@dataclass(frozen=True)
class Drawn:
    """One picture, its prompt, and the heat of each word asked for; the first one is the object's."""

    prompt: str
    picture: Image.Image
    heats: dict[str, Float[Tensor, "h w"]]


def foreground(picture: Image.Image) -> Bool[Tensor, "h w"]:
    """What was drawn on white.

    >>> int(foreground(Image.new("RGB", (4, 4), "white")).sum())
    0
    """
    from torchvision.transforms.functional import to_tensor

    return to_tensor(picture.convert("RGB")).amin(0) < WHITE


def known_drawings(sd: mm.HookedDiffusion) -> list[str]:
    """Names that a pipeline's directory lists in ``drawings.json``."""
    if sd.name == "mini":
        return [row["name"] for row in drawings()]
    where = Path(str(getattr(sd.pipe, "_name_or_path", "") or sd.name)) / "drawings.json"
    if not where.is_file():
        raise MMHooksError(f"{sd!r} lists no drawings of its own ({where}): give --prompt and --word")
    remedy = "give --prompt and --word, or write the list again"
    listed = read_json(where, "a list of drawings", remedy=remedy)
    rows = listed.get("drawings") if isinstance(listed, dict) else listed
    if not isinstance(rows, list):
        raise MMHooksError(
            f"{where} is not a list of drawings: expected a list, got {describe_json(rows)}; {remedy}"
        )
    for row in rows:
        check_fields(row, {"name": str}, f"{where} is not a list of drawings", remedy=remedy)
    return [row["name"] for row in rows]


def draw(
    sd: mm.HookedDiffusion,
    prompts: list[str],
    words: list[list[str]],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int,
) -> list[Drawn]:
    """Draws every prompt, each from a seed of its own, and keeps the heat of its words."""
    sd.pipe.set_progress_bar_config(disable=True)
    drawn = []
    with rate_bar("drawing", len(prompts), unit="pictures") as advance, mm.attention_maps(sd) as maps:
        for begin in range(0, len(prompts), batch):
            these = prompts[begin : begin + batch]
            seeds = [torch.Generator().manual_seed(seed + begin + n) for n in range(len(these))]
            pictures = sd.pipe(
                these, num_inference_steps=steps, guidance_scale=guidance, generator=seeds
            ).images
            heat = maps.maps.cpu()
            for n, (prompt, picture) in enumerate(zip(these, pictures, strict=True)):
                length = heat.shape[1]
                heats = {
                    word: heat[n, maps.places(word, prompt, length)].mean(0) for word in words[begin + n]
                }
                drawn.append(Drawn(prompt, picture, heats))
            advance(len(these))
    return drawn


def play(drawn: list[Drawn]) -> dict[str, PointingGame]:
    """The pointing game of the object's words, and its controls.

    ``another picture's heat``: of the object's words in the next picture: what standing in the middle is worth.
    ``the word "a"``: of a word that names nothing, where the prompts have one.
    """
    masks = torch.stack([foreground(d.picture) for d in drawn])
    heat = torch.stack([next(iter(d.heats.values())) for d in drawn])
    games = {"object": pointing_game(heat, masks)}
    if len(drawn) > 1:
        games["another picture's heat"] = pointing_game(heat.roll(1, 0), masks)
    if all("a" in d.heats for d in drawn):
        games['the word "a"'] = pointing_game(torch.stack([d.heats["a"] for d in drawn]), masks)
    return games


def verdict(games: dict[str, PointingGame]) -> str:
    game = games["object"]
    word = "more often than" if game.rate.low > game.chance else "not more often than"
    return (
        f"The hottest place of the object's words lies on the object {word} a blind guess: {game.rate} against "
        f"{game.chance:.3f}."
    )


@app.command(help=__doc__)
def main(
    pipeline: Annotated[str, typer.Option(help='"mini", a directory, or a Hub repository')] = "mini",
    prompt: Annotated[list[str] | None, typer.Option(help="repeatable")] = None,
    word: Annotated[
        list[str] | None, typer.Option(help="repeatable; default: every word of the prompt")
    ] = None,
    pictures: Annotated[int, typer.Option(help="how many of the drawings that the pipeline knows")] = 200,
    template: Annotated[str, typer.Option(help="prompt of a known drawing; {} is its name")] = TEMPLATE,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    guidance: Annotated[float, typer.Option(help="guidance scale; up to 1: none")] = 4.0,
    batch: Annotated[int, typer.Option(help="pictures at once")] = 16,
    seed: Annotated[int, typer.Option(help="of the first picture's noise; the next ones follow")] = 0,
    device: Annotated[str, typer.Option()] = "cpu",
    out: Annotated[Path, typer.Option(help="results.json, results.md, heat.png, overlays/")] = Path(
        "runs/attention_maps"
    ),
) -> None:
    start = time.perf_counter()
    try:
        sd = mm.load_diffusion(pipeline, device=device)
        if prompt:
            prompts = list(prompt)
            words = [word or list(dict.fromkeys(p.split())) for p in prompts]
        else:
            names = known_drawings(sd)[:pictures]
            prompts = [template.format(name) for name in names]
            fixed = [w for w in template.split() if w == "a"][:1]
            words = [[name, *fixed] for name in names]
        drawn = draw(sd, prompts, words, steps=steps, guidance=guidance, seed=seed, batch=batch)
    except MMHooksError as error:
        say_error(error, "error")
        raise typer.Exit(1) from None
    out.mkdir(parents=True, exist_ok=True)
    heat_grid([(d.prompt, d.picture, d.heats) for d in drawn[:8]]).savefig(out / "heat.png", dpi=130)
    (out / "overlays").mkdir(exist_ok=True)
    for n, d in enumerate(drawn):
        for k, (_, heat) in enumerate(d.heats.items()):
            overlay(d.picture, heat).save(out / "overlays" / f"{n:04d}-{k}.png")
    result: dict[str, Any] = {
        "pipeline": pipeline, "steps": steps, "guidance": guidance, "seed": seed, "template": template,
        "prompts": prompts, "words": words, "command": shlex.join(sys.argv),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    lines = [
        "# Attention maps",
        "",
        f"{len(drawn)} pictures of {markdown(pipeline)}, {steps} steps, guidance {guidance}.",
    ]
    if not prompt:
        games = play(drawn)
        table = Table([{"heat of": name, **game.table()[0]} for name, game in games.items()])
        result |= {"games": plain(games), "verdict": verdict(games)}
        lines += ["", verdict(games), "", table.markdown()]
    write_text(out / "results.json", json.dumps(result, indent=1) + "\n")
    write_text(out / "results.md", "\n".join([*lines, "", "![heat](heat.png)", ""]))
    say_lines("\n".join(lines[2:]))
    say(f"{out / 'results.md'}, {result['seconds']:.0f} s")


if __name__ == "__main__":
    app()
