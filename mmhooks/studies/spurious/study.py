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
    from mmhooks.studies.common.paper_report import paper_account
    from mmhooks.studies.common.run import environment
    from mmhooks.studies.common.write import print_study, write_study
    from mmhooks.studies.spurious.accuracy import (
        accuracy_estimates,
        claims_of,
        decided,
        mean_and_range,
        worst_group,
        worst_of_random,
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
    n = len(splits)
    trials = [
        trial(model, split, pool, embedded, options, seed=options.seed + i, title=f"split {i + 1} of {n}")
        for i, split in enumerate(splits)
    ]
    groups = torch.cat([split.judge.groups for split in splits])
    # An animal that several splits drew is one species in all of them.
    species = torch.cat([split.judge.species for split in splits])
    shares = torch.stack([split.shares for split in splits]).mean(0)
    accuracy, randoms, right = {}, {}, {}
    for way in ("direct", "live"):
        right[way] = {name: torch.cat([t.right[way][name] for t in trials]) for name in trials[0].right[way]}
        accuracy[way] = {
            name: accuracy_estimates(own, groups, species, shares, options.seed)
            for name, own in right[way].items()
        }
        randoms[way] = mean_and_range(worst_of_random([t.random[way] for t in trials], groups))
    decisions = decided(right["direct"], [t.random["direct"] for t in trials], groups, species, options.seed)
    claims = claims_of(decisions)
    heads = {name: [[f"{n}.{h}" for n, h in t.chosen[name]] for t in trials] for name in trials[0].chosen}
    worst = {
        name: [
            worst_group(t.right["direct"][name], split.judge.groups)
            for t, split in zip(trials, splits, strict=True)
        ]
        for name in right["direct"]
    }
    n_chosen = sum(len(split.choose.places) for split in splits)
    results = {
        "settings": as_settings(options),
        "paper": paper_account(options),
        "n": {"choose": n_chosen, "judge": len(groups), "species": len(species.unique())},
        "shares_where_chosen": shares,
        "shares_tested": torch.bincount(groups, minlength=4) / len(groups),
        "heads": heads,
        "reach": max(t.reach for t in trials),
        "texts": [t.texts for t in trials],
        "accuracy": accuracy["live"],
        "random": randoms["live"],
        "direct": {"accuracy": accuracy["direct"], "random": randoms["direct"]},
        "worst_by_split": worst,
        "decisions": decisions,
        "claims": [list(claim) for claim in claims],
        "environment": environment(start),
    }
    tables = [
        accuracy_table(accuracy["direct"], randoms["direct"], "Accuracy, direct effects ablated"),
        accuracy_table(accuracy["live"], randoms["live"], "Accuracy, ablated live (exploratory)"),
        splits_table(worst, heads),
        heads_table(heads, [t.texts for t in trials]),
    ]
    unit = f"{results['n']['species']} species"
    if options.data != "mini" and options.species is None:
        unit = "images, as if no two were of one species (--species names the column)"
    written = write_study(
        Path(options.out),
        results,
        title="Removing a spurious background from CLIP by ablating attention heads",
        lead=f"Land and water animals on land and water, model {options.model}. Attention heads of the last "
        f"{options.layers} layers are chosen on {n_chosen} images and evaluated on {len(groups)} others, of other "
        f"animals where they are drawn; splits: {len(splits)}. An attention head is set to its mean over the former: only its "
        "direct contribution to the embedding, as in the paper, or live, so that later layers read the mean too.",
        claims=claims,
        tables=tables,
        plots={"groups": groups_plot(accuracy["direct"], randoms["direct"])},
        notes=[
            f"TextSpan's heads (selection {options.selection}): "
            f"by the variance along those of their twenty texts that are of the kinds {options.kinds}. "
            "Contrast: by how much an attention head moves "
            "along the difference of the class texts when the background changes, animals held fixed. Number of heads: the "
            "one with the best worst group where they are chosen, by direct effects, separately in every split. Random: random "
            f"rankings of the same layers' heads with the same choice of their number, {options.direct_draws} draws, "
            f"{options.draws} of them live. Average: weighted by the groups' shares where heads are chosen; test average: by "
            "those of the evaluated images. Intervals and tests resample "
            f"{unit}; the four primary claims are corrected by "
            f"Holm. Texts of backgrounds span at most {100 * max(t.reach for t in trials):.0f} % of any attention head's "
            "variance."
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
