"""Which features carry "woman" and "man" in pictures and texts: case study 1 of the paper, and a bias audit.

Tables 6 and 7 and Figure 5, by prompt, centroid and probe, in both readings of the zero-masked classification, each
group beside random sets of its size; then the same by skin tone and profession. Labels are binary because the
paper's are; they say what a drawing's name or a classifier says, not who anybody is.

    python recipes/gender.py --out runs/gender
    python recipes/gender.py --model ViT-B-32 --pretrained openai --data cc3m --labels classifier --out runs/gender-cc3m
    python recipes/gender.py --model ViT-B-32 --pretrained openai --data people/ --labels column --label-column gender
"""

from __future__ import annotations

import json
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from gender_samples import CLASSES, CLASSIFIER, PROMPTS, Sample

from mmhooks.cli.clear_errors import clear_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="mini, or any open_clip name.")] = "mini",
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag, or a checkpoint file.")] = None,
    data: Annotated[
        str,
        typer.Option(
            help="mini, a folder/ with metadata.csv, cc3m, a data set's name, a corpus/ of mini_corpus.py."
        ),
    ] = "mini",
    labels: Annotated[
        str,
        typer.Option(help="auto, codepoints (mini), column, or classifier (an image-classification model)."),
    ] = "auto",
    label_column: Annotated[str, typer.Option(help="Column of the label, with --labels column.")] = "gender",
    strata: Annotated[str, typer.Option(help="Columns that the audit counts by, e.g. age,race.")] = "",
    family: Annotated[
        str, typer.Option(help="Column of samples that belong together (one person, one film).")
    ] = "",
    classifier: Annotated[
        str, typer.Option(help="transformers name or path; default: the paper's.")
    ] = CLASSIFIER,
    confidence: Annotated[float, typer.Option(min=0, max=1, help="Leave out what it is less sure of.")] = 0.0,
    template: Annotated[
        str, typer.Option(help="Of label prompts; auto: a drawing (mini) or photo of a {}.")
    ] = "auto",
    sae: Annotated[
        str | None, typer.Option(help="SAE head: name, directory, Hub id, or train; mini has its own.")
    ] = None,
    ncl: Annotated[str | None, typer.Option(help="NCL head, likewise; none leaves it out.")] = None,
    out: Annotated[Path, typer.Option(help="Where results, tables, figures and index.html go.")] = Path(
        "runs/gender"
    ),
    limit: Annotated[
        int | None, typer.Option(min=8, help="Use at most so many labelled samples, and no others.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of splits, random masks and resampling.")] = 0,
    draws: Annotated[
        int, typer.Option(min=2, help="Random masks of each control; 50 or more for p below .04.")
    ] = 100,
    features: Annotated[int, typer.Option(help="Features of a head that is trained here.")] = 1024,
    epochs: Annotated[int, typer.Option(help="Epochs of a head that is trained here.")] = 200,
    batch: Annotated[int, typer.Option(help="Pairs at a time through the encoders.")] = 256,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip unreadable pictures and count them.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars, no tables on the screen.")] = False,
) -> None:
    """Case study 1, gender patterns, and a bias audit.

    Example: python recipes/gender.py --out runs/gender
    """
    o = {k: (str(v) if isinstance(v, Path) else v) for k, v in locals().items()}
    o["command"] = shlex.join(["python", "recipes/gender.py", *sys.argv[1:]])
    with clear_errors("gender"):
        study(o, quiet=quiet)


def study(o: dict[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """The whole study with these options; writes everything under ``o["out"]`` and returns the results."""
    start = time.perf_counter()
    import torch
    from gender_audit import audit, tones
    from gender_features import carriers, shares
    from gender_page import report, save_all
    from gender_paper import claims, conflict
    from gender_samples import from_drawings
    from gender_study import GROUPS, MAIN, Setting, Split, check_live, false_discovery, groups_of, measure
    from gender_styles import is_corpus
    from modality import Clock, environment, head_source
    from modality_study import encode, train_heads

    import mmhooks as mm
    from mmhooks.analysis.results import plain
    from mmhooks.analysis.zero_masked import prompt_labels
    from mmhooks.data.cache import cache_dir

    torch.manual_seed(o["seed"])
    clock, cache = Clock(quiet), cache_dir("modality")
    out = Path(o["out"])
    out.mkdir(parents=True, exist_ok=True)
    with clock.bars:
        with clock.step("pairs and labels"):
            pairs, people = samples(o, clock)
            pairs, people = limited(pairs, people, o)
            fit_on, judged_on = split(people, o["seed"])
        with clock.step("encoders"):
            model = mm.load(o["model"], pretrained=o["pretrained"])
            encoded = encode(model, o["model"], pairs, cache, batch=o["batch"], progress=clock.bar)
            drawn = any("codepoints" in meta for meta in pairs.meta)
            scale = float(model.logit_scale.detach().exp())
            form = (
                o["template"] if o["template"] != "auto" else f"a {'drawing' if drawn else 'photo'} of a {{}}"
            )
            prompts = prompt_labels(model, PROMPTS, [form])
        with clock.step("heads"):
            away = {s.row for s in judged_on}
            known = [i for i in range(len(pairs)) if i not in away]
            names: dict[str, str] = {k: head_source(o, k) for k in ("sae", "ncl")}
            trained: dict[str, Any] = dict.fromkeys(names)
            if not all(names.values()):
                made = train_heads(
                    encoded, known, n=o["features"], epochs=o["epochs"], seed=o["seed"], cache=cache
                )
                trained = dict(zip(("sae", "ncl"), made, strict=True))
            heads: dict[str, Any] = {
                k: mm.load_head(n) if n else trained[k] for k, n in names.items() if n != "none"
            }
            source, rows = (encoded, pairs.fingerprint), known
            if is_corpus(o["data"]):  # over all styles mu + sigma exceeds 1: no ImgD would be left
                drawings = mm.data.pairs("mini")
                people_there = {s.row for s in from_drawings(drawings) if s.heldout}
                source = (
                    encode(model, o["model"], drawings, cache, batch=o["batch"], progress=clock.bar),
                    drawings.fingerprint,
                )
                rows = [i for i in range(len(drawings)) if i not in people_there]
            groups = {k: groups_of(h, source[0], rows, source[1]) for k, h in heads.items()}
        settings = [
            Setting(f"SAE, {space}", heads["sae"], space, groups["sae"])
            for space in ("decoded", "spliced", "latent")
        ]
        if "ncl" in heads:
            settings.append(Setting("NCL, latent", heads["ncl"], "latent", groups["ncl"]))
        fit, judged = Split.of(fit_on), Split.of(judged_on)
        masking, live = {}, {}
        for s in settings:
            with clock.step(f"masking: {s.name}"):
                vectors, worst, clean = check_live(s, encoded, fit, judged, prompts, scale, pairs)
                live[s.name] = {"by_hand": worst, "bit_equal_after": clean}
                bar = clock.bar(f"random masks: {s.name}", 12 * o["draws"])
                masking[s.name] = measure(
                    s,
                    encoded,
                    fit,
                    judged,
                    prompts,
                    scale,
                    draws=o["draws"],
                    seed=o["seed"],
                    live=vectors,
                    step=bar,
                )
        false_discovery(masking)
        main_setting = settings[0]
        labelled = [s for s in people if s.label is not None]
        with clock.step("features, Figure 5, audit"):
            found = carriers(main_setting, encoded, fit, judged, prompts, scale, count=10, seed=o["seed"])
            figure5 = shares(
                main_setting, encoded, Split.of(labelled), prompts, scale, shown=7, seed=o["seed"]
            )
            strata = audit(main_setting, encoded, people, prompts, scale, seed=o["seed"])
            tone_words = prompt_labels(model, [["light skin tone"], ["dark skin tone"]])
            tone = tones(main_setting, encoded, people, tone_words, scale, seed=o["seed"])
        results: dict[str, Any] = {
            "settings": o,
            "data": about(pairs, o, people, fit_on, judged_on),
            "prompts": {
                "template": form,
                "words": dict(zip(CLASSES, map(list, PROMPTS), strict=True)),
                "scale": scale,
            },
            "groups": {
                k: {g: len(m) for g, m in zip(GROUPS, groups[k].groups, strict=True)} | {"head": heads[k].id}
                for k in groups
            },
            "masking": masking,
            "live": live,
            "features": found,
            "figure5": figure5,
            "audit": strata,
            "tones": tone,
            "conflict": conflict(),
        }
        results = plain(results)  # JSON has no NaN
        statements = claims(results, MAIN)
        results["claims"] = [vars(c) for c in statements]
        results["environment"] = environment(clock, start)
        with clock.step("figures and page"):
            paths = save_all(results, statements, pairs, main_setting, encoded, out)
    results["environment"] = environment(clock, start)
    (out / "results.json").write_text(
        json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
    )
    if not quiet:
        report(clock.console, results, statements, [out / "results.json", *paths])
    return results


def samples(o: dict[str, Any], clock: Any) -> tuple[Any, list[Sample]]:
    """The pairs, and who is in them."""
    from gender_samples import from_classifier, from_column, from_drawings
    from gender_styles import corpus_pairs, is_corpus

    import mmhooks as mm
    from mmhooks.errors import DataError

    how = o["labels"]
    if how not in ("auto", "codepoints", "column", "classifier"):
        raise DataError(f"--labels is auto, codepoints, column or classifier, came {how!r}")
    if how == "auto":
        how = "codepoints" if o["data"] == "mini" else "column"
    strata = [s.strip() for s in o["strata"].split(",") if s.strip()]
    if is_corpus(o["data"]):
        pairs = corpus_pairs(o["data"], seed=o["seed"])
        return pairs, from_drawings(pairs)
    folder = (Path(o["data"]).expanduser() / "metadata.csv").is_file()
    columns = [c for c in ([o["label_column"], *strata, o["family"]] if how == "column" else strata) if c]
    pairs = mm.data.pairs(
        o["data"],
        seed=o["seed"],
        on_error="skip" if o["skip_bad"] else "raise",
        meta_columns=() if folder or o["data"] == "mini" else columns,
        progress=not o.get("quiet"),
    )
    if how == "column":
        return pairs, from_column(pairs, o["label_column"], strata, o["family"])
    if how == "classifier":
        bar = clock.bar("labels by the classifier", len(pairs))
        people = from_classifier(pairs, o["classifier"], least=o["confidence"], strata=strata, progress=bar)
        return pairs, people
    found = from_drawings(pairs)
    if not found:
        raise DataError(
            f"{o['data']!r} has no code points that say woman or man; give --labels column or classifier"
        )
    return pairs, found


def limited(pairs: Any, people: list[Sample], o: dict[str, Any]) -> tuple[Any, list[Sample]]:
    """With ``--limit``, so many labelled samples, as evenly as possible from women and men, held out and not."""
    from dataclasses import replace

    if o["limit"] is None:
        return pairs, people
    parts: dict[Any, list[Sample]] = {}
    for s in people:
        if s.label is not None:
            parts.setdefault((s.heldout, s.label), []).append(s)
    for key in parts:
        random.Random(o["seed"]).shuffle(parts[key])
    chosen: list[Sample] = []
    while len(chosen) < o["limit"] and any(parts.values()):
        chosen += [parts[key].pop() for key in sorted(parts) if parts[key]][: o["limit"] - len(chosen)]
    chosen.sort(key=lambda s: s.row)
    return pairs.select([s.row for s in chosen]), [replace(s, row=i) for i, s in enumerate(chosen)]


def split(people: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples that labels are fitted on, and samples that are judged: the held-out ones, else half of the families.

    Raises:
        DataError: a side without at least two women and two men.
    """
    from mmhooks.errors import DataError

    labelled = [s for s in people if s.label is not None]
    judged = [s for s in labelled if s.heldout]
    if not judged:
        families = sorted({s.family for s in labelled})
        random.Random(seed).shuffle(families)
        half = set(families[: len(families) // 2])
        judged = [s for s in labelled if s.family in half]
    rows = {s.row for s in judged}
    fit = [s for s in labelled if s.row not in rows]
    counts = {
        w: [sum(s.label == c for s in part) for c in (0, 1)]
        for w, part in (("fitted", fit), ("judged", judged))
    }
    if min(map(min, counts.values())) < 2:
        said = "; ".join(f"{w}: {a} women, {b} men" for w, (a, b) in counts.items())
        raise DataError(
            f"every side needs at least 2 women and 2 men; {said}. Give more samples or a larger --limit"
        )
    return fit, judged


def about(
    pairs: Any, o: dict[str, Any], people: Sequence[Sample], fit: Sequence[Sample], judged: Sequence[Sample]
) -> dict[str, Any]:
    from gender_samples import gender_of_words
    from modality import about as described

    def counts(part: Sequence[Sample]) -> dict[str, int]:
        women, men, unsaid = (sum(s.label == c for s in part) for c in (0, 1, None))
        return {"women": women, "men": men, "unsaid": unsaid, "families": len({s.family for s in part})}

    named = sum(gender_of_words(pairs.texts[s.row]) is not None for s in judged)
    sure = [s.confidence for s in people if s.confidence is not None]
    return described(pairs, o, sum(s.heldout for s in people)) | {
        "people": counts(people),
        "fitted": counts(fit),
        "judged": counts(judged),
        "judged_texts_naming_a_gender": named,
        "confidence": {"mean": sum(sure) / len(sure), "least": min(sure)} if sure else None,
        "labels": [
            {"id": pairs.ids[s.row], "label": CLASSES[s.label], "confidence": s.confidence, "judged": s in judged}
            for s in people
            if s.label is not None
        ] if sure else None,
    }  # fmt: skip


if __name__ == "__main__":
    app()
