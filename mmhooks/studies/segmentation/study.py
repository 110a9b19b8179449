"""Zero-shot segmentation by the tokens' contributions along a class's text, against four attention baselines.

Section 5 of "Interpreting CLIP's Image Representation via Text-Based Decomposition". By default on drawings with exact
masks, on photograph-like and patterned backgrounds; or on ImageNet-Segmentation's own file, or a folder.

    python recipes/segmentation.py --out runs/segmentation
    python recipes/segmentation.py --model ViT-B-16 --pretrained laion2b_s34b_b88k --data gtsegs_ijcv.mat
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmhooks.studies.common.options import as_settings, study_app
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.common.write import Results
from mmhooks.studies.segmentation.options import Options


def run(options: Options) -> Results:
    """Runs the segmentation study: writes results, tables, figures and a page under ``options.out``, and returns the
    results.

    Raises:
        DataError: data that cannot be used, or fewer than two images that show both object and background.

    >>> found = run(Options(limit=24, quiet=True))                               # doctest: +SKIP
    >>> found["scores"]["all"]["token contributions"]["miou"]                    # doctest: +SKIP
    """
    start = time.perf_counter()
    import torch

    import mmhooks as mm
    from mmhooks.analysis.attribution.segmentation_scores import segmentation_scores
    from mmhooks.studies.common.paper_report import paper_account
    from mmhooks.studies.common.run import environment
    from mmhooks.studies.common.write import print_study, write_study
    from mmhooks.studies.segmentation.maps import directions, heat_maps
    from mmhooks.studies.segmentation.page import SCORES, claims_of, decided, image_plot, left_out, table
    from mmhooks.studies.segmentation.samples import prepared, samples_of
    from mmhooks.utils.indexing import number_labels

    torch.manual_seed(options.seed)
    place = Placement.of(options)
    model = mm.load(options.model, pretrained=options.pretrained, device=place.device, dtype=place.dtype)
    found, attribution = samples_of(options.data, options.limit, options.seed)
    samples, pixels, masks = prepared(model.preprocess, found)
    sought = directions(model, pixels, [s.name for s in samples], options)
    maps = heat_maps(model, pixels, sought.own, options)
    kinds = list(dict.fromkeys(s.ground for s in samples))
    scores: dict[str, list[Any]] = {}
    for kind in ["all", *(kinds if len(kinds) > 1 else [])]:
        of = torch.tensor([kind in ("all", s.ground) for s in samples])
        scores[kind] = [
            segmentation_scores(own[of], masks[of], name=name, seed=options.seed)
            for name, own in maps.items()
        ]
    clusters = number_labels([s.kind for s in samples])
    decisions, missing = decided(scores["all"], clusters), len(found) - len(samples)
    claims = claims_of(decisions)
    results = {
        "settings": as_settings(options),
        "paper": paper_account(options),
        "n": len(samples),
        "left_out": missing,
        "classes": sought.classes,
        "right_class": sought.right,
        "scores": {
            kind: {s.name: {score: getattr(s, score) for score in SCORES} for s in own}
            for kind, own in scores.items()
        },
        "clusters": len(clusters.unique()),
        "decisions": decisions,
        "claims": [list(claim) for claim in claims],
        "environment": environment(start),
    }
    tables = [table(kind, own) for kind, own in scores.items()]
    written = write_study(
        Path(options.out),
        results,
        title="Where in the image is it? Zero-shot segmentation by token contributions",
        lead=f"{len(samples)} images, model {options.model}; {sought.what} is sought. Negative values of a map count as 0, "
        "then it is cut at its own mean. mIoU is the IoU of object and background, its mean over images; pooled: of all "
        "images' pixels together. mAP ranks all values; public mAP ranks object and background together, from the map "
        "between 0 and its maximum. Intervals of scores are 95 % bootstrap over images; the four differences of mIoU, which were "
        f"chosen before the run, are tested over {len(clusters.unique())} kinds of objects and corrected by Holm.",
        claims=claims,
        tables=tables,
        plots={"maps": image_plot(samples, masks, maps, scores["all"])},
        notes=[
            f"An image's direction is the unit text embedding of {sought.what}, minus the mean of all classes'. Raw attention "
            "and rollout do not use the text. All methods read the same sites of the same model; none is tuned. Gradient "
            f"attention begins in block {options.chefer_start}; LeGrad counts {options.legrad_layers or 'all'} last blocks.",
            *left_out(missing),
        ],
        attribution=attribution,
    )
    if not options.quiet:
        print_study(written.found, tables, claims, written.paths)
    return written


app = study_app(
    "segmentation",
    Options,
    run,
    help="Zero-shot segmentation: token contributions against raw attention, rollout, gradient attention and LeGrad.",
)
