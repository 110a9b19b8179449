"""Text labels of attention heads, saved as a small file that other studies read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmhooks.analysis.results import Records, Result
from mmhooks.errors import MMHooksError
from mmhooks.utils.json_files import describe_json, read_json

FORMAT = 1


@dataclass(frozen=True)
class HeadLabels(Result):
    """Ranked texts of a model's attention heads, with the kind of each text if the pool has kinds.

    >>> labels = HeadLabels("mini", {"5.2": ("a red thing", "a beach")}, kinds={"5.2": ("colour", "place")})
    >>> labels.share("place"), labels.of_kind("place", at_least=0.5)
    ({'5.2': 0.5}, ['5.2'])
    """

    model: str
    texts: Mapping[str, tuple[str, ...]]
    kinds: Mapping[str, tuple[str, ...]] | None = None
    pool: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def share(self, *kinds: str, top: int | None = None) -> dict[str, float]:
        """Computes, per head, the share of its first ``top`` texts that is of one of these kinds.

        Raises:
            MMHooksError: the labels have no kinds, or none of these names.
        """
        if self.kinds is None:
            raise MMHooksError(
                f"expected labels with kinds, got those of {self.model} with the pool {self.pool!r}, which has no kinds"
            )
        known = {k for own in self.kinds.values() for k in own}
        if not known.intersection(kinds):
            raise MMHooksError(f"kinds: expected one of {', '.join(sorted(known))}, got {', '.join(kinds)}")
        return {
            head: sum(k in kinds for k in own[:top]) / max(len(own[:top]), 1)
            for head, own in self.kinds.items()
        }

    def of_kind(self, *kinds: str, at_least: float = 0.5, top: int | None = None) -> list[str]:
        """Lists the heads with at least this share of their first ``top`` texts of these kinds, largest share first."""
        shares = self.share(*kinds, top=top)
        return sorted((h for h, s in shares.items() if s >= at_least), key=lambda h: -shares[h])

    def table(self, top: int = 5) -> Records:
        rows = Records()
        for head, texts in self.texts.items():
            row = {"head": head, "texts": "; ".join(texts[:top])}
            if self.kinds is not None:
                common = Counter(self.kinds[head]).most_common(1)
                row["kind"] = f"{common[0][0]} {common[0][1]}/{len(texts)}" if common else ""
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **super().to_json()}

    @classmethod
    def load(cls, path: str | Path) -> HeadLabels:
        """Reads labels written by :meth:`save`.

        Raises:
            MMHooksError: the file is damaged or of another kind; names it, what was expected and what it holds.
        """
        what, remedy = f"a file of head labels of format {FORMAT}", "write it again with labels.save(path)"
        fields = {"kind": str, "format": int, "model": str, "texts": dict, "kinds": (dict, type(None)), "pool": str,
                  "info": dict}  # fmt: skip
        content = read_json(path, what, fields, remedy=remedy, error=MMHooksError)
        if content["kind"] != "HeadLabels" or content["format"] > FORMAT:
            raise MMHooksError(
                f"{path} is not {what}: got kind {content['kind']!r}, format {content['format']}; {remedy}"
            )
        texts, kinds = content["texts"], content["kinds"]
        for name, lists in (("texts", texts), ("kinds", kinds or {})):
            for head, listed in lists.items():
                if not isinstance(listed, list) or not all(isinstance(t, str) for t in listed):
                    raise MMHooksError(
                        f"{path} is not {what}: expected a list of texts as {name!r} of {head!r}, got "
                        f"{describe_json(listed)}; {remedy}"
                    )
        if kinds is not None and kinds.keys() != texts.keys():
            raise MMHooksError(
                f"{path} is not {what}: expected kinds of the same {len(texts)} heads, got {len(kinds)}; {remedy}"
            )
        return cls(
            model=content["model"],
            texts={h: tuple(t) for h, t in texts.items()},
            kinds=None if kinds is None else {h: tuple(k) for h, k in kinds.items()},
            pool=content["pool"],
            info=content["info"],
        )
