"""Removing a spurious cue from CLIP: attention heads that carry the background, mean-ablated live.

Section 4 of "Interpreting CLIP's Image Representation via Text-Based Decomposition", on a Waterbirds-like task: land
and water animals on land and water. TextSpan describes each attention head; those whose texts are places are set to
their mean. They are chosen on other images, of other animals, than they are evaluated on.

    python recipes/spurious.py --out runs/spurious
    python recipes/spurious.py --model ViT-L-14 --pretrained laion2b_s32b_b82k --data waterbirds/
"""

from __future__ import annotations

import time
from pathlib import Path

from mmhooks.studies.common.options import as_settings, study_app
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.common.write import Results
from mmhooks.studies.spurious.options import Options


def run(options: Options) -> Results:
    """Runs the spurious-cue study: writes results, tables, a figure and a page under ``options.out``, and returns the
    results.

    Raises:
        DataError: data that cannot be used, or a text pool without kinds.

    >>> found = run(Options(limit=32, splits=2, draws=2, quiet=True))            # doctest: +SKIP
    >>> found["accuracy"]["TextSpan"]["worst"]                                   # doctest: +SKIP
    """
    start = time.perf_counter()
    import torch

    import mmhooks as mm
    from mmhooks.models.clip.embed_texts import embed_texts
    from mmhooks.studies.common.run import environment
    from mmhooks.studies.common.write import print_study, write_study
    from mmhooks.studies.spurious.accuracy import (
        accuracy_estimates,
        claims_of,
        worst_group,
        worst_group_of_random,
    )
    from mmhooks.studies.spurious.page import accuracy_table, groups_plot, heads_table, splits_table
    from mmhooks.studies.spurious.samples import load_splits
    from mmhooks.studies.spurious.trials import trial

    torch.manual_seed(options.seed)
    place = Placement.of(options)
    model = mm.load(options.model, pretrained=options.pretrained, device=place.device, dtype=place.dtype)
    splits = load_splits(model.preprocess, options)
    pool = mm.data.text_pool(options.pool)
    embedded = embed_texts(model, pool.texts)
    trials = [
        trial(
            model,
            split,
            pool,
            embedded,
            options,
            seed=options.seed + i,
            title=f"split {i + 1} of {len(splits)}",
        )
        for i, split in enumerate(splits)
    ]
    groups = torch.cat([split.judge.groups for split in splits])
    shares = torch.stack([split.shares for split in splits]).mean(0)
    right = {name: torch.cat([t.right[name] for t in trials]) for name in trials[0].right}
    accuracy = {name: accuracy_estimates(own, groups, shares, options.seed) for name, own in right.items()}
    randoms = {
        name: worst_group_of_random([t.random[name] for t in trials], groups) for name in trials[0].chosen
    }
    claims = claims_of(trials, right, groups, randoms, options.seed)
    heads = {name: [[f"{n}.{h}" for n, h in t.chosen[name]] for t in trials] for name in trials[0].chosen}
    worst = {
        name: [
            worst_group(t.right[name], split.judge.groups) for t, split in zip(trials, splits, strict=True)
        ]
        for name in right
    }
    n_chosen = sum(len(split.choose.places) for split in splits)
    results = {
        "settings": as_settings(options),
        "n": {"choose": n_chosen, "judge": len(groups)},
        "shares_where_chosen": shares,
        "heads": heads,
        "texts": [t.texts for t in trials],
        "accuracy": accuracy,
        "random": randoms,
        "worst_by_split": worst,
        "claims": [list(claim) for claim in claims],
        "environment": environment(start),
    }
    tables = [
        accuracy_table(accuracy, randoms),
        splits_table(worst, heads),
        heads_table(heads, [t.texts for t in trials]),
    ]
    written = write_study(
        Path(options.out),
        results,
        title="Removing a spurious background from CLIP by ablating attention heads",
        lead=f"Land and water animals on land and water, model {options.model}. Attention heads of the last "
        f"{options.layers} layers are chosen on {n_chosen} images and evaluated on {len(groups)} others, of other "
        f"animals where they are drawn; splits: {len(splits)}. An attention head's output is set, live, to its mean "
        "over the former.",
        claims=claims,
        tables=tables,
        plots={"groups": groups_plot(accuracy, randoms)},
        notes=[
            f"TextSpan's heads: by the variance along those of their twenty texts that are of the kinds {options.kinds}. "
            "Contrast: by how much an attention head moves "
            "along the difference of the class texts when the background changes, animals held fixed. Number of heads: the "
            "one with the best worst group where they are chosen, separately in every split. Random: as many of the same "
            f"layers, {options.draws} draws. The average is weighted by the groups' shares where heads are chosen."
        ],
        attribution=splits[0].attribution,
    )
    if not options.quiet:
        print_study(written.found, tables, claims, written.paths)
    return written


app = study_app(
    "spurious",
    Options,
    run,
    help="Worst-group accuracy before and after attention heads that carry the background are mean-ablated.",
)
