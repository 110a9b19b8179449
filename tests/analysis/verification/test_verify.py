"""The verification kit on tiny checkpoints with stored expectations: it passes what is right and names what is not."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import pipelines
from models import tiny_transformers as tiny
from models.tiny_vlms import VLMS, inputs
from PIL import Image
from typer.testing import CliRunner

import mmhooks as mm
from mmhooks.analysis.verification import published
from mmhooks.analysis.verification.published import published_of
from mmhooks.analysis.verification.site_checks import (
    capture_checks,
    edit_checks,
    groups_of,
    idle_checks,
    some_blocks,
)
from mmhooks.analysis.verification.subject import subject_of
from mmhooks.analysis.verification.verify import Verification
from mmhooks.cli import app
from mmhooks.errors import DataError, MMHooksError

TEXTS = ["a dog", "a cat"]


def png() -> bytes:
    file, rng = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def expected(folder: Path, kind: str) -> list[float]:
    """The model's own logits, by transformers alone."""
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    image = Image.open(io.BytesIO(png()))
    given = processor(text=TEXTS, images=image, padding="max_length", max_length=64, return_tensors="pt")
    given = {name: given[name] for name in ("input_ids", "pixel_values")}
    with torch.no_grad():
        logits = model(**given).logits_per_image[0]
    return (logits.softmax(0) if kind == "clip" else logits).tolist()


def numbers(root: Path, kind: str, values: list[float], models: list[str]) -> Path:
    entry = {
        "models": models, "kind": "probabilities" if kind == "clip" else "logits", "what": "ours", "source": "this test",
        "picture": {"name": "tiny.png", "url": "https://nowhere.example/tiny.png"}, "texts": TEXTS, "values": values,
        "tolerance": 1e-4,
    }  # fmt: skip
    path = root / "numbers.json"
    path.write_text(json.dumps({"published": [entry]}))
    return path


@pytest.fixture(scope="module", params=["clip", "siglip"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path]:
    """A name, its kind, and the file of its numbers."""
    root = tmp_path_factory.mktemp(request.param)
    name = tiny.checkpoint(root / "model", request.param)
    values = expected(root / "model", request.param)
    (root / "tiny.png").write_bytes(png())
    return name, request.param, numbers(root, request.param, values, [name, "mine"])


@pytest.fixture(scope="module")
def report(checkpoint: tuple[str, str, Path]) -> Verification:
    picture = checkpoint[2].with_name("tiny.png")
    return mm.verify(checkpoint[0], published=checkpoint[2], pictures=[picture])


def test_a_checkpoint_passes_and_the_report_says_what_it_is(
    report: Verification, checkpoint: Any, tmp_path: Path
) -> None:
    assert not report.failed and all(check.passed for check in report.checks)
    whats = {check.what for check in report.checks}
    assert whats >= {
        "ours",
        "pattern @ v = z",
        "captured value = what a plain hook sees",
        "nothing stays installed",
    }
    model = mm.load(checkpoint[0])
    edited = {check.place for check in report.checks if check.what == "an edit acts downstream"}
    assert edited == set(model.sites()) == {c.place for c in report.checks if c.what == "a site fires"}
    number = next(check for check in report.checks if check.what == "ours")
    assert number.got == pytest.approx(number.expected, abs=1e-4) and number.note == "this test"
    assert report.model["class"] == type(model.model).__name__ and report.model["dtype"] == "float32"
    assert {"mmhooks", "torch", "transformers", "python"} <= set(report.versions)
    found = json.loads(report.save(tmp_path / "report.json").read_text())
    assert found["verified"] and found["counts"] == {
        "passed": len(report.checks),
        "failed": 0,
        "not checked": 0,
    }
    check = next(c for c in found["checks"] if c["what"] == "pattern @ v = z")
    assert check["got"] <= check["tolerance"] == 2e-5


def test_other_weights_are_told_by_the_number_alone(checkpoint: Any) -> None:
    name, kind, file = checkpoint
    if kind != "clip":
        return  # one is enough
    model = mm.load(name)
    with torch.no_grad():
        for parameter in model.model.vision_model.encoder.layers[0].mlp.parameters():
            parameter.mul_(-1)
    found = mm.verify(model, published=file, fetch=lambda url: png())
    assert [check.what for check in found.failed] == ["ours"]
    number = found.failed[0]
    assert max(abs(a - b) for a, b in zip(number.got, number.expected, strict=True)) > number.tolerance


LIES = {  # a site, the place that it claims, and the checks that must say so
    "image.blocks.1.attn_out": ("mlp", {"resid_pre + attn_out = resid_mid"}),
    "text.blocks.2.resid_post": ("mlp", {"resid_mid + mlp_out = resid_post"}),
    "image.blocks.0.mlp_out": ("layer_norm1", {"resid_mid + mlp_out = resid_post"}),
    "text.blocks.1.ln_1": ("unused", {"a site fires", "an edit acts downstream"}),
}


@pytest.mark.parametrize("site", LIES)
def test_a_site_that_lies_is_named(site: str) -> None:
    model = mm.hook(tiny.clip(), tiny.processor())
    tower, _, n, _ = site.split(".", 3)
    encoder = model.model.vision_model.encoder if tower == "image" else model.model.text_model.encoder
    layer = encoder.layers[int(n)]
    layer.unused = torch.nn.Identity()
    sites = model.places.sites
    sites = type(sites)(model.model, sites.canonical, sites.towers, sites.widths)
    model.places.sites = sites
    place, said = LIES[site]
    sites.canonical[site] = replace(sites.canonical[site], tap=sites.output(getattr(layer, place)))
    subject = subject_of(model)
    group = next(group for group in groups_of(list(sites.canonical)) if site in group)
    checks = [*capture_checks(subject, group), *edit_checks(subject, [site], subject.run())]
    failed = [check for check in checks if check.passed is False]
    assert said <= {check.what for check in failed}
    assert {c.place for c in failed} <= {site, site.rpartition(".")[0]}


def test_hooks_that_change_bits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that is computed anew where its pattern is read: equal but for the last bits."""
    from mmhooks.hooks import intercept

    kept = intercept.attend

    def anew(emit: Any, want: Any, *args: Any, **options: Any) -> Any:
        return kept(emit, want, *args, **{**options, "weights": True})

    monkeypatch.setattr(intercept, "attend", anew)
    subject = subject_of(mm.hook(tiny.clip(), tiny.processor()))
    failed = {check.what for check in idle_checks(subject, subject.run()) if not check.passed}
    assert failed == {"output while all sites are read = plain output"}


def test_a_pipeline() -> None:
    found = mm.verify(mm.hook(pipelines.build("sd1")))
    assert not found.failed and found.inputs["prompt"].endswith("without guidance")
    places = {check.place for check in found.checks if check.what == "an edit acts downstream"}
    assert "text.cond" in places and pipelines.PATTERN in places


@pytest.mark.parametrize("name", ["LLaVA 1.5", "PaliGemma 2", "Qwen2-VL"])
def test_a_vision_language_model(name: str) -> None:
    """Grouped queries, capped scores, an image tower that is left before its last layer."""
    model = mm.hook(VLMS[name]())
    found = mm.verify(model, inputs=inputs(model.model))
    assert not found.failed, found.failed[:3]
    acting = {check.place for check in found.checks if check.what == "an edit acts downstream"}
    leaves = "an edit leaves alone what does not read its site"
    idle = {check.place for check in found.checks if check.what == leaves}
    assert acting | idle == set(model.sites()) and not acting & idle
    last = {site for site in model.sites() if site.startswith(("image.blocks.2.", "image.ln_post"))}
    assert idle == (last if name == "LLaVA 1.5" else set())
    assert {"softmax of q · k = pattern", "resid_mid + mlp_out = resid_post"} <= {
        check.what for check in found.checks if check.place.startswith("lm.")
    }


@pytest.mark.parametrize("fault", [OSError("no route to host"), None])
def test_a_picture_that_cannot_be_had_is_said_and_no_failure(
    checkpoint: Any, fault: Exception | None, tmp_path: Path
) -> None:
    def fetch(url: str) -> bytes:
        if fault is not None:
            raise fault
        return b"not a picture"

    known = published_of("mine", checkpoint[2])
    (check,) = published.published_checks(mm.load(checkpoint[0]), known, (), fetch)
    assert check.passed is None and "give --picture .../tiny.png" in check.note
    wrong = replace(known[0], picture={**known[0].picture, "sha256": "0" * 64})
    (check,) = published.published_checks(mm.load(checkpoint[0]), [wrong], (), lambda url: png())
    assert check.passed is None and "expected the picture with SHA-256 000" in check.note
    with pytest.raises(
        DataError, match=r"named as a published picture of this model \(tiny.png\), got 'other.png'"
    ):
        published.published_checks(mm.load(checkpoint[0]), known, ["other.png"], fetch)


def test_no_number_is_made_up() -> None:
    assert published_of("hf:llava-hf/llava-1.5-7b-hf") == [] and published_of("mini") == []
    (check,) = published.published_checks(None, [], (), lambda url: b"")
    assert check.passed is None and check.note == "no published number known"
    for name in ("ViT-B-32/openai", "hf:openai/clip-vit-base-patch32"):
        assert published_of(name)[0].values == [0.9927937, 0.00421068, 0.00299572]


def test_what_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(MMHooksError, match="verify: expected a dual encoder, .* got HookedModel"):
        mm.verify(mm.HookedModel(torch.nn.Linear(2, 2)))
    with pytest.raises(MMHooksError, match=r"expected inputs=\{'audio': a tensor"):
        mm.verify(mm.hook(tiny.clap()))
    (tmp_path / "bad.json").write_text('{"published": [{"models": []}]}')
    with pytest.raises(DataError, match=r"expected 'kind' in it.*docs/verify.md"):
        published_of("mini", tmp_path / "bad.json")


def test_blocks_whose_sites_are_edited() -> None:
    groups = [["image.embed"], *([f"image.blocks.{n}.z"] for n in range(5)), ["text.blocks.0.z"]]
    assert some_blocks(groups) == [groups[0], groups[1], groups[3], groups[5], groups[6]]


def test_the_command(
    checkpoint: Any, report: Verification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, file = checkpoint
    given: dict[str, Any] = {}
    number = next(check for check in report.checks if check.what == "ours")
    wrong = replace(report, checks=[*report.checks, replace(number, passed=False, got=[9.0, -9.0])])
    for found, status, said in ((report, 0, "0 failed"), (wrong, 1, "failed: ours at tiny.png")):
        monkeypatch.setattr(
            mm, "verify", lambda name, found=found, **options: given.update(options, name=name) or found
        )
        options = [
            "verify",
            name,
            "--out",
            str(tmp_path / "a.json"),
            "--published",
            str(file),
            "--picture",
            "x/tiny.png",
        ]
        done = CliRunner().invoke(app, options)
        assert done.exit_code == status and said in done.output, done.output
        assert json.loads((tmp_path / "a.json").read_text())["verified"] == (status == 0)
    assert given["name"] == name and given["published"] == file and given["pictures"] == [Path("x/tiny.png")]
    assert (
        "mmhooks verify hf:openai/clip-vit-base-patch32"
        in CliRunner().invoke(app, ["verify", "--help"]).output
    )
