"""The gender study end to end: the embedded model, a folder with a label column, a classifier, a full-size model."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import mmhooks as mm
from mmhooks.errors import DataError, MissingWeights
from mmhooks.studies.common.encode import encode
from mmhooks.studies.estimate.plans import stages_of
from mmhooks.studies.gender import data as gender_data
from mmhooks.studies.gender import drawing_styles as gender_styles
from mmhooks.studies.gender import paper as gender_paper
from mmhooks.studies.gender import samples as gender_samples
from mmhooks.studies.gender import study as gender
from mmhooks.studies.gender.masking import MAIN
from mmhooks.studies.gender.page import person_sentence
from mmhooks.studies.gender.person_filter import showing_a_person

from ..tower_counts import counted_towers

EVIL = '<img src=x onerror="alert(1)"> a woman | b $x$'
SMALL = gender.Options(draws=4, features=64, epochs=3, batch=64, quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, towers: dict[str, int]) -> Any:
    """The embedded model on 96 labelled drawings: (results, folder of its files, options)."""
    out = tmp_path_factory.mktemp("gender")
    options = replace(SMALL, limit=96, out=out)
    with counted_towers() as counted:
        found = gender.run(options)
    towers.update(counted)
    return found, out, options


@pytest.fixture(scope="module")
def towers() -> dict[str, int]:
    """What the towers of :func:`run` read."""
    return {}


def test_the_towers_read_no_more_than_the_estimate_says(run: Any, towers: dict[str, int]) -> None:
    """How many samples are judged is known only from the data: a half at the most."""
    results, _, options = run
    planned = stages_of("gender", options)
    judged = results["data"]["judged"]["women"] + results["data"]["judged"]["men"]
    words, implicit, tones = 12, 180, 2
    for unit, texts in (("images", 0), ("texts", words + implicit + tones)):
        read = sum(s.count for s in planned if s.unit == unit)
        # Four settings of at most three groups, 32 samples before and after each; the pairs may lie in the cache.
        assert 4 * judged < towers[unit] - texts <= 96 + 4 * (3 * judged + 64)
        assert towers[unit] <= read


def test_everything_is_written(run: Any) -> None:
    results, out, _ = run
    names = {p.name for p in out.iterdir()}
    assert {"results.json", "tables.md", "index.html", "fig5_share.png", "masking.png"} <= names
    stored = json.loads(
        (out / "results.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON")
    )
    assert stored == results.found
    assert results.paths[0] == out / "results.json" and {p.name for p in results.paths} == names
    page, tables = (out / "index.html").read_text(), (out / "tables.md").read_text()
    for words in (
        "Table 6",
        "Table 7",
        "impossible",
        "random masks, same size",
        "CrossD",
        "unstated gender",
        "who a person is",
    ):
        assert words in page, words
    assert ("Bias audit" in tables and "Differs" in tables) or "Undecided" in tables


def test_judged_samples_were_held_out_and_never_fitted(run: Any) -> None:
    data = run[0]["data"]
    assert (
        data["judged"]["women"] + data["judged"]["men"] + data["fitted"]["women"] + data["fitted"]["men"]
        == 96
    )
    pairs, people = gender_data.load_people(run[2], lambda label, total: lambda done: None)
    fit, judged = gender_data.split(people, 0)
    assert not {s.row for s in fit} & {s.row for s in judged}
    assert all(pairs.splits[s.row] != "train" for s in judged) and all(
        pairs.splits[s.row] == "train" for s in fit
    )


def test_live_masks_equal_those_by_hand(run: Any) -> None:
    assert set(run[0]["live"]) == set(run[0]["masking"])
    for name, live in run[0]["live"].items():
        assert live["by_hand"] < 1e-6, name
        assert live["bit_equal_after"] is True


def test_numbers_hang_together(run: Any) -> None:
    for setting in run[0]["masking"].values():
        for side in ("image", "text"):
            for found in (setting[side][k] for k in ("prompt", "centroid", "probe")):
                base = found["base"]
                for g in found["groups"].values():
                    change = g["probability"]["value"] - base["probability"]["value"]
                    assert g["change"]["difference"]["value"] == pytest.approx(change, abs=1e-9)
                    by = g["by_gender"]
                    n = {w: by[w]["n"] for w in ("woman", "man")}
                    points = sum(n[w] * by[w]["points"]["value"] for w in n) / sum(n.values())
                    assert points == pytest.approx(-100 * change, abs=1e-6)
                    for w in n:
                        p0 = base["by_class"][w]["probability"]["value"]
                        assert by[w]["relative"]["value"] == pytest.approx(
                            by[w]["points"]["value"] / p0, abs=1e-6
                        )
                    assert len(g["random"]["draws"]) == 4 and 0 < g["random"]["p"] <= g["random"]["q"] <= 1
                    assert g["random"]["low"] <= g["random"]["mean"] <= g["random"]["high"]
                contrast = (
                    found["groups"]["ImgD"]["probability"]["value"]
                    - found["groups"]["TextD"]["probability"]["value"]
                )
                assert found["contrast"]["difference"]["value"] == pytest.approx(contrast, abs=1e-9)


def test_texts_are_read_far_above_chance(run: Any) -> None:
    text = run[0]["masking"][MAIN]["text"]
    assert all(text[k]["base"]["accuracy"]["low"] > 0.6 for k in ("prompt", "centroid", "probe"))


def test_the_papers_tables_do_not_fit() -> None:
    images, texts = gender_paper.table_conflicts()
    assert "4.9 lies outside 5.64–17.65" in images and "women to carry 2 %" in images
    assert "7.0 lies outside 7.27–28.67" in texts and "88 %" in texts


def test_codepoints_and_names_agree() -> None:
    pairs = mm.data.pairs("mini")
    people = gender_samples.from_drawings(pairs)
    assert len(people) > 1000
    for s in people:
        name = pairs.texts[s.row]
        if not re.search("claus|mer(maid|man)", name):
            assert gender_samples.gender_of_words(name) == s.label, name
    skin_tone_masking = {s.strata["skin tone"] for s in people}
    assert skin_tone_masking == set(gender_samples.TONES)
    # A family holds both genders and all tones: none of them is split between fitted and judged by a folder's half.
    farmer = {pairs.texts[s.row].split(" ")[0] for s in people if s.family == "farmer"}
    assert {"woman", "man", "farmer"} <= farmer


def test_more_styles_come_from_the_corpus_by_their_names(tmp_path: Path) -> None:
    names = [
        "woman farmer: dark skin tone",
        "Man_Farmer",
        "farmer",
        "red apple",
        "woman running",
        "women wrestling",
    ]
    rows = [
        {"style": style, "name": n, "split": "unseen_style" if style == "twemoji" else "train"}
        for style in ("noto", "twemoji")
        for n in names
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    rgba = torch.randint(0, 255, (len(rows), 8, 8, 4), dtype=torch.uint8)
    save_file({"rgba": rgba}, tmp_path / "rgba.safetensors")
    assert gender_styles.is_corpus(str(tmp_path))
    pairs = gender_styles.style_pairs(str(tmp_path), others=2)
    people = gender_samples.from_drawings(pairs)
    assert len(people) == 8 and len(pairs) == 10
    found = {(pairs.texts[s.row], s.label, s.strata["style"], s.heldout) for s in people}
    assert ("Man_Farmer", 1, "noto", False) in found and ("farmer", None, "twemoji", True) in found
    dark = next(s for s in people if s.label == 0 and s.strata.get("profession"))
    assert dark.strata["skin tone"] == "dark" and dark.family == people[1].family == "farmer"
    at = rows.index({"style": "twemoji", "name": "woman running", "split": "unseen_style"})
    one = next(s.row for s in people if s.heldout and "running" in pairs.texts[s.row])
    assert np.array_equal(np.asarray(pairs.rgba(one)), rgba[at].numpy())


def write_folder(root: Path, n: int = 24, gender_column: str = "gender") -> Path:
    rng = np.random.default_rng(0)
    with (root / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text", gender_column, "age"])
        for i in range(n):
            pixels = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{i:02}.png")
            rows.writerow(
                [
                    f"{i:02}.png",
                    EVIL if i % 4 == 0 else f"portrait {i}",
                    ("Female", "Male")[i % 2],
                    ("young", "old")[i % 3 == 0],
                ]
            )
    return root


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))


def test_a_folder_with_a_label_column(own_cache: None, tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    folder = write_folder(tmp_path / "people")
    results = gender.run(
        replace(
            SMALL, data=f"{folder}/", labels="column", strata="age", sae="train", ncl="none",
            out=tmp_path / "out",
        )
    )  # fmt: skip
    people = results["data"]["people"]
    assert people["women"] == people["men"] == 12
    assert {line["stratum"] for line in results["audit"]} == {"all", "all of age", "young", "old"}
    assert "NCL, latent" not in results["masking"] and results["tones"] is None
    page = (tmp_path / "out" / "index.html").read_text()
    assert "&lt;img src=x onerror=" in page
    assert re.search(r"<img[^>]*onerror=\"", page) is None and "<script" not in page
    assert "<img" not in (tmp_path / "out" / "tables.md").read_text()


def save_classifier(place: Path, classes: list[str], even_on: Any = None) -> Path:
    """A random classifier; with ``even_on`` half of these pairs get the first class, half the second."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        id2label=dict(enumerate(classes)), label2id={c: i for i, c in enumerate(classes)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(40)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    if even_on is not None:
        with torch.no_grad():
            pixels = processor(
                [even_on.image(i) for i in range(len(even_on))], return_tensors="pt"
            ).pixel_values
            logits = model.eval()(pixels).logits
            model.classifier.bias[0] += (logits[:, 1] - logits[:, 0]).median()
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


def test_labels_by_a_classifier_keep_its_confidence(own_cache: None, tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    pairs = mm.data.pairs(write_folder(tmp_path / "people"), progress=False)
    place = save_classifier(tmp_path / "vit", ["women_adult", "men_adult", "girls", "boys", "unisex"])
    people = gender_samples.from_classifier(pairs, str(place), strata=["age"])
    assert len(people) == 24 and {s.strata["age"] for s in people} == {"young", "old"}
    from transformers import pipeline

    answer = {
        a["label"]: a["score"]
        for a in pipeline("image-classification", model=str(place))(pairs.image(0), top_k=5)
    }
    sums = answer["women_adult"] + answer["girls"], answer["men_adult"] + answer["boys"]
    assert people[0].label == int(sums[1] > sums[0])
    assert people[0].confidence == pytest.approx(max(sums), abs=1e-5)
    least = sorted(s.confidence for s in people if s.confidence is not None)[12]
    assert len(gender_samples.from_classifier(pairs, str(place), least=least)) <= 12
    with pytest.raises(DataError, match="classes cat, dog"):
        gender_samples.from_classifier(pairs, str(save_classifier(tmp_path / "pets", ["cat", "dog"])))
    with pytest.raises(MissingWeights, match="local path"):
        gender_samples.from_classifier(pairs, str(tmp_path / "nothing"))


def test_bad_input_is_one_sentence(own_cache: None, tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    folder = write_folder(tmp_path / "people", gender_column="sex")
    args = ["--data", f"{folder}/", "--out", str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(gender.app, args)
    assert result.exit_code == 1 and "no column gender" in result.output and "Traceback" not in result.output
    result = CliRunner().invoke(gender.app, [*args, "--label-column", "age"])
    assert result.exit_code == 1 and "no value of column age is a gender" in result.output
    result = CliRunner().invoke(gender.app, ["--labels", "guess", "--out", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 1 and "got 'guess'" in result.output


def test_help_shows_the_options_and_an_example() -> None:
    result = CliRunner().invoke(gender.app, ["--help"], env={"COLUMNS": "200"})
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for option in (
        "--model",
        "--pretrained",
        "--data",
        "--sae",
        "--ncl",
        "--limit",
        "--seed",
        "--out",
        "--draws",
        "Example:",
    ):
        assert option in plain


@pytest.mark.slow
def test_a_full_size_model_runs(own_cache: None, tmp_path: Path) -> None:
    """ViT-B/32 with random weights through every step; a head is trained on the spot."""
    results = gender.run(replace(SMALL, model="ViT-B-32", limit=8, out=tmp_path / "out"))
    assert results["data"]["people"]["women"] == results["data"]["people"]["men"] == 4
    assert all(live["by_hand"] < 1e-6 and live["bit_equal_after"] for live in results["live"].values())
    assert (tmp_path / "out" / "index.html").exists()


def test_images_without_a_person_are_left_out(tmp_path: Path) -> None:
    """On drawings of one person and of food: the filter keeps more of the former, and counts what it kept."""
    pairs = mm.data.pairs("mini")
    people = gender_samples.from_drawings(pairs)[::20][:40]
    food = [i for i, m in enumerate(pairs.meta) if str(m["codepoints"]).startswith(("1f34", "1f35"))][:40]
    others = [gender_samples.Sample(i, 0) for i in food]
    some = pairs.select([s.row for s in (*people, *others)])
    people, others = (
        [replace(s, row=i + at) for i, s in enumerate(part)] for part, at in ((people, 0), (others, 40))
    )
    model = mm.load("mini")
    encoded = encode(model, "mini", some, tmp_path, batch=64, progress=False)
    scale, template = float(model.logit_scale.detach().exp()), "a drawing of a {}"
    kept, counts = showing_a_person([*people, *others], encoded, 0.1, template, scale)
    left = [sum(s.row < 40 for s in kept), sum(s.row >= 40 for s in kept)]
    assert left[0] > 2 * left[1] and left[0] >= 20
    assert counts is not None and counts["prompts"][0] == "a drawing of a person"
    assert sum(counts["before"].values()) == sum(s.label is not None for s in (*people, *others))
    assert sum(counts["after"].values()) == sum(s.label is not None for s in kept)
    assert f"{counts['after']['man']} of {counts['before']['man']} men" in person_sentence(counts)
    assert showing_a_person(others, encoded, 0.0, template, scale) == (others, None)
    with pytest.raises(
        DataError,
        match=f"--person 1.0: expected labelled images that show a person, got none of {len(others)}",
    ):
        showing_a_person(others, encoded, 1.0, template, scale)


def test_words_of_the_prompts_are_an_option() -> None:
    assert gender_samples.label_words("") == gender_samples.PROMPTS
    for bad in ("female", "female/", "a/b/c"):
        with pytest.raises(DataError, match="women's words/men's words"):
            gender_samples.label_words(bad)


def test_the_papers_settings_run_and_are_accounted_for(own_cache: None, tmp_path: Path) -> None:
    """``--paper`` at a small size: a classifier's labels, the person filter, "female" and "male", the SAE alone."""
    (tmp_path / "people").mkdir()
    folder = write_folder(tmp_path / "people")
    classifier = save_classifier(tmp_path / "vit", ["women", "men"], mm.data.pairs(folder, progress=False))
    options = gender.Options.of_paper(
        model="mini", pretrained="", data=f"{folder}/", confidence=0.0, person=0.001, features=64, k=8, epochs=2, draws=2,
        classifier=str(classifier), quiet=True, out=tmp_path / "out",
    )  # fmt: skip
    results = gender.run(options)
    data, filtered = results["data"], results["data"]["person_filter"]
    assert filtered["after"] == {"woman": data["people"]["women"], "man": data["people"]["men"]}
    assert sum(filtered["before"].values()) == 24 >= sum(filtered["after"].values())
    assert results["prompts"]["words"] == {"woman": ["female"], "man": ["male"]}
    assert all(name.startswith("SAE") for name in results["masking"])
    status = {s["option"]: s["status"] for s in results["paper"]["settings"] if s["option"]}
    assert status["words"] == "the paper's in part" and status["ncl"] == "the paper's"
    assert {status[name] for name in ("model", "data", "confidence", "person")} == {"overridden"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Images of a person" in page and "The paper&#39;s settings" in page
