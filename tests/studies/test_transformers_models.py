"""Every study end to end on tiny checkpoints of transformers' CLIP and SigLIP, by the option that a user gives."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_transformers as tiny
from PIL import Image

from mmhooks.studies import adversarial, decomposition, gender, modality, segmentation, spurious
from mmhooks.studies.adversarial.options import Options as AdversarialOptions
from mmhooks.studies.decomposition.options import Options as DecompositionOptions
from mmhooks.studies.gender.options import Options as GenderOptions
from mmhooks.studies.modality import study as modality_study
from mmhooks.studies.modality.options import Options as ModalityOptions
from mmhooks.studies.segmentation.options import Options as SegmentationOptions
from mmhooks.studies.spurious.options import Options as SpuriousOptions

from .written_files import written

N = 40
POOL = "# place\na beach\na forest\nthe sea\n# colour\nred things\nblue things\na dark room\n"


# The two differ where an embedding is read out: there each is run, elsewhere one of them.
CLIP, SIGLIP, BOTH = (
    pytest.mark.parametrize("kind", kinds) for kinds in (["clip"], ["siglip"], ["clip", "siglip"])
)


@pytest.fixture(scope="session")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: tiny.checkpoint(root / kind, kind) for kind in ("clip", "siglip")}


@pytest.fixture
def name(kind: str, names: dict[str, str]) -> str:
    return names[kind]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random images with a text and a label each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    with (root / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text", "gender"])
        for i in range(N):
            pixels = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{i:02}.png")
            who = "woman" if i % 2 else "man"
            rows.writerow([f"{i:02}.png", f"a {who} in room {i}", who])
    return f"{root}/"


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pool") / "pool.txt"
    path.write_text(POOL)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMHOOKS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@CLIP
def test_gender(name: str, pairs: str, tmp_path: Path) -> None:
    found = gender.run(
        GenderOptions(
            model=name, data=pairs, labels="column", sae="train", ncl="train", draws=2, features=32, epochs=1, batch=64,
            out=tmp_path / "out", quiet=True,
        )
    )  # fmt: skip
    assert set(found["masking"]) and found["settings"]["model"] == name


@SIGLIP
def test_spurious(name: str, pool: str, tmp_path: Path) -> None:
    options = SpuriousOptions(
        model=name, limit=8, draws=2, direct_draws=5, layers=1, batch=32, splits=1, pool=pool, out=tmp_path / "out", quiet=True
    )  # fmt: skip
    found = written(spurious.run(options))
    assert found["n"]["judge"] == 8 and len(found["decisions"]) == 4


@SIGLIP
def test_segmentation(name: str, tmp_path: Path) -> None:
    options = SegmentationOptions(model=name, limit=8, batch=4, out=tmp_path / "out", quiet=True)
    found = written(segmentation.run(options))
    assert found["n"] == 8 and {"token contributions", "LeGrad"} <= set(found["scores"]["all"])


@BOTH
def test_decomposition(name: str, pairs: str, pool: str, tmp_path: Path) -> None:
    found = decomposition.run(
        DecompositionOptions(
            model=name,
            data=pairs,
            pool=pool,
            evaluate=8,
            layers=1,
            texts=3,
            each=1,
            out=tmp_path / "out",
            quiet=True,
        )
    )
    assert len(found["text_span"]["heads"]) == 4
    pools_by_attention = "siglip" in name  # no neuron's effect is an exact sum there, and the page says so
    assert ("why" in found["neurons"]) == pools_by_attention == (not found["neurons"]["strongest"])
    said = (
        "Not computed. second-order effects: expected an image tower that reads a class token or the average"
    )
    assert all(
        (said in (tmp_path / "out" / f).read_text()) == pools_by_attention
        for f in ("tables.md", "index.html")
    )
    assert sum(r["all"] for r in found["shares"]) == pytest.approx(1, abs=1e-3)


@SIGLIP
def test_adversarial(name: str, tmp_path: Path) -> None:
    found = adversarial.run(
        AdversarialOptions(
            model=name, limit=8, victim=["clip"], head=["raw"], attack_steps=1, steps=1, repeats=1, calibration=4,
            matched=2, cost=2, out=tmp_path / "out", quiet=True,
        )
    )  # fmt: skip
    assert found["victims"]["zero-shot CLIP"]["n"] == 8


@SIGLIP
def test_modality(name: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judges(of: Any, _: Any) -> dict[str, torch.Tensor]:
        drawn = torch.randn(2, len(of), 16, generator=torch.Generator().manual_seed(1)) + 0.5
        return dict(zip(("image", "text"), torch.nn.functional.normalize(drawn, dim=-1), strict=True))

    monkeypatch.setattr(modality_study, "similarity_embeddings", judges)
    found = modality.run(
        ModalityOptions(
            model=name, declip="", data=pairs, sae="train", ncl="train", top_m=5, features=32, epochs=1, draws=2, each=1,
            out=tmp_path / "out", quiet=True,
        )
    )  # fmt: skip
    assert list(found["models"]) == ["CLIP", "CLIP+NCL", "CLIP+SAE"]
