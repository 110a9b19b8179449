"""The modality study end to end on a random model and a small folder."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from publish import readme as readme_tables
from typer.testing import CliRunner

import mmhooks as mm
from mmhooks.models.embedded import mini
from mmhooks.studies.common.encode import Encoded, encode
from mmhooks.studies.modality import masking as modality_mask
from mmhooks.studies.modality import measures as modality_study
from mmhooks.studies.modality import seeds
from mmhooks.studies.modality import study as modality
from mmhooks.studies.modality.seeds import seed_table
from mmhooks.utils.indexing import number_labels

N = 60
EVIL = '<img src=x onerror="alert(1)"> a | b $x$'
SMALL = modality.Options(
    declip="mini-declip", sae="train", ncl="train", top_m=5, features=64, epochs=4, draws=6, each=2, batch=32, quiet=True,
)  # fmt: skip


def random_clip(name: str = "mini", **_: Any) -> mm.HookedCLIP:
    torch.manual_seed(len(name))
    return mm.HookedCLIP(mini.build().eval(), mini.tokenizer(), mini.preprocess, name=name)


def similarity_embeddings(pairs: Any, _: Any) -> dict[str, torch.Tensor]:
    """Judges that need no weights: fixed random vectors."""
    generator = torch.Generator().manual_seed(1)
    return {
        k: torch.nn.functional.normalize(torch.randn(len(pairs), 16, generator=generator) + 0.5, dim=-1)
        for k in ("image", "text")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured squares with their names; one name tries to break out of every format."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    with (root / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for i in range(N):
            pixels = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{i:02}.png")
            rows.writerow([f"{i:02}.png", EVIL if i % 3 == 0 else f"pattern number {i}"])
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of the study: (results, folder of its files, options)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMHOOKS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(mm, "load", random_clip)
        patch.setattr(modality, "similarity_embeddings", similarity_embeddings)
        out = tmp_path_factory.mktemp("run") / "modality"
        options = replace(SMALL, data=f"{folder}/", out=out)
        yield modality.run(options), out, options


def test_everything_is_written(run: Any) -> None:
    results, out, _ = run
    names = {p.name for p in out.iterdir()}
    assert {"results.json", "tables.md", "index.html", "fig1_mds.png", "masking.png", "summary.png"} <= names
    stored = json.loads(
        (out / "results.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON")
    )
    assert list(stored["models"]) == ["CLIP", "DeCLIP", "CLIP+NCL", "CLIP+SAE"]
    assert stored == results.found
    assert results.paths[0] == out / "results.json" and {p.name for p in results.paths} == names
    assert stored["data"]["n"] == N and stored["data"]["heldout"] == N // 5


def test_every_number_has_n_and_interval(run: Any) -> None:
    def walk(x: Any) -> Any:
        if isinstance(x, dict):
            if "value" in x:
                yield x
            else:
                for v in x.values():
                    yield from walk(v)

    found = list(walk(run[0]["models"]))
    assert len(found) > 80
    for e in found:
        assert isinstance(e["n"], int)
        if e["value"] is not None and e["n"] > 1:
            assert e["low"] <= e["value"] + 1e-9 and e["value"] - 1e-9 <= e["high"], e


def test_groups_part_the_alive_features(run: Any) -> None:
    for model in run[0]["models"].values():
        scores = np.array([np.nan if s is None else s for s in model["mds"]["scores"]])
        alive = scores[~np.isnan(scores)]
        mu, sigma = alive.mean(), alive.std()
        assert model["alive"] == len(alive) and model["alive"] + model["dead"] == model["n_features"]
        assert model["mds"]["mu"]["value"] == pytest.approx(mu, abs=1e-5)
        assert model["mds"]["sigma"]["value"] == pytest.approx(sigma, abs=1e-5)
        sizes = {g: model["groups"][g]["size"] for g in ("ImgD", "TextD", "CrossD")}
        assert sizes["ImgD"] == (alive > mu + sigma).sum() and sizes["TextD"] == (alive < mu - sigma).sum()
        assert sum(sizes.values()) == len(alive)


def test_pairing_and_definitions_are_reported_for_every_model(run: Any) -> None:
    results, out, _ = run
    for model in results["models"].values():
        cross = model["cross_modal"]
        assert cross["pairs"] == model["families"] <= N
        names = ["" if s is None else "x" for s in model["mds"]["scores"]]
        assert len(cross["lift"]) == len(cross["causal"]) == len(names) == len(cross["is_paired"])
        for kind, flags in (("paired", cross["is_paired"]), ("both", cross["is_causal"])):
            assert sum(g[kind] for g in cross["groups"].values()) == sum(
                f for f, name in zip(flags, names, strict=True) if name
            )
    compared = results["definitions"]
    assert list(compared["verdicts"]) == ["this run's", "every pair counts", "the paper's"]
    assert compared["verdicts"]["this run's"] == {c["claim"]: c["verdict"] for c in results["claims"]}
    for key in ("embed_sim", "win_rate", "monosemanticity"):
        for side in ("image", "text"):
            ours = compared["numbers"]["this run's"]["CLIP+SAE"][key][side]
            assert ours == {k: results["models"]["CLIP+SAE"][key][side][k] for k in ours}
    assert compared["numbers"]["the paper's"]["CLIP"] != compared["numbers"]["this run's"]["CLIP"]
    text = (out / "tables.md").read_text()
    assert "Definitions decide verdicts" in text and "Which features are cross-modal by the pairing" in text


def test_other_seeds_train_other_heads_and_their_verdicts_are_counted(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, options = run
    monkeypatch.setattr(mm, "load", random_clip)
    monkeypatch.setattr(modality, "similarity_embeddings", similarity_embeddings)
    results = modality.run(replace(options, seeds=2, limit=40, declip="", out=tmp_path / "seeds"))
    one, other = results["seeds"]["numbers"]
    for name in ("CLIP+NCL", "CLIP+SAE"):
        assert one[name]["embed_sim"] == {
            k: results["models"][name]["embed_sim"][k] for k in one[name]["embed_sim"]
        }
        assert one[name] != other[name]
    counted = seed_table(results.found).rows
    assert [row[0] for row in counted] == list(results["seeds"]["verdicts"][0])
    assert all(sum(int(str(c)) for c in row[1:]) == 2 for row in counted)


def test_seeds_of_minis_heads_are_those_that_ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(seeds, "load_heads", lambda *a, **k: asked.update(sources=a[2], seed=k["seed"]) or {})
    given = {"sae": "mini/sae", "ncl": "mine/ncl"}
    seeds.heads_of_seed(None, [], given, 3, n=8, k=4, epochs=1, first=10, cache=tmp_path)
    assert asked == {"sources": {"sae": "mini/sae-seed3", "ncl": "mine/ncl"}, "seed": 13}


def test_masks_are_live_equal_by_hand_and_leave_nothing(run: Any) -> None:
    for model in run[0]["models"].values():
        assert 0 <= model["masking"]["by_hand"] < 1e-4
        assert model["masking"]["bit_equal_after"] is True
    # not by never changing anything: masking a raw model's largest group moves its ranks
    raw = run[0]["models"]["CLIP"]["masking"]
    assert any(abs(r) > 0 for r in raw["groups"]["CrossD"]["random"])


def test_random_masks_have_the_groups_size(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes: list[int] = []
    real = modality_mask.masked_by_hand
    monkeypatch.setattr(
        modality_mask, "masked_by_hand", lambda s, x, f, g: sizes.append(len(g)) or real(s, x, f, g)
    )
    pairs = mm.data.pairs(run[2].data)
    encoded = encode(random_clip(), "mini", pairs, tmp_path, batch=30, progress=False)
    s = modality_study.StudyModel("CLIP", encoded)
    mds = mm.mds(encoded.store, kind="abs", image="image.embed", text="text.embed")
    inputs = modality_mask.model_inputs(encoded.model, pairs, range(12))
    modality_mask.masking_effects(s, mds, pairs, range(12), inputs, draws=3, seed=0, step=lambda n: None)
    wanted = [len(g) for g in mds.groups for _ in range(2)] + [len(g) for g in mds.groups for _ in range(6)]
    assert sorted(sizes) == sorted(wanted)


def test_by_hand_is_the_written_formula() -> None:
    """``x + |x| (f' - f) W_dec`` for an SAE on unit-norm input, row by row."""
    torch.manual_seed(0)
    sae = mm.TopKSAE(8, 20, 4)
    x = torch.randn(5, 8) * 3
    f = sae.encode(x / x.norm(dim=-1, keepdim=True)).detach()
    s = modality_study.StudyModel("s", object.__new__(Encoded), sae)  # the formula needs no model
    group = mm.FeatureSet([int(k) for k in f[0].nonzero().flatten()[:2]], 20)
    got = modality_mask.masked_by_hand(s, x, f, group)
    for row in range(5):
        kept = f[row].clone()
        kept[group.indices] = 0
        want = x[row] + x[row].norm() * ((kept - f[row]) @ sae.W_dec.detach())
        assert torch.allclose(got[row], want, atol=1e-6)
    assert not torch.allclose(got[0], x[0])


@pytest.mark.parametrize("words", [["a"] * 9, list("abcdefghi"), list("aabbcdefg")])
def test_first_hits_is_retrievals_first_rank(words: list[str]) -> None:
    torch.manual_seed(3)
    same = number_labels(words)
    for noise in (0.1, 1.0):
        image = torch.randn(9, 4)
        text = image + noise * torch.randn(9, 4)
        text[3:5] = 0  # as after a mask that leaves nothing: ties
        want = mm.retrieval(image, text, ks=(1,), same=same).image_to_text[1].value
        assert modality_mask.first_rank_rate(image, text, same[:, None] == same) == pytest.approx(want)


def test_second_run_reads_its_cache_and_gives_the_same(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, _, options = run

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("done again, though it was kept")

    monkeypatch.setattr(mm, "train_head", forbidden)
    monkeypatch.setattr(torch, "stack", guard_pixels(torch.stack))
    again = modality.run(replace(options, out=tmp_path))
    assert again["models"] == first["models"] and again["claims"] == first["claims"]


def test_the_fewest_pairs_are_enough(run: Any, tmp_path: Path) -> None:
    """The least data that the study takes goes through every step."""
    found = modality.run(replace(run[2], limit=8, top_m=3, draws=2, out=tmp_path))
    assert found["data"]["n"] == 8 and list(found["models"]) == list(run[0]["models"])


def guard_pixels(real: Any) -> Any:
    """torch.stack that refuses more pixels than the held-out pairs need: the encoder must not see all pairs."""

    def stack(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        out = real(tensors, *args, **kwargs)
        assert out.ndim != 4 or out.shape[0] <= N // 5
        return out

    return stack


def test_embeddings_are_those_of_the_model_row_by_row(run: Any, tmp_path: Path) -> None:
    model, pairs = random_clip(), mm.data.pairs(run[2].data)
    encoded = encode(model, "mini", pairs, tmp_path, batch=32, progress=False)
    rows = [3, 40, 7]
    with torch.no_grad():
        image = model.encode_image(torch.stack([model.preprocess(pairs[i].image) for i in rows]))
        text = model.encode_text(model.tokenizer([pairs.texts[i] for i in rows]))
    assert torch.allclose(encoded.vectors("image", rows), image, atol=1e-5)
    assert torch.allclose(encoded.vectors("text", rows), text, atol=1e-5)
    assert encoded.store.ids == list(pairs.ids) and encoded.vectors("image").shape == (N, 256)


def test_other_weights_transforms_or_pairs_never_meet_an_old_cache(run: Any, tmp_path: Path) -> None:
    pairs = mm.data.pairs(run[2].data).select(range(8))

    def folder(model: mm.HookedCLIP, pairs: Any = pairs) -> Path:
        found = encode(model, "mini", pairs, tmp_path, batch=8, progress=False).store.folder
        assert found is not None
        return found

    one = folder(random_clip("mini"))
    assert one == folder(random_clip("mini"))  # the same weights, whoever holds them
    grey = random_clip("mini")
    real = grey.preprocess
    grey.preprocess = lambda image: real(image.convert("L").convert("RGB"))
    others = [
        folder(random_clip("mini-declip")),
        folder(grey),
        folder(random_clip("mini"), pairs.select(range(4))),
    ]
    assert len({one, *others}) == 4


def test_page_and_tables_escape_captions(run: Any) -> None:
    page = (run[1] / "index.html").read_text()
    assert "&lt;img src=x onerror=" in page
    assert re.search(r"<img[^>]*onerror=\"", page) is None and "<script" not in page
    assert set(re.findall(r'(?:src|srcset|href)="([^":#]{0,4}[:#])', page)) <= {"data:", "#"}
    assert "<img" not in (run[1] / "tables.md").read_text()


def test_page_says_its_controls(run: Any) -> None:
    page, tables = (run[1] / "index.html").read_text(), (run[1] / "tables.md").read_text()
    for words in (
        "shuffled pairs",
        "random groups of the same sizes",
        "random masks, same size",
        "chance",
        "xcluded",
    ):
        assert words in page and words in tables, words
    for claim in run[0]["claims"]:
        assert claim["verdict"] in ("same", "differs", "open") and claim["claim"][:30] in tables


def test_the_slot_of_the_results_page_is_filled_once(run: Any, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- results:begin (x) -->\nstale words\n<!-- results:end -->\nafter\n")
    readme_tables.main(run[1], page)
    once = page.read_text()
    assert (
        "stale words" not in once
        and "| CLIP+SAE |" in once
        and once.startswith("before\n")
        and once.endswith("after\n")
    )
    assert (tmp_path / "img" / "summary.png").read_bytes() == (run[1] / "summary.png").read_bytes()
    readme_tables.main(run[1], page)
    assert page.read_text() == once


def test_help_shows_the_options() -> None:
    script = Path(__file__).parents[3] / "recipes" / "modality.py"
    out = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.stdout)
    for option in (
        "--model",
        "--pretrained",
        "--data",
        "--declip",
        "--out",
        "--limit",
        "--seed",
        "--top-m",
        "embedder",
    ):
        assert option in plain


def test_bad_data_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\na.png,hello\n")
    (tmp_path / "data" / "a.png").write_bytes(b"no image")
    args = ["--data", f"{tmp_path}/data/", "--out", str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(modality.app, args)
    assert (
        result.exit_code == 1 and result.output.startswith("modality: ") and "Traceback" not in result.output
    )


@pytest.mark.parametrize(("after", "said"), [(0.5, ""), (0.49, "more"), (0.51, "less")])
def test_an_effect_is_named_only_beyond_rounding(after: float, said: str) -> None:
    def rate(value: float) -> dict[str, Any]:
        return {"R@1": modality_mask.Estimate(value, value, value, 100)}

    # A random mask without effect, as single precision adds it up.
    found = modality_mask._against_random(rate(after), rate(0.5), [1e-9, 2e-9], size=3, n=100)
    assert found["beyond"] == said


def test_an_empty_group_has_no_effect() -> None:
    from mmhooks.studies.modality.tables import _effect_against_random

    assert _effect_against_random({"size": 0, "beyond": ""}) == "nothing to mask"


def test_the_papers_settings_run_and_are_accounted_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--paper`` at a small size: definitions are the paper's, sizes are overridden, and the page says which."""
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mm, "load", random_clip)
    monkeypatch.setattr(modality, "similarity_embeddings", similarity_embeddings)
    sizes: Any = {"limit": 16, "top_m": 4, "features": 16, "k": 4, "epochs": 1, "draws": 2, "each": 1}
    out = tmp_path / "paper"
    results = modality.run(modality.Options.of_paper(data=f"{folder}/", **sizes, quiet=True, out=out))
    settings = results["settings"]
    assert (settings["activation"], settings["zeros"], settings["family"]) == ("raw", "keep", "none")
    assert settings["command"].startswith("python recipes/modality.py --paper --data ")
    assert results["models"]["CLIP"]["kind"] == "paper" and results["models"]["CLIP"]["families"] == 16
    status = {s["option"]: s["status"] for s in results["paper"]["settings"] if s["option"]}
    assert status["zeros"] == "the paper's" and status["declip"] == "not had"
    assert {status[name] for name in ("data", "top_m", "features", "k")} == {"overridden"}
    for name in ("index.html", "tables.md"):
        text = (out / name).read_text()
        assert "Section 2.2, footnote 1" in text and "--declip FILE" in text.replace("\\", "")
