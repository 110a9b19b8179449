"""Where the words of a prompt act in the picture: cross-attention heat maps of any Stable Diffusion (DAAM).

    python recipes/attention_maps.py --out runs/attention_maps
    python recipes/attention_maps.py --pipeline stabilityai/stable-diffusion-2-base \
        --prompt "a red panda on a blue house" --word panda --word house --out runs/panda

Without --prompt the drawings that a pipeline knows are drawn (mini lists its own). Where pictures stand on white, as
mini's do, the pointing game is played: is the hottest place of the object's words on what was drawn?
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmhooks.studies.attention_maps.options import Options
from mmhooks.studies.common.options import as_command, study_app
from mmhooks.studies.common.write import Results


def run(options: Options) -> Results:
    """Runs the attention-map study: writes results, heat maps and overlays under ``options.out``, and returns the
    results.

    Raises:
        MMHooksError: a pipeline that lists no drawings of its own, without prompts; a word that is not in its prompt.

    >>> found = run(Options(pictures=8, steps=4))                                # doctest: +SKIP
    >>> found["games"]["object"]["rate"]                                         # doctest: +SKIP
    """
    start = time.perf_counter()
    import mmhooks as mm
    from mmhooks.analysis.results import Records
    from mmhooks.studies.attention_maps.pictures import draw, play, save_pictures, verdict, what_to_draw
    from mmhooks.studies.common.write import write_results
    from mmhooks.utils.escape import markdown
    from mmhooks.utils.files import write_text
    from mmhooks.utils.say import say, say_lines

    sd = mm.load_diffusion(options.pipeline, device=options.device)
    prompts, words = what_to_draw(sd, options)
    drawn = draw(sd, prompts, words, options)
    out = Path(options.out)
    paths = save_pictures(drawn, out)
    results: dict[str, Any] = {
        "pipeline": options.pipeline,
        "steps": options.steps,
        "guidance": options.guidance,
        "seed": options.seed,
        "template": options.template,
        "prompts": prompts,
        "words": words,
        "command": as_command("attention_maps", options),
        "seconds": time.perf_counter() - start,
    }
    lines = [
        f"{len(drawn)} pictures of {markdown(options.pipeline)}, {options.steps} steps, guidance {options.guidance}."
    ]
    if not options.prompt:
        games = play(drawn)
        table = Records([{"heat of": name, **game.table()[0]} for name, game in games.items()])
        results |= {"games": games, "verdict": verdict(games)}
        lines += ["", verdict(games), "", table.markdown()]
    page = out / "results.md"
    write_text(page, "\n".join(["# Attention maps", "", *lines, "", "![heat](heat.png)", ""]))
    written = write_results(out, results, [page, *paths])
    say_lines("\n".join(lines))
    say(f"{page}, {results['seconds']:.0f} s")
    return written


app = study_app("attention_maps", Options, run, help=__doc__ or "")
