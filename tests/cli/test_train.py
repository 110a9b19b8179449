"""``mmhooks train`` and ``mmhooks sweep`` on a store, from the command line."""

from __future__ import annotations

import json

import pytest
import torch
from heads.conftest import paired_clouds
from heads.stores import write_store
from typer.testing import CliRunner

from mmhooks.cli import app
from mmhooks.heads import load_head_dir, reconstruction
from mmhooks.heads.sae.modality_centres import by_modality


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    image, text = paired_clouds(600)
    folder = tmp_path_factory.mktemp("stores") / "acts"
    write_store(folder, image_embed=image, text_embed=text)
    return str(folder)


def run(*words: str):
    return CliRunner().invoke(app, [str(w) for w in words])


def test_train_writes_a_head_its_history_and_a_figure(store, tmp_path) -> None:
    out = tmp_path / "sae"
    words = ("train", store, "--features", 48, "--k", 4, "--epochs", 3, "--batch-size", 90, "--out", out)
    done = run(*words)
    assert done.exit_code == 0, done.output
    head = load_head_dir(out)
    held_out = [x[9::10] for x in paired_clouds(600)]
    said = json.loads((out / "training.json").read_text())
    assert said["held_out"]["image"]["fvu"] == pytest.approx(reconstruction(head, held_out[0]).fvu, rel=1e-5)
    assert [row["epoch"] for row in said["history"]] == [1, 2, 3] and "valid_fvu_text" in said["history"][0]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert head.id in done.output and head.info["sites"] == ["image.embed", "text.embed"]
    # What its card says when it is published.
    assert (head.info["model"], head.info["data"]["name"]) == ("m", "made up")
    assert head.info["held_out"] == said["held_out"]
    again = run(*words)  # a finished run: the same head, nothing trained
    assert again.exit_code == 0 and head.id in again.output
    other = run(*words, "--seed", 1)
    assert other.exit_code == 1 and "belongs to another training" in other.output


def test_train_accepts_every_kind_and_option(store, tmp_path) -> None:
    short = ("--features", 32, "--k", 4, "--epochs", 1, "--batch-size", 90)
    kinds = (
        "batchtopk",
        "matryoshka",
        "jumprelu",
        "relu",
        "gated",
        "matching_pursuit",
        "archetypal",
        "transcoder",
        "ncl",
    )
    for kind in kinds:
        done = run("train", store, *short, "--kind", kind, "--out", tmp_path / kind)
        assert done.exit_code == 0, done.output
        assert load_head_dir(tmp_path / kind).kind == kind
    options = ("--centre", "modality", "--schedule", "cosine", "--precision", "bf16", "--b-pre", "mean")
    done = run("train", store, *short, *options, "--valid", store, "--patience", 1, "--out", tmp_path / "all")
    assert done.exit_code == 0, done.output
    assert set(by_modality(load_head_dir(tmp_path / "all"))) == {"image", "text"}


def test_errors_of_train_are_one_line(store, tmp_path) -> None:
    done = run("train", store, "--sites", "image.nowhere", "--out", tmp_path / "x")
    assert done.exit_code == 1 and done.output.startswith("mmhooks: ") and "image.nowhere" in done.output
    assert run("sweep", store, "--k", "4,many", "--out", tmp_path / "y").exit_code == 2


def test_sweep_from_the_command_line(store, tmp_path) -> None:
    out = tmp_path / "sweep"
    done = run("sweep", store, "--k", "2,4", "--n", "24", "--epochs", 1, "--batch-size", 90, "--out", out)
    assert done.exit_code == 0, done.output
    assert {p.name for p in out.iterdir()} >= {"sweep.json", "sweep.md", "pareto.png", "heads", "runs"}
    assert len(json.loads((out / "sweep.json").read_text())["rows"]) == 2


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_has_an_example(command) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0 and f"Example: mmhooks {command} runs/acts" in " ".join(done.output.split())


def test_one_site_trains_on_one_modality(store, tmp_path) -> None:
    done = run("train", store, "--sites", "image.embed", "--features", 32, "--k", 4, "--epochs", 1,
               "--batch-size", 90, "--out", tmp_path / "one")  # fmt: skip
    assert done.exit_code == 0 and "held out, text" not in done.output
    assert torch.isfinite(load_head_dir(tmp_path / "one").W_dec).all()


def test_a_grid_of_heads_is_trained_in_one_pass(store, tmp_path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "heads:\n  - {k: 4}\n  - {k: 2, seed: 3, sites: [image.embed], name: small}\n  - {kind: relu, lr: 0.001}\n"
    )
    short = ("--features", 32, "--epochs", 2, "--batch-size", 90)
    done = run("train", store, "--heads", grid, *short, "--out", tmp_path / "heads")
    assert done.exit_code == 0, done.output
    folders = {path.name for path in (tmp_path / "heads").iterdir()}
    assert folders == {"topk-n32-k4-seed0", "small", "relu-n32-k32-seed0"}
    alone = run("train", store, "--k", 4, *short, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    together, single = (load_head_dir(tmp_path / name) for name in ("heads/topk-n32-k4-seed0", "alone"))
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), single.parameters(), strict=True))
    small = load_head_dir(tmp_path / "heads" / "small")
    assert small.k == 2 and small.info["sites"] == ["image.embed"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("heads: 3", "expected a list under heads:"),
        (
            "heads: [{wide: 3}]",
            "head 0: expected the keys kind, features, k, seed, sites, lr, normalize, name, got wide",
        ),
        ("heads: [{k: many}]", "head 0: expected k to be int, got 'many'"),
        ("heads: [{k: true}]", "head 0: expected k to be int, got True"),
        ("heads: [{kind: best}]", "head 0: expected a kind of topk"),
        ("heads: [{k: 4}, {k: 4}]", "two heads of"),
        ("heads: [", "cannot be read as YAML"),
    ],
)
def test_a_grid_that_cannot_be_read_says_why(store, tmp_path, text, said) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(text)
    done = run("train", store, "--heads", grid, "--out", tmp_path / "heads")
    assert done.exit_code != 0 and said in " ".join(done.output.replace("│", "").split()), done.output


def test_pairs_of_a_store_by_token_are_held_out_whole(tmp_path) -> None:
    from data.tiny import folder_of_pairs

    folder_of_pairs(tmp_path / "photos", 20)
    words = ("extract", "mini", "--pairs", tmp_path / "photos", "--site", "image.blocks.0.resid_post")
    done = run(*words, "--tokens", "patch", "--out", tmp_path / "acts")
    assert done.exit_code == 0 and "1280 tokens of 20 pairs" in done.output, done.output
    done = run("store", "info", tmp_path / "acts")
    assert "20 of 20 pairs with 1280 rows, one a token, in 1 shards" in done.output, done.output
    short = (
        "--sites",
        "image.blocks.0.resid_post",
        "--features",
        32,
        "--k",
        4,
        "--epochs",
        1,
        "--batch-size",
        64,
    )
    done = run("train", tmp_path / "acts", *short, "--out", tmp_path / "sae")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "sae" / "training.json").read_text())["held_out"]["image"]["n"] == 2 * 64
    for tokens in ("1:5", "0,7"):
        done = run(*words, "--tokens", tokens, "--out", tmp_path / tokens.replace(":", "-"))
        assert done.exit_code == 0 and f"{20 * (4 if ':' in tokens else 2)} tokens" in done.output, (
            done.output
        )
    assert "expected a kind such as patch" in " ".join(run(*words, "--tokens", "1-5").output.split())
