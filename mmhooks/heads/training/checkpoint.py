"""Training checkpoints: one safetensors file with the head, Adam's moments and the counters; no pickle.

Batches are a function of the seed and the step (see ``train``), so no generator state is needed: a resumed run ends with
the same bits as an uninterrupted one. A checkpoint contains hashes of what its run started from (settings, starting
weights, every row of the data) and of its own content; a mismatch is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.heads.base import Head
from mmhooks.heads.vectors import Vectors
from mmhooks.heads.weights import load_strictly
from mmhooks.utils.files import atomic_path, make_folder
from mmhooks.utils.tensors import digest_of, metadata_of, read_safetensors

Fingerprint = dict[str, str]
"""Hashes of the parts that determine a training run, by name."""


def save_checkpoint(
    path: Path, head: Head, adam: torch.optim.Optimizer, extra: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Writes the checkpoint atomically, with its own digest."""
    tensors = {f"head.{k}": v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    for name, p in head.named_parameters():
        # Cloned: Adam's step counters may share memory, which safetensors refuses.
        tensors |= {f"adam.{name}.{k}": v.detach().cpu().clone() for k, v in adam.state.get(p, {}).items()}
    tensors |= {f"extra.{k}": v.detach().cpu().contiguous() for k, v in extra.items()}
    text = json.dumps(meta)
    make_folder(path.parent)
    with atomic_path(path) as aside:
        save_file(tensors, aside, metadata={"meta": text, "digest": digest_of(text, tensors)})


def clear_leftovers(path: Path) -> None:
    """Removes temporary files of runs that were killed while writing ``path``."""
    for leftover in path.parent.glob(f".{path.name[:200]}.*.part"):
        leftover.unlink(missing_ok=True)


def load_checkpoint(
    path: Path, head: Head, adam: torch.optim.Optimizer, fingerprint: Fingerprint
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Restores head and optimiser in place; returns the extra tensors and the metadata.

    Raises:
        MMHooksError: the file is damaged, or belongs to another head, data set or setting.
    """
    tensors, meta = _whole(path)
    started = meta["fingerprint"] if isinstance(meta.get("fingerprint"), dict) else {}
    differ = [name for name in fingerprint if started.get(name) != fingerprint[name]]
    if differ:
        raise MMHooksError(
            f"{path} belongs to another training run: it started from other {' and other '.join(differ)}; choose another "
            "path, or delete it to start over"
        )
    groups: dict[str, dict[str, Tensor]] = {"head": {}, "adam": {}, "extra": {}}
    for key, value in tensors.items():
        group, name = key.split(".", 1)
        groups[group][name] = value
    load_strictly(head, groups["head"], str(path))
    for name, p in head.named_parameters():
        moments = {
            k.removeprefix(f"{name}."): v for k, v in groups["adam"].items() if k.startswith(f"{name}.")
        }
        if moments:
            adam.state[p] = {k: v.to(p.device) if k != "step" else v for k, v in moments.items()}
    return groups["extra"], meta


def _whole(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a checkpoint, after verifying its digest."""
    try:
        tensors, kept = read_safetensors(path), metadata_of(path)
    except MMHooksError as error:
        raise DamagedFile(
            f"{path} is not a checkpoint of a head's training ({error}); delete it to start over"
        ) from error
    if not {"meta", "digest"} <= kept.keys():
        found = (
            "a checkpoint from before digests were stored" if "meta" in kept else "another safetensors file"
        )
        raise DamagedFile(
            f"{path} is not a checkpoint of a head's training: got {found}; delete it to start over, or finish the run "
            "with the version of mmhooks that began it"
        )
    if digest_of(kept["meta"], tensors) != kept["digest"]:
        raise DamagedFile(
            f"{path} is damaged: its content does not match its digest; delete it to start over, or restore a copy"
        )
    return tensors, json.loads(kept["meta"])


def fingerprint(settings: Mapping[str, Any], head: Head, data: Mapping[str, str]) -> Fingerprint:
    """Hashes of JSON settings, of the weights that training starts from, and those of its data."""
    trained = {name: p.requires_grad for name, p in head.named_parameters()}
    weights = {name: value for name, value in head.state_dict().items()}
    found = {"settings": digest_of(dict(settings), {}), "starting weights": digest_of(trained, weights)}
    return found | dict(data)


def rows_hash(rows: Any, step: int = 16384) -> str:
    """SHA-256 of all rows of a tensor, a stored site or :class:`Vectors`, as stored, read in chunks."""
    source = rows.rows if isinstance(rows, Vectors) else rows
    digest = sha256(f"{len(source)}".encode())
    for begin in range(0, len(source), step):
        part = source[begin : begin + step].detach().to("cpu").contiguous()
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
