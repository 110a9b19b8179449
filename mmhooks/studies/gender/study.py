"""Which features carry "woman" and "man" in images and texts: case study 1 of the paper, and a bias audit.

Tables 6 and 7 and Figure 5, by prompt, centroid and probe, in both readings of the zero-masked classification, each
group compared with random sets of its size; then the same by skin tone and profession. Labels are binary because the
paper's are; they come from a drawing's name or a classifier and do not say who anybody is.

    python recipes/gender.py --out runs/gender
    python recipes/gender.py --model ViT-B-32 --pretrained openai --data cc3m --labels classifier --out runs/gender-cc3m
    python recipes/gender.py --model ViT-B-32 --pretrained openai --data people/ --labels column --label-column gender
"""

from __future__ import annotations

import time
from pathlib import Path

from mmhooks.studies.common.options import as_command, as_settings, study_app
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.common.write import Results
from mmhooks.studies.gender.options import Options


def run(options: Options) -> Results:
    """Runs the gender study: writes results, tables, figures and a page under ``options.out``, and returns the results.

    Raises:
        DataError: data or labels that cannot be used, or fewer than two women and two men on a side.

    >>> found = run(Options(limit=96, draws=4, quiet=True))                     # doctest: +SKIP
    >>> found["masking"]["SAE, decoded"]["image"]["prompt"]["base"]["accuracy"]  # doctest: +SKIP
    """
    start = time.perf_counter()
    import torch

    import mmhooks as mm
    from mmhooks.analysis.interventions.masked_classification import prompt_labels
    from mmhooks.analysis.results import plain
    from mmhooks.studies.common.encode import encode
    from mmhooks.studies.common.heads import head_sources, load_heads
    from mmhooks.studies.common.paper_report import paper_account
    from mmhooks.studies.common.run import StepTimer
    from mmhooks.studies.common.write import write_results
    from mmhooks.studies.gender.audit import audit, skin_tone_masking
    from mmhooks.studies.gender.data import describe_data, load_people, split, template_of
    from mmhooks.studies.gender.discrimination import discrimination
    from mmhooks.studies.gender.features import imgd_shares, strongest_features
    from mmhooks.studies.gender.groups import group_sizes, score_groups, settings_of
    from mmhooks.studies.gender.implicit import all_arms
    from mmhooks.studies.gender.masking import (
        MAIN,
        Inputs,
        Split,
        false_discovery,
        mask_live,
        masking_effects,
    )
    from mmhooks.studies.gender.page import report, save_all
    from mmhooks.studies.gender.paper import claims, table_conflicts
    from mmhooks.studies.gender.person_filter import showing_a_person
    from mmhooks.studies.gender.samples import CLASSES, label_words
    from mmhooks.utils.files import cache_dir

    torch.manual_seed(options.seed)
    place = Placement.of(options)
    timer, cache, seed, out = StepTimer(options.quiet), cache_dir("modality"), options.seed, Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with timer.bars:
        with timer.step("pairs and labels"):
            pairs, people = load_people(options, timer.bar)
            words = label_words(options.words)
            named = dict(zip(CLASSES, words, strict=True))
        with timer.step("encoders"):
            model = mm.load(
                options.model, pretrained=options.pretrained, device=place.device, dtype=place.dtype
            )
            encoded = encode(
                model, options.model, pairs, cache, batch=options.batch, progress=not options.quiet
            )
            template, scale = template_of(options.template, pairs), float(model.logit_scale.detach().exp())
            people, filtered = showing_a_person(people, encoded, options.person, template, scale)
            fit, judged = split(people, seed)
            prompts = prompt_labels(model, words, [template])
            inputs = Inputs(encoded, Split.of(fit), Split.of(judged), prompts, scale)
        with timer.step("heads"):
            judged_rows = {s.row for s in judged}
            known = [row for row in range(len(pairs)) if row not in judged_rows]
            sources = head_sources(options.sae, options.ncl, options.model)
            heads = load_heads(
                encoded, known, sources, n=options.features, k=options.k, epochs=options.epochs, seed=seed,
                cache=cache,
            )  # fmt: skip
            groups = score_groups(heads, encoded, known, options, cache)
        settings = settings_of(heads, groups)
        masking, live = {}, {}
        for setting in settings:
            with timer.step(f"masking: {setting.name}"):
                vectors, live[setting.name] = mask_live(setting, inputs, pairs)
                step = timer.bar(f"random masks: {setting.name}", 12 * options.draws)
                masking[setting.name] = masking_effects(
                    setting, inputs, draws=options.draws, seed=seed, live=vectors, step=step
                )
        false_discovery(masking)
        main = settings[0]
        with timer.step("separation and drift"):
            arms = all_arms(model, main.head, inputs, [s.family for s in judged])
            separated = discrimination(arms, main.mds, inputs.labels, seed=seed, draws=options.draws)
        with timer.step("features, Figure 5, audit"):
            everyone = Split.of([s for s in people if s.label is not None])
            tone_words = prompt_labels(model, [["light skin tone"], ["dark skin tone"]])
            measured = {
                "features": strongest_features(main, inputs, count=10, seed=seed),
                "figure5": imgd_shares(main, inputs, everyone, shown=7, seed=seed),
                "audit": audit(main, inputs, people, seed=seed),
                "tones": skin_tone_masking(main, inputs, people, tone_words, seed=seed),
            }
        results = plain(
            {
                "settings": as_settings(options) | {"command": as_command("gender", options)},
                "paper": paper_account(options),
                "data": describe_data(pairs, options, people, fit, judged) | {"person_filter": filtered},
                "prompts": {"template": template, "words": named, "scale": scale},
                "groups": group_sizes(heads, groups),
                "masking": masking,
                "live": live,
                "discrimination": separated,
                **measured,
                "conflict": table_conflicts(),
            }
        )
        statements = claims(results, MAIN)
        results["claims"] = [vars(claim) for claim in statements]
        results["environment"] = timer.environment(start)
        with timer.step("figures and page"):
            paths = save_all(results, statements, pairs, main, encoded, out)
    results["environment"] = timer.environment(start)
    found = write_results(out, results, paths)
    if not options.quiet:
        report(timer.console, results, statements, found.paths)
    return found


app = study_app(
    "gender",
    Options,
    run,
    help="""Case study 1, gender patterns, and a bias audit.

    Example: python recipes/gender.py --out runs/gender
    """,
)
