"""The ``mmhooks train`` command: trains a head on a store of activations."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.cli.grid import HeadChoice, Kind, read_grid
from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say

# What a head keeps of its store's data, for the card that it is published with.
DATA_FACTS = ("name", "pairs", "licence", "attribution")


class Schedule(StrEnum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Centre(StrEnum):
    pooled = "pooled"
    modality = "modality"


class Start(StrEnum):
    median = "median"
    mean = "mean"
    zero = "zero"


def train(
    store: Annotated[Path, typer.Argument(help="A store of activations, as mmhooks extract writes it.")],
    out: Annotated[
        Path, typer.Option(help="Output folder of the head, its history and its checkpoint.")
    ] = Path("runs/head"),
    kind: Annotated[Kind, typer.Option(help="Kind of head.")] = Kind.topk,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file with a list under heads:, each with any of kind, features, k, seed, sites, lr, normalize, name; "
            "all are trained in one pass, each into a folder of its name."
        ),
    ] = None,
    features: Annotated[int, typer.Option(help="Number of features n.")] = 1024,
    k: Annotated[int, typer.Option("--k", help="Active features per vector (target L0 of jumprelu).")] = 32,
    valid: Annotated[
        Path | None, typer.Option(help="A store of held-out pairs; default: every tenth pair is held out.")
    ] = None,
    sites: Annotated[
        str,
        typer.Option(
            help="Image site and text site, or just one site; of a transcoder, the site read and the site written."
        ),
    ] = "image.embed,text.embed",
    epochs: Annotated[int, typer.Option(help="Passes over the pairs.")] = 60,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per step; default: the objective's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the objective's.")] = None,
    schedule: Annotated[Schedule, typer.Option(help="How the learning rate decays.")] = Schedule.linear,
    warmup: Annotated[
        float, typer.Option(help="Fraction of the steps over which the learning rate rises.")
    ] = 0.05,
    decay: Annotated[float, typer.Option(help="Fraction of the steps over which it decays.")] = 0.5,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs without improvement on held-out pairs.")
    ] = None,
    b_pre: Annotated[Start, typer.Option(help="Initial value of an SAE's pre-bias.")] = Start.median,
    centre: Annotated[
        Centre, typer.Option(help="One centre for both modalities, or one per modality.")
    ] = Centre.pooled,
    resample_every: Annotated[
        int | None, typer.Option(help="Epochs between revivals of dead features.")
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Give vectors unit norm.")] = True,
    precision: Annotated[
        Precision, typer.Option(help="Precision of the large matrix products.")
    ] = Precision.fp32,
    compile: Annotated[bool, typer.Option(help="Use torch.compile.")] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, …; ignored under accelerate, which chooses the device.")
    ] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints inside an epoch.")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.")] = None,
) -> None:
    """Train a sparse head, or several in one pass, on stored activations. Repeat the command to resume an interrupted run.

    Example: mmhooks train runs/acts --features 4096 --k 32 --epochs 40 --out runs/sae

    On several GPUs or processes: accelerate launch --num_processes 2 -m mmhooks.cli train runs/acts --out runs/sae
    """
    from mmhooks.data.store import Store
    from mmhooks.heads.training.processes import Processes
    from mmhooks.heads.training.train import HeadJob, default_objective, train_heads
    from mmhooks.heads.vectors import held_out_pairs

    base = HeadChoice(kind, features, k, seed, sites, lr, normalize)
    with clear_errors():
        chosen = [base] if heads is None else read_grid(heads, base)
        acts = Store(store)
        if valid is None:
            training, held_out = held_out_pairs(acts)
        else:
            training, held_out = acts, Store(valid)
        jobs = []
        for choice in chosen:
            head = _head(choice, acts).to(device)
            objective: Any = default_objective(head)
            if choice.kind not in (Kind.ncl, Kind.transcoder):
                objective.b_pre, objective.centre = b_pre.value, centre.value
                objective.resample_every = resample_every
                objective.target_l0 = float(choice.k) if choice.kind is Kind.jumprelu else None
            jobs.append(
                HeadJob(
                    head,
                    choice.site_names,
                    choice.lr,
                    objective,
                    held_out,
                    out / choice.name / "checkpoint.safetensors",
                )
            )
        results = train_heads(
            jobs, training, epochs=epochs, batch_size=batch_size, schedule=schedule.value, warmup=warmup, decay=decay,
            seed=seed, patience=patience, checkpoint_every=checkpoint_every, precision=precision.value, compile=compile,
            tensorboard=tensorboard,
        )  # fmt: skip
        if Processes.is_first_process():
            for choice, result in zip(chosen, results, strict=True):
                _write(choice, result, held_out, store, out / choice.name)


def _write(choice: HeadChoice, result: Any, held_out: Any, store: Path, out: Path) -> None:
    """Writes a head, its history and figure, and says how it does on held-out pairs."""
    from mmhooks.data.store import Store
    from mmhooks.heads.reconstruction import prediction, reconstruction
    from mmhooks.heads.sae.modality_centres import KEY, by_modality
    from mmhooks.heads.training.feeds import names_in
    from mmhooks.heads.vectors import training_rows
    from mmhooks.report.style import draw
    from mmhooks.report.training import training_figure
    from mmhooks.utils.files import write_bytes, write_text

    head, names = result.head, list(names_in(held_out, choice.site_names))
    apart = [rows if rows is None else rows[:].float() for rows in training_rows(held_out, None, names)]
    if choice.kind is Kind.transcoder:
        read, written = apart
        assert read is not None and written is not None  # trained on both
        rows = {"written": prediction(head, read, written).table()[0]}
    else:
        heads: dict[str, Any] = dict(by_modality(head)) if KEY in head.info else {}
        rows = {
            name: reconstruction(heads.get(name, head), x).table()[0]
            for name, x in zip(("image", "text"), apart, strict=True)
            if x is not None
        }
    told = Store(store).info
    about = {"model": told["model"]["name"], "data": {k: told["data"].get(k) for k in DATA_FACTS}}
    head.info = head.info | about | {"store": str(store), "sites": names, "epochs": result.epochs}
    head.info["held_out"] = rows
    head.save(out)
    content = json.dumps({"held_out": rows, "history": result.history}, indent=1) + "\n"
    write_text(out / "training.json", content)
    figure, _ = draw(lambda palette: training_figure(result.history, palette), alt="training", dark=False)
    write_bytes(out / "training.png", figure.data)
    say(f"{head.id}: {result.epochs} epochs, {result.steps} steps, {result.seconds:.0f} s; in {out}")
    for name, row in rows.items():
        say(
            f"  held out, {name}: n {row['n']}, FVU {row['fvu']:.4f}, cosine {row['cosine']:.4f}, "
            f"L0 {row['l0']:.1f}, dead {row['dead']:.1%}"
        )


def _head(choice: HeadChoice, acts: Any) -> Any:
    """An untrained head of the widths of its sites."""
    from mmhooks import heads
    from mmhooks.heads.training.feeds import names_in

    widths = [acts[name].shape[-1] for name in names_in(acts, choice.site_names)]
    kind, d, d_out, n, k = choice.kind, widths[0], widths[-1], choice.features, choice.k
    seed, normalize = choice.seed, choice.normalize

    if kind is Kind.transcoder:
        return heads.Transcoder(d, n, k, d_out=d_out, seed=seed)
    with_k = {
        Kind.topk: heads.TopKSAE,
        Kind.batchtopk: heads.BatchTopKSAE,
        Kind.matryoshka: heads.MatryoshkaSAE,
        Kind.matching_pursuit: heads.MatchingPursuitSAE,
        Kind.archetypal: heads.ArchetypalSAE,
    }
    if kind in with_k:
        return with_k[kind](d, n, k, seed=seed, normalize_input=normalize)
    make = {
        Kind.jumprelu: heads.JumpReLUSAE,
        Kind.relu: heads.ReLUSAE,
        Kind.gated: heads.GatedSAE,
        Kind.ncl: heads.NCL,
    }[kind]
    return make(d, n, seed=seed, normalize_input=normalize)
