"""Where the words of a prompt act in the image: cross-attention heat maps of any Stable Diffusion (DAAM).

    python recipes/attention_maps.py --out runs/attention_maps
    python recipes/attention_maps.py --pipeline stabilityai/stable-diffusion-2-base \
        --prompt "a red panda on a blue house" --word panda --word house --out runs/panda

Without --prompt the pipeline generates the drawings that it knows (mini lists its own). Their objects are on white, so
the pointing game can be played: is the hottest place of the object's words on the object? And the heat can be cut at a
threshold, as DAAM's public code does: how much of the cut-out and the object is common to both (IoU)?
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmhooks.studies.attention_maps.options import Options
from mmhooks.studies.common.options import as_command, study_app
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.common.write import Results


def run(options: Options) -> Results:
    """Runs the attention-map study: writes results, heat maps and overlays under ``options.out``, and returns the
    results.

    Raises:
        MMHooksError: no prompts for a pipeline that lists no drawings of its own; a word that is not in its prompt.

    >>> found = run(Options(pictures=8, steps=4))                               # doctest: +SKIP
    >>> found["games"]["object"]["rate"]                                         # doctest: +SKIP
    """
    start = time.perf_counter()
    import mmhooks as mm
    from mmhooks.analysis.results import Records
    from mmhooks.studies.attention_maps.images import (
        draw_prompts,
        overlaps,
        play_pointing_game,
        prompts_and_words,
        save_images,
        verdict_sentence,
    )
    from mmhooks.studies.common.run import environment
    from mmhooks.studies.common.write import write_results
    from mmhooks.utils.escape import markdown
    from mmhooks.utils.files import write_text
    from mmhooks.utils.say import say, say_lines

    place = Placement.of(options)
    sd = mm.load_diffusion(options.pipeline, device=place.device, dtype=place.dtype)
    prompts, words = prompts_and_words(sd, options)
    drawn = draw_prompts(sd, prompts, words, options)
    out = Path(options.out)
    paths = save_images(drawn, out)
    results: dict[str, Any] = {
        "pipeline": options.pipeline,
        "steps": options.steps,
        "guidance": options.guidance,
        "seed": options.seed,
        "resize": options.resize,
        "template": options.template,
        "prompts": prompts,
        "words": words,
        "command": as_command("attention_maps", options),
        "environment": environment(start),
    }
    lines = [
        f"{len(drawn)} images of {markdown(options.pipeline)}, {options.steps} steps, guidance {options.guidance}."
    ]
    if not options.prompt:
        games = play_pointing_game(drawn)
        covered = overlaps(drawn, options.threshold)
        tables = [
            Records([{"heat of": name, **found.table()[0]} for name, found in of.items()])
            for of in (games, covered)
        ]
        results |= {"games": games, "overlaps": covered, "verdict": verdict_sentence(games)}
        lines += ["", verdict_sentence(games), *(line for table in tables for line in ("", table.markdown()))]
    page = out / "results.md"
    write_text(page, "\n".join(["# Attention maps", "", *lines, "", "![heat](heat.png)", ""]))
    written = write_results(out, results, [page, *paths])
    say_lines("\n".join(lines))
    say(f"{page}, {results['environment']['seconds']:.0f} s")
    return written


app = study_app("attention_maps", Options, run, help=__doc__ or "")
