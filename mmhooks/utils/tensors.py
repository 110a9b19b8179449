"""Safe reading of tensor files from untrusted sources: shapes are compared with the file size before allocation.

Reads safetensors, and torch checkpoints of which only tensors are unpickled. A damaged or foreign file raises an
error with its path, what was expected, what was found, and what to do.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmhooks.errors import DamagedFile, MissingWeights
from mmhooks.utils.faults import first_line

# The globals that a pickled state dict of plain tensors needs.
_PLAIN = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char",
                                          "Byte", "Bool")),
    *(f"torch {str(kind).removeprefix('torch.')}" for kind in (torch.float32, torch.float16, torch.bfloat16,
                                                               torch.float64, torch.int64, torch.int32)),
}  # fmt: skip
_HEADER_LIMIT = 1 << 20


def shapes_of(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, without reading a tensor.

    Raises:
        MissingWeights: no such file. DamagedFile: not a safetensors file, or shorter than its header announces.
    """
    with _opened(Path(path)) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def metadata_of(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        MissingWeights, DamagedFile: as :func:`shapes_of`.
    """
    with _opened(Path(path)) as file:
        return dict(file.metadata() or {})


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        MissingWeights, DamagedFile: as :func:`shapes_of`.

    >>> import tempfile; from pathlib import Path; from safetensors.torch import save_file
    >>> path = Path(tempfile.mkdtemp()) / "w.safetensors"
    >>> save_file({"w": torch.ones(2)}, path); read_safetensors(path)
    {'w': tensor([1., 1.])}
    """
    with _opened(Path(path)) as file:
        # Copies: mapped memory ends the process (SIGBUS) if the file is truncated later.
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping


def read_checkpoint(path: str | Path, *, stand_ins: str | tuple[str, ...] = "") -> dict[str, Any]:
    """The dictionary in a torch checkpoint (``torch.save``); only tensors are unpickled.

    Args:
        stand_ins: a package such as ``"vit_prisma."``, or several, whose objects are read as :class:`StandIn`: attributes only,
            without running any of its code.

    Raises:
        MissingWeights: no such file.
        DamagedFile: not a zip as torch writes it, other pickled Python objects, or tensors larger than the file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingWeights(f"{path} does not exist")
    return _unpickled(path, path.read_bytes(), stand_ins)[0]


def read_headed_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON object in the first line of a file, and the dictionary in the torch checkpoint that follows it.

    Raises:
        MissingWeights, DamagedFile: as :func:`read_checkpoint`, or the first line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingWeights(f"{path} does not exist")
    with path.open("rb") as file:
        line = file.readline(_HEADER_LIMIT)
        try:
            header = json.loads(line)
        except ValueError as error:
            raise DamagedFile(
                f"{path}: expected a JSON object in its first line, got {line[:40]!r}"
            ) from error
        if not isinstance(header, dict):
            raise DamagedFile(f"{path}: expected a JSON object in its first line, got {line[:40]!r}")
        return header, _unpickled(path, file.read(), "")[0]


def is_headed(path: Path) -> bool:
    """Whether a file starts with a JSON object."""
    with path.open("rb") as file:
        return file.read(1) == b"{"


def digest_of(about: Any, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a JSON value and of tensors (name, type, shape, bits); stable across versions.

    >>> digest_of({"k": 4}, {"w": torch.zeros(2)})[:12]
    '740c9dbaf3c3'
    """
    digest = sha256(json.dumps(about, sort_keys=True).encode() + b"\n")
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{json.dumps(name)} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class StandIn:
    """Replaces a pickled object whose class is not imported: holds its attributes only."""


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise MissingWeights(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFile(
            f"{path}: expected a whole safetensors file, got {path.stat().st_size:,} bytes that are not one "
            f"({error}); fetch or write it again"
        ) from error


def _unpickled(
    path: Path, content: bytes, stand_ins: str | tuple[str, ...]
) -> tuple[dict[str, Any], set[str]]:
    names = _globals_of(path, content)
    foreign = {n for n in names - _PLAIN if not (stand_ins and n.startswith(stand_ins))}
    if foreign:
        raise DamagedFile(
            f"{path} cannot be read as plain tensors: it pickles {', '.join(sorted(foreign)[:5])}; a checkpoint that "
            "pickles Python objects is not opened here: load it with its own library and save its state_dict()"
        )
    allowed = [(StandIn, n.replace(" ", ".")) for n in names - _PLAIN]
    try:
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedFile(
            f"{path} cannot be read as plain tensors ({type(error).__name__}: {first_line(error)}); if it is "
            "whole, load it with its own library and save its state_dict()"
        ) from error
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: expected a dictionary of tensors, got a {type(found).__name__}")
    # Tied weights are two names of one storage; more sharing, or strides of zero, would inflate a small file.
    total = sum(t.numel() * t.element_size() for t in _tensors_in(found))
    if total > 2 * len(content) + 4096:
        raise DamagedFile(
            f"{path} has {len(content):,} bytes but announces tensors of {total:,}: views that repeat their storage. "
            "Save contiguous tensors: {k: v.contiguous() for k, v in state.items()}"
        )
    return dict(found), names


def _globals_of(path: Path, content: bytes) -> set[str]:
    """Every global that the pickle inside names; compressed records, whose size could explode, are refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = archive.infolist()
            if any(r.compress_type != zipfile.ZIP_STORED for r in records):
                raise DamagedFile(f"{path} has compressed records, which torch never writes; save it again")
            pickles = [r for r in records if r.filename.endswith("data.pkl")]
            if len(pickles) != 1:
                raise DamagedFile(f"{path}: expected one data.pkl inside, got {len(pickles)}")
            names: set[str] = set()
            for code, argument, _ in pickletools.genops(archive.read(pickles[0])):
                if code.name == "GLOBAL":
                    names.add(str(argument))
                elif code.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                    names.add(f"something by {code.name}")
            return names
    except DamagedFile:
        raise
    except Exception as error:
        raise DamagedFile(
            f"{path} cannot be read as plain tensors: expected a checkpoint as torch.save writes it since 1.6, got "
            f"{len(content):,} bytes beginning {content[:8]!r} ({type(error).__name__}: {error}); load it with its own "
            "library and save its state_dict()"
        ) from error


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors_in(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors_in(v)]
    return []
