"""What attention heads of CLIP's image encoder say: the tables and pictures of the text-based decomposition.

Head texts of the last layers (TextSpan), how far they hold over other pictures, what the embedding loses without
components, top pictures and nearest neighbours by single heads, neurons through later heads, pictures in texts.

    python recipes/decomposition.py --out runs/decomposition
    python recipes/decomposition.py --model ViT-B-32 --pretrained openai --data coco --limit 5000 --pool imagenet
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.cli.clear_errors import clear_errors
from mmhooks.utils.escape import rich_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="mini, or any open_clip name with a ViT.")] = "mini",
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip's tag, or a checkpoint file; none: random weights.")
    ] = None,
    data: Annotated[str, typer.Option(help="mini, a folder/ with metadata.csv, coco, cc3m, …")] = "mini",
    pool: Annotated[
        str, typer.Option(help="Texts: general, imagenet, mini, or a file, one a line.")
    ] = "general",
    out: Annotated[Path, typer.Option(help="Where results, tables, figures and index.html go.")] = Path(
        "runs/decomposition"
    ),
    limit: Annotated[int, typer.Option(min=8, help="Use at most so many pairs.")] = 2000,
    layers: Annotated[int, typer.Option(min=1, help="Attention heads of the last so many layers.")] = 4,
    texts: Annotated[int, typer.Option(min=1, help="Texts an attention head.")] = 20,
    evaluate: Annotated[
        int, typer.Option(min=2, help="At most so many held-out pictures in accuracies.")
    ] = 400,
    each: Annotated[int, typer.Option(min=1, help="Attention heads, queries and neurons shown.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Of splits, subsets, and the pictures shown.")] = 0,
    live: Annotated[
        bool, typer.Option("--live/--direct", help="Also ablate live, not direct effects alone.")
    ] = True,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip unreadable pictures and count them.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars, no tables on the screen.")] = False,
) -> None:
    """ "Interpreting CLIP's Image Representation via Text-Based Decomposition", on your model and pictures."""
    settings = {k: (str(v) if isinstance(v, Path) else v) for k, v in locals().items() if k != "quiet"}
    settings["command"] = shlex.join(["python", "recipes/decomposition.py", *sys.argv[1:]])
    with clear_errors("decomposition"):
        study(settings, quiet=quiet)


def study(o: dict[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """The whole study with these options; writes everything under ``o["out"]`` and returns the results."""
    start = time.perf_counter()
    import torch
    from decomposition_page import save_all, tables
    from modality import Clock, about, choose, environment, settle

    import mmhooks as mm
    from mmhooks.analysis.ablate import ablation_sites, ablations, paper_parts, site_means
    from mmhooks.analysis.embed_texts import embed_texts
    from mmhooks.analysis.results import plain
    from mmhooks.analysis.second_order import second_order
    from mmhooks.analysis.span_accuracy import reconstruction_accuracy
    from mmhooks.analysis.span_overlap import subset_overlap

    torch.manual_seed(o["seed"])
    clock, out = Clock(quiet), Path(o["out"])
    out.mkdir(parents=True, exist_ok=True)
    with clock.bars, torch.no_grad():
        with clock.step("pairs"):
            pairs = mm.data.pairs(
                o["data"], limit=o["limit"], seed=o["seed"], on_error="skip" if o["skip_bad"] else "raise"
            )
            held = choose(settle(pairs, o["data"], o["seed"]), o["evaluate"], o["seed"])
            seen = [i for i in range(len(pairs)) if i not in set(held)]
        with clock.step("texts"):
            model = mm.load(o["model"], pretrained=o["pretrained"])
            pool = mm.data.text_pool(o["pool"])
            pool_embeddings = embed_texts(model, pool.texts)
            names = sorted({pairs.texts[i] for i in held})
            classes = embed_texts(model, names)
            labels = torch.tensor([names.index(pairs.texts[i]) for i in held])
        with clock.step("direct contributions"):
            means = mm.decompose(
                model, pairs.select(choose(seen, 1000, o["seed"])), batch_size=o["batch"], progress=not quiet
            )
            depth, n_heads = means.heads.shape[:2]
            last = list(range(max(0, depth - o["layers"]), depth))
            outputs, embeddings = contributions(model, pairs, last, o["batch"], quiet)
        heads = [f"{layer}.{head}" for layer in last for head in range(n_heads)]
        with clock.step("texts of attention heads"):
            k = min(o["texts"], len(pool))
            span = mm.text_span(outputs[seen], pool_embeddings, pool.texts, n_texts=k, heads=heads)
            span.save(out / "text_span.json")
            head_labels = span.labels(model=model.name, pool=pool.name, kinds=pool.kinds)
            head_labels.save(out / "head_labels.json")
            overlap = subset_overlap(
                outputs[seen], pool_embeddings, pool.texts, n_texts=k, seed=o["seed"], heads=heads
            )
            captions = embed_texts(model, [pairs.texts[i] for i in held])
            meant = agreement(span, outputs[held], captions, pool_embeddings, o["seed"])
        with clock.step("attention heads rebuilt from texts"):
            counts = sorted({0, 1, 2, 5, 10, k})
            rest = embeddings - outputs.sum(1)
            constant = rest[seen].mean(0).expand(len(held), -1)
            rebuilt = {
                "everything else kept": reconstruction_accuracy(
                    span, outputs[held], rest[held], classes, labels, n_texts=counts
                ),
                "everything else at its mean": reconstruction_accuracy(
                    span, outputs[held], constant, classes, labels, n_texts=counts
                ),
            }
        with clock.step("ablations"):
            pixels = torch.stack([model.preprocess(pairs.image(i)) for i in held])  # type: ignore[misc]
            parts = paper_parts(depth, n_heads, last=len(last))
            live = None
            if o["live"]:
                sites = sorted({s for p in parts if not p.initial for s in ablation_sites(p)})
                some = choose(seen, 256, o["seed"])
                live = site_means(model, pairs.select(some), sites, batch_size=o["batch"])
            ablated = ablations(
                model, pixels, labels, classes, means, parts, live_means=live, batch_size=o["batch"]
            )
        with clock.step("neurons"):
            layer = max(0, depth - 3)
            some = choose(seen, 512, o["seed"])
            neurons = second_order(model, pairs.select(some), layer=layer, batch_size=o["batch"])
            strong = neurons.strongest(o["each"])
            told = mm.sparse_text_code(
                neurons.direction[strong], pool_embeddings, pool.texts,
                mean=torch.zeros(neurons.direction.shape[1]), penalty=0.1,
            )  # fmt: skip
        with clock.step("pictures in texts"):
            code = mm.sparse_text_code(embeddings, pool_embeddings, pool.texts, penalty=0.15)
        results: dict[str, Any] = {
            "settings": o,
            "data": {
                **about(
                    pairs, data=o["data"], model=o["model"], pretrained=o["pretrained"], heldout=len(held)
                ),
                "seen": len(seen),
                "classes": len(names),
                "pool": pool.name,
                "pool_size": len(pool),
            },
            "shares": plain_shares(means),
            "text_span": span.to_json(),
            "labels": head_labels.to_json(),
            "agreement": meant,
            "overlap": overlap.to_json(),
            "rebuilt": {name: found.to_json() for name, found in rebuilt.items()},
            "ablations": ablated.to_json(),
            "neurons": {
                **{
                    key: v
                    for key, v in neurons.to_json().items()
                    if key in ("layer", "n_samples", "reference")
                },
                "mean_rank1": float(neurons.explained.nanmean()),
                "strongest": [
                    {
                        "neuron": neurons.neurons[i],
                        "size": float(neurons.size[i]) / neurons.reference,
                        "rank1": float(neurons.explained[i]),
                        "texts": told.top(j, 6),
                        "cosine": float(told.cosine[j]),
                        "top": [some[t] for t in neurons.top[i].tolist() if t >= 0],
                    }
                    for j, i in enumerate(strong)
                ],
            },
            "code": {"table": list(code.table()), "penalty": code.penalty},
        }
        with clock.step("figures and page"):
            shown = pictures(pairs, span, outputs, embeddings, code, results["neurons"]["strongest"], o)
            results["environment"] = environment(clock, start)
            paths = save_all(results, shown, out)
    results["environment"] = environment(clock, start)
    results = plain(results)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "results.json").write_text(text, encoding="utf-8")
    if not quiet:
        for table in tables(results):
            clock.console.print(rich_text(table.markdown(), lines=True))
            clock.console.print()
        clock.console.print(rich_text(f"{results['environment']['seconds']:.0f} s"))
        for path in [out / "results.json", *paths]:
            clock.console.print(rich_text(f"  {path}"))
    return results


def contributions(model: Any, pairs: Any, layers: list[int], batch: int, quiet: bool) -> tuple[Any, Any]:
    """What each attention head of these layers writes, ``[n h e]``, and the embeddings ``[n e]``."""
    import torch

    from mmhooks.analysis.decompose_data import decompositions

    heads, embeddings = [], []
    for parts in decompositions(model, pairs, batch_size=batch, progress=not quiet):
        heads.append(parts.heads[:, layers].flatten(1, 2).cpu())
        embeddings.append(parts.embedding.cpu())
    return torch.cat(heads), torch.cat(embeddings)


def agreement(span: Any, outputs: Any, captions: Any, pool: Any, seed: int, top: int = 5) -> dict[str, Any]:
    """Do texts mean what their directions do? Mean correlation, over a head's first texts, of where held-out pictures
    lie along the text's direction with how alike their captions are to the text; and to random texts of the pool."""
    import torch

    from mmhooks.analysis.intervals import bootstrap
    from mmhooks.analysis.results import correlation

    generator = torch.Generator().manual_seed(seed)
    alike = (captions - captions.mean(0)) @ (pool - pool.mean(0)).T
    own, random = [], []
    for h in range(len(span.heads)):
        along = (outputs[:, h] - span.mean[h]) @ span.bases[h][:top].T
        chosen = span.indices[h][:top]
        other = torch.randint(len(pool), (len(chosen),), generator=generator).tolist()
        for values, texts in ((own, chosen), (random, other)):
            found = [correlation(along[:, k], alike[:, t]) for k, t in enumerate(texts)]
            values.append(sum(found) / len(found) if found else float("nan"))
    return {
        "heads": [None if v != v else v for v in own],
        "own": bootstrap(torch.tensor(own)).__dict__,
        "random": bootstrap(torch.tensor(random)).__dict__,
    }


def plain_shares(means: Any) -> list[dict[str, Any]]:
    return [{**row} for row in means.table()]


def pictures(
    pairs: Any,
    span: Any,
    outputs: Any,
    embeddings: Any,
    code: Any,
    neurons: list[dict[str, Any]],
    o: dict[str, Any],
) -> dict[str, Any]:
    """Strips: top pictures of heads, neighbours by heads, of neurons, and pictures with their texts."""
    import torch
    from torch.nn.functional import normalize

    from mmhooks.report.figures import Strip

    def images(rows: list[int]) -> list[Any]:
        return [pairs.image(i) for i in rows]

    loud = sorted(range(len(span.heads)), key=lambda h: -span.variance[h])[: o["each"]]
    centred = outputs - span.mean
    tops = []
    for h in loud:
        if not len(span.bases[h]):
            continue
        # The first text's direction, turned to where it points.
        along = centred[:, h] @ span.bases[h][0]
        rows = along.topk(min(8, len(along))).indices.tolist()
        tops.append(
            Strip(
                f"Attention head {span.heads[h]}: {span.texts[h][0]}",
                "ImgD",
                images(rows),
                list(span.texts[h][:5]),
            )
        )
    generator = torch.Generator().manual_seed(o["seed"])
    queries = torch.randperm(len(pairs), generator=generator)[: o["each"]].tolist()
    near = []
    for q in queries[:3]:
        spaces = [
            ("whole embedding", embeddings - embeddings.mean(0)),
            *((f"attention head {span.heads[h]}", centred[:, h]) for h in loud[:3]),
        ]
        for name, space in spaces:
            unit = normalize(space, dim=1)
            rows = [i for i in (unit @ unit[q]).topk(min(9, len(unit))).indices.tolist() if i != q][:7]
            near.append(
                Strip(
                    f"{pairs.texts[q]}, by {name}",
                    "CrossD",
                    images([q, *rows]),
                    [pairs.texts[i] for i in rows[:5]],
                )
            )
    acting = [
        Strip(
            f"Neuron {n['neuron']}", "ImgD", images(n["top"]), [f"{w:.2f} {text}" for text, w in n["texts"]]
        )
        for n in neurons
    ]
    told = [
        Strip(pairs.texts[q], "TextD", images([q]), [f"{w:.2f} {text}" for text, w in code.top(q, 5)])
        for q in queries
    ]
    return {"heads": tops, "neighbours": near, "neurons": acting, "texts": told}


if __name__ == "__main__":
    app()
