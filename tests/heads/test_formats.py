"""Files of other libraries, against each library's public formula written out; and the one door to all of them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmhooks as mm
from mmhooks.errors import DamagedFile, MissingWeights, MMHooksError, NotFinite
from mmhooks.heads import NCL, SAE, Head
from mmhooks.heads.formats import FORMATS, load_saelens, read_head, save_saelens

D, N, K = 6, 20, 3
X = torch.randn(9, D, generator=torch.Generator().manual_seed(1))


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def topk(z: Tensor, k: int) -> Tensor:
    top = z.relu().topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, top.indices, top.values)


def same(head: Head, f: Tensor, recon: Tensor, x: Tensor = X) -> None:
    torch.testing.assert_close(head.encode(x).detach(), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head(x).detach(), recon, atol=1e-5, rtol=1e-5)


def tiny_model() -> tuple[mm.HookedCLIP, Tensor]:
    from open_clip import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    model = CLIP(embed_dim=D, vision_cfg=vision, text_cfg=text).eval()  # type: ignore[arg-type]
    return mm.HookedCLIP(model), torch.randn(5, 3, 16, 16)


# -- SAELens -----------------------------------------------------------------------------------------------

STANDARD = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}


def saelens(path: Path, state: dict[str, Tensor] | None = None, **cfg) -> dict[str, Tensor]:
    state = tensors(**STANDARD) if state is None else state
    path.mkdir()
    save_file(state, path / "sae_weights.safetensors")
    cfg = {"architecture": "topk", "d_in": D, "d_sae": N, "k": K, "dtype": "float32"} | cfg
    (path / "cfg.json").write_text(json.dumps(cfg))
    return state


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("rescaled", [True, False])
def test_saelens_topk(tmp_path, shifted, rescaled) -> None:
    w = saelens(tmp_path / "s", apply_b_dec_to_input=shifted, rescale_acts_by_decoder_norm=rescaled)
    z = (X - w["b_dec"] * shifted) @ w["W_enc"] + w["b_enc"]
    norm = w["W_dec"].norm(dim=-1) if rescaled else torch.ones(N)
    f = topk(z * norm, K)
    head = mm.load_head(tmp_path / "s")
    same(head, f, (f * (1 / norm)) @ w["W_dec"] + w["b_dec"])
    assert head.kind == "topk" and not head.normalize_input and head.info["from"] == "SAELens"


def test_saelens_standard_and_files_of_before_6(tmp_path) -> None:
    w = saelens(tmp_path / "s", architecture="standard")
    f = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    same(mm.load_head(tmp_path / "s"), f, f @ w["W_dec"] + w["b_dec"])
    old = tensors(**STANDARD) | {"scaling_factor": torch.ones(N)}
    cfg = {
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "architecture": "standard",
        "k": None,
    }
    saelens(tmp_path / "old", old, **cfg, normalize_activations=False)
    head = mm.load_head(tmp_path / "old")
    assert head.kind == "topk"
    f = topk((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K)
    same(head, f, f @ w["W_dec"] + w["b_dec"])


def test_saelens_jumprelu(tmp_path) -> None:
    state = tensors(**STANDARD) | {"threshold": torch.linspace(-0.2, 1.5, N)}
    w = saelens(tmp_path / "s", state, architecture="jumprelu")
    z = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = z.relu() * (z > w["threshold"])
    same(mm.load_head(tmp_path / "s"), f, f @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_saelens_training_checkpoints_of_batchtopk(tmp_path, architecture) -> None:
    state = tensors(**STANDARD) | {"topk_threshold": torch.tensor(0.8, dtype=torch.float64)}
    w = saelens(tmp_path / "s", state, architecture=architecture, k=3.0)
    z = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = z.relu() * (z > 0.8)
    head = mm.load_head(tmp_path / "s")
    same(head, f, f @ w["W_dec"] + w["b_dec"])
    assert isinstance(head, mm.BatchTopKSAE)


def test_saelens_rows_of_constant_norm_are_unit_norm_and_a_scale(tmp_path) -> None:
    w = saelens(tmp_path / "s", normalize_activations="constant_norm_rescale")
    scale = D**0.5 / X.norm(dim=-1, keepdim=True)
    f = topk((X * scale - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K)
    recon = (f @ w["W_dec"] + w["b_dec"]) / scale
    head = mm.load_head(tmp_path / "s")
    assert head.normalize_input
    norm = X.norm(dim=-1, keepdim=True)
    same(head, f, recon / norm, x=head.prepare(X))
    same(head, f, recon)


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mu = x.mean(dim=-1, keepdim=True)
    std = (x - mu).std(dim=-1, keepdim=True)
    return (x - mu) / (std + 1e-5), mu, std


@pytest.mark.parametrize("library", ["SAELens", "ViT-Prisma"])
def test_layer_normed_inputs_alone_and_in_the_graph(tmp_path, library) -> None:
    """Both libraries standardise each row and give the reconstruction its mean and deviation back."""
    if library == "SAELens":
        w = saelens(tmp_path / "s", architecture="standard", normalize_activations="layer_norm")
    else:
        w = prisma(tmp_path / "s", normalize_activations="layer_norm")

    def features(x: Tensor) -> Tensor:
        return ((layer_norm(x)[0] - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()

    def recon(f: Tensor, x: Tensor) -> Tensor:
        _, mu, std = layer_norm(x)
        return (f @ w["W_dec"] + w["b_dec"]) * std + mu

    head = mm.load_head(tmp_path / "s")
    rows, scale, shift = head.scaled(X)
    f = features(X)
    torch.testing.assert_close(head.encode(rows).detach(), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head(rows).detach() * scale + shift, recon(f, X), atol=1e-5, rtol=1e-5)
    # As their own encode(x) and sae(x): raw vectors in, raw vectors out.
    torch.testing.assert_close(head.encode(X).detach(), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head(X).detach(), recon(f, X), atol=1e-5, rtol=1e-5)
    with pytest.raises(NotFinite, match="got 1 of 2 that are constant"):
        head.prepare(torch.stack([torch.ones(D), X[0]]))

    model, images = tiny_model()
    with torch.no_grad():
        x = model.encode_image(images)
        model.attach(head, at="image.embed")
        assert torch.equal(model.encode_image(images), x)
        _, cache = model.run_with_cache(images=images, sites=["image.embed.sae.recon"])
        with model.hooks(mask=[0, 3, 7]):
            z = model.encode_image(images)
        masked = features(x)
        masked[:, [0, 3, 7]] = 0
        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(cache["image.embed.sae.recon"], recon(features(x), x), **close)
        torch.testing.assert_close(z, recon(masked, x) + (x - recon(features(x), x)), **close)
        model.detach()
        model.attach(head, at="image.embed", error_term=False)
        with model.hooks(mask=[0, 3, 7]):
            torch.testing.assert_close(model.encode_image(images), recon(masked, x), **close)
    back = mm.load_head(head.save(tmp_path / "own"))
    assert back.normalize_input == "layer_norm" and back.id == head.id


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architecture": "temporal"}, "topk.*'temporal', which is not supported"),
        ({"normalize_activations": "expected_average_only_in"}, "statistics that are not in the file"),
        ({"d_sae": 21}, r"d_sae = 21, W_enc is \[6, 20\]"),
        ({"k": None}, "expected k in cfg.json, got none"),
        ({"architecture": "jumprelu"}, "missing threshold"),
        ({"architecture": "batchtopk"}, "missing topk_threshold"),
    ],
)
def test_saelens_files_that_would_be_computed_wrongly_are_refused(tmp_path, change, match) -> None:
    saelens(tmp_path / "s", **change)
    with pytest.raises(MMHooksError, match=match):
        mm.load_head(tmp_path / "s")


def test_missing_and_surplus_tensors_are_named_not_hidden(tmp_path) -> None:
    """The fault: ``load_state_dict(strict=False)``."""
    state = tensors(**STANDARD)
    del state["b_enc"]
    saelens(tmp_path / "s", state | {"r_mag": torch.zeros(N)})
    with pytest.raises(MMHooksError, match=r"missing b_enc; unexpected r_mag; it holds W_dec, W_enc"):
        mm.load_head(tmp_path / "s")
    saelens(tmp_path / "t", tensors(**(STANDARD | {"W_dec": (N, D + 1)})))
    with pytest.raises(MMHooksError, match=r"W_dec must be \[20, 6\], got \[20, 7\]"):
        mm.load_head(tmp_path / "t")


def trained_like(head: SAE) -> SAE:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    if isinstance(head, mm.BatchTopKSAE):
        head.calibrate(X)
    return head


WRITTEN = {
    "topk": lambda: mm.TopKSAE(D, N, K),
    "batchtopk": lambda: mm.BatchTopKSAE(D, N, K),
    "widths": lambda: mm.MatryoshkaSAE(D, N, K, widths=(5, N)),
    "ks": lambda: mm.MatryoshkaSAE(D, N, K, ks=(1, K)),
    "jumprelu": lambda: mm.JumpReLUSAE(D, N),
    "relu": lambda: mm.ReLUSAE(D, N),
}


@pytest.mark.parametrize("normalize_input", [True, False, "layer_norm"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_saelens_written_as_its_own_formula_and_read_back_as_ours(tmp_path, kind, normalize_input) -> None:
    """On raw vectors, at any scale: SAELens normalises as the head does, in and out."""
    head = WRITTEN[kind]()
    head.normalize_input = normalize_input
    trained_like(head)
    path = save_saelens(head, tmp_path / "s", hook_name="visual.ln_post", model_name="ViT-B-32")
    cfg = json.loads((path / "cfg.json").read_text())
    assert cfg["metadata"]["sae_lens_version"].startswith("6.")  # without it SAELens drops the names
    assert (cfg["metadata"]["hook_name"], cfg["metadata"]["model_name"]) == ("visual.ln_post", "ViT-B-32")
    w = load_file(path / "sae_weights.safetensors")
    assert {k: tuple(w[k].shape) for k in STANDARD} == STANDARD
    x = X * 30 + 2
    rows, back_in = {  # SAELens's run_time_activation_norm_fn_in and _out
        "none": lambda: (x, lambda y: y),
        "constant_norm_rescale": lambda: (
            x * (D**0.5 / x.norm(dim=-1, keepdim=True)),
            lambda y: y / (D**0.5 / x.norm(dim=-1, keepdim=True)),
        ),
        "layer_norm": lambda: (layer_norm(x)[0], lambda y: y * layer_norm(x)[2] + layer_norm(x)[1]),
    }[cfg["normalize_activations"]]()
    z = (rows - w["b_dec"]) @ w["W_enc"] + w["b_enc"]  # SAELens's inference code, by architecture
    f = {
        "topk": lambda: topk(z, cfg.get("k", 1)),
        "standard": lambda: z.relu(),
        "jumprelu": lambda: z.relu() * (z > w["threshold"]),
    }[cfg["architecture"]]()
    recon = back_in(f @ w["W_dec"] + w["b_dec"])
    torch.testing.assert_close(head.encode(x).detach(), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head(x).detach(), recon, atol=1e-4, rtol=1e-5)
    back = mm.load_head(path)
    assert type(back) is type(head) and back.config() == head.config()
    torch.testing.assert_close(back(x).detach(), recon, atol=1e-4, rtol=1e-5)
    assert load_saelens(path, name="probe", normalize_input=False).normalize_input is False


def test_saelens_has_no_place_for_ncl_or_an_unset_threshold(tmp_path) -> None:
    with pytest.raises(MMHooksError, match=r"got ncl, for which SAELens has no architecture.*head\.save"):
        save_saelens(NCL(D, N), tmp_path)
    with pytest.raises(MMHooksError, match="no inference threshold yet"):
        save_saelens(mm.BatchTopKSAE(D, N, K), tmp_path)


# -- sparsify ----------------------------------------------------------------------------------------------

CODER = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}


def sparsify(path: Path, **cfg) -> dict[str, Tensor]:
    state = tensors(**CODER)
    path.mkdir()
    save_file(state, path / "sae.safetensors")
    (path / "cfg.json").write_text(json.dumps({"d_in": D, "k": K, "activation": "topk"} | cfg))
    return state


def test_sparsify(tmp_path) -> None:
    w = sparsify(tmp_path / "s")
    f = topk((X - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], K)
    same(mm.load_head(tmp_path / "s"), f, f @ w["W_dec"] + w["b_dec"])
    many = tmp_path / "layers"
    many.mkdir()
    sparsify(many / "visual.3")
    assert mm.load_head(many, subfolder="visual.3").id == mm.load_head(tmp_path / "s").id
    with pytest.raises(MissingWeights, match=r"It has subfolders \(visual.3\)"):
        mm.load_head(many)


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        ({"skip_connection": True}, "skip connection"),
        ({"activation": "groupmax"}, "'groupmax' is not topk"),
    ],
)
def test_sparsify_coders_that_are_no_autoencoders_of_ours(tmp_path, cfg, match) -> None:
    sparsify(tmp_path / "s", **cfg)
    with pytest.raises(MMHooksError, match=match):
        mm.load_head(tmp_path / "s")


# -- dictionary_learning -----------------------------------------------------------------------------------

LINEAR = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N)}


def dictionary(path: Path, state: dict[str, Tensor], dict_class: str | None) -> dict[str, Tensor]:
    path.mkdir()
    torch.save(state, path / "ae.pt")
    if dict_class:
        (path / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class, "k": K}}))
    return state


def test_dictionary_learning_relu_classes(tmp_path) -> None:
    w = dictionary(tmp_path / "a", tensors(**LINEAR, bias=(D,)), "AutoEncoder")
    f = ((X - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    same(mm.load_head(tmp_path / "a"), f, f @ w["decoder.weight"].T + w["bias"])
    w = dictionary(tmp_path / "b", tensors(**LINEAR) | {"decoder.bias": torch.randn(D)}, "AutoEncoderNew")
    f = (X @ w["encoder.weight"].T + w["encoder.bias"]).relu()  # this one subtracts nothing
    same(mm.load_head(tmp_path / "b"), f, f @ w["decoder.weight"].T + w["decoder.bias"])


@pytest.mark.parametrize("dict_class", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_dictionary_learning_topk_classes_have_the_same_tensors(tmp_path, dict_class) -> None:
    state = tensors(**LINEAR, b_dec=(D,)) | {"k": torch.tensor(K), "threshold": torch.tensor(0.7)}
    w = dictionary(tmp_path / "a", state, dict_class)
    z = (X - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    f = topk(z, K) if dict_class == "AutoEncoderTopK" else z.relu() * (z.relu() > 0.7)
    same(mm.load_head(tmp_path / "a"), f, f @ w["decoder.weight"].T + w["b_dec"])
    dictionary(tmp_path / "b", state, None)
    with pytest.raises(MMHooksError, match="pass kind='topk' or kind='batchtopk'"):
        mm.load_head(tmp_path / "b")
    assert mm.load_head(tmp_path / "b", kind="topk").k == K
    assert mm.load_head(tmp_path / "b" / "ae.pt", kind="batchtopk").kind == "batchtopk"
    dictionary(tmp_path / "c", state | {"threshold": torch.tensor(-1.0)}, "BatchTopKSAE")
    with pytest.raises(MMHooksError, match="training never set it"):
        mm.load_head(tmp_path / "c")
    assert float(mm.load_head(tmp_path / "c", threshold=0.5).threshold) == 0.5


def test_dictionary_learning_matryoshka_and_jumprelu(tmp_path) -> None:
    book = {"k": torch.tensor(K), "threshold": torch.tensor(0.7), "group_sizes": torch.tensor([8, 12])}
    w = dictionary(tmp_path / "m", tensors(**STANDARD) | book, None)
    z = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    f = z * (z > 0.7)
    same(mm.load_head(tmp_path / "m"), f, f @ w["W_dec"] + w["b_dec"])
    thresholds = {"threshold": torch.linspace(0, 1, N)}
    w = dictionary(tmp_path / "j", tensors(**STANDARD) | thresholds, "JumpReluAutoEncoder")
    z = X @ w["W_enc"] + w["b_enc"]  # this one subtracts nothing
    f = (z * (z > w["threshold"])).relu()
    same(mm.load_head(tmp_path / "j"), f, f @ w["W_dec"] + w["b_dec"])
    dictionary(tmp_path / "g", tensors(**STANDARD), "GatedAutoEncoder")
    with pytest.raises(MMHooksError, match="got 'GatedAutoEncoder', which is not supported"):
        mm.load_head(tmp_path / "g")


# -- overcomplete ------------------------------------------------------------------------------------------


def overcomplete_rows(w: dict[str, Tensor]) -> Tensor:
    rows = w["dictionary._weights"]
    return rows / (rows.norm(dim=1, keepdim=True) + 1e-8) * w["dictionary.multiplier"].exp()


OVER = {"dictionary._weights": (N, D), "dictionary.multiplier": ()}
FINAL = {"encoder.final_block.0.weight": (N, D), "encoder.final_block.0.bias": (N,)}


def test_overcomplete_needs_its_activation_named(tmp_path) -> None:
    w = tensors(**OVER, **FINAL)
    torch.save(w, tmp_path / "sae.pt")
    z = (X @ w["encoder.final_block.0.weight"].T + w["encoder.final_block.0.bias"]).relu()
    for options, f in (
        ({"kind": "relu"}, z),
        ({"k": K}, topk(z, K)),
        ({"threshold": 0.6}, z * (z > 0.6)),
    ):
        same(mm.load_head(tmp_path / "sae.pt", **options), f, f @ overcomplete_rows(w))
    with pytest.raises(MMHooksError, match=r"pass k=.*threshold=.*kind='relu'"):
        mm.load_head(tmp_path)
    w["thresholds"] = torch.linspace(-3, 0, N)
    save_file(w, tmp_path / "jump.safetensors")
    f = z * (z >= w["thresholds"].exp())
    same(mm.load_head(tmp_path / "jump.safetensors"), f, f @ overcomplete_rows(w))


def test_overcomplete_encoders_tied_or_with_batch_norm(tmp_path) -> None:
    w = tensors(**OVER, **{"encoder.bias": (N,)})
    torch.save(w, tmp_path / "tied.pt")
    f = (X @ overcomplete_rows(w).T + w["encoder.bias"]).relu()
    same(mm.load_head(tmp_path / "tied.pt", kind="relu"), f, f @ overcomplete_rows(w))
    norm = torch.nn.BatchNorm1d(N)
    norm(torch.randn(50, N) * 2 + 1)  # running statistics of its own
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    w = tensors(**OVER, **FINAL) | {f"encoder.final_block.1.{k}": v for k, v in norm.state_dict().items()}
    torch.save(w, tmp_path / "bn.pt")
    z = norm.eval()(X @ w["encoder.final_block.0.weight"].T + w["encoder.final_block.0.bias"])
    f = topk(z.detach(), K)
    same(mm.load_head(tmp_path / "bn.pt", k=K), f, f @ overcomplete_rows(w))
    torch.save(w | {"encoder.mlp_blocks.0.0.weight": torch.zeros(3, 3)}, tmp_path / "mlp.pt")
    with pytest.raises(MMHooksError, match="expected an encoder of one linear layer"):
        mm.load_head(tmp_path / "mlp.pt", k=K)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({}, "matching pursuit.*MpSAE"),  # MpSAE and OMPSAE have no encoder: the dictionary is all there is
        (FINAL | {"Q": (4,)}, "QSAE quantizes"),
        (FINAL | {"dictionary.Relax": (N, D)}, r"unexpected dictionary\.Relax"),  # an archetypal dictionary
        (FINAL | {"threshold": ()}, "unexpected threshold"),
    ],
)
def test_overcomplete_saes_that_compute_otherwise_are_refused(tmp_path, change, match) -> None:
    torch.save(tensors(**OVER, **change), tmp_path / "sae.pt")
    for options in ({"k": K}, {"threshold": 0.1}, {"kind": "relu"}, {}):
        with pytest.raises(MMHooksError, match=match):
            mm.load_head(tmp_path / "sae.pt", **options)


def test_overcomplete_tied_without_bias(tmp_path) -> None:
    """Its own ``sae.tied()``: the encoder's keys are the dictionary's once more."""
    w = tensors(**OVER)
    torch.save(w | {f"encoder.tied_to.{k.split('.')[1]}": v for k, v in w.items()}, tmp_path / "tied.pt")
    f = topk(X @ overcomplete_rows(w).T, K)
    same(mm.load_head(tmp_path / "tied.pt", k=K), f, f @ overcomplete_rows(w))
    torch.save(w | {"encoder.tied_to._weights": torch.ones(N, D)}, tmp_path / "else.pt")
    with pytest.raises(MMHooksError, match="to equal the dictionary"):
        mm.load_head(tmp_path / "else.pt", k=K)


# -- saev --------------------------------------------------------------------------------------------------


def saev(path: Path, header: dict, **more: Tensor) -> dict[str, Tensor]:
    state = tensors(**STANDARD) | more
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)
    return state


def activation(cls: str, **params) -> dict:
    return {"cls": cls, "params": params}


@pytest.mark.parametrize("schema", [2, 3, 5])
def test_saev(tmp_path, schema) -> None:
    path = tmp_path / "sae.pt"
    head = {"schema": schema, "commit": "c0ffee", "lib": "0.1"}
    w = saev(path, head | {"cfg": {"d_model": D, "d_sae": N, "activation": activation("Relu")}})
    z = X @ w["W_enc"] + w["b_enc"]
    same(mm.load_head(path), z.relu(), z.relu() @ w["W_dec"] + w["b_dec"])
    same(mm.load_head(tmp_path), z.relu(), z.relu() @ w["W_dec"] + w["b_dec"])
    for name in ("TopK", "BatchTopK"):  # without a threshold its BatchTopK selects within the row
        w = saev(path, head | {"cfg": {"d_model": D, "activation": activation(name, top_k=K)}})
        f = topk(z, K)
        same(mm.load_head(path), f, f @ w["W_dec"] + w["b_dec"])
    for threshold in (0.7, -0.2):
        cfg = {"d_model": D, "activation": activation("BatchTopK", top_k=K)}
        w = saev(path, head | {"cfg": cfg}, **{"activation.threshold": torch.tensor(threshold)})
        f = z * (z > max(threshold, 0))
        same(mm.load_head(path), f, f @ w["W_dec"] + w["b_dec"])


def test_saev_of_before_schema_2_subtracts_the_decoders_bias(tmp_path) -> None:
    path = tmp_path / "sae.pt"
    for header, k in (
        ({"d_vit": D, "exp_factor": 2, "ghost_grads": False, "sparsity_coeff": 4e-4}, None),
        ({"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, "top_k": K}}, K),
        (
            {
                "schema": 1,
                "cls": "SparseAutoencoderConfig",
                "cfg": {"activation": activation("TopK", top_k=K)},
            },
            K,
        ),
    ):
        w = saev(path, header)
        z = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        f = z.relu() if k is None else topk(z, k)
        same(mm.load_head(path), f, f @ w["W_dec"] + w["b_dec"])


def test_saev_files_that_are_not_read(tmp_path) -> None:
    path = tmp_path / "sae.pt"
    for header, match in (
        ({"schema": 6, "cfg": {}}, "schema of saev up to 5, got 6"),
        ({"schema": 5, "cfg": {"activation": activation("Gated")}}, "got 'Gated', which is not supported"),
        ({"schema": 5, "cfg": {"d_model": D + 1, "activation": activation("Relu")}}, "width 7, W_enc has 6"),
    ):
        saev(path, header)
        with pytest.raises(MMHooksError, match=match):
            mm.load_head(path)
    saev(path, {"schema": 5, "cfg": {"activation": activation("Relu")}}, surplus=torch.zeros(1))
    with pytest.raises(MMHooksError, match="unexpected surplus"):
        mm.load_head(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DamagedFile, match=r"sae\.pt cannot be read"):
        mm.load_head(path)


# -- MSAE and Prisma ---------------------------------------------------------------------------------------

AUTO = {"encoder": (D, N), "latent_bias": (N,), "decoder": (N, D), "pre_bias": (D,)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [None, K])
def test_msae(tmp_path, tied, k) -> None:
    model = tensors(**AUTO) | {"latents_activation_frequency": torch.zeros(N, dtype=torch.int64)}
    if tied:
        del model["decoder"]
    mean = torch.randn(D)
    payload = {"model": model, "mean_center": mean, "scaling_factor": 3.7, "target_norm": 1.0}
    path = tmp_path / f"{N}_{D}_TopKReLU_2_RW_{tied}_False_0.0_cc3m_ViT-L~14_train_image_2905936_768.pth"
    torch.save(payload, path)
    x = (X - mean) * 3.7
    f = ((x - model["pre_bias"]) @ model["encoder"] + model["latent_bias"]).relu()
    f = f if k is None else topk(f, k)
    decoder = model["encoder"].T if tied else model["decoder"]
    recon = (f @ decoder + model["pre_bias"]) / 3.7 + mean
    same(mm.load_head(path, k=k), f, recon)
    same(mm.load_head(tmp_path, k=k), f, recon)


def test_msae_jumprelu_and_names_that_are_not_read(tmp_path) -> None:
    model = tensors(**AUTO) | {"activation.log_threshold": torch.linspace(-2, 0, N)}
    payload = {"model": model, "mean_center": 0.0, "scaling_factor": 1.0, "target_norm": 1.0}
    path = tmp_path / f"{N}_{D}_JumpReLU_False_False_0.0_cc3m.pth"
    torch.save(payload, path)
    z = ((X - model["pre_bias"]) @ model["encoder"] + model["latent_bias"]).relu()
    f = z * (z > model["activation.log_threshold"].exp())
    same(mm.load_head(path), f, f @ model["decoder"] + model["pre_bias"])
    for name, match in (
        ("best.pth", "expected a file name with MSAE's configuration"),
        (f"{N}_{D}_TopKabs_4_False_False_0.0_x.pth", "got TopKabs"),
        (f"{N}_{D}_TopKReLU_4_False_False_30.0_x.pth", "soft cap 30.0"),
    ):
        torch.save(payload, tmp_path / name)
        with pytest.raises(MMHooksError, match=match):
            mm.load_head(tmp_path / name)


def prisma(path: Path, **cfg) -> dict[str, Tensor]:
    path.mkdir()
    state = tensors(**STANDARD)
    torch.save(state, path / "n_images_2600058.pt")
    cfg = {"architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {}} | cfg
    (path / "config.json").write_text(json.dumps(cfg | {"d_in": D}))
    return state


def test_prisma(tmp_path) -> None:
    w = prisma(tmp_path / "relu")
    z = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    same(mm.load_head(tmp_path / "relu"), z.relu(), z.relu() @ w["W_dec"] + w["b_dec"])
    prisma(tmp_path / "topk", activation_fn_str="topk", activation_fn_kwargs={"k": K})
    f = topk(z, K)
    same(mm.load_head(tmp_path / "topk"), f, f @ w["W_dec"] + w["b_dec"])
    prisma(tmp_path / "scaled", normalize_activations="constant_norm_rescale")
    scale = D**0.5 / X.norm(dim=-1, keepdim=True)
    f = ((X * scale - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    recon = (f @ w["W_dec"] + w["b_dec"]) / scale
    head = mm.load_head(tmp_path / "scaled")
    same(head, f, recon / X.norm(dim=-1, keepdim=True), x=head.prepare(X))
    same(head, f, recon)
    for cfg, match in (
        ({"architecture": "gated"}, "'gated'"),
        ({"activation_fn_str": "tanh-relu"}, "'tanh-relu'"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
    ):
        prisma(tmp_path / str(match), **cfg)
        with pytest.raises(MMHooksError, match=match):
            mm.load_head(tmp_path / str(match))


class VisionModelSAERunnerConfig:
    """Stands for ViT-Prisma's class of this name while a file is written."""


def test_prismas_own_save_model_without_running_its_configuration(tmp_path, monkeypatch) -> None:
    """``torch.save({"cfg": a pickled dataclass, "state_dict": ...})``: attributes are read, no class is imported."""
    import sys
    import types

    package = types.ModuleType("vit_prisma")
    for name in ("vit_prisma", "vit_prisma.sae", "vit_prisma.sae.config"):
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(package, "VisionModelSAERunnerConfig", VisionModelSAERunnerConfig, raising=False)
    monkeypatch.setattr(VisionModelSAERunnerConfig, "__module__", "vit_prisma.sae.config")
    for fields, k in (
        ({"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, K),
        ({"architecture": "standard", "activation_fn_str": "relu", "_dtype": "float32", "lr": 1e-3}, None),
    ):
        cfg, state = VisionModelSAERunnerConfig(), tensors(**STANDARD)
        vars(cfg).update(fields | {"normalize_activations": "layer_norm", "d_in": D})
        torch.save({"cfg": cfg, "state_dict": state}, tmp_path / f"{k}.pt")
    cfg.is_transcoder = True
    torch.save({"cfg": cfg, "state_dict": state}, tmp_path / "transcoder.pt")
    torch.save({"cfg": cfg, "state_dict": state, "other": Evil()}, tmp_path / "evil.pt")
    for name in ("vit_prisma", "vit_prisma.sae", "vit_prisma.sae.config"):
        monkeypatch.delitem(sys.modules, name)

    rows, mu, std = layer_norm(X)
    z = (rows - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    for k in (K, None):
        f = z.relu() if k is None else topk(z, k)
        head = mm.load_head(tmp_path / f"{k}.pt")
        same(head, f, (f @ state["W_dec"] + state["b_dec"]) * std + mu)
        assert head.info["cfg"]["d_in"] == D and head.normalize_input == "layer_norm"
    with pytest.raises(MMHooksError, match="transcoder"):
        mm.load_head(tmp_path / "transcoder.pt")
    with pytest.raises(MMHooksError, match="pickles builtins print|pickles __builtin__ print"):
        mm.load_head(tmp_path / "evil.pt")


# -- one door ----------------------------------------------------------------------------------------------


def test_unknown_files_are_listed_beside_what_is_understood(tmp_path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"?")
    with pytest.raises(MissingWeights) as caught:
        mm.load_head(tmp_path)
    assert "Found: weights.bin" in str(caught.value)
    assert all(format.name in str(caught.value) and format.files in str(caught.value) for format in FORMATS)


class Evil:
    def __reduce__(self):
        return (print, ("code of a file was run",))


def test_pickled_objects_are_not_opened(tmp_path, capsys) -> None:
    torch.save({"cfg": Evil(), "state_dict": tensors(**STANDARD)}, tmp_path / "legacy.pt")
    with pytest.raises(MMHooksError, match=r"plain tensors.*save its state_dict\(\)"):
        mm.load_head(tmp_path / "legacy.pt")
    assert capsys.readouterr().out == ""


def test_our_own_format_leaves_nothing_open(tmp_path) -> None:
    path = mm.TopKSAE(D, N, K).save(tmp_path / "own")
    assert read_head(path).id == mm.load_head(path, name="probe").id
    assert mm.load_head(path, name="probe").name == "probe"
    with pytest.raises(MMHooksError, match="expected no k"):
        mm.load_head(path, k=4)


def attached_saelens(path: Path):
    w = saelens(path)
    return lambda x: topk((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K) @ w["W_dec"] + w["b_dec"]


def attached_sparsify(path: Path):
    w = sparsify(path)
    return lambda x: (
        topk((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], K) @ w["W_dec"] + w["b_dec"]
    )


def attached_dictionary(path: Path):
    w = dictionary(path, tensors(**LINEAR, bias=(D,)), "AutoEncoder")

    def recon(x: Tensor) -> Tensor:
        f = ((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
        return f @ w["decoder.weight"].T + w["bias"]

    return recon


def attached_msae(path: Path):
    w = tensors(**AUTO)
    path.mkdir()
    payload = {"model": w, "mean_center": 0.1, "scaling_factor": 2.0, "target_norm": 1.0}
    torch.save(payload, path / f"{N}_{D}_ReLU_03_False_False_0.0_cc3m.pth")

    def recon(x: Tensor) -> Tensor:
        f = (((x - 0.1) * 2 - w["pre_bias"]) @ w["encoder"] + w["latent_bias"]).relu()
        return (f @ w["decoder"] + w["pre_bias"]) / 2 + 0.1

    return recon


def attached_prisma(path: Path):
    w = prisma(path)
    return lambda x: ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu() @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize(
    "write", [attached_saelens, attached_sparsify, attached_dictionary, attached_msae, attached_prisma]
)
def test_a_foreign_head_attached_reconstructs_as_its_library(tmp_path, write) -> None:
    """In the graph: the reconstruction site carries the library's own reconstruction of the embedding."""
    recon_of = write(tmp_path / "h")
    model, images = tiny_model()
    head = mm.load_head(tmp_path / "h")
    site = f"image.embed.{head.name}"
    with torch.no_grad():
        x = model.encode_image(images)
        model.attach(head, at="image.embed", error_term=False)
        assert torch.equal(model.encode_image(images), x)
        _, cache = model.run_with_cache(images=images, sites=[f"{site}.recon"])
        off = (head.encode(x) == 0).all(dim=0).nonzero().flatten()
        with model.hooks(mask=off if len(off) else [0]):
            out = model.encode_image(images)
    torch.testing.assert_close(cache[f"{site}.recon"], recon_of(x), atol=1e-5, rtol=1e-5)
    if len(off):  # an edit without effect, error term off: the reconstruction itself flows on
        torch.testing.assert_close(out, recon_of(x), atol=1e-5, rtol=1e-5)


def test_small_files_that_grow_large_are_refused(tmp_path) -> None:
    """Strides of zero, names of one storage, a configuration larger than its weights: before anything is allocated."""
    wide = {
        "encoder.weight": torch.zeros(1).expand(30_000, 30_000),
        "encoder.bias": torch.zeros(1).expand(30_000),
    }
    wide |= {"decoder.weight": torch.zeros(1).expand(30_000, 30_000), "bias": torch.zeros(1).expand(30_000)}
    torch.save(wide, tmp_path / "wide.pt")
    with pytest.raises(DamagedFile, match=r"wide\.pt has [\d,]+ bytes but announces"):
        mm.load_head(tmp_path / "wide.pt")
    path = mm.TopKSAE(D, N, K).save(tmp_path / "own")
    about = json.loads((path / "config.json").read_text())
    about["config"] |= {"d_in": 30_000, "n_features": 30_000}
    (path / "config.json").write_text(json.dumps(about))
    with pytest.raises(MMHooksError, match=r"W_dec is \[20, 6\], not \[30000, 30000\]"):
        mm.load_head(path)
    many = {f"w{i}": torch.zeros(500) for i in range(3)}
    torch.save({**many, **{f"x{i}": many["w0"] for i in range(40)}}, tmp_path / "many.pt")
    with pytest.raises(DamagedFile, match="views that repeat"):
        mm.load_head(tmp_path / "many.pt")
    compressed = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED)
    compressed.writestr("archive/data.pkl", b"0" * 10_000_000)
    compressed.close()
    with pytest.raises(DamagedFile, match="compressed records"):
        mm.load_head(tmp_path / "bomb.pt")


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json"])
def test_damaged_foreign_files_say_what_was_found(tmp_path, name) -> None:
    saelens(tmp_path / "s")
    file = tmp_path / "s" / name
    whole = file.read_bytes()
    for bad in (b"", b"{", whole[: len(whole) // 2], b"\xff" * 40, b"[1]", b"\x00" * 8):
        file.write_bytes(bad)
        with pytest.raises(DamagedFile, match=name):
            mm.load_head(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"d_in": "6"}, "d_in must be a whole number, got '6'"),
        ({"k": "3"}, "k must be a number"),
        ({"normalize_activations": 1}, "normalize_activations must be text"),
        ({"apply_b_dec_to_input": "False"}, "apply_b_dec_to_input must be true or false, got 'False'"),
        ({"metadata": {"mmhooks": {"kind": "topkk"}}}, "'topkk'"),
    ],
)
def test_saelens_fields_of_other_types_are_refused(tmp_path, change, match) -> None:
    saelens(tmp_path / "s", **change)
    with pytest.raises(DamagedFile, match=match):
        mm.load_head(tmp_path / "s")


def test_weights_that_are_no_numbers_are_refused_in_every_format(tmp_path) -> None:
    bad = tensors(**STANDARD)
    bad["W_dec"][3, 1] = float("nan")
    saelens(tmp_path / "s", bad)
    with pytest.raises(NotFinite, match="1 of 120 values of W_dec"):
        mm.load_head(tmp_path / "s")
