"""One export from a run on the embedded model, for all tests of the study with people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mmhooks as mm
from mmhooks.studies.common.encode import encode
from mmhooks.studies.common.options import as_settings
from mmhooks.studies.human import source
from mmhooks.studies.human.export import Export, export
from mmhooks.studies.human.options import Options
from mmhooks.studies.modality.options import Options as ModalityOptions
from mmhooks.utils.files import cache_dir

PAIRS = 160


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a modality run, as far as an export reads it, computed here by the public functions."""
    root = tmp_path_factory.mktemp("human")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMHOOKS_CACHE", str(root / "cache"))
        # Drawings carry the name of their family: no embedder is needed to find it.
        patch.setattr(source, "similarity_embeddings", lambda pairs, _: {"image": torch.zeros(len(pairs), 2)})
        pairs = mm.data.pairs("mini", limit=PAIRS, seed=0)
        head = mm.load_head("mini/sae")
        encoded = encode(mm.load("mini"), "mini", pairs, cache_dir("modality"), batch=256, progress=False)
        scores = mm.mds(encoded.store, head=head, image="image.embed", text="text.embed", kind="relu")
        groups = {
            name: {"size": len(group)}
            for name, group in zip(("ImgD", "TextD", "CrossD"), scores.groups, strict=True)
        }
        results = {
            "settings": as_settings(ModalityOptions(limit=PAIRS)) | {"command": "the command"},
            "data": {"fingerprint": str(pairs.fingerprint)},
            "models": {
                "CLIP": {},
                "CLIP+SAE": {
                    "head": head.id, "groups": groups,
                    "mds": {"scores": [None if r != r else round(r, 6) for r in scores.R.tolist()]},
                },
            },
        }  # fmt: skip
        folder = root / "modality"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
        yield folder


@pytest.fixture(scope="package")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export(Options(run=run, out=tmp_path_factory.mktemp("export"), features=5, names=2, lists=4))


@pytest.fixture(scope="package")
def key(exported: Export) -> dict[str, Any]:
    return json.loads(exported.key.read_text())
