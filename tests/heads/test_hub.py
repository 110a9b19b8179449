"""The Hub against a local stand-in: what is uploaded is what is fetched, and failures say the way out."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.heads import NCL, Head


class LocalHub:
    """Keeps repositories as folders; as much of HfApi and snapshot_download as heads need."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def api(self, token=None):
        return self

    def create_repo(self, repo, *, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))
        (self.root / repo).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message):
        self.calls.append(("upload", repo_id, path_in_repo, commit_message))
        shutil.copytree(folder_path, self.root / repo_id / (path_in_repo or ""), dirs_exist_ok=True)
        return f"hub://{repo_id}/commit/1"

    def snapshot_download(self, repo, *, revision, cache_dir, token, allow_patterns):
        if not (self.root / repo).is_dir():
            raise OSError(f"404 for {repo}")
        out = self.root / "snapshots" / repo
        for file in (self.root / repo).rglob("*"):
            name = file.relative_to(self.root / repo).as_posix()
            if file.is_file() and any(Path(name).match(p) or name == p for p in allow_patterns):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, out / name)
        out.mkdir(parents=True, exist_ok=True)
        return str(out)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> LocalHub:
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.mark.parametrize("format", ["mmhooks", "saelens"])
def test_what_is_pushed_is_what_is_loaded(hub, format) -> None:
    sae = mm.TopKSAE(6, 20, 3)
    sae.info = {"data": "mini | pairs", "fvu": 0.07}
    address = sae.push_to_hub("me/clip-sae", format=format, private=True)
    assert address == "hub://me/clip-sae/commit/1"
    assert hub.calls[0] == ("create", "me/clip-sae", True, True)
    head = mm.load_head("me/clip-sae")
    assert head.id == sae.id and type(head) is mm.TopKSAE
    assert mm.TopKSAE.from_pretrained("me/clip-sae").id == sae.id
    card = (hub.root / "me/clip-sae/README.md").read_text()
    assert ("SAE.load_from_disk(" in card and "sae.encode(x)" in card) == (format == "saelens")
    assert "mini / pairs" in card and sae.id in card and 'mm.load_head("me/clip-sae")' in card


def test_a_card_is_completed_or_says_what_it_lacks(hub) -> None:
    sae = mm.TopKSAE(6, 20, 3)
    with pytest.warns(
        UserWarning, match=r"expected licence, base_model, data of 'me/sae'.*licence=, base_model="
    ):
        sae.push_to_hub("me/sae")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae.push_to_hub("me/sae", licence="mit", base_model="them/clip", data="their pairs")
    text = (hub.root / "me/sae/README.md").read_text()
    assert "license: mit\n" in text and "base_model: them/clip\n" in text and "| data | their pairs |" in text
    assert 'mm.load("hf:them/clip")' in text


def test_several_heads_in_one_repository(hub) -> None:
    sae, ncl = mm.ReLUSAE(6, 20), NCL(6, 20)
    ncl.fit_decoder(torch.randn(50, 6))
    sae.push_to_hub("me/heads", subfolder="sae", dtype="fp32")
    ncl.push_to_hub("me/heads", subfolder="ncl", dtype="fp32")
    assert mm.load_head("me/heads", subfolder="sae").id == sae.id
    back = Head.from_pretrained("me/heads", subfolder="ncl")
    x = torch.randn(4, 6)
    assert back.id == ncl.id and torch.equal(back(x), ncl(x))
    with pytest.raises(MissingWeights, match="'me/heads' contains no 'other'"):
        mm.load_head("me/heads", subfolder="other")


def test_a_foreign_file_of_a_repository_by_its_name(hub) -> None:
    folder = hub.root / "them/clip"
    folder.mkdir(parents=True)
    state = {"encoder.weight": torch.randn(20, 6), "encoder.bias": torch.randn(20)}
    state |= {"decoder.weight": torch.randn(6, 20), "bias": torch.randn(6)}
    torch.save(state, folder / "a.pt")
    torch.save(state, folder / "b.pt")
    head = mm.load_head("them/clip", subfolder="b.pt", name="theirs", normalize_input=True)
    assert head.kind == "relu" and head.name == "theirs" and head.normalize_input
    assert [p.name for p in (hub.root / "snapshots/them/clip").iterdir()] == [
        "b.pt"
    ]  # no more than was asked


def test_from_pretrained_takes_a_folder_and_refuses_another_kind(tmp_path) -> None:
    sae = mm.JumpReLUSAE(6, 20)
    path = sae.save(tmp_path / "h")
    assert mm.JumpReLUSAE.from_pretrained(path).id == sae.id
    with pytest.raises(MMHooksError, match="expected a TopKSAE, got a JumpReLUSAE"):
        mm.TopKSAE.from_pretrained(tmp_path, subfolder="h")


def test_without_network_the_way_out_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        MissingWeights, match=r"'nobody/nothing' could not be downloaded.*path of a local copy"
    ):
        mm.load_head("nobody/nothing", cache_dir=tmp_path)
    with pytest.raises(MMHooksError, match=r"could not be uploaded to the Hub.*token.*head\.save"):
        mm.TopKSAE(6, 20, 3).push_to_hub("nobody/nothing")
    with pytest.raises(MMHooksError, match="owner/name, got 'nothing'"):
        mm.TopKSAE(6, 20, 3).push_to_hub("nothing")


def test_the_uploaded_folder_is_a_head_on_its_own(hub) -> None:
    mm.TopKSAE(6, 20, 3).push_to_hub("me/one")
    meta = json.loads((hub.root / "me/one/config.json").read_text())
    assert meta["kind"] == "topk" and meta["format"] == 1


def test_transcoders_and_crosscoders_are_published_with_the_code_that_attaches_them(hub) -> None:
    head = mm.Transcoder(16, 48, 4, skip=True)
    crosscoder = mm.Crosscoder(16, 48, 4, widths=(6, 10))
    for name, one in (("t", head), ("c", crosscoder)):
        one.push_to_hub(f"me/{name}", dtype="fp32")
        back = mm.load_head(f"me/{name}")
        assert type(back) is type(one) and back.id == one.id
        text = (hub.root / "me" / name / "README.md").read_text()
        assert 'model.attach(head, at=["<the first of its sites>", "<the second>"])' in text
    head.info["sites"] = ["image.blocks.0.ln_2", "image.blocks.0.mlp_out"]
    head.push_to_hub("me/s")
    assert "model.attach(head)\n" in (hub.root / "me" / "s" / "README.md").read_text()
    assert mm.load_head("me/s").sites == head.sites
    with pytest.raises(MMHooksError, match="for which SAELens has no architecture"):
        head.push_to_hub("me/s", format="saelens")
