"""Training checkpoints: one safetensors file with the head, Adam's moments and the counters; no pickle.

Batches are a function of the seed and the step (see ``train``), so no generator state is needed: a run that
was killed and resumed from here ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.base import Head, load_strictly


def save_checkpoint(
    path: Path, head: Head, adam: torch.optim.Optimizer, extra: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Writes aside, syncs and renames: the file at ``path`` is always a whole one."""
    tensors = {f"head.{k}": v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    for name, p in head.named_parameters():
        # Copies: Adam's step counters are equal scalars that would otherwise count as shared memory.
        tensors |= {f"adam.{name}.{k}": v.detach().cpu().clone() for k, v in adam.state.get(p, {}).items()}
    tensors |= {f"extra.{k}": v.detach().cpu().contiguous() for k, v in extra.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, aside, metadata={"meta": json.dumps(meta)})
    with aside.open("rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name too must survive a crash of the machine
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def clear_leftovers(path: Path) -> None:
    """Removes what runs that were killed while writing ``path`` left beside it."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def load_checkpoint(
    path: Path, head: Head, adam: torch.optim.Optimizer, fingerprint: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Restores head and optimiser in place; returns the extra tensors and the meta data.

    Raises:
        MMHooksError: the file is broken, or belongs to another head, data set or setting.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["meta"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise MMHooksError(
            f"{path} is no checkpoint of a head's training ({error}); delete it to start anew"
        ) from error
    if meta["fingerprint"] != fingerprint:
        raise MMHooksError(
            f"{path} belongs to another training (other data, head, seed or settings): its fingerprint "
            f"is {meta['fingerprint']}, this run's {fingerprint}; choose another path or delete it"
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


def fingerprint(settings: dict[str, Any], tensors: Iterable[Tensor | None]) -> str:
    """Hash of JSON settings and of up to 4096 rows of each tensor."""
    digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for t in tensors:
        if t is not None:
            rows = t[:: max(1, len(t) // 4096)].detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{tuple(t.shape)}".encode())
            digest.update(rows.numpy().tobytes())
    return digest.hexdigest()
