"""SAELens itself as a witness: it loads what we wrote, we load what it wrote, and the numbers are compared.

Runs in two environments, so that SAELens's side has nothing of ours. This script is run with ours; it starts itself
again with the python of an environment that has ``sae-lens`` (``tests/environments/saelens.py`` has both in one):

    python benchmarks/saelens_witness.py --python /path/to/env-with-sae-lens/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WRITERS = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu")
THEIRS = {
    "topk": {"k": 8},
    "topk, rescaled": {"k": 8, "rescale_acts_by_decoder_norm": True},
    "topk, b_dec not applied": {"k": 8, "apply_b_dec_to_input": False},
    "topk, constant norm": {"k": 8, "normalize_activations": "constant_norm_rescale"},
    "topk, layer norm": {"k": 8, "normalize_activations": "layer_norm"},
    "standard": {},
    "jumprelu": {},
}
TRAINED = {"batchtopk": {"k": 8}, "matryoshka_batchtopk": {"k": 8, "matryoshka_widths": [64, 256]}}
D, N = 64, 256


def ours_writes(folder: Path) -> None:
    """A head of every kind that SAELens can hold, with what it computes on a fixed batch."""
    import mmhooks as mm
    from mmhooks.heads.formats import save_saelens

    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, D, generator=g) * 20 + 1  # raw vectors: heads normalise, and so must SAELens
    make = {
        "topk": lambda: mm.TopKSAE(D, N, 8),
        "batchtopk": lambda: mm.BatchTopKSAE(D, N, 8),
        "matryoshka": lambda: mm.MatryoshkaSAE(D, N, 8),
        "jumprelu": lambda: mm.JumpReLUSAE(D, N, threshold=0.05),
        "relu": lambda: mm.ReLUSAE(D, N),
    }
    for kind in WRITERS:
        head = make[kind]()
        mm.train_head(head, x, x.flip(0), epochs=5, batch_size=100, progress=False)
        with torch.no_grad():
            f = head.encode(x)
            save_saelens(head, folder / "ours" / kind, hook_name="visual.ln_post", model_name="ViT-B-32")
            save_file({"x": x, "f": f, "recon": head(x)}, folder / "ours" / kind / "expected.st")


def theirs(folder: Path) -> None:
    """In the environment of SAELens: computes our heads, and writes heads of its own."""
    from importlib.metadata import version

    import sae_lens
    from sae_lens.registry import get_sae_class, get_sae_training_class

    torch.manual_seed(0)
    report: dict = {"sae-lens": version("sae-lens"), "torch": torch.__version__}
    for kind in WRITERS:
        path = folder / "ours" / kind
        sae = sae_lens.SAE.load_from_disk(path, device="cpu")
        want = load_file(path / "expected.st")
        with torch.no_grad():
            f = sae.encode(want["x"])
            recon = sae.decode(f)
        assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name) == ("visual.ln_post", "ViT-B-32")
        report[kind] = {"architecture": sae.cfg.architecture()} | differences(f, recon, want)
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(1)) * 3
    for name, config in THEIRS.items():
        sae_class, config_class = get_sae_class(name.split(",")[0])
        sae = sae_class(config_class(d_in=D, d_sae=N, **config))
        shake(sae)
        write(sae, x, folder / "theirs" / name)
    for name, config in TRAINED.items():
        sae_class, config_class = get_sae_training_class(name)
        sae = sae_class(config_class(d_in=D, d_sae=N, **config))
        shake(sae)
        with torch.no_grad():
            sae.topk_threshold += 1.5
        path = folder / "theirs" / f"{name}, inference file"
        sae.save_inference_model(str(path))
        write(sae_lens.SAE.load_from_disk(path, device="cpu"), x, path)
    (folder / "report.json").write_text(json.dumps(report))


def differences(f: torch.Tensor, recon: torch.Tensor, want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest differences, and how much there was to differ: mean active features, largest reconstruction."""
    return {
        "recon": float((recon - want["recon"]).abs().max()),
        "features": float((f - want["f"]).abs().max()),
        "active differs": int(((f > 0) != (want["f"] > 0)).sum()),
        "l0": float((want["f"] > 0).float().sum(dim=1).mean()),
        "recon max": float(want["recon"].abs().max()),
    }


def shake(sae: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            noise = torch.randn(p.shape, generator=g) * 0.2
            p.copy_(noise.abs() * 3 if name == "threshold" else p + noise)


def write(sae, x: torch.Tensor, path: Path) -> None:
    with torch.no_grad():
        f = sae.encode(x)
        recon = sae.decode(f)
    sae.save_model(path)
    save_file({"x": x, "f": f.contiguous(), "recon": recon.contiguous()}, path / "expected.st")


def ours_reads(folder: Path) -> dict[str, dict]:
    import mmhooks as mm

    rows = {}
    for path in sorted((folder / "theirs").iterdir()):
        head, want = mm.load_head(path), load_file(path / "expected.st")
        with torch.no_grad():
            f, recon = head.encode(want["x"]), head(want["x"])
        rows[path.name] = {"kind": head.kind} | differences(f, recon, want)
    return rows


def line(name: str, row: dict) -> None:
    print(
        f"| {name} | {row['recon']:.1e} | {row['features']:.1e} | {row['active differs']} | {row['l0']:.1f} "
        f"| {row['recon max']:.2f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, help="python of an environment with sae-lens")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.theirs:
        theirs(args.theirs)
        return 0
    if args.python is None:
        parser.error("--python is needed: an environment with sae-lens")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours_writes(folder)
        subprocess.run([args.python, __file__, "--theirs", str(folder)], check=True)
        report = json.loads((folder / "report.json").read_text())
        read = ours_reads(folder)
    print(f"sae-lens {report.pop('sae-lens')}, torch {report.pop('torch')} there; largest differences")
    print("| written by, read by | recon | features | active differs | mean L0 | largest recon |")
    print("|:--|--:|--:|--:|--:|--:|")
    for kind, row in report.items():
        line(f"mmhooks {kind}, SAELens {row['architecture']}", row)
    for kind, row in read.items():
        line(f"SAELens {kind}, mmhooks {row['kind']}", row)
    worst = max(float(r["recon"]) for r in [*report.values(), *read.values()])
    print("same" if worst < 1e-4 else "DIFFERENT", f"(worst {worst:.1e})")
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
