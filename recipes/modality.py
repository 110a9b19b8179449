"""Which features of CLIP belong to pictures, to texts, to both: Section 2 of the paper, end to end.

Four models, CLIP, DeCLIP, CLIP+NCL and CLIP+SAE: Tables 1 and 2, the MDS histograms of Figure 1, top pictures and
texts of features of each group (Figures 2-4, Tables 3-5), and what masking a group does to retrieval.

    python recipes/modality.py --out runs/modality
    python recipes/modality.py --model ViT-B-32 --pretrained openai --declip declip.pth --data coco --limit 5000
"""

from __future__ import annotations

import json
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.cli.clear_errors import clear_errors
from mmhooks.utils.escape import one_line, rich_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

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


@app.command()
def main(
    model: Annotated[str, typer.Option(help="mini, or any open_clip name.")] = "mini",
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag, or a checkpoint file.")] = None,
    data: Annotated[str, typer.Option(help="mini, a folder/ with metadata.csv, coco, cc3m, …")] = "mini",
    declip: Annotated[
        str, typer.Option(help="DeCLIP: mini-declip, or a checkpoint of --model's class; '' leaves it out.")
    ] = "auto",
    sae: Annotated[
        str | None, typer.Option(help="SAE head: name, directory, Hub id, or train; mini has its own.")
    ] = None,
    ncl: Annotated[str | None, typer.Option(help="NCL head, likewise.")] = None,
    out: Annotated[Path, typer.Option(help="Where results, tables, figures and index.html go.")] = Path(
        "runs/modality"
    ),
    limit: Annotated[int | None, typer.Option(min=8, help="Use at most so many pairs.")] = None,
    seed: Annotated[
        int, typer.Option(help="Of baselines, bootstrap, random controls and the features shown.")
    ] = 0,
    top_m: Annotated[int, typer.Option("--top-m", min=2, help="m: top samples a feature.")] = 20,
    image_embedder: Annotated[
        str, typer.Option(help="efficientnet-lite0 (offline) or vit-b16-in21k (the paper's).")
    ] = "efficientnet-lite0",
    text_embedder: Annotated[
        str, typer.Option(help="minilm (offline, the paper's) or a sentence-transformers name.")
    ] = "minilm",
    features: Annotated[int, typer.Option(help="Features of a head that is trained here.")] = 1024,
    epochs: Annotated[int, typer.Option(help="Epochs of a head that is trained here.")] = 200,
    draws: Annotated[int, typer.Option(help="Random masks and groups of each control.")] = 60,
    evaluate: Annotated[int, typer.Option(min=2, help="At most so many held-out pairs under masks.")] = 600,
    each: Annotated[int, typer.Option(help="Features shown of each group.")] = 4,
    batch: Annotated[int, typer.Option(help="Pairs at a time through the encoders.")] = 256,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip unreadable pictures and count them.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars, no tables on the screen.")] = False,
) -> None:
    """Section 2 of "The Multi-Faceted Monosemanticity in Multimodal Representations", end to end."""
    import torch

    torch.manual_seed(seed)
    settings = {k: (str(v) if isinstance(v, Path) else v) for k, v in locals().items() if k != "torch"}
    settings["command"] = shlex.join(["python", "recipes/modality.py", *sys.argv[1:]])
    with clear_errors("modality"):
        study(settings, quiet=quiet)


def study(o: dict[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """The whole study with these options; writes everything under ``o["out"]`` and returns the results."""
    start = time.perf_counter()
    from modality_mask import experiment, prepare
    from modality_page import Shown, save_all
    from modality_paper import claims
    from modality_study import encode, measure, show, subject, train_heads

    import mmhooks as mm
    from mmhooks.data.cache import cache_dir

    clock = Clock(quiet)
    cache = cache_dir("modality")
    out = Path(o["out"])
    out.mkdir(parents=True, exist_ok=True)
    with clock.bars:
        with clock.step("pairs"):
            pairs = mm.data.pairs(
                o["data"], limit=o["limit"], seed=o["seed"], on_error="skip" if o["skip_bad"] else "raise"
            )
            heldout = settle(pairs, o["data"], o["seed"])
        with clock.step("picture and text embedders"):
            embeddings = judge(pairs, o)
        with clock.step("encoders"):
            clip = encode(
                mm.load(o["model"], pretrained=o["pretrained"]), o["model"], pairs, cache,
                batch=o["batch"], progress=clock.bar,
            )  # fmt: skip
            other = load_declip(o)
            declip = None if other is None else encode(
                other, "DeCLIP", pairs, cache, batch=o["batch"], progress=clock.bar
            )  # fmt: skip
        with clock.step("heads"):
            sae, ncl = (head_source(o[kind], kind, o["model"]) for kind in ("sae", "ncl"))
            trained: list[Any] = [None, None]
            if not (sae and ncl):
                known = set(heldout)
                rows = [i for i in range(len(pairs)) if i not in known]
                trained = train_heads(
                    clip, rows, n=o["features"], epochs=o["epochs"], seed=o["seed"], cache=cache
                )
            sae_head = mm.load_head(sae) if sae else trained[0]
            ncl_head = mm.load_head(ncl) if ncl else trained[1]
            subjects = [subject("CLIP", clip)]
            if declip is not None:
                subjects.append(subject("DeCLIP", declip))
            subjects += [subject("CLIP+NCL", clip, ncl_head), subject("CLIP+SAE", clip, sae_head)]
        models: dict[str, Any] = {}
        shown: list[Shown] = []
        inputs: dict[str, Any] = {}
        under = choose(heldout, o["evaluate"], o["seed"])
        for s in subjects:
            with clock.step(f"measures of {s.name}"):
                models[s.name], mds = measure(
                    s,
                    embeddings,
                    heldout,
                    data=pairs.fingerprint,
                    top_m=o["top_m"],
                    seed=o["seed"],
                    draws=o["draws"],
                )
                shown += show(s, mds, pairs, each=o["each"], seed=o["seed"])
            with clock.step(f"masking {s.name}"):
                bar = clock.bar(f"random masks of {s.name}", 3 * o["draws"])
                if s.encoded.name not in inputs:
                    inputs[s.encoded.name] = prepare(s.encoded.model, pairs, under)
                models[s.name]["masking"] = experiment(
                    s, mds, pairs, under, inputs[s.encoded.name], draws=o["draws"], seed=o["seed"], step=bar
                )
        results: dict[str, Any] = {
            "settings": o,
            "data": about(
                pairs, data=o["data"], model=o["model"], pretrained=o["pretrained"], heldout=len(heldout)
            ),
            "models": models,
        }
        found = claims(models)
        results["claims"] = [vars(c) for c in found]
        results["environment"] = environment(clock, start)
        with clock.step("figures and page"):
            paths = save_all(results, found, shown, out, "CLIP+SAE")
    results["environment"] = environment(clock, start)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    if not quiet:
        report(clock.console, results, found, [out / "results.json", *paths])
    return results


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


def judge(pairs: Any, o: dict[str, Any]) -> dict[str, Any]:
    """Embeddings of the judges (not of the models under study), cached by data and embedder."""
    from mmhooks.analysis.embedders import image_embedder, text_embedder

    texts = text_embedder(o["text_embedder"], progress=not o.get("quiet"))
    images = image_embedder(o["image_embedder"], progress=not o.get("quiet"))
    return {"image": images(pairs), "text": texts(pairs)}


def load_declip(o: dict[str, Any]) -> Any:
    """The DeCLIP model: embedded for mini, else the user's own checkpoint; None where there is none."""
    import mmhooks as mm

    name = o["declip"]
    if name == "auto":
        name = "mini-declip" if o["model"] == "mini" else ""
    if not name:
        return None
    return mm.load(name) if name == "mini-declip" else mm.load(o["model"], pretrained=name)


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


def report(console: Any, results: dict[str, Any], found: Sequence[Any], paths: Sequence[Path]) -> None:
    """The tables and statements on the screen, then where everything lies."""
    from modality_tables import control_table, mask_table, table1, table2
    from rich.table import Table as Grid

    for made in (control_table, table1, table2, mask_table):
        table = made(results)
        grid = Grid(
            title=rich_text(table.caption),
            title_justify="left",
            caption=rich_text(table.note),
            caption_justify="left",
        )
        for i, column in enumerate(table.columns):
            grid.add_column(rich_text(column), justify="left" if i in table.text_columns else "right")
        for row in table.cells():
            lines = (
                "\n".join(p for p in (c.text, c.interval, f"paper {c.paper}" if c.paper else "") if p)
                for c in row
            )
            shown = (f"{line} ≠" if c.differs else line for line, c in zip(lines, row, strict=True))
            grid.add_row(*(rich_text(line, lines=True) for line in shown))
        console.print(grid)
        console.print()
    for claim in found:
        console.print(rich_text(claim.sentence()))
    env = results["environment"]
    console.print()
    console.print(
        rich_text(f"{env['seconds']:.0f} s, {env['peak_memory_gb']:.2f} GB at most, {env['threads']} threads")
    )
    for path in paths:
        console.print(rich_text(f"  {path}"))


if __name__ == "__main__":
    app()
