"""The interface every head keeps, its files and its content id."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmhooks.errors import DamagedFile, MissingWeights, MMHooksError, NoDecoder, NotFinite, ShapeMismatch
from mmhooks.heads import (
    NCL,
    ArchetypalSAE,
    BatchTopKSAE,
    Crosscoder,
    GatedSAE,
    Head,
    JumpReLUSAE,
    MatchingPursuitSAE,
    MatryoshkaSAE,
    ReLUSAE,
    TopKSAE,
    Transcoder,
    load_head_dir,
)
from mmhooks.heads.base import KINDS


def calibrated() -> BatchTopKSAE:
    head = BatchTopKSAE(16, 48, 5)
    head.calibrate(torch.randn(200, 16, generator=torch.Generator().manual_seed(1)))
    return head


def decodable() -> NCL:
    head = NCL(16, 48, hidden=20)
    head.fit_decoder(torch.randn(200, 16, generator=torch.Generator().manual_seed(1)))
    return head


def with_points() -> ArchetypalSAE:
    head = ArchetypalSAE(16, 48, 5, n_points=60, delta=0.1)
    head.set_points(torch.randn(60, 16, generator=torch.Generator().manual_seed(1)))
    return head


def gated() -> GatedSAE:
    head, g = GatedSAE(16, 48), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (head.r_mag, head.b_mag, head.b_enc):
            p.copy_(0.1 * torch.randn(48, generator=g))
    return head


HEADS = {
    "topk": lambda: TopKSAE(16, 48, 5),
    "batchtopk": calibrated,
    "matryoshka": lambda: MatryoshkaSAE(16, 48, 5, widths=(12, 48)),
    "nested K": lambda: MatryoshkaSAE(16, 48, 5, ks=(2, 5)),
    "jumprelu": lambda: JumpReLUSAE(16, 48, threshold=0.2),
    "relu": lambda: ReLUSAE(16, 48),
    "gated": gated,
    "matching pursuit": lambda: MatchingPursuitSAE(16, 48, 5),
    "archetypal": with_points,
    "crosscoder": lambda: Crosscoder(16, 48, 5, widths=(6, 10)),
    "transcoder": lambda: Transcoder(16, 48, 5),
    "transcoder with skip": lambda: Transcoder(16, 48, 5, skip=True),
    "ncl": lambda: NCL(16, 48, hidden=20),
    "ncl with decoder": decodable,
}


def test_every_kind_is_tested_here() -> None:
    assert {make().kind for make in HEADS.values()} == set(KINDS)
    others = {"crosscoder", "gated", "matching_pursuit", "archetypal", "ncl", "transcoder"}
    assert set(KINDS) == {"topk", "batchtopk", "matryoshka", "jumprelu", "relu"} | others


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> Head:
    return HEADS[request.param]()


def test_shapes_signs_and_gradient_to_the_input(head: Head) -> None:
    x = torch.randn(2, 3, 16, requires_grad=True)
    f = head.encode(x)
    assert f.shape == head.pre(x).shape == (2, 3, 48)
    assert bool((f >= 0).all()) and bool((f > 0).any())
    f.sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    assert head.encode(torch.zeros(16)).shape == (48,)


def test_encoder_gradient_equals_finite_differences(head: Head) -> None:
    head.double()
    x = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    direction = torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (grad,) = torch.autograd.grad((head.encode(x) * direction).sum(), x)
    h = 1e-6
    for i in range(16):
        step = torch.zeros(16, dtype=torch.float64)
        step[i] = h
        slope = ((head.encode(x + step) - head.encode(x - step)) * direction).sum() / (2 * h)
        assert float(slope.detach()) == pytest.approx(float(grad[i]), abs=1e-6)


def test_decoder_or_a_clear_refusal(head: Head) -> None:
    f = head.encode(torch.randn(4, 16))
    if head.has_decoder:
        assert head.decode(f).shape == (4, 16)
        assert head.W_dec.shape == (48, 16)
        with pytest.raises(ShapeMismatch, match="48"):
            head.decode(f[:, :-1])
    else:
        with pytest.raises(NoDecoder, match="no decoder"):
            head.decode(f)


def test_wrong_width_names_both_numbers(head: Head) -> None:
    for call in (head.pre, head.encode, head.prepare):
        with pytest.raises(ShapeMismatch, match=r"16.*\(4, 15\)"):
            call(torch.randn(4, 15))


def test_prepare_normalises_and_refuses_what_is_no_number(head: Head) -> None:
    x = torch.randn(5, 16) * 7
    lengths = torch.ones(5) if head.normalize_input else x.norm(dim=-1)
    torch.testing.assert_close(head.prepare(x).norm(dim=-1), lengths)
    x[3, 2] = float("nan")
    with pytest.raises(NotFinite, match="1 of 5 rows, the first is row 3"):
        head.prepare(x)
    if not head.normalize_input:
        return
    with pytest.raises(NotFinite, match="unit norm, got 2 of 4 that are all zero"):
        head.prepare(torch.cat([torch.zeros(2, 16), torch.ones(2, 16)]))


@pytest.mark.parametrize("normalize_input", [True, "layer_norm", False])
@pytest.mark.parametrize(
    "kind", ["topk", "jumprelu", "relu", "gated", "matching pursuit", "archetypal", "ncl with decoder"]
)
def test_every_way_to_run_a_head_agrees_about_where_it_normalises(kind, normalize_input) -> None:
    """Raw vectors in: pre, encode, encode_topk, head(x), prepare and the splice see the same features."""
    head = HEADS[kind]()
    head.normalize_input = normalize_input
    raw = torch.randn(5, 16, generator=torch.Generator().manual_seed(7)) * 40 + 3
    rows, scale, shift = head.scaled(raw)
    bare = head.bare()
    with torch.no_grad():
        f = bare.encode(rows)
        assert bare.W_dec.data_ptr() == head.W_dec.data_ptr() and head.normalize_input == normalize_input
        assert torch.equal(head.encode(raw), f) and torch.equal(head.pre(raw), bare.pre(rows))
        assert torch.equal(head.encode(head.prepare(raw)), f)  # prepared already: nothing twice
        assert torch.equal(head.pre(head.prepare(raw)), bare.pre(rows))
        recon = bare.decode(f) * (1 if scale is None else scale) + (0 if shift is None else shift)
        assert torch.equal(head(raw), recon)
        if hasattr(head, "encode_topk"):
            values, indices = head.encode_topk(raw)
            assert torch.equal(torch.zeros_like(f).scatter(-1, indices, values), f)
        assert torch.equal(head.encode(raw[0]), f[0]) or torch.allclose(head.encode(raw[0]), f[0])


def test_unnormalised_head_takes_rows_as_they_are() -> None:
    x = torch.randn(5, 16) * 7
    assert torch.equal(TopKSAE(16, 48, 5, normalize_input=False).prepare(x), x)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_files_round_trip(head: Head, tmp_path, dtype) -> None:
    head.info["trained on"] = "noise"
    head.name = "probe"
    back = load_head_dir(head.save(tmp_path / "h", dtype=dtype))
    assert type(back) is type(head) and back.config() == head.config()
    assert (back.id, back.name, back.info) == (head.id, "probe", {"trained on": "noise"})
    x = head.prepare(torch.randn(7, 16))
    if dtype == "fp32":
        assert torch.equal(back.encode(x), head.encode(x))
    else:
        torch.testing.assert_close(back.pre(x), head.pre(x), atol=5e-3, rtol=0)
        assert all(t.dtype == torch.float16 for t in load_file(tmp_path / "h" / "model.safetensors").values())
    assert type(head).load(tmp_path / "h").id == head.id
    assert type(head).from_dir(tmp_path / "h").id == head.id


def test_id_follows_content_only(head: Head) -> None:
    before = head.id
    head.name, head.info["x"] = "other", 1
    assert head.id == before
    with torch.no_grad():
        next(head.parameters())[0, 0] += 0.1
    assert head.id != before


def test_id_knows_the_configuration() -> None:
    a, b = TopKSAE(16, 48, 5), TopKSAE(16, 48, 6)
    assert torch.equal(a.W_dec, b.W_dec) and a.id != b.id


def test_loading_refuses_what_is_not_there_or_does_not_fit(tmp_path) -> None:
    with pytest.raises(MissingWeights, match="no head in"):
        load_head_dir(tmp_path / "nowhere")
    path = TopKSAE(16, 48, 5).save(tmp_path / "h")
    with pytest.raises(MMHooksError, match="expected a NCL, got a TopKSAE"):
        NCL.load(path)

    weights = load_file(path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "b_enc"} | {"extra": torch.zeros(1)},
        path / "model.safetensors",
    )
    with pytest.raises(MMHooksError, match="missing b_enc; unexpected extra"):
        load_head_dir(path)
    save_file(weights | {"b_pre": torch.zeros(15)}, path / "model.safetensors")
    with pytest.raises(MMHooksError, match=r"b_pre is \[15\], not \[16\]"):
        load_head_dir(path)

    meta = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(meta | {"kind": "topkk"}))
    with pytest.raises(
        MMHooksError, match=r"expected a kind of head among .*ncl, relu, .*topk, transcoder, got 'topkk'"
    ):
        load_head_dir(path)


def test_bad_sizes() -> None:
    with pytest.raises(ShapeMismatch, match="k must lie in"):
        TopKSAE(4, 8, 9)
    with pytest.raises(ShapeMismatch, match="got 0 and 8"):
        NCL(0, 8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"normalize_input": "False"}, "normalize_input must be true, false or \"layer_norm\", got 'False'"),
        ({"k": True}, "k must be a whole number"),
        ({"k": 5.0}, "k must be a whole number"),
        ({"d_in": "16"}, "d_in must be"),
        ({"n_features": 0}, "n_features must be"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"k": 99}, "k must lie in"),
    ],
)
def test_configurations_are_read_field_by_field(tmp_path, change, match) -> None:
    """Also of files without digests, as they were written before."""
    path = TopKSAE(16, 48, 5).save(tmp_path / "h")
    about = json.loads((path / "config.json").read_text())
    about = {k: v for k, v in about.items() if k not in ("weights", "digest")}
    about["config"] |= change
    (path / "config.json").write_text(json.dumps(about))
    save_file(load_file(path / "model.safetensors"), path / "model.safetensors")
    with pytest.raises(DamagedFile, match=match):
        load_head_dir(path)


def test_heads_of_before_digests_are_compared_by_their_id(head: Head, tmp_path) -> None:
    path = head.save(tmp_path / "h", dtype="fp16")
    about = {
        k: v
        for k, v in json.loads((path / "config.json").read_text()).items()
        if k not in ("weights", "digest")
    }
    (path / "config.json").write_text(json.dumps(about))
    weights = load_file(path / "model.safetensors")
    save_file(weights, path / "model.safetensors", {"id": head.id})
    assert load_head_dir(path).id == head.id
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1
    save_file(weights, path / "model.safetensors")
    with pytest.raises(DamagedFile, match="is not the head that was saved"):
        load_head_dir(path)
    save_file({k: v.float() for k, v in load_head_dir(head.save(tmp_path / "i")).state_dict().items()},
              path / "model.safetensors")  # fmt: skip
    with pytest.warns(UserWarning, match="verified in half precision only"):
        load_head_dir(path)


def test_weights_of_one_head_with_the_configuration_of_another(tmp_path) -> None:
    a, b = TopKSAE(16, 48, 5), TopKSAE(16, 48, 6, seed=1)
    one, two = a.save(tmp_path / "a"), b.save(tmp_path / "b")
    whole = (two / "model.safetensors").read_bytes()
    (one / "model.safetensors").write_bytes(whole)  # a save killed before its second file
    with pytest.warns(UserWarning, match="a save was interrupted between them"):
        assert load_head_dir(one).id == b.id
    save_file(load_file(two / "model.safetensors"), one / "model.safetensors")
    with pytest.raises(DamagedFile, match="does not hold the weights that were saved"):
        load_head_dir(one)


def test_info_that_is_no_json_is_named(tmp_path) -> None:
    head = TopKSAE(16, 48, 5)
    head.info = {"rows": torch.ones(2)}
    with pytest.raises(MMHooksError, match=r"head\.info: expected values that JSON"):
        head.save(tmp_path / "h")
    assert not (tmp_path / "h" / "config.json").exists()
