"""What a mean, a decomposition or another statistic belongs to: it is written with it and asked before it is used."""

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

# A hash reads all weights, so it is kept while no tensor was written to and no module was put in.
_HASHES: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Origin:
    """Where a statistic comes from.

    Attributes:
        tower: "image" or "text".
        normalize: of the unit-norm embedding, or of the raw one.
        model: its name, for messages.
        weights: hash of its weights.
        data: name and fingerprint of the data set; what was given, where it has none. Not compared: means of other
            data than they are used on are the rule.
    """

    tower: str
    normalize: bool
    model: str
    weights: str
    data: str = ""

    def check(self, other: Origin, what: str, against: str) -> None:
        """Raises WrongOrigin unless ``what``, which is of here, may be used with ``against``, which is of ``other``."""
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
                f"{what} do not belong to {against}: they are {'; '.join(faults)}. Compute both from the same model, "
                "tower and normalize="
            )

    def to_metadata(self) -> dict[str, str]:
        """As a safetensors file keeps it."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, about: dict[str, str], path: Any) -> Origin:
        """What :meth:`to_metadata` gave.

        Raises:
            DataError: the file is older than that and does not say what its numbers belong to.
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
    """The origin of what ``model`` gives for ``data``: a data set, a tensor or an iterable of batches."""
    name = model.name or type(model.model).__name__
    return Origin(tower, normalize, name, _weights(model.model), _described(data))


def _weights(module: nn.Module) -> str:
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_inference() for t in tensors):  # these have no version to tell that they were written to
        return weights_hash(module)
    state = (*map(id, module.modules()), *((id(t), t.data_ptr(), t._version) for t in tensors))
    known = _HASHES.get(module)
    if known is None or known[0] != state:
        known = _HASHES[module] = (state, weights_hash(module))
    return known[1]


def _described(data: Any) -> str:
    if isinstance(data, str):
        return data
    if isinstance(data, (Pairs, PairStream)):
        return f"{data.name} {data.fingerprint}"
    if isinstance(data, Tensor):
        return f"a tensor {list(data.shape)}"
    return f"batches from a {type(data).__name__}" if isinstance(data, Iterable) else type(data).__name__
