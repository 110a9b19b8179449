"""The origin of a statistic (model, tower, normalization, data): saved with it, and checked before it is used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream
from mmhooks.errors import DataError, WrongOrigin
from mmhooks.models.clip.model import HookedCLIP
from mmhooks.models.provenance import weights_hash

# A hash reads all weights, so it is cached until a tensor is written to or a module is replaced.
_HASHES: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Origin:
    """Where a statistic was computed.

    Attributes:
        tower: "image" or "text".
        normalize: whether it is of the unit-norm embedding or of the raw one.
        model: its name, for messages.
        weights: hash of its weights.
        data: name and fingerprint of the data set, else a description of the input. Not compared: means are usually
            used on other data than they were computed from.
    """

    tower: str
    normalize: bool
    model: str
    weights: str
    data: str = ""

    def check(self, other: Origin, what: str, against: str) -> None:
        """Raises WrongOrigin unless ``what``, of this origin, may be used with ``against``, of the origin ``other``."""
        faults = []
        if self.tower != other.tower:
            faults.append(f"of the {self.tower} tower, not of the {other.tower} tower")
        if self.normalize != other.normalize:
            kinds = {True: "unit-norm embeddings (normalize=True)", False: "raw embeddings (normalize=False)"}
            faults.append(f"of {kinds[self.normalize]}, not of {kinds[other.normalize]}")
        if self.weights != other.weights:
            faults.append(
                f"of the model {self.model or 'without a name'} with weights {self.weights}, not of "
                f"{other.model or 'one without a name'} with weights {other.weights}"
            )
        if faults:
            raise WrongOrigin(
                f"{what}: expected the origin of {against}, got one that differs: they are {'; '.join(faults)}. Compute "
                "both from the same model, tower and normalize="
            )

    def to_metadata(self) -> dict[str, str]:
        """Converts to safetensors metadata."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, about: dict[str, str], path: Any) -> Origin:
        """The inverse of :meth:`to_metadata`.

        Raises:
            DataError: the file is older and does not say what its numbers belong to.
        """
        missing = [name for name in ("tower", "normalize", "model", "weights", "data") if name not in about]
        if missing:
            raise DataError(
                f"{path} does not say what its numbers belong to (no {', '.join(missing)}): it was written by an older "
                "version; compute it again"
            )
        return cls(
            about["tower"], about["normalize"] == "True", about["model"], about["weights"], about["data"]
        )


def origin_of(model: HookedCLIP, tower: str, normalize: bool, data: Any = "") -> Origin:
    """The origin of a statistic of ``model`` on ``data``: a data set, a tensor or an iterable of batches."""
    name = model.name or type(model.model).__name__
    return Origin(tower, normalize, name, _cached_weights_hash(model.model), _describe_data(data))


def _cached_weights_hash(module: nn.Module) -> str:
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta for t in tensors):  # a model without weights, on which costs are counted
        return "none (meta device)"
    if any(t.is_inference() for t in tensors):  # these have no version counter that shows writes
        return weights_hash(module)
    state = (*map(id, module.modules()), *((id(t), t.data_ptr(), t._version) for t in tensors))
    known = _HASHES.get(module)
    if known is None or known[0] != state:
        known = _HASHES[module] = (state, weights_hash(module))
    return known[1]


def _describe_data(data: Any) -> str:
    if isinstance(data, str):
        return data
    if isinstance(data, (Pairs, PairStream)):
        return f"{data.name} {data.fingerprint}"
    if isinstance(data, Tensor):
        return f"a tensor {list(data.shape)}"
    return f"batches from a {type(data).__name__}" if isinstance(data, Iterable) else type(data).__name__
