"""Which features of CLIP belong to images, to texts, or to both: Section 2 of the paper, end to end.

Four models, CLIP, DeCLIP, CLIP+NCL and CLIP+SAE: Tables 1 and 2, the MDS histograms of Figure 1, top images and
texts of features of each group (Figures 2-4, Tables 3-5), and what masking a group does to retrieval.

    python recipes/modality.py --out runs/modality
    python recipes/modality.py --model ViT-B-32 --pretrained openai --declip declip.pth --data coco --limit 5000
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhooks.studies.common.heads import head_sources
from mmhooks.studies.common.held_out import describe_data, held_out_rows, sample_rows
from mmhooks.studies.common.options import as_command, as_settings, study_app
from mmhooks.studies.common.run import StepTimer
from mmhooks.studies.common.write import Results
from mmhooks.studies.modality.models import load_clip, load_declip, similarity_embeddings
from mmhooks.studies.modality.options import Options

if TYPE_CHECKING:
    from mmhooks.analysis.measures.all_measures import Measures


def run(options: Options) -> Results:
    """Runs the modality study: writes results, tables, figures and a page under ``options.out``, and returns the results.

    Raises:
        DataError: data that cannot be used, or fewer than eight pairs.

    >>> found = run(Options(limit=400, draws=6, quiet=True))                     # doctest: +SKIP
    >>> found["models"]["CLIP+SAE"]["groups"]["ImgD"]["size"]                    # doctest: +SKIP
    """
    start = time.perf_counter()
    import torch

    import mmhooks as mm
    from mmhooks.studies.common.cards import FeatureExample
    from mmhooks.studies.common.encode import encode
    from mmhooks.studies.common.heads import load_heads
    from mmhooks.studies.common.paper_report import paper_account
    from mmhooks.studies.common.write import write_results
    from mmhooks.studies.modality.cross_modal import CAUSAL_PAIRS, pairing_effects
    from mmhooks.studies.modality.definitions import compare_definitions, definitions, sample_families
    from mmhooks.studies.modality.masking import masking_effects, model_inputs
    from mmhooks.studies.modality.measures import Definition, StudyModel, choose_examples, measure_model
    from mmhooks.studies.modality.page import report, save_all
    from mmhooks.studies.modality.paper import claims
    from mmhooks.studies.modality.seeds import compare_seeds, heads_of_seed
    from mmhooks.utils.files import cache_dir

    torch.manual_seed(options.seed)
    timer, cache, seed, out = StepTimer(options.quiet), cache_dir("modality"), options.seed, Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    def encoded(model: Any, name: str) -> Any:
        return encode(model, name, pairs, cache, batch=options.batch, progress=not options.quiet)

    with timer.bars:
        with timer.step("pairs"):
            on_error = "skip" if options.skip_bad else "raise"
            pairs = mm.data.pairs(options.data, limit=options.limit, seed=seed, on_error=on_error)
            heldout = held_out_rows(pairs, options.data, seed)
            masked = sample_rows(heldout, options.evaluate, seed)
        with timer.step("picture and text embedders"):
            embeddings = similarity_embeddings(pairs, options)
            families = sample_families(pairs, options.family, embeddings["image"])
            definition = Definition(
                options.top_m, options.activation, options.zeros, options.min_samples, families
            )
        with timer.step("encoders"):
            clip = encoded(load_clip(options), options.model)
            other = load_declip(options)
            declip = None if other is None else encoded(other, "DeCLIP")
        with timer.step("heads"):
            unseen = set(heldout)
            seen = [row for row in range(len(pairs)) if row not in unseen]
            sources = head_sources(options.sae, options.ncl, options.model)
            settings = {"n": options.features, "k": options.k, "epochs": options.epochs, "cache": cache}
            heads = load_heads(clip, seen, sources, seed=seed, **settings)
        study_models = [StudyModel("CLIP", clip), *([StudyModel("DeCLIP", declip)] if declip else [])]
        study_models += [StudyModel(f"CLIP+{kind.upper()}", clip, heads[kind]) for kind in ("ncl", "sae")]
        models: dict[str, Any] = {}
        all_found: dict[str, Measures] = {}
        shown: list[FeatureExample] = []
        inputs: dict[str, Any] = {}
        for s in study_models:
            with timer.step(f"measures of {s.name}"):
                models[s.name], found = measure_model(
                    s, embeddings, heldout, definition, seed=seed, draws=options.draws
                )
                all_found[s.name] = found
                shown += choose_examples(s, found, pairs, each=options.each, seed=seed)
            with timer.step(f"pairing of {s.name}"):
                models[s.name]["cross_modal"] = pairing_effects(
                    s, found.mds, families, pairs.texts, most=CAUSAL_PAIRS, seed=seed
                )
            with timer.step(f"masking {s.name}"):
                step = timer.bar(f"random masks of {s.name}", 3 * options.draws)
                if s.encoded.name not in inputs:
                    inputs[s.encoded.name] = model_inputs(s.encoded.model, pairs, masked)
                models[s.name]["masking"] = masking_effects(
                    s, found.mds, pairs, masked, inputs[s.encoded.name], draws=options.draws, seed=seed, step=step
                )  # fmt: skip
        with timer.step("other definitions"):
            step = timer.bar("definitions", len(definitions(definition)) * len(study_models))
            compared = compare_definitions(
                study_models, embeddings, definition, all_found, seed=seed, step=step
            )
        with timer.step("other training seeds"):
            others = [
                heads_of_seed(clip, seen, sources, i, first=seed, **settings) for i in range(1, options.seeds)
            ]
            step = timer.bar("heads of other seeds", 2 * len(others))
            seeds = compare_seeds(others, models, clip, embeddings, definition, seed=seed, step=step)
        statements = claims(models)
        summary = describe_data(
            pairs, data=options.data, model=options.model, pretrained=options.pretrained, heldout=len(heldout)
        )
        results: dict[str, Any] = {
            "settings": as_settings(options) | {"command": as_command("modality", options)},
            "paper": paper_account(options),
            "data": summary,
            "models": models,
            "definitions": compared,
            "seeds": seeds,
            "claims": [vars(claim) for claim in statements],
            "environment": timer.environment(start),
        }
        with timer.step("figures and page"):
            paths = save_all(results, statements, shown, out, "CLIP+SAE")
    results["environment"] = timer.environment(start)
    written = write_results(out, results, paths)
    if not options.quiet:
        report(timer.console, written.found, statements, written.paths)
    return written


app = study_app(
    "modality",
    Options,
    run,
    help='Section 2 of "The Multi-Faceted Monosemanticity in Multimodal Representations", end to end.',
)
