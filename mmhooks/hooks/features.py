"""Feature sets: named selections of a head's features with their provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.errors import MMHooksError, OutOfRange, ShapeMismatch, WrongHead
from mmhooks.utils.files import write_text
from mmhooks.utils.indexing import as_choice, as_indices, like_a_mask, refuse_mask_of_numbers

FORMAT = 1


class FeatureSet:
    """An immutable, named set of features of one head; ``| & -`` and ``~`` create new sets.

    Args:
        indices: feature indices in ``0 .. n_features - 1``, in any order, repeats allowed, or a bool mask of length
            ``n_features``; a tensor, an array or any iterable. Features are unordered, so ``-1`` is refused.
        n_features: the number of features of the head.
        name: the set's name in tables and messages.
        head: id of the head it was computed for; ``""`` fits any head of that width.
        info: JSON values on its provenance (thresholds, data fingerprint); not part of its identity.

    Raises:
        ShapeMismatch: an index outside the head, a mask of another length, or floats (a mask is bool).
        WrongHead: (set algebra, :meth:`check`) two different heads.

    >>> imgd = FeatureSet([3, 1], 8, name="ImgD"); textd = FeatureSet([3, 5], 8, name="TextD")
    >>> imgd | textd, list(~imgd & textd)
    (FeatureSet('ImgD|TextD', 3 of 8), [5])
    """

    __slots__ = ("_indices", "_members", "head", "info", "n_features", "name")

    name: str
    head: str
    n_features: int
    info: Mapping[str, Any]

    def __init__(
        self,
        indices: Any,
        n_features: int,
        *,
        name: str = "",
        head: str = "",
        info: Mapping[str, Any] | None = None,
    ) -> None:
        if n_features < 1:
            raise ShapeMismatch(f"FeatureSet: expected n_features >= 1, got {n_features}")
        choice = as_choice(indices, "features")
        refuse_mask_of_numbers(like_a_mask(choice), n_features, "features")
        if choice.dtype == torch.bool:
            members = tuple(as_indices(choice, n_features, "features").tolist())
        else:
            members = tuple(choice.unique().tolist())
        if members and not 0 <= members[0] <= members[-1] < n_features:
            bad = members[0] if members[0] < 0 else members[-1]
            raise OutOfRange(f"feature {bad} is outside 0..{n_features - 1} (n_features = {n_features})")
        put = object.__setattr__
        put(self, "_members", frozenset(members))
        put(self, "_indices", members)
        put(self, "n_features", int(n_features))
        put(self, "name", name)
        put(self, "head", head)
        put(self, "info", MappingProxyType(dict(info or {})))

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError(f"FeatureSet is immutable: make a new one instead of setting {key!r}")

    __delattr__ = __setattr__  # type: ignore[assignment]

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def indices(self) -> Int[Tensor, " m"]:
        """The features, sorted; a fresh LongTensor each time."""
        return torch.tensor(self._indices, dtype=torch.long)

    @property
    def mask(self) -> Bool[Tensor, " n"]:
        """True at the features of the set; a fresh tensor of length ``n_features`` each time."""
        mask = torch.zeros(self.n_features, dtype=torch.bool)
        mask[self.indices] = True
        return mask

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __contains__(self, feature: object) -> bool:
        """Whether a feature, any whole number, is in the set."""
        if isinstance(feature, Tensor) and feature.numel() == 1:
            feature = feature.item()  # sets compare hashes, and a tensor's is not that of its number
        return feature in self._members

    def __eq__(self, other: object) -> bool:
        """Same features of the same head; name and info do not count."""
        if not isinstance(other, FeatureSet):
            return NotImplemented
        return (self._indices, self.n_features, self.head) == (other._indices, other.n_features, other.head)

    def __hash__(self) -> int:
        return hash((self._indices, self.n_features, self.head))

    def __repr__(self) -> str:
        return f"FeatureSet({self.name!r}, {len(self)} of {self.n_features})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._indices, self.n_features, self.name, self.head, dict(self.info))

    # -- algebra ---------------------------------------------------------------------------------------

    def __or__(self, other: FeatureSet) -> FeatureSet:
        return self._combine(other, "|", frozenset.union)

    def __and__(self, other: FeatureSet) -> FeatureSet:
        return self._combine(other, "&", frozenset.intersection)

    def __sub__(self, other: FeatureSet) -> FeatureSet:
        return self._combine(other, "-", frozenset.difference)

    def __invert__(self) -> FeatureSet:
        rest = (i for i in range(self.n_features) if i not in self._members)
        return FeatureSet(rest, self.n_features, name=f"~{self.name}", head=self.head, info=self.info)

    def _combine(self, other: FeatureSet, sign: str, operation: Any) -> FeatureSet:
        if not isinstance(other, FeatureSet):
            return NotImplemented
        if self.n_features != other.n_features or (self.head and other.head and self.head != other.head):
            raise WrongHead(
                f"{self!r} of head {self.head or '(any)'} {sign} {other!r} of head {other.head or '(any)'}: "
                "feature sets combine only within one head"
            )
        info = self.info if self.info == other.info else {"left": dict(self.info), "right": dict(other.info)}
        return FeatureSet(
            operation(self._members, other._members),
            self.n_features,
            name=f"{self.name}{sign}{other.name}",
            head=self.head or other.head,
            info=info,
        )

    def sample(self, k: int, seed: int = 0) -> FeatureSet:
        """``k`` random features of the set, reproducible by ``seed``, for size-matched random controls.

        >>> everything = FeatureSet(range(100), 100); group = FeatureSet(range(7), 100, name="ImgD")
        >>> len((everything - group).sample(len(group), seed=0))
        7
        """
        if not 0 <= k <= len(self):
            raise ShapeMismatch(f"cannot sample {k} features from {self!r}: expected k in 0..{len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:k].tolist()
        return FeatureSet(
            (self._indices[i] for i in order),
            self.n_features,
            name=f"{self.name}.sample({k}, seed={seed})",
            head=self.head,
            info={**self.info, "sampled": {"from": self.name, "k": int(k), "seed": int(seed)}},
        )

    def check(self, *, head: str, n_features: int) -> None:
        """Raises :class:`~mmhooks.errors.WrongHead` unless the set belongs to this head."""
        if self.n_features != n_features:
            raise WrongHead(
                f"{self!r} was computed for a head of {self.n_features} features"
                f"{f' ({self.head})' if self.head else ''}, not for {head or 'this one'} of {n_features}; "
                "recompute it from this head's activations"
            )
        if self.head and head and self.head != head:
            raise WrongHead(
                f"{self!r} was computed for head {self.head}, not for {head}; recompute it from this "
                "head's activations, or drop its provenance with FeatureSet(fs.indices, fs.n_features)"
            )

    # -- files -----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Writes the set as JSON, atomically, and returns the path.

        Raises:
            CannotWrite: a full disk, a read-only or missing folder.
        """
        content = {
            "format": FORMAT,
            "kind": "FeatureSet",
            "name": self.name,
            "head": self.head,
            "n_features": self.n_features,
            "indices": list(self._indices),
            "info": dict(self.info),
        }
        return write_text(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> FeatureSet:
        """Reads a set written by :meth:`save`; raises MMHooksError if the file is something else."""
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["kind"] != "FeatureSet" or content["format"] > FORMAT:
                raise KeyError(f"kind {content['kind']!r}, format {content['format']!r}")
            return cls(
                content["indices"],
                content["n_features"],
                name=content["name"],
                head=content["head"],
                info=content["info"],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as fault:
            raise MMHooksError(
                f"{path}: expected a FeatureSet of format {FORMAT}, as FeatureSet.save writes it, got: {fault}"
            ) from fault


def as_feature_set(features: Any, n_features: int, *, head: str = "") -> FeatureSet:
    """``features`` as a set for this head: a FeatureSet after a check, or anything that one can be built from.

    Raises:
        WrongHead: a FeatureSet of another head. ShapeMismatch: as :class:`FeatureSet`.

    >>> as_feature_set([True, False, True], 3)
    FeatureSet('', 2 of 3)
    """
    if isinstance(features, FeatureSet):
        features.check(head=head, n_features=n_features)
        return features
    return FeatureSet(features, n_features, head=head)


def _rebuild(indices: tuple[int, ...], n: int, name: str, head: str, info: dict[str, Any]) -> FeatureSet:
    return FeatureSet(indices, n, name=name, head=head, info=info)
