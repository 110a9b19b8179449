"""Attention heads of CLIP's image encoder described by texts: tables and images of the text-based decomposition.

Texts of the last layers' heads (TextSpan) and their stability over other images, accuracy without components, top
images and nearest neighbours by single heads, neurons through later heads, images as sparse sums of texts.

    python recipes/decomposition.py --out runs/decomposition
    python recipes/decomposition.py --model ViT-B-32 --pretrained openai --data coco --limit 5000 --pool imagenet
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmhooks.studies.common.options import as_command, as_settings, study_app
from mmhooks.studies.common.placement import Placement
from mmhooks.studies.common.write import Results
from mmhooks.studies.decomposition.options import Options


def run(options: Options) -> Results:
    """Runs the decomposition study: writes results, head labels, tables, figures and a page under ``options.out``, and
    returns the results.

    Raises:
        DataError: data that cannot be used, or fewer than eight pairs.

    >>> found = run(Options(limit=60, evaluate=12, quiet=True))                  # doctest: +SKIP
    >>> found["text_span"]["texts"][0]                                           # doctest: +SKIP
    """
    start = time.perf_counter()
    import torch

    import mmhooks as mm
    from mmhooks.analysis.results import plain
    from mmhooks.models.clip.embed_texts import embed_texts
    from mmhooks.studies.common.held_out import describe_data, held_out_rows, sample_rows
    from mmhooks.studies.common.paper_report import paper_account
    from mmhooks.studies.common.run import StepTimer
    from mmhooks.studies.common.write import write_results
    from mmhooks.studies.decomposition.measures import (
        Evaluation,
        ablation_accuracy,
        agreement,
        contributions,
        halves,
        other_selection,
        rebuilt_from_texts,
        strongest_neurons,
    )
    from mmhooks.studies.decomposition.page import report, save_all
    from mmhooks.studies.decomposition.strips import make_strips

    torch.manual_seed(options.seed)
    place = Placement.of(options)
    timer, seed, out = StepTimer(options.quiet), options.seed, Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with timer.bars, torch.no_grad():
        with timer.step("pairs"):
            on_error = "skip" if options.skip_bad else "raise"
            pairs = mm.data.pairs(options.data, limit=options.limit, seed=seed, on_error=on_error)
            held = sample_rows(held_out_rows(pairs, options.data, seed), options.evaluate, seed)
            unseen = set(held)
            seen = [row for row in range(len(pairs)) if row not in unseen]
        with timer.step("texts"):
            model = mm.load(
                options.model, pretrained=options.pretrained, device=place.device, dtype=place.dtype
            )
            pool = mm.data.text_pool(options.pool)
            texts = embed_texts(model, pool.texts)
            evaluation = Evaluation.of(model, pairs, held)
        with timer.step("direct contributions"):
            parts = contributions(model, pairs, seen, options)
        with timer.step("texts of attention heads"):
            k = min(options.texts, len(pool))
            span = mm.text_span(
                parts.outputs[seen],
                texts,
                pool.texts,
                n_texts=k,
                heads=parts.heads,
                selection=options.selection,  # type: ignore[arg-type]
            )
            span.save(out / "text_span.json")
            head_labels = span.labels(model=model.name, pool=pool.name, kinds=pool.kinds)
            head_labels.save(out / "head_labels.json")
            overlap = halves(pairs, parts, seen, texts, pool.texts, span)
            other = other_selection(parts, seen, texts, pool.texts, span)
            captions = embed_texts(model, [pairs.texts[i] for i in held])
            text_agreement = agreement(span, parts.outputs[held], captions, texts, seed)
        with timer.step("attention heads rebuilt from texts"):
            rebuilt = rebuilt_from_texts(span, parts, evaluation, seen, k)
        with timer.step("ablations"):
            without = ablation_accuracy(model, pairs, parts, evaluation, seen, options)
        with timer.step("neurons"):
            layer = max(0, len(parts.means.heads) - 3)
            neurons = strongest_neurons(model, pairs, seen, layer, texts, pool.texts, options)
        with timer.step("pictures in texts"):
            code = mm.sparse_text_code(parts.embeddings, texts, pool.texts, penalty=0.15)
        summary = describe_data(
            pairs, data=options.data, model=options.model, pretrained=options.pretrained, heldout=len(held)
        )
        counts = {
            "seen": len(seen),
            "classes": len(evaluation.names),
            "pool": pool.name,
            "pool_size": len(pool),
        }
        results: dict[str, Any] = {
            "settings": as_settings(options) | {"command": as_command("decomposition", options)},
            "paper": paper_account(options),
            "data": summary | counts,
            "shares": [{**row} for row in parts.means.table()],
            "text_span": span.to_json(),
            "labels": head_labels.to_json(),
            "agreement": text_agreement,
            "overlap": overlap.to_json(),
            "other_selection": other,
            "rebuilt": plain(rebuilt),
            "ablations": without.to_json(),
            "neurons": neurons,
            "code": {"table": list(code.table()), "penalty": code.penalty},
        }
        with timer.step("figures and page"):
            shown = make_strips(pairs, span, parts, code, neurons["strongest"], each=options.each, seed=seed)
            results["environment"] = timer.environment(start)
            paths = save_all(results, shown, out)
    results["environment"] = timer.environment(start)
    found = write_results(out, results, [out / "text_span.json", out / "head_labels.json", *paths])
    if not options.quiet:
        report(timer.console, found.found, found.paths)
    return found


app = study_app(
    "decomposition",
    Options,
    run,
    help='"Interpreting CLIP\'s Image Representation via Text-Based Decomposition", on your model and images.',
)
