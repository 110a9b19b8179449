"""Cost of the defence on benign images, which are moved as if they carried an attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmhooks.analysis.attacks.judges import names
from mmhooks.analysis.attacks.pixels import psnr
from mmhooks.analysis.results import plain
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.analysis.statistics.repeated import repeated_difference, repeated_rate
from mmhooks.studies.adversarial.defence import finite_mean
from mmhooks.studies.adversarial.samples import Samples

DESCRIBE = "What is in the picture?"


def untriggered_rows(samples: Samples, most: int) -> list[int]:
    """Returns at most ``most`` samples whose benign image is moved: each image once, evenly over triggers.

    Only samples whose partner is another image: a gradient attack's partner is the benign image itself, so nothing
    would move.
    """
    rows: dict[str, int] = {}
    for i, name in enumerate(samples.base_name):
        if not torch.equal(samples.base[i], samples.partner[i]):
            rows.setdefault(name, i)
    found = list(rows.values())
    count = min(most, len(found))
    return [found[j * len(found) // count] for j in range(count)]


def cost_results(
    victims: Sequence[Any],
    samples: Samples,
    rows: Sequence[int],
    defended: Mapping[str, Tensor],
    embed: Callable[[Sequence[str]], Tensor],
) -> dict[str, Any]:
    """Measures how the victims' descriptions of benign images change under the defence.

    Each condition has the share of answers that name the thing (``named``), the share identical to the answer before
    (``kept``), and their mean cosine with it (``similarity``). ``partner`` is the friendly partner itself, the worst
    that a defence could do; ``another picture`` is the floor: the answer to the next benign image.
    ``against_partner`` is exact match minus the partner's.

    Args:
        rows: samples whose benign image is moved. defended: by defence, their moved images.
        embed: maps texts to unit vectors.
    """
    base, own = samples.base[list(rows)], [samples.base_name[i] for i in rows]
    shown = {"before": base, "partner": samples.partner[list(rows)], **defended}
    out: dict[str, Any] = {}
    for victim in victims:
        said = {c: victim.answer(p, [DESCRIBE] * len(rows)) for c, p in shown.items()}
        said["another picture"] = said["before"][1:] + said["before"][:1]
        known = list(dict.fromkeys(a for answers in said.values() for a in answers))
        place, vectors = {a: i for i, a in enumerate(known)}, embed(known)
        before = vectors[[place[a] for a in said["before"]]]
        kept = {c: torch.tensor([[a == b for a, b in zip(answers, said["before"], strict=True)]])
                for c, answers in said.items()}  # fmt: skip
        out[victim.name] = {
            c: {
                "named": _named(answers, own),
                "kept": plain(repeated_rate(kept[c])),
                "similarity": plain(bootstrap((before * vectors[[place[a] for a in answers]]).sum(1))),
                "against_partner": plain(repeated_difference(kept[c], kept["partner"])),
                "answers": answers[:12],
            }
            for c, answers in said.items()
        }
    return {
        "n": len(rows),
        "victims": out,
        "psnr": {c: finite_mean(psnr(p, base).tolist()) for c, p in shown.items() if c != "before"},
    }


def _named(answers: Sequence[str], own: Sequence[str]) -> dict[str, Any]:
    return plain(repeated_rate(torch.tensor([[names(a, [t]) for a, t in zip(answers, own, strict=True)]])))
