"""Interpolation by modality in Stable Diffusion (Section 3.3 of the paper, Figures 7 and 8), with numbers.

Features of the conditioner that belong to images (ImgD), texts (TextD) or both (CrossD) are moved toward a
reference image while a prompt is drawn. The paper's claim: TextD moves the concept and keeps the structure; ImgD
and CrossD break it. To run it::

    python recipes/generation.py --out runs/generation
    python recipes/generation.py --pipeline stabilityai/stable-diffusion-2-base --model ViT-H-14 \\
        --pretrained laion2b_s32b_b79k --data coco --limit 5000
    python recipes/generation.py --pipeline fusing/stable-unclip-2-1-l --model ViT-L-14 --pretrained openai \\
        --data coco --limit 5000
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmhooks.studies.common.options import as_command, as_settings, study_app
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.common.write import Results
from mmhooks.studies.generation.options import Options


def run(options: Options) -> Results:
    """Runs the generation study: writes results, tables, figures and a page under ``options.out``, and returns the
    results.

    Raises:
        MMHooksError: options that contradict each other, too few pairs, or a pipeline in which no mode is possible.

    >>> found = run(Options(limit=1500, pairs=3, strength=[0.9], steps=3))  # doctest: +SKIP
    >>> found["modes"]["projected"]["SAE"]["verdicts"]["TextD keeps the structure"]["sentence"]  # doctest: +SKIP
    """
    start = time.perf_counter()
    from diffusers.utils import logging

    import mmhooks as mm
    from mmhooks.errors import MMHooksError
    from mmhooks.studies.common.paper_report import paper_account
    from mmhooks.studies.common.run import environment
    from mmhooks.studies.common.write import write_results
    from mmhooks.studies.generation.cases import make_cases
    from mmhooks.studies.generation.interpolation import (
        STRENGTHS,
        ImageGenerator,
        Interpolated,
        interpolate,
        numbers_of,
    )
    from mmhooks.studies.generation.page import report, write_page
    from mmhooks.studies.generation.settings import (
        check_options,
        known_texts,
        modes_of,
        settings_of,
    )

    logging.set_verbosity_error()  # otherwise one warning per caption that is cut to the context
    check_options(options)
    strengths = tuple(sorted(s for s in options.strength or STRENGTHS if s > 0))
    place = Placement.of(options)
    sd = mm.load_diffusion(options.pipeline, device=place.device, dtype=place.dtype)
    clip = mm.load(options.model, pretrained=options.pretrained, device=place.device, dtype=place.dtype)
    corpus = mm.data.pairs(options.data, limit=options.limit, progress=not options.quiet)
    cases = make_cases(corpus, known_texts(sd), options)
    generate = ImageGenerator(sd, options.steps, options.guidance, options.batch)
    modes: dict[str, Interpolated] = {}
    impossible: dict[str, str] = {}
    for mode in modes_of(sd, options.mode):
        try:
            settings, refused = settings_of(sd, clip, corpus, cases, mode, options)
            impossible |= refused
            if settings:
                modes[mode] = interpolate(generate, settings, cases, strengths, options, place)
        except MMHooksError as error:  # widths or towers that do not fit; the other modes still run
            impossible[mode] = str(error)
    if not modes:
        raise MMHooksError(f"no mode is possible: {impossible}")
    results: dict[str, Any] = {
        "paper": paper_account(options),
        "settings": as_settings(options) | {"command": as_command("generation", options)},
        "pipeline": options.pipeline,
        "model": options.model,
        "pretrained": options.pretrained,
        "data": corpus.name,
        "data_pairs": len(corpus),
        "licence": corpus.licence,
        "attribution": corpus.attribution,
        "command": as_command("generation", options),
        "strengths": [0.0, *strengths],
        "seeds": options.seeds,
        "steps": options.steps,
        "guidance": options.guidance,
        "whole": options.whole,
        "curve_prompts": min(options.curve_pairs, len(cases)),
        "cases": [{"prompt": case.prompt, "reference": case.reference} for case in cases],
        "chosen": options.shown is None,
        "impossible": impossible,
        "modes": {mode: numbers_of(found) for mode, found in modes.items()},
        "environment": environment(start),
    }
    out = Path(options.out)
    written = write_results(out, results)
    strips_by_mode = {mode: (found.strips, cases[found.shown].image) for mode, found in modes.items()}
    paths = write_page(written.found, strips_by_mode, out)
    report(written.found, out)
    return Results(written.found, (*written.paths, *paths))


app = study_app("generation", Options, run, help=__doc__ or "")
