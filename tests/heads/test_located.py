"""Foreign vision heads name their sites: ``model.attach(head)`` needs no ``at=``, or says what to pass."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import DamagedFile, MMHooksError

from .test_formats import STANDARD, D, K, N, X, activation, dictionary, prisma, saev, same, tensors

LAYERS = 4


@pytest.fixture(scope="module")
def model() -> mm.HookedCLIP:
    from open_clip import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": D, "layers": LAYERS, "head_width": 3}
    text = {"context_length": 6, "vocab_size": 32, "width": 8, "heads": 2, "layers": 1}
    return mm.HookedCLIP(CLIP(embed_dim=D, vision_cfg=vision, text_cfg=text).eval())  # type: ignore[arg-type]


def attached_at(model: mm.HookedCLIP, head) -> list[str]:
    """Attaches without ``at=``, masks everything there, and takes it off again."""
    places = model.attach(head)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), model.hooks(mask=range(N)), model.caching(f"{places[0]}.latents") as cache:
        model.encode_image(images)
    assert cache[f"{places[0]}.latents"].shape[-1] == N
    model.detach()
    return [place.removesuffix(f".{head.name}") for place in places]


# -- saev --------------------------------------------------------------------------------------------------


def saev_run(root: Path, data: dict | None, metadata: dict | None = None) -> Path:
    """A run as its training writes it: checkpoint/sae.pt and config.json, links/train-shards/metadata.json."""
    (root / "checkpoint").mkdir(parents=True)
    path = root / "checkpoint" / "sae.pt"
    saev(path, {"schema": 5, "cfg": {"d_model": D, "d_sae": N, "activation": activation("TopK", top_k=K)}})
    if data is not None:
        (path.parent / "config.json").write_text(json.dumps({"train_data": data, "lr": 4e-4}))
    if metadata is not None:
        (root / "links" / "train-shards").mkdir(parents=True)
        (root / "links" / "train-shards" / "metadata.json").write_text(json.dumps(metadata))
    return path


def test_saev(tmp_path, model) -> None:
    about = {"family": "clip", "ckpt": "ViT-B-16/openai", "content_tokens_per_example": 196, "d_model": D}
    path = saev_run(tmp_path / "a", {"layer": 2, "tokens": "content", "scale_norm": False}, about)
    for source in (path, path.parent):
        head = mm.load_head(source)
        assert attached_at(model, head) == ["image.blocks.2.resid_post"]
        want = {"model": "clip/ViT-B-16/openai", "tokens": "patch", "patches_per_image": 196}
        assert head.info["preprocess"] == want
    assert mm.load_head(head.save(tmp_path / "ours")).sites == head.sites
    head = mm.load_head(saev_run(tmp_path / "b", {"layer": -2, "patches": "cls"}))
    assert attached_at(model, head) == ["image.blocks.2.resid_post"]  # the last but one of four
    assert head.info["preprocess"] == {"tokens": "class"}


def test_saev_without_a_layer_says_what_to_pass(tmp_path, model) -> None:
    for i, (data, match) in enumerate(
        (
            (
                None,
                r"config\.json.*is not there: fetch it too, or pass at='image\.blocks\.<layer>\.resid_post'",
            ),
            ({"layer": "all"}, "names layer 'all'"),
            (
                {"layer": 3, "scale_norm": True},
                r"layer 3 with scale_norm.*pass at='image\.blocks\.3\.resid_post'",
            ),
        )
    ):
        head = mm.load_head(saev_run(tmp_path / str(i), data))
        with pytest.raises(MMHooksError, match=f"head 'sae' names no site: pass at=.*{match}"):
            model.attach(head)
    assert model.attach(head, at="image.blocks.3.resid_post") == ["image.blocks.3.resid_post.sae"]
    model.detach()


# -- ViT-Prisma --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_prisma(tmp_path, model, leaf) -> None:
    cfg = {"hook_point_layer": 1, "layer_subtype": f"hook_{leaf}", "hook_point_head_index": None}
    cfg |= {"model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "image_size": 224}
    prisma(tmp_path / "p", **cfg, use_patches_only=True)
    head = mm.load_head(tmp_path / "p")
    assert attached_at(model, head) == [f"image.blocks.1.{leaf}"]
    assert head.info["preprocess"] == {"model": cfg["model_name"], "image_size": 224, "tokens": "patch"}


def test_prisma_where_its_own_model_differs(tmp_path, model) -> None:
    cfg = {"hook_point_layer": 1, "layer_subtype": "hook_resid_post", "model_name": "vit_base_patch32_224"}
    prisma(tmp_path / "plain", **cfg)
    with pytest.raises(
        MMHooksError, match=r"centres when it loads them.*pass at='image\.blocks\.1\.resid_post'"
    ):
        model.attach(mm.load_head(tmp_path / "plain"))
    # Layer norm takes the mean off: the same features with and without centred weights.
    prisma(tmp_path / "normed", **cfg, normalize_activations="layer_norm")
    assert attached_at(model, mm.load_head(tmp_path / "normed")) == ["image.blocks.1.resid_post"]
    for i, change in enumerate(
        ({"layer_subtype": "attn.hook_z"}, {"hook_point_layer": None}, {"hook_point_head_index": 3})
    ):
        prisma(tmp_path / str(i), **(cfg | change))
        with pytest.raises(MMHooksError, match="which has no name here"):
            model.attach(mm.load_head(tmp_path / str(i)))


# -- sae-for-vlm -------------------------------------------------------------------------------------------

FOLDER = "imagenet_train_activations_clip-vit-large-patch14-336_{}_matroyshka_batch_top_k_20_x64"


def for_vlm(folder: Path) -> Path:
    """As its ``sae_train.py`` writes it: a folder whose name alone says the layer, and empty names in config.json."""
    state = tensors(**STANDARD) | {
        "k": torch.tensor(K),
        "threshold": torch.tensor(0.5),
        "group_sizes": torch.tensor([N]),
    }
    folder.parent.mkdir(parents=True)
    dictionary(folder, state, "MatroyshkaBatchTopKSAE")
    cfg = json.loads((folder / "config.json").read_text())
    cfg["trainer"] |= {"layer": "", "lm_name": "", "submodule_name": ""}
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def test_sae_for_vlm(tmp_path, model) -> None:
    folder = for_vlm(tmp_path / "random_k_2" / FOLDER.format("3_post_mlp_residual") / "trainer_0")
    head = mm.load_head(folder)
    w = tensors(**STANDARD)
    f = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    f = f * (f > 0.5)
    same(head, f, f @ w["W_dec"] + w["b_dec"])
    assert attached_at(model, head) == ["image.blocks.3.resid_post"]
    assert head.info["preprocess"] == {"model": "clip-vit-large-patch14-336", "tokens": "all"}
    head = mm.load_head(for_vlm(tmp_path / FOLDER.format("-1_post_projection") / "trainer_0"))
    assert attached_at(model, head) == ["image.embed"]
    assert head.info["preprocess"]["tokens"] == "pooled"
    head = mm.load_head(for_vlm(tmp_path / "renamed" / "trainer_0"))
    with pytest.raises(
        MMHooksError, match=r"names no layer; sae-for-vlm's folders do.*'image\.embed' for post_projection"
    ):
        model.attach(head)


# -- PatchSAE ----------------------------------------------------------------------------------------------


class ViTSAERunnerConfig:
    """Stands for PatchSAE's class of this name while a file is written."""


def patchsae(path: Path, monkeypatch, kind: str = "object", **change) -> dict[str, torch.Tensor]:
    state = tensors(**STANDARD)
    cfg = {"block_layer": 1, "module_name": "resid", "d_in": D, "d_sae": N, "model_name": "openai/clip-vit-base-patch16",
           "class_token": False, "image_width": 224, "gated_sae": False, "dtype": torch.float32} | change  # fmt: skip
    if kind == "dictionary":
        torch.save({"config": cfg, "state_dict": state}, path)
        return state
    package = types.ModuleType("src")
    with monkeypatch.context() as patch:
        for name in ("src", "src.sae_training", "src.sae_training.config"):
            patch.setitem(sys.modules, name, package)
        patch.setattr(package, "ViTSAERunnerConfig", ViTSAERunnerConfig, raising=False)
        patch.setattr(ViTSAERunnerConfig, "__module__", "src.sae_training.config")
        made = ViTSAERunnerConfig()
        vars(made).update(cfg)
        torch.save({"cfg": made, "state_dict": state}, path)
    return state


@pytest.mark.parametrize("kind", ["object", "dictionary"])
def test_patchsae(tmp_path, model, monkeypatch, kind) -> None:
    w = patchsae(tmp_path / "final.pt", monkeypatch, kind)
    f = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    head = mm.load_head(tmp_path / "final.pt")
    same(head, f, f @ w["W_dec"] + w["b_dec"])
    assert head.info["from"] == "PatchSAE" and attached_at(model, head) == ["image.blocks.1.resid_post"]
    want = {"model": "openai/clip-vit-base-patch16", "image_size": 224, "tokens": "all"}
    assert head.info["preprocess"] == want
    patchsae(tmp_path / "last.pt", monkeypatch, kind, block_layer=-2)
    assert attached_at(model, mm.load_head(tmp_path / "last.pt")) == ["image.blocks.2.resid_post"]
    for change, match in (({"gated_sae": True}, "gated_sae=True"), ({"module_name": "mlp"}, "on 'mlp'")):
        patchsae(tmp_path / "no.pt", monkeypatch, kind, **change)
        with pytest.raises(MMHooksError, match=match):
            mm.load_head(tmp_path / "no.pt")
    patchsae(tmp_path / "no.pt", monkeypatch, kind, d_in=D + 1)
    with pytest.raises(DamagedFile, match="says width 7, W_enc has 6"):
        mm.load_head(tmp_path / "no.pt")


# -- ours --------------------------------------------------------------------------------------------------


def test_own_heads_name_their_sites(model, tmp_path) -> None:
    head = mm.Transcoder(D, N, K)
    with pytest.raises(MMHooksError, match="head 'transcoder' names no site: pass at="):
        model.attach(head)
    head.info["sites"] = ["image.blocks.0.ln_2", "image.blocks.0.mlp_out"]
    again = mm.load_head(head.save(tmp_path / "h"))
    assert model.attach(again) == ["image.blocks.0.mlp_out.transcoder"]
    sae = mm.TopKSAE(D, N, K)
    sae.info["site"] = "image.embed"
    assert model.attach(sae) == ["image.embed.sae"]
    model.detach()
