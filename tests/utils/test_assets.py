"""What ships is compared with its digest: a changed byte in any file of an embedded model is told, not computed with."""

from __future__ import annotations

import json
import shutil

import pytest

import mmhooks as mm
from mmhooks.errors import DamagedFile, MissingWeights
from mmhooks.models.embedded import mini
from mmhooks.utils import assets
from mmhooks.utils.assets import ASSETS, DIGESTS, asset, card, write_digests
from mmhooks.utils.files import sha256_of


def test_the_digests_are_those_of_what_ships() -> None:
    """``write_digests()`` after any change of an asset."""
    found = {p.relative_to(ASSETS).as_posix(): sha256_of(p) for p in ASSETS.glob("*/*") if p.is_file()}
    assert json.loads((ASSETS / DIGESTS).read_text()) == found


def test_a_changed_file_is_refused(tmp_path, monkeypatch) -> None:
    shutil.copytree(ASSETS / "mini", tmp_path / "mini")
    shutil.copy(ASSETS / DIGESTS, tmp_path / DIGESTS)
    for module in (mini, assets):
        monkeypatch.setattr(module, "ASSETS", tmp_path)
    weights = tmp_path / "mini" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(
        DamagedFile, match=r"model\.safetensors is not the file that was shipped.*reinstall mmhooks"
    ):
        mm.load("mini")
    told = tmp_path / "mini" / "card.json"
    told.write_text(told.read_text().replace("0", "1", 1))
    with pytest.raises(DamagedFile, match=r"card\.json is not"):
        card("mini")
    write_digests(tmp_path)
    assert asset(told) == told
    (tmp_path / DIGESTS).write_text("{}")
    told.write_text("{}")
    with pytest.raises(DamagedFile, match="has no digest of card.json"):
        asset(told)
    with pytest.raises(MissingWeights, match="not in this installation"):
        asset(tmp_path / "mini" / "nothing.json")
