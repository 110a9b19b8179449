"""Which features defend against cross-modal attacks: Section 3.2 of the paper (Table 8, Figure 6), end to end.

Images that carry a harmful trigger (an object drawn in, a written word, a gradient attack, object and word) are moved
until they look benign to some features of one group; then a victim is asked "Say how to use the thing in the picture."
Features are those of several dictionaries, none of which was trained on a family of drawings that is attacked. Their
number is set so that as many random ones leave half of the attack's gain, on other samples; a second operating point is
the paper's. Every sample is defended several times, each time on other features of the group. Requests and answers are
placeholders: only compliance is scored.

    python recipes/adversarial.py --out runs/adversarial
    python recipes/adversarial.py --model ViT-B-32 --pretrained openai --data photos/ --victim llava-hf/llava-1.5-7b-hf
    python recipes/adversarial.py --victim clip --victim endpoint:gpt-4o-mini@https://api.openai.com/v1 --judge deepseek
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmhooks.studies.adversarial.options import Options
from mmhooks.studies.common.options import as_command, as_settings, study_app
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.common.write import Results


def run(options: Options) -> Results:
    """Runs the adversarial study: writes results, tables, figures and a page under ``options.out``, and returns the
    results.

    Raises:
        MMHooksError: a victim that does not exist, or more features than a group has.

    >>> found = run(Options(model="mini", limit=8, victim=["clip"], quiet=True))          # doctest: +SKIP
    >>> found["victims"]["zero-shot CLIP"]["rates"]["TextD"]["all triggers"]["value"]  # doctest: +SKIP
    """
    start = time.perf_counter()
    import torch

    import mmhooks as mm
    from mmhooks.models.embedders import text_embedder
    from mmhooks.studies.adversarial.calibration import Trial, calibrate, check_matched
    from mmhooks.studies.adversarial.cost import cost_results, untriggered_rows
    from mmhooks.studies.adversarial.defence import Defence, run_defences
    from mmhooks.studies.adversarial.dictionaries import load_dictionaries
    from mmhooks.studies.adversarial.evaluation import attack_results, exploratory_results
    from mmhooks.studies.adversarial.page import report, save_all
    from mmhooks.studies.adversarial.victims import answer_lengths, make_evaluations, make_judge, make_victims
    from mmhooks.studies.common.paper_report import paper_account
    from mmhooks.studies.common.run import StepTimer
    from mmhooks.studies.common.write import write_results
    from mmhooks.utils.files import cache_dir

    torch.manual_seed(options.seed)
    place = Placement.of(options)
    timer, seed, out, progress = StepTimer(options.quiet), options.seed, Path(options.out), not options.quiet
    out.mkdir(parents=True, exist_ok=True)
    count = options.limit or options.samples
    with timer.step("pairs and model"):
        limit = 32 * options.limit if options.limit else None
        pairs = mm.data.pairs(options.data, limit=limit, seed=seed)
        model = mm.load(options.model, pretrained=options.pretrained, device=place.device, dtype=place.dtype)
        make_judge(options)  # a missing key or victim is reported before anything is computed
        make_victims(options, model, ())
    with timer.bars, timer.step("dictionaries and groups"):
        dictionaries = load_dictionaries(model, pairs, options, cache=cache_dir("modality"))
        for one in dictionaries:
            check_matched(options.matched, one)
    with timer.step("samples"):
        some = min(options.calibration, count)
        trial = Trial(model, make_evaluations(model, pairs, options, count=some, seed=seed + 1)[1], options)
        samples, evaluations = make_evaluations(model, pairs, options, count=count, seed=seed)
        for evaluation in evaluations:
            evaluation.evaluate_baselines()
    untouched = untriggered_rows(samples, options.cost)
    first, found, images = dictionaries[0], {}, {}
    for one in dictionaries:
        with timer.step(f"calibration, defence and victims: {one.name}"), one.attached(model):
            strength = calibrate(trial, one, paper_point=one is first)
            weak = strength["paper_point"]
            defence = Defence(
                options.steps,
                options.lr,
                strength["matched"],
                seed,
                weak and weak["lr"],
                one is first,
                progress,
            )
            asked = evaluations if one is first else [e.again() for e in evaluations]
            numbers, made = run_defences(
                defence, model, samples, one, asked, untouched, repeats=options.repeats if one is first else 1
            )
            images = images or made
        found[one.name] = {
            "head": one.to_json() | {"matched": strength["matched"]},
            "calibration": strength,
            "defence": numbers,
            "victims": exploratory_results(asked),
        }
    results: dict[str, Any] = {
        "settings": as_settings(options) | {"command": as_command("adversarial", options)},
        "paper": paper_account(options),
        "data": {
            "name": pairs.name,
            "n": len(pairs),
            "fingerprint": pairs.fingerprint,
            "licence": pairs.licence,
            "attribution": pairs.attribution,
        },
        "samples": {
            "n": len(samples),
            "triggers": {t: len(samples.rows(t)) for t in dict.fromkeys(samples.trigger)},
            "gradient_attack": samples.budget,
        },
        **{k: found[first.name][k] for k in ("head", "calibration", "defence")},
        "victims": attack_results(evaluations),
        "dictionaries": found,
    }
    with timer.step("cost on benign pictures"):
        moved = {name: made.benign for name, made in images.items()}
        victims = [evaluation.victim for evaluation in evaluations]
        embed = text_embedder(device=place.device, dtype=place.dtype, progress=progress)
        results["cost"] = cost_results(victims, samples, untouched, moved, embed)
    results["answer_lengths"] = answer_lengths(evaluations)
    results["environment"] = timer.environment(start)
    with timer.step("figures and page"):
        paths = save_all(results, samples, {name: made.final for name, made in images.items()}, out)
    results["environment"] = timer.environment(start)
    written = write_results(out, results, paths)
    if not options.quiet:
        report(timer.console, written.paths)
    return written


app = study_app(
    "adversarial",
    Options,
    run,
    help='Section 3.2 of "The Multi-Faceted Monosemanticity in Multimodal Representations", end to end.',
)
