"""Decompositions against the paper's equations as loops, and exact sums for every family that open_clip lists."""

from __future__ import annotations

import weakref

import open_clip
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmhooks as mm
from mmhooks.analysis.decomposition.dataset import MeanDecomposition, decompositions, head_outputs
from mmhooks.errors import DataError, MMHooksError, NoExactSum, ShapeMismatch
from mmhooks.models.clip.sites import example_inputs
from mmhooks.models.embedded.mini import build

SMALL = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}


def clip(vision: dict | None = None, text: dict | None = None, kind: str = "CLIP") -> mm.HookedCLIP:
    torch.manual_seed(0)
    model = getattr(open_clip, kind)(12, {**SMALL, **(vision or {})}, {**TEXT, **(text or {})}).eval()
    with torch.no_grad():  # LayerNorms and biases that do something
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "scale" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return mm.HookedCLIP(model)


@pytest.fixture(scope="module")
def mini() -> mm.HookedCLIP:
    return mm.load("mini")


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(model: mm.HookedCLIP, pixels: Tensor) -> tuple[Tensor, ...]:
    """initial, heads, mlps, tokens of a class-token ViT: the paper's equations as loops, in double precision."""
    visual = model.model.visual
    blocks = visual.transformer.resblocks
    _, cache = model.run_with_cache(pixels, sites=["image.blocks.*"])
    norm, proj = visual.ln_post, visual.proj.double()
    last = cache[f"image.blocks.{len(blocks) - 1}.resid_post"][:, 0].double()
    mean, sigma = last.mean(-1), (last.var(-1, correction=0) + norm.eps).sqrt()
    parts = 1 + 2 * len(blocks)

    def read(x: Tensor, i: int, share: float) -> Tensor:
        centred = (x.double() - mean[i] / parts * share) / sigma[i]
        return (norm.weight.double() * centred + norm.bias.double() / parts * share) @ proj

    b, tokens = len(pixels), cache["image.blocks.0.resid_pre"].shape[1]
    n_heads, e = blocks[0].attn.num_heads, proj.shape[1]
    initial = torch.stack([read(cache["image.blocks.0.resid_pre"][i, 0], i, 1) for i in range(b)])
    mlps = torch.zeros(b, len(blocks), e, dtype=torch.float64)
    split = torch.zeros(b, len(blocks), n_heads, tokens, e, dtype=torch.float64)
    for i in range(b):
        for n, block in enumerate(blocks):
            mlps[i, n] = read(cache[f"image.blocks.{n}.mlp_out"][i, 0], i, 1)
            width = block.attn.head_dim
            for h in range(n_heads):
                w_o = block.attn.out_proj.weight[:, h * width : (h + 1) * width].double()
                for t in range(tokens):
                    value = cache[f"image.blocks.{n}.attn.v"][i, t, h].double()
                    weight = cache[f"image.blocks.{n}.attn.pattern"][i, h, 0, t].double()
                    whole = weight * (w_o @ value)
                    whole = whole + block.attn.out_proj.bias.double() / (n_heads * tokens)
                    split[i, n, h, t] = read(whole, i, 1 / (n_heads * tokens))
    return initial, split.sum(3), mlps, split


@pytest.mark.parametrize("act", [{}, {"quick_gelu": True}], ids=["GELU", "QuickGELU"])
def test_equal_to_the_papers_equations(act):
    torch.manual_seed(0)
    model = clip() if not act else mm.HookedCLIP(open_clip.CLIP(12, dict(SMALL), dict(TEXT), **act).eval())
    pixels = images(3)
    texts = torch.randn(5, 12)
    initial, heads, mlps, tokens = by_hand(model, pixels)
    found = mm.decompose(model, pixels, tokens=True, against=texts)
    for ours, theirs in (
        (found.initial, initial),
        (found.heads, heads),
        (found.mlps, mlps),
        (found.tokens, tokens),
        (found.scores, tokens @ texts.double().T),
    ):
        assert ours is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-6)
    with torch.no_grad():
        assert torch.equal(found.embedding, model.encode_image(pixels))


KINDS = {
    "class token": {},
    "average, norm before": {"pool_type": "avg"},
    "average, norm after": {"pool_type": "avg", "final_ln_after_pool": True},
    "no norm before the blocks": {"no_ln_pre": True},
    "layer scale": {"ls_init_value": 0.1},
    "attention pooling": {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2},
    "scaled heads, q and k normed": {"block_type": "custom", "qk_norm": True, "scale_heads": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_marginals(kind):
    model = clip(KINDS[kind])
    pixels = images(3)
    by_token = kind != "scaled heads, q and k normed"
    found = mm.decompose(model, pixels, tokens=by_token)
    assert float(found.error.max()) < 1e-5
    torch.testing.assert_close(found.total, found.embedding, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.attention, found.heads.sum(2))
    shares = torch.stack([value.reshape(3, -1).sum(1) for value in found.shares().values()]).sum(0)
    torch.testing.assert_close(shares, torch.ones(3), rtol=1e-5, atol=1e-5)
    if found.tokens is not None:
        torch.testing.assert_close(found.tokens.sum(3), found.heads, rtol=1e-4, atol=1e-6)


def test_a_head_that_scales_z_has_no_tokens():
    model = clip({**KINDS["scaled heads, q and k normed"]})
    with torch.no_grad():
        for block in model.model.visual.transformer.resblocks:
            block.attn.head_scale.mul_(3)
    mm.decompose(model, images())
    with pytest.raises(NoExactSum, match="no sum over tokens"):
        mm.decompose(model, images(), tokens=True)


@pytest.mark.parametrize(
    "text",
    [{}, {"pool_type": "last", "no_causal_mask": True}, {"pool_type": "eos", "eos_id": 62}, {"pool_type": "first"},
     {"proj_bias": True}, {"embed_cls": True}],
    ids=str,
)  # fmt: skip
def test_text_towers(text):
    model = clip(text=text, kind="CustomTextCLIP")
    _, tokens = example_inputs(model.model, batch=3)
    tokens[1, 3] = 63  # an end of text in the middle
    tokens[1, 4:] = 0
    found = mm.decompose(model, texts=tokens, tokens=True)
    assert float(found.error.max()) < 1e-5
    assert found.tokens is not None and found.tokens.shape[3] == tokens.shape[1] + bool(text.get("embed_cls"))


def test_text_after_the_end_token_only_contributes_the_even_share():
    """Under a causal mask nothing after the end of text is attended, so only the even share is left."""
    model = mm.HookedCLIP(build().eval())
    tokens = mm.load("mini").tokenizer(["a cat"])  # type: ignore[misc]
    found = mm.decompose(model, texts=tokens, tokens=True)
    assert found.tokens is not None
    behind = found.tokens[0, :, :, int(tokens.argmax()) + 1 :]
    assert float((behind - behind[:, :, :1]).abs().max()) < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP"])
def test_large_models(name):
    torch.manual_seed(0)
    model = mm.HookedCLIP(open_clip.create_model(name, pretrained=None).eval())
    pixels, texts = example_inputs(model.model)
    for found in (mm.decompose(model, pixels, tokens=True), mm.decompose(model, texts=texts)):
        assert float(found.error.max()) < 1e-5
        if found.tokens is not None:
            torch.testing.assert_close(found.tokens.sum(3), found.heads, rtol=1e-4, atol=1e-5)


def test_mini_is_exact(mini):
    found = mm.decompose(mini, images(4, 64), tokens=True)
    assert float(found.error.max()) < 1e-5
    assert (found.pool is None) and found.tokens is not None
    torch.testing.assert_close(found.tokens.sum(3), found.heads, rtol=1e-4, atol=1e-5)


def test_normalized_parts_sum_to_the_unit_vector(mini):
    found = mm.decompose(mini, images(2, 64), normalize=True)
    torch.testing.assert_close(found.total.norm(dim=1), torch.ones(2), rtol=1e-5, atol=0)


# -- data sets ---------------------------------------------------------------------------------------------------


def test_running_means_are_means(mini):
    pixels = images(7, 64)
    whole = mm.decompose(mini, pixels)
    for data in (iter(pixels.split(3)), [pixels[:1], pixels[1:]]):
        means = mm.decompose(mini, data, batch_size=2)
        assert isinstance(means, MeanDecomposition) and means.n == 7
        torch.testing.assert_close(means.heads, whole.heads.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(means.total, means.embedding, rtol=1e-4, atol=1e-5)
    assert "block 5" in mm.decompose(mini, [pixels]).table().markdown()


def test_means_are_saved_and_loaded(mini, tmp_path):
    means = mm.decompose(mini, [images(2, 64)])
    again = MeanDecomposition.load(means.save(tmp_path / "means.safetensors"))
    assert again.n == 2 and again.pool is None and torch.equal(again.heads, means.heads)
    assert again.table() == means.table()


def test_head_outputs_of_pairs(mini):
    pairs = mm.data.pairs("mini", limit=5)
    rows = head_outputs(mini, pairs, layers=[-2, -1], batch_size=2)
    pixels = torch.stack([mini.preprocess(pair.image) for pair in pairs])  # type: ignore[misc]
    torch.testing.assert_close(rows, mm.decompose(mini, pixels).heads[:, -2:], rtol=1e-4, atol=1e-5)
    texts = head_outputs(mini, pairs, tower="text", normalize=True)
    whole = mm.decompose(mini, texts=mini.tokenizer(pairs.texts), normalize=True)  # type: ignore[misc]
    torch.testing.assert_close(texts, whole.heads, rtol=1e-4, atol=1e-5)


class Peak(TorchDispatchMode):
    """Records the peak of bytes of tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for value in tree_leaves(out):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in self._seen | given:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@torch.no_grad()
def peak(run) -> int:
    with Peak() as memory:
        kept = run()
    del kept
    return memory.most


def test_memory_does_not_grow_with_the_data(mini):
    def data(n: int):
        return (torch.randn(8, 3, 64, 64) for _ in range(n))

    few, many = (peak(lambda n=n: mm.decompose(mini, data(n))) for n in (2, 12))
    assert few > 2**20 and many < 1.02 * few


@pytest.mark.slow
def test_a_batch_needs_little_more_memory_than_its_forward_pass():
    model = mm.HookedCLIP(open_clip.create_model("ViT-B-32", pretrained=None).eval())
    pixels = torch.randn(32, 3, 224, 224)
    plain = peak(lambda: model.encode_image(pixels))
    assert plain > 2**24
    assert peak(lambda: mm.decompose(model, pixels)) < 1.5 * plain


# -- never silent ------------------------------------------------------------------------------------------------


def test_architectures_without_an_exact_sum_say_why():
    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    model = mm.HookedCLIP(open_clip.CLIP(12, resnet, dict(TEXT)).eval())
    with pytest.raises(NoExactSum, match="ModifiedResNet.*take a ViT"):
        mm.decompose(model, images(1, 64))
    with pytest.raises(NoExactSum, match="scale_attn"):
        mm.decompose(clip({"block_type": "custom", "scale_attn": True}), images())


def test_an_edit_behind_the_sites_raises_and_one_before_them_is_decomposed(mini):
    pixels = images(2, 64)
    with mini.hooks(mm.Zero([1], at="image.blocks.4.attn.z")):
        found = mm.decompose(mini, pixels)
        torch.testing.assert_close(found.embedding, mini.encode_image(pixels).detach())
    assert float(found.error.max()) < 1e-5
    with (
        mini.hooks(mm.Zero([1], at="image.blocks.4.attn.head_out")),
        pytest.raises(NoExactSum, match="decompose outside of it"),
    ):
        mm.decompose(mini, pixels)


def test_inputs_that_cannot_be_decomposed(mini):
    with pytest.raises(ShapeMismatch, match="one of them"):
        mm.decompose(mini)
    with pytest.raises(ShapeMismatch, match="no rows"):
        mm.decompose(mini, images(2, 64)[:0])
    with pytest.raises(ShapeMismatch, match="width 7"):
        mm.decompose(mini, images(1, 64), against=torch.randn(2, 7))
    with pytest.raises(DataError, match="no images"):
        mm.decompose(mini, [])
    with pytest.raises(ShapeMismatch, match="got a str"):
        mm.decompose(mini, ["a picture"])
    with pytest.raises(MMHooksError, match="batch by batch"):
        mm.decompose(mini, [images(1, 64)], tokens=True)
    with pytest.raises(ShapeMismatch, match="of a tower of 6 layers"):
        head_outputs(mini, images(1, 64), layers=[6])


def test_no_hooks_stay_behind(mini):
    pixels = images(2, 64)
    with torch.no_grad():
        before = mini.encode_image(pixels)
        list(decompositions(mini, pixels, tokens=True))
        assert torch.equal(before, mini.encode_image(pixels))
    assert len(mini._registry) == 0
