"""Reads heads in any supported format, which is recognised by the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.heads import base
from mmhooks.heads.base import Head
from mmhooks.heads.formats import (
    dictionary_learning,
    msae,
    overcomplete,
    patchsae,
    prisma,
    saelens,
    saev,
    sparsify,
)
from mmhooks.heads.formats.affine import Options, read_json, read_tensors
from mmhooks.heads.formats.saelens import load_saelens, save_saelens
from mmhooks.utils.tensors import read_checkpoint

__all__ = ["FORMATS", "Options", "load_saelens", "read_head", "save_saelens"]

TENSOR_FILES = (".safetensors", ".pt", ".pth")


class Format(NamedTuple):
    """A file format: its name, its files, whether a path contains it, and its reader."""

    name: str
    files: str
    holds: Callable[[Path], bool]
    read: Callable[[Path, Options], Head]


def read_head(path: str | Path, options: Options | None = None) -> Head:
    """The head at ``path``, a folder or a file of weights, in any of :data:`FORMATS`.

    Raises:
        MissingWeights: nothing there, or no known format; the message lists the files found and the formats.
        MMHooksError: a known format with contents that do not fit.

    >>> import tempfile; from mmhooks.heads import TopKSAE
    >>> sae = TopKSAE(8, 32, 4)
    >>> read_head(save_saelens(sae, tempfile.mkdtemp())).id == read_head(sae.save(tempfile.mkdtemp())).id
    True
    """
    path, options = Path(path), options or Options()
    if not path.exists():
        raise MissingWeights(f"no head at {path}: it does not exist")
    for format in FORMATS:
        if format.holds(path):
            return format.read(path, options)
    found = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
    shown = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
    known = "\n".join(f"  {format.name}: {format.files}" for format in FORMATS)
    inside = [p.name for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
    hint = (
        f"\nIt has subfolders ({', '.join(sorted(inside)[:6])}): is the head in one of them?"
        if inside
        else ""
    )
    raise MissingWeights(
        f"no head in {path}. Found: {shown or 'nothing'}. Supported formats are\n{known}{hint}"
    )


def _config(path: Path) -> dict:
    """``config.json`` of a folder, or beside a file; empty if there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(file) if file.is_file() else {}


def _one_file(path: Path) -> Path | None:
    """A file of tensors: the path itself, or the only one in a folder."""
    if path.is_file():
        return path if path.suffix in TENSOR_FILES else None
    files = [p for p in sorted(path.iterdir()) if p.suffix in TENSOR_FILES]
    return files[0] if len(files) == 1 else None


def _file_fits(fits: Callable[[Path], bool]) -> Callable[[Path], bool]:
    def holds(path: Path) -> bool:
        file = _one_file(path)
        return file is not None and fits(file)

    return holds


def _keys_fit(fits: Callable[[dict], bool]) -> Callable[[Path], bool]:
    return _file_fits(lambda file: fits(read_tensors(file)))


def _is_prismas_own(file: Path) -> bool:
    return file.suffix == ".pt" and prisma.is_whole(read_checkpoint(file, stand_ins=prisma.PACKAGE))


def _is_patchsae(file: Path) -> bool:
    packages = (prisma.PACKAGE, *patchsae.PACKAGES)  # so that the other's files are told, not refused
    return file.suffix == ".pt" and patchsae.fits(read_checkpoint(file, stand_ins=packages))


def _from_file(read: Callable[[Path, Options], Head]) -> Callable[[Path, Options], Head]:
    def of(path: Path, options: Options) -> Head:
        file = _one_file(path)
        assert file is not None
        return read(file, options)

    return of


def _read_own(path: Path, options: Options) -> Head:
    given = {k: v for k, v in vars(options).items() if v is not None}
    if given.keys() - {"name"}:
        raise MMHooksError(
            f"{path}: the format of mmhooks specifies everything itself: expected no "
            f"{', '.join(sorted(given.keys() - {'name'}))}"
        )
    head = base.load_head_dir(path)
    head.name = options.name or head.name
    return head


def _has_files(config: str, weights: str) -> Callable[[Path], bool]:
    return lambda path: (path / config).is_file() and (path / weights).is_file()


FORMATS = (
    Format(
        "mmhooks", "config.json (with a kind) and model.safetensors",
        lambda path: _has_files(base.CONFIG, base.WEIGHTS)(path) and "kind" in _config(path), _read_own,
    ),
    Format("SAELens", "cfg.json and sae_weights.safetensors",
           _has_files(saelens.CONFIG, saelens.WEIGHTS), saelens.read),
    Format("sparsify", "cfg.json and sae.safetensors", _has_files(sparsify.CONFIG, sparsify.WEIGHTS), sparsify.read),
    Format("dictionary_learning", "ae.pt, with config.json or kind=",
           lambda path: _has_files("ae.pt", "ae.pt")(path), dictionary_learning.read),
    Format("ViT-Prisma", "config.json (with activation_fn_str) and one .pt file",
           lambda path: prisma.fits(_config(path)) and (path.suffix == ".pt" or bool(list(path.glob("*.pt")))),
           prisma.read),
    Format("saev", "one .pt file that begins with a JSON header", _file_fits(saev.fits), _from_file(saev.read)),
    Format("PatchSAE", "a .pt file with state_dict and a cfg that names block_layer",
           _file_fits(_is_patchsae), _from_file(patchsae.read)),
    Format("ViT-Prisma checkpoint", "a .pt file of its save_model, with cfg and state_dict",
           _file_fits(_is_prismas_own), _from_file(prisma.read)),
    Format("MSAE", "a .pth file with model, mean_center and scaling_factor, under its published name",
           _keys_fit(msae.fits), _from_file(msae.read)),
    Format("overcomplete", "a file of its state dict (dictionary._weights), with k=, threshold= or kind=",
           _keys_fit(overcomplete.fits), _from_file(overcomplete.read)),
    Format("dictionary_learning state dict", "a file with encoder.weight and decoder.weight, or W_enc and threshold",
           _keys_fit(dictionary_learning.fits), _from_file(dictionary_learning.read)),
)  # fmt: skip
