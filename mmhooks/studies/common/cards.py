"""Features shown by their top samples: distinct samples of each side, and cards and strips made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from mmhooks.analysis.measures.top_activating import TopActivating
from mmhooks.report import EncodedImage, FeatureCard, fixed
from mmhooks.report.figures import Strip


@dataclass(frozen=True)
class FeatureExample:
    """One feature with the samples that activate it most."""

    model: str
    feature: int
    group: str
    score: float
    images: int  # how many images and texts activate it at all
    texts: int
    top_images: Sequence[tuple[Image, str]]  # with the text of its pair
    top_texts: Sequence[tuple[str, float]]

    @property
    def title(self) -> str:
        return f"{self.model} · feature {self.feature} · {self.group}"

    @property
    def facts(self) -> str:
        return f"MDS {fixed(self.score, 2)} · active on {self.images:,} images and {self.texts:,} texts"


def strip(s: FeatureExample) -> Strip:
    title = f"{s.group}  ·  feature {s.feature}  ·  MDS {fixed(s.score, 2)}"
    return Strip(title, s.group, [image for image, _ in s.top_images], [text for text, _ in s.top_texts])


def card(s: FeatureExample) -> FeatureCard:
    group: Any = s.group
    return FeatureCard(
        f"Feature {s.feature} · {s.group}",
        group,
        s.facts,
        [EncodedImage.from_pil(image, text) for image, text in s.top_images],
        [(text, fixed(value, 2)) for text, value in s.top_texts],
        "No sample of this modality activates it.",
    )


def format_duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


TOP = 8  # samples of a feature that are shown


def top_rows(best: TopActivating, feature: int, top: int = TOP) -> list[int]:
    """Returns the rows of the samples that activate a feature most, at most ``top``."""
    return best.indices[feature, : min(int(best.count[feature]), top)].tolist()


def distinct_top_texts(
    best: TopActivating, feature: int, texts: Sequence[str], top: int = TOP
) -> list[tuple[int, float]]:
    """Returns row and activation of the top texts, without repeated texts."""
    seen: dict[str, tuple[int, float]] = {}
    for i, value in zip(top_rows(best, feature, top), best.values[feature].tolist(), strict=False):
        seen.setdefault(texts[i], (i, value))
    return list(seen.values())
