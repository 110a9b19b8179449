"""Cards of published heads: what they state, where it is from, and that their code runs."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

import mmhooks as mm
from mmhooks.errors import MissingWeights
from mmhooks.heads.card import card_facts, head_card


def card_of(head: mm.Head, repo: str = "me/sae", format: str = "mmhooks", **given: str) -> str:
    return head_card(head, repo, format, None, card_facts(head, **given))


def metadata(text: str) -> dict[str, object]:
    """What the Hub's own reader finds at the top of a card."""
    return huggingface_hub.ModelCard(text).data.to_dict()


def test_an_embedded_head_is_described_in_full() -> None:
    sae = mm.load_head("mini/sae")
    text = card_of(sae)
    assert metadata(text)["license"] == "apache-2.0" and "base_model" not in metadata(text)
    assert text.count("not stated") == 1 and "| site | not stated; the code below names one |" in text
    assert "| base model | mini |" in text and "| seed | 0 |" in text
    # Every source that trained the base model is named, and no other.
    drawings = mm.utils.assets.card("mini")["data"]
    sources = text.split("Sources:")[1].split("## ")[0]
    for d in drawings:
        assert (d["attribution"].split(",")[0] in sources) == (d["trained_on"] > 0), d["source"]
    held = sae.info["held_out"]
    assert f"| fvu_text | {held['fvu_text']:.4g} |" in text and f"| n | {held['n']} |" in text
    assert "variance left unexplained" in text


def test_the_hub_reads_licence_and_base_model() -> None:
    data = metadata(card_of(mm.TopKSAE(6, 20, 3), licence="mit", base_model="them/clip", data="them/pairs"))
    assert (data["license"], data["base_model"], data["library_name"]) == ("mit", "them/clip", "mmhooks")
    data = metadata(card_of(mm.TopKSAE(6, 20, 3), licence="Research only: ask us", format="saelens"))
    assert (data["license"], data["license_name"]) == ("other", "Research only: ask us")
    assert data["library_name"] == "sae_lens"


def test_what_is_stated_nowhere_is_said_to_be_missing() -> None:
    head = mm.TopKSAE(6, 20, 3)
    facts = card_facts(head, data="mine")
    assert facts.missing == ["licence", "base_model"]
    text = card_of(head, data="mine")
    assert "license" not in metadata(text) and "| licence | not stated |" in text
    assert "No measures on held-out data were recorded." in text
    assert 'pretrained="<its tag>"' in text  # no code that would load some other model


def test_a_name_of_a_model_is_no_repository_and_a_folder_is_not_told() -> None:
    head = mm.TopKSAE(6, 20, 3)
    head.info = {"model": "runs/clip", "store": "/somewhere/acts"}
    text = card_of(head)
    assert "base_model" not in metadata(text) and "| base model | runs/clip |" in text and "acts" not in text
    head.info = {"model": "/somewhere/me/clip"}
    assert "| base model | clip |" in card_of(head) and "somewhere" not in card_of(head)
    head.info = {"model": "clip", "base_model": "them/clip"}
    assert metadata(card_of(head))["base_model"] == "them/clip"


def test_data_of_a_store_come_with_licence_and_attribution() -> None:
    head = mm.TopKSAE(6, 20, 3)
    head.info = {
        "data": {"name": "coco", "pairs": 25014, "licence": "CC BY 4.0", "attribution": "COCO 2017"},
        "held_out": {"image": {"head": "x", "n": 12, "fvu": 0.25}, "text": {"n": 12, "cosine": 0.5}},
    }
    text = card_of(head)
    assert "| data | coco, 25,014 pairs |" in text and "- CC BY 4.0\n- COCO 2017\n" in text
    assert "| | held out, image | held out, text |\n|---|--:|--:|\n" in text
    assert "| n | 12 | 12 |\n| fvu | 0.25 | – |\n| cosine | – | 0.5 |\n" in text


def test_text_from_data_stays_text() -> None:
    head = mm.TopKSAE(6, 20, 3)
    head.info = {
        "data": "a | b\n# not a heading\n[x](http://evil.example)",
        "licence": "x\n---\nlibrary_name: evil",
        "model": 'm"); import os; ("',
    }
    text = card_of(head)
    assert metadata(text)["library_name"] == "mmhooks"
    assert not re.search(r"^# not a heading", text, re.M) and "[x](http://evil.example)" not in text
    code = re.search(r"```python\n(.+?)\n```", text, re.S)
    assert code is not None and r'mm.load("m\"); import os; (\"", pretrained=' in code.group(1)


@pytest.mark.parametrize(
    "sites", [[], ["image.blocks.2.resid_post"], ["text.embed"]], ids=["embeddings", "block", "text"]
)
def test_the_code_of_a_card_runs(sites: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 192 if sites and "blocks" in sites[0] else 256
    head = mm.TopKSAE(width, 24, 3, normalize_input=False)
    head.info = {"model": "mini", "sites": sites}
    (tmp_path / "<a folder of images>").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "<a folder of images>" / "image.png")
    saved = head.save(tmp_path / "sae", dtype="fp32")

    def fetched(repo: str, **_: object) -> str:
        if repo != "me/sae":
            raise MissingWeights(repo)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.+?)\n```", card_of(head), re.S)
    assert code is not None
    names: dict[str, object] = {}
    exec(compile(code.group(1), "card", "exec"), names)
    features = names["features"]
    assert features.shape[0] == 1 and features.shape[-1] == 24 and (features != 0).sum(-1).max() == 3
