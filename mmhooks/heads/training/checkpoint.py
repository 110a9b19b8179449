"""Training checkpoints: one safetensors file with the head, Adam's moments and the counters; no pickle.

Batches are a function of the seed and the step (see ``train``), so no generator state is needed: a run that
was killed and resumed from here ends with the same bits as one that was not. A checkpoint knows by hashes what its
run started from (settings, starting weights, every row of the data) and its own content: what differs is refused.
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
from mmhooks.utils.files import make_folder, written_aside
from mmhooks.utils.tensors import digest_of, metadata_of, read_safetensors

Fingerprint = dict[str, str]
"""What decides a training, each part by its hash."""


def save_checkpoint(
    path: Path, head: Head, adam: torch.optim.Optimizer, extra: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Writes aside, syncs and renames: the file at ``path`` is always a whole one, with its own digest."""
    tensors = {f"head.{k}": v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    for name, p in head.named_parameters():
        # Copies: Adam's step counters are equal scalars that would otherwise count as shared memory.
        tensors |= {f"adam.{name}.{k}": v.detach().cpu().clone() for k, v in adam.state.get(p, {}).items()}
    tensors |= {f"extra.{k}": v.detach().cpu().contiguous() for k, v in extra.items()}
    text = json.dumps(meta)
    make_folder(path.parent)
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata={"meta": text, "digest": digest_of(text, tensors)})


def clear_leftovers(path: Path) -> None:
    """Removes what runs that were killed while writing ``path`` left beside it."""
    for leftover in path.parent.glob(f".{path.name[:200]}.*.part"):
        leftover.unlink(missing_ok=True)


def load_checkpoint(
    path: Path, head: Head, adam: torch.optim.Optimizer, fingerprint: Fingerprint
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Restores head and optimiser in place; returns the extra tensors and the meta data.

    Raises:
        MMHooksError: the file is broken, or belongs to another head, data set or setting.
    """
    tensors, meta = _whole(path)
    started = meta["fingerprint"] if isinstance(meta.get("fingerprint"), dict) else {}
    differ = [name for name in fingerprint if started.get(name) != fingerprint[name]]
    if differ:
        raise MMHooksError(
            f"{path} belongs to another training: it started from other {' and other '.join(differ)}; choose another "
            "path, or delete it to start anew"
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
    """Tensors and meta data of a checkpoint whose content is what was written."""
    try:
        tensors, kept = read_safetensors(path), metadata_of(path)
    except MMHooksError as error:
        raise DamagedFile(
            f"{path} is no checkpoint of a head's training ({error}); delete it to start anew"
        ) from error
    if not {"meta", "digest"} <= kept.keys():
        found = "a checkpoint of before digests were kept" if "meta" in kept else "another safetensors file"
        raise DamagedFile(
            f"{path} is no checkpoint of a head's training: got {found}; delete it to start anew, or finish the run "
            "with the mmhooks that began it"
        )
    if digest_of(kept["meta"], tensors) != kept["digest"]:
        raise DamagedFile(
            f"{path} is no checkpoint that was written whole: its content is not what its digest says; delete it to "
            "start anew, or bring back a copy"
        )
    return tensors, json.loads(kept["meta"])


def fingerprint(
    settings: Mapping[str, Any], head: Head, data: Mapping[str, Vectors | Tensor | None]
) -> Fingerprint:
    """Hashes of JSON settings, of the weights that a training starts from, and of every row of its data."""
    trained = {name: p.requires_grad for name, p in head.named_parameters()}
    weights = {name: value for name, value in head.state_dict().items()}
    found = {"settings": digest_of(dict(settings), {}), "starting weights": digest_of(trained, weights)}
    return found | {name: rows_hash(rows) for name, rows in data.items() if rows is not None}


def rows_hash(rows: Any, step: int = 16384) -> str:
    """SHA-256 of every row of a tensor, a stored site or :class:`Vectors`, as it is kept, a few at a time."""
    source = rows.rows if isinstance(rows, Vectors) else rows
    digest = sha256(f"{len(source)}".encode())
    for begin in range(0, len(source), step):
        part = source[begin : begin + step].detach().to("cpu").contiguous()
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
