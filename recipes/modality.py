"""Which features of CLIP belong to pictures, to texts, to both: Section 2 of the paper, end to end.

Four models, CLIP, DeCLIP, CLIP+NCL and CLIP+SAE: Tables 1 and 2, the MDS histograms of Figure 1, top pictures and
texts of features of each group (Figures 2-4, Tables 3-5), and what masking a group does to retrieval.

    python recipes/modality.py --out runs/modality
    python recipes/modality.py --model ViT-B-32 --pretrained openai --declip declip.pth --data coco --limit 5000
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modality_options import Options
from study_options import as_command, as_settings, study_app
from study_page import Results

from mmhooks.utils.escape import one_line, rich_text

Heldout = ("heldout_pictures", "heldout_concepts")


class Clock:
    """Seconds of each step, and one progress bar a step."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        # Tables need room where the output is a file: a terminal's own width is kept.
        self.console = Console(quiet=quiet, width=None if sys.stdout.isatty() else 150)
        self.seconds: dict[str, float] = {}
        self.bars = Progress(
            TextColumn("{task.description:<34}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, disable=quiet,
        )  # fmt: skip

    def bar(self, label: str, total: int) -> Callable[[int], None]:
        task = self.bars.add_task(one_line(label), total=total)
        return lambda done: self.bars.update(task, advance=done)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        start = time.perf_counter()
        task = self.bars.add_task(one_line(label), total=1)
        yield
        self.bars.update(task, advance=1)
        self.seconds[label] = time.perf_counter() - start
        if not self.console.is_terminal:  # a log file shows no bars
            self.console.print(rich_text(f"{label}: {self.seconds[label]:.1f} s"))


def run(options: Options) -> Results:
    """Runs the modality study: writes results, tables, figures and a page under ``options.out``, and returns the results.

    Raises:
        DataError: data that cannot be used, or fewer than eight pairs.

    >>> found = run(Options(limit=400, draws=6, quiet=True))                     # doctest: +SKIP
    >>> found["models"]["CLIP+SAE"]["groups"]["ImgD"]["size"]                    # doctest: +SKIP
    """
    start = time.perf_counter()
    import torch
    from modality_mask import experiment, prepare
    from modality_page import Shown, report, save_all
    from modality_paper import claims
    from modality_study import Subject, encode, load_heads, measure_subject, show
    from study_page import write_results

    import mmhooks as mm
    from mmhooks.data.cache import cache_dir

    torch.manual_seed(options.seed)
    clock, cache, seed, out = Clock(options.quiet), cache_dir("modality"), options.seed, Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    def encoded(model: Any, name: str) -> Any:
        return encode(model, name, pairs, cache, batch=options.batch, progress=not options.quiet)

    with clock.bars:
        with clock.step("pairs"):
            on_error = "skip" if options.skip_bad else "raise"
            pairs = mm.data.pairs(options.data, limit=options.limit, seed=seed, on_error=on_error)
            heldout = settle(pairs, options.data, seed)
            masked = choose(heldout, options.evaluate, seed)
        with clock.step("picture and text embedders"):
            judges = judge(pairs, options)
        with clock.step("encoders"):
            clip = encoded(mm.load(options.model, pretrained=options.pretrained), options.model)
            other = load_declip(options)
            declip = None if other is None else encoded(other, "DeCLIP")
        with clock.step("heads"):
            unseen = set(heldout)
            seen = [row for row in range(len(pairs)) if row not in unseen]
            sources = {
                "sae": head_source(options.sae, "sae", options.model),
                "ncl": head_source(options.ncl, "ncl", options.model),
            }
            heads = load_heads(
                clip, seen, sources, n=options.features, epochs=options.epochs, seed=seed, cache=cache
            )
        subjects = [Subject("CLIP", clip), *([Subject("DeCLIP", declip)] if declip else [])]
        subjects += [Subject("CLIP+NCL", clip, heads["ncl"]), Subject("CLIP+SAE", clip, heads["sae"])]
        models: dict[str, Any] = {}
        shown: list[Shown] = []
        inputs: dict[str, Any] = {}
        for s in subjects:
            with clock.step(f"measures of {s.name}"):
                models[s.name], found = measure_subject(
                    s, judges, heldout, top_m=options.top_m, seed=seed, draws=options.draws
                )
                shown += show(s, found, pairs, each=options.each, seed=seed)
            with clock.step(f"masking {s.name}"):
                step = clock.bar(f"random masks of {s.name}", 3 * options.draws)
                if s.encoded.name not in inputs:
                    inputs[s.encoded.name] = prepare(s.encoded.model, pairs, masked)
                models[s.name]["masking"] = experiment(
                    s,
                    found.mds,
                    pairs,
                    masked,
                    inputs[s.encoded.name],
                    draws=options.draws,
                    seed=seed,
                    step=step,
                )
        statements = claims(models)
        told = about(
            pairs, data=options.data, model=options.model, pretrained=options.pretrained, heldout=len(heldout)
        )
        results: dict[str, Any] = {
            "settings": as_settings(options) | {"command": as_command("modality", options)},
            "data": told,
            "models": models,
            "claims": [vars(claim) for claim in statements],
            "environment": environment(clock, start),
        }
        with clock.step("figures and page"):
            paths = save_all(results, statements, shown, out, "CLIP+SAE")
    results["environment"] = environment(clock, start)
    written = write_results(out, results, paths)
    if not options.quiet:
        report(clock.console, written.found, statements, written.paths)
    return written


def judge(pairs: Any, options: Options) -> dict[str, Any]:
    """Embeddings by models that are not under study, which say how alike samples are; cached by data and embedder."""
    from mmhooks.analysis.embedders import image_embedder, text_embedder

    texts = text_embedder(options.text_embedder, progress=not options.quiet)
    images = image_embedder(options.image_embedder, progress=not options.quiet)
    return {"image": images(pairs), "text": texts(pairs)}


def load_declip(options: Options) -> Any:
    """The DeCLIP model: embedded for mini, else the user's own checkpoint; None where there is none."""
    import mmhooks as mm

    name = options.declip
    if name == "auto":
        name = "mini-declip" if options.model == "mini" else ""
    if not name:
        return None
    return mm.load(name) if name == "mini-declip" else mm.load(options.model, pretrained=name)


def head_source(given: str | None, kind: str, model: str) -> str:
    """Where a head comes from: as given, else mini's own; empty: it is trained here."""
    if given == "train":
        return ""
    return given or (f"mini/{kind}" if model == "mini" else "")


def choose(rows: list[int], most: int, seed: int) -> list[int]:
    """At most so many of these rows, at random, in order."""
    return sorted(random.Random(seed).sample(rows, min(most, len(rows))))


def settle(pairs: Any, data: str, seed: int) -> list[int]:
    """The rows that no training saw: of mini its own held-out splits, else a seeded fifth.

    Raises:
        DataError: fewer than eight pairs.
    """
    import torch

    from mmhooks.errors import DataError

    rows = [i for i, split in enumerate(pairs.splits) if split in Heldout] if data == "mini" else []
    if len(rows) < 2:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = sorted(order[: max(len(pairs) // 5, 2)])
    if len(pairs) < 8:
        raise DataError(
            f"{data!r} has {len(pairs)} pairs; the study needs at least 8, sensibly a few thousand"
        )
    return rows


def about(pairs: Any, *, data: str, model: str, pretrained: str | None, heldout: int) -> dict[str, Any]:
    """What ``results.json`` says of the data and the model; ``heldout`` counts pairs that no training saw."""
    name = {"mini": "OpenMoji drawings", "coco": "COCO 2017", "cc3m": "CC3M validation"}.get(
        data, Path(data).name
    )
    return {
        "name": name,
        "n": len(pairs),
        "heldout": heldout,
        "licence": str(pairs.licence),
        "fingerprint": str(pairs.fingerprint),
        "skipped": len(pairs.skipped),
        "attribution": str(pairs.attribution),
        "model": model + (f" ({pretrained})" if pretrained else ""),
    }


def environment(clock: Clock, start: float) -> dict[str, Any]:
    """Time, memory and versions, with the seconds of each step."""
    from study_page import environment as measured

    return measured(start) | {"steps": {k: round(v, 2) for k, v in clock.seconds.items()}}


app = study_app(
    "modality",
    Options,
    run,
    help='Section 2 of "The Multi-Faceted Monosemanticity in Multimodal Representations", end to end.',
)

if __name__ == "__main__":
    app()
