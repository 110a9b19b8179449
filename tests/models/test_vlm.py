"""HookedVLM on LLaVA: kinds of tokens, steps of a generation, caches, and attention knocked out as by a mask."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import HookDidNotFire, MMHooksError, MMHooksWarning, ShapeMismatch
from mmhooks.hooks import attention
from mmhooks.hooks.kinds import tokens_of_kind

from . import tiny_transformers as tiny
from . import tiny_vlms as vlms
from .tiny_vlms import NEW, generated, logits, real
from .walk import hooked_vlm


@pytest.fixture(scope="module")
def llava():
    return mm.hook(vlms.llava())


@torch.no_grad()
def test_keys_are_shown_by_key_head_and_edits_of_them_reach_their_query_heads(llava):
    with llava.caching("lm.blocks.1.attn.*") as clean:
        generated(llava)
    assert clean.at(0)["lm.blocks.1.attn.k"].shape == (2, 10, 2, 8)
    assert clean.at(2)["lm.blocks.1.attn.v"].shape == (2, 12, 2, 8)
    assert clean.at(2)["lm.blocks.1.attn.q"].shape == (2, 1, 4, 8)
    assert clean.at(2)["lm.blocks.1.attn.pattern"].shape == (2, 4, 1, 12)
    edits = {"k": mm.Zero([1], at="lm.blocks.1.attn.k"), "v": mm.Zero([1], at="lm.blocks.1.attn.v")}
    for leaf, edit in edits.items():
        with llava.hooks(edit), llava.caching("lm.blocks.1.attn.*") as cache:
            generated(llava)
        for step in (0, 2):
            before, after = clean.at(step), cache.at(step)
            z, old = after["lm.blocks.1.attn.z"], before["lm.blocks.1.attn.z"]
            if step == 0:
                assert torch.equal(z[:, :, :2], old[:, :, :2]) and not torch.equal(z[:, :, 2:], old[:, :, 2:])
            if leaf == "v":
                assert not z[:, :, 2:].any() and z[:, :, :2].any()
            else:  # all keys equal: every key that may be seen weighs the same
                row = after["lm.blocks.1.attn.pattern"][0, 2:, -1]
                torch.testing.assert_close(row, torch.full_like(row, 1 / row.shape[-1]))


# -- kinds of tokens ---------------------------------------------------------------------------------------------


def masks(llava):
    ids = vlms.inputs(llava.model)["input_ids"]
    last = torch.zeros_like(real(llava))
    last[:, -1] = True
    return {"image": ids == 5, "text": real(llava) & (ids != 5), "prompt": real(llava), "last": last}


@pytest.mark.parametrize("heads", [None, [1, 2]])
@pytest.mark.parametrize("kind", ["image", "text", "prompt", "last"])
@torch.no_grad()
def test_a_knock_out_equals_an_additive_mask(llava, kind, heads):
    """-inf in front of the softmax, in all rows of the kind, given to the model's own forward."""
    given, seen = vlms.inputs(llava.model), real(llava)
    length = seen.shape[1]
    out = masks(llava)[kind][:, None, :, None].expand(2, 4, length, length).clone()
    if heads is not None:
        out[:, [h for h in range(4) if h not in heads]] = False
    may = torch.ones(length, length, dtype=torch.bool).tril() & seen[:, None, None]
    mask = torch.zeros(out.shape).masked_fill(~may | out, float("-inf"))
    with llava.hooks(mm.Zero(heads, at="lm.blocks.*.attn.pattern", tokens=kind)):
        edited = logits(llava)
    want = llava.forward(**given | {"attention_mask": mask}).logits
    assert not torch.allclose(want[seen], logits(llava)[seen], atol=1e-3)
    torch.testing.assert_close(edited[seen], want[seen], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_knock_out_is_the_same_under_eager_attention(llava):
    eager = mm.hook(vlms.llava("eager"))
    edit = mm.Zero([1, 2], at="lm.blocks.*.attn.pattern", tokens="last")
    with llava.hooks(edit), eager.hooks(edit):
        torch.testing.assert_close(generated(llava)[1], generated(eager)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_kinds_while_decoding(llava, cached):
    seen = {kind: {} for kind in ("image", "text", "prompt", "generated", "last")}
    for kind, found in seen.items():
        for leaf in ("resid_post", "attn.k"):
            site = f"lm.blocks.0.{leaf}"
            edit = mm.Zero(at=site, tokens=kind)
            with llava.hooks(edit), llava.caching(site) as cache:
                generated(llava, use_cache=cached)
            for step in (0, 3):
                zero = (cache.at(step)[site].flatten(2) == 0).all(-1)
                length = zero.shape[1]  # the embedding of padding is zero itself
                found[leaf, step] = (
                    zero & torch.cat([real(llava), torch.ones(2, step).bool()], 1)[:, -length:]
                )
    held = masks(llava)
    for kind in ("image", "text", "prompt", "last"):
        assert torch.equal(seen[kind]["resid_post", 0], held[kind]), kind
        assert torch.equal(seen[kind]["attn.k", 0], held[kind]), kind
    new = torch.ones(2, 3, dtype=torch.bool)
    whole = {
        "image": torch.cat([held["image"], ~new], 1),
        "text": torch.cat([held["text"], new], 1),
        "prompt": torch.cat([held["prompt"], ~new], 1),
        "generated": torch.cat([torch.zeros_like(real(llava)), new], 1),
        "last": torch.cat([torch.zeros_like(real(llava)), new & (torch.arange(3) == 2)], 1),
    }
    for kind, mask in whole.items():
        assert torch.equal(seen[kind]["attn.k", 3], mask), kind
        assert torch.equal(seen[kind]["resid_post", 3], mask[:, -1:] if cached else mask), kind


@torch.no_grad()
def test_a_row_that_has_ended_holds_no_more_tokens(llava):
    new = generated(llava)[0][:, 10:]
    end = int(new[0, 1])
    assert end not in new[1]
    last, held = new[0].tolist().index(end), []

    def note(value, *, hook):
        held.append(tokens_of_kind("generated", value.shape[1], value.device, hook.name).mask[:, -1].tolist())

    with llava.hooks(fwd_hooks=[("lm.ln_final", note)]):
        generated(llava, min_new_tokens=0, eos_token_id=[end])
    # Step t runs the new token t - 1; the end itself is a token.
    assert held == [[False, False], *([t - 1 <= last, True] for t in range(1, NEW))]
    sites = ["lm.blocks.1.resid_post", "lm.blocks.1.attn.pattern"]
    with llava.caching(sites, tokens="last") as kept, llava.caching(sites) as whole:
        generated(llava, min_new_tokens=0, eos_token_id=[end])
    for step in range(NEW):  # of the ended row too, what runs last
        assert torch.equal(kept.at(step)[sites[0]], whole.at(step)[sites[0]][:, -1:])
        assert torch.equal(kept.at(step)[sites[1]], whole.at(step)[sites[1]][:, :, -1:])


@torch.no_grad()
def test_kinds_that_are_not_there_are_told(llava):
    at = "lm.blocks.0.resid_post"
    inputs = vlms.inputs(llava.model)
    del inputs["pixel_values"]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 5, 6)
    says = r"tokens='image' at .*: the batch holds none of that kind: 0 image, 18 text, 18 prompt, 0 generated tokens in 2"
    with pytest.raises(ShapeMismatch, match=says), llava.hooks(mm.Zero(at=at, tokens="image")):
        llava.forward(**inputs)
    with pytest.raises(ShapeMismatch, match="'generated'"), llava.hooks(mm.Zero(at=at, tokens="generated")):
        logits(llava)
    with (
        pytest.raises(HookDidNotFire, match="tokens= did not occur"),
        llava.hooks(mm.Zero(at=at, tokens="generated")),
    ):
        generated(llava, max_new_tokens=1, min_new_tokens=1)
    with pytest.raises(ShapeMismatch, match="one of the kinds image, text"):
        mm.Zero(at=at, tokens="images").chosen_tokens  # noqa: B018
    with (
        pytest.raises(ShapeMismatch, match="expected one of the kinds of tokens there, cls, patch"),
        llava.hooks(mm.Zero(at="image.blocks.0.resid_post", tokens="image")),
    ):
        logits(llava)
    clip = mm.load("mini")
    with (
        pytest.raises(ShapeMismatch, match="expected one of the kinds of tokens there, cls, patch"),
        clip.hooks(mm.Zero(at="image.blocks.0.resid_post", tokens="last")),
    ):
        clip.encode_image(torch.zeros(1, 3, 64, 64))
    given = {k: v for k, v in vlms.inputs(llava.model).items() if k != "input_ids"}
    embeds = torch.randn(2, 10, 32)
    with pytest.raises(MMHooksError, match="input_ids"), llava.hooks(mm.Zero(at=at, tokens="last")):
        llava.model(inputs_embeds=embeds, attention_mask=given["attention_mask"])


# -- caches ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_sequence_is_what_one_forward_over_all_tokens_gives(llava):
    sites = ["lm.tokens", "lm.blocks.*.resid_post", "lm.blocks.*.attn.*", "lm.logits"]
    with llava.caching(sites) as steps:
        ids, _ = generated(llava)
    inputs = vlms.inputs(llava.model)
    inputs["input_ids"] = ids[:, :-1]
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, NEW - 1).long()], 1)
    positions = inputs["attention_mask"].cumsum(1).sub(1).clamp_min(0)
    with llava.caching(sites) as once:
        llava.forward(**inputs, position_ids=positions)
    seen = inputs["attention_mask"].bool()
    for site in once:
        joined = steps.sequence(site)
        if site == "lm.logits":
            torch.testing.assert_close(joined, once[site][:, -NEW:], atol=1e-5, rtol=1e-5)
        elif site.endswith("pattern"):
            assert joined.shape == once[site].shape
            torch.testing.assert_close(
                joined.movedim(2, 1)[seen], once[site].movedim(2, 1)[seen], atol=1e-5, rtol=1e-5
            )
        else:
            torch.testing.assert_close(joined[seen], once[site][seen], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_keeps_the_tokens_of_a_kind_and_the_steps_that_it_is_told(llava):
    site = "lm.blocks.1.resid_post"
    with llava.caching(site) as whole:
        logits(llava)
    for kind in ("image", "last"):
        with llava.caching([site, "lm.blocks.1.attn.pattern"], tokens=kind) as cache:
            logits(llava)
        want = whole[site][masks(llava)[kind]].view(2, -1, 32)
        assert torch.equal(cache[site], want)
        assert cache["lm.blocks.1.attn.pattern"].shape == (2, 4, want.shape[1], 10)
    with (
        pytest.raises(ShapeMismatch, match=r"got \[6, 4\] tokens of the kind 'text'"),
        llava.caching(site, tokens="text"),
    ):
        logits(llava)
    with llava.caching(site, tokens="last") as last, llava.caching(site, steps=[1, 2]) as some:
        generated(llava)
    assert last[site].shape == (NEW, 2, 1, 32) and last.sequence(site).shape == (2, NEW, 32)
    assert some.steps == [1, 2] and torch.equal(some[site], last[site][1:3])
    with pytest.raises(MMHooksError, match=r"from the first, got steps \[1, 2\]"):
        some.sequence(site)
    with llava.caching([site, "image.ln_post"]) as cache:
        generated(llava)
    with pytest.raises(ShapeMismatch, match=r"\.sequence\('lm.blocks.1.resid_post'\) joins their tokens"):
        cache[site]
    assert cache["image.ln_post"].shape == (2, 32)
    with pytest.raises(MMHooksError, match="one without tokens"):
        cache.sequence("image.ln_post")


@pytest.mark.parametrize("tokens", ["last", "image", [1, -1], slice(2, 4)])
@torch.no_grad()
def test_patterns_are_computed_only_at_the_tokens_that_a_cache_keeps(llava, tokens, monkeypatch):
    """Against eager attention, which returns all rows; the second row of the batch is padded in front."""
    eager, computed = vlms.llava("eager"), []
    scores = attention.softmax_scores

    def spied(*args):
        computed.append(scores(*args))
        return computed[-1]

    monkeypatch.setattr(attention, "softmax_scores", spied)
    with llava.caching("lm.blocks.*.attn.pattern", tokens=tokens) as cache:
        logits(llava)
    theirs = eager(**vlms.inputs(eager), output_attentions=True).attentions
    chosen = masks(llava)[tokens].nonzero()[:, 1].view(2, -1) if isinstance(tokens, str) else None
    for n in range(3):
        ours = cache[f"lm.blocks.{n}.attn.pattern"]
        for row in range(2):
            want = theirs[n][row][:, tokens if chosen is None else chosen[row]]
            if real(llava)[row, tokens if chosen is None else chosen[row]].all():  # eager differs at padding
                torch.testing.assert_close(ours[row], want, atol=1e-5, rtol=1e-5)
    width = 4 if tokens == "image" else 1 if tokens == "last" else 2
    assert [tuple(c.shape) for c in computed] == [(2, 4, width, 10)] * 3
    assert cache.shapes["lm.blocks.0.attn.pattern"] == (2, 4, 10, 10)
    computed.clear()
    site = "lm.blocks.0.attn.pattern"
    with llava.hooks(mm.Steer(direction=0.1, at=site)), llava.caching(site, tokens=tokens) as cache:
        logits(llava)  # an edit reads every row
    assert cache[site].shape == (2, 4, width, 10) and computed[0].shape == (2, 4, 10, 10)


@torch.no_grad()
def test_keys_of_a_window_are_not_joined():
    gemma = mm.hook(vlms.gemma3())
    with gemma.caching(["lm.blocks.[01].attn.k", "lm.blocks.[01].attn.pattern"]) as cache:
        generated(gemma)
    assert cache.sequence("lm.blocks.1.attn.k").shape == (2, 9 + NEW, 2, 8)
    assert cache.sequence("lm.blocks.1.attn.pattern").shape == (2, 4, 9 + NEW, 9 + NEW)
    with pytest.raises(MMHooksError, match=r"got \[10, 8, 8, 8, 8\] tokens at 5 steps: a window"):
        cache.sequence("lm.blocks.0.attn.k")
    with pytest.raises(MMHooksError, match="a window over the last keys"):
        cache.sequence("lm.blocks.0.attn.pattern")
    with (
        gemma.hooks(mm.Zero(at="lm.blocks.0.attn.k", tokens="generated")),
        gemma.caching("lm.blocks.0.attn.k") as cache,
    ):
        generated(gemma)  # the window's end is the sequence's
    zero = (cache.at(2)["lm.blocks.0.attn.k"] == 0).flatten(2).all(-1)
    assert zero.tolist() == [[False] * 6 + [True] * 2] * 2


# -- edits of a generation ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_edit_of_one_step_begins_there(llava):
    clean, _ = generated(llava)
    push = torch.zeros(60)
    push[33] = 1e4
    with llava.hooks(mm.Steer(direction=push, at="lm.logits", steps=2)):
        ids, _ = generated(llava)
    assert (ids[:, 12] == 33).all() and torch.equal(ids[:, :12], clean[:, :12])
    with (
        pytest.raises(MMHooksError, match="image towers run once"),
        llava.hooks(mm.Zero(at="image.patches", steps=0)),
    ):
        generated(llava)
    with llava.hooks(mm.Zero(at="projector.out")):
        blind = generated(llava)
    with llava.hooks(mm.Zero(at="lm.tokens", tokens="image")):
        assert torch.equal(generated(llava)[1], blind[1])


@torch.no_grad()
def test_a_patch_by_step_brings_the_other_run_back(llava):
    clean = generated(llava)
    with llava.caching("lm.blocks.2.resid_post") as cache:
        generated(llava)
    edits = mm.Zero(at="projector.out"), mm.Patch(cache, at="lm.blocks.2.resid_post")
    with llava.hooks(*edits):
        ids, out = generated(llava)
    assert torch.equal(ids, clean[0]) and torch.equal(out, clean[1])


# -- refusals ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_would_mix_rows_or_steps_is_refused(llava):
    with pytest.raises(MMHooksError, match="expected one beam, got num_beams=3"), llava.hooks():
        generated(llava, num_beams=3)
    with pytest.raises(MMHooksError, match="prefill_chunk_size"), llava.hooks():
        generated(llava, prefill_chunk_size=4)
    assert len(generated(llava, num_beams=2)[0]) == 2  # outside a context it is the model's own affair


@pytest.mark.parametrize("name", vlms.VLMS)
@torch.no_grad()
def test_images_and_image_tokens_that_do_not_match(name):
    """As every model type of transformers counts them; one more picture than the prompt has places for."""
    model = hooked_vlm(name)
    inputs = vlms.inputs(model.model)
    ids = inputs["input_ids"].clone()
    ids[1][ids[1] == vlms.IMAGE] = 40
    says = "image tokens: expected as many as the images give features.*got Image features and image tokens do not match"
    with pytest.raises(ShapeMismatch, match=says):
        model.forward(**inputs | {"input_ids": ids})


def test_more_images_than_requests_or_places(llava):
    mini = mm.load_llava()
    image = mm.data.pairs("mini").image(10)
    with pytest.raises(ShapeMismatch, match="2 images and 3 requests"):
        mini.generate([image] * 2, ["what?"] * 3)
    with pytest.raises(ShapeMismatch, match="image tokens: expected as many.*requests hold no image tokens"):
        mini.generate([image], "What is in <image>?")


@pytest.mark.parametrize("name", vlms.UNKNOWN)
def test_a_type_without_named_sites_is_told(name):
    model = vlms.UNKNOWN[name]()
    says = f"{type(model).__name__} is of no known family .*of the types llava, .*, qwen3_vl.*its native module paths"
    with pytest.warns(MMHooksWarning, match=says):
        assert type(mm.hook(model)) is mm.HookedModel


def test_a_wrapper_of_peft_is_told():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(vlms.llava(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    says = r"PeftModel is of no known family \(PEFT's wrapper; mm.hook\(model.get_base_model\(\)\) hooks the LlavaFor"
    with pytest.warns(MMHooksWarning, match=says):
        mm.hook(wrapped)


def test_misfits(llava):
    with pytest.raises(MMHooksError, match="of the types llava, .*, got CLIPModel"):
        mm.HookedVLM(tiny.clip())
    with pytest.raises(MMHooksError, match="expected one with tokenizer, got object"):
        mm.hook(vlms.llava(), processor=object())
    with pytest.raises(MMHooksError, match="has no processor"):
        llava.answer(None, "what?")
    with pytest.raises(MMHooksError, match=r"expected a tokenizer of at most 60 tokens.*another model's"):
        mm.hook(vlms.llava(), processor=mm.load_llava().processor)


@torch.no_grad()
def test_mini_vlm_looks_at_the_picture():
    model = mm.load_llava()
    pairs = mm.data.pairs("mini")
    images, asked = [pairs.image(10), pairs.image(500)], "What is in the picture?"
    clean = model.generate(images, asked, max_new_tokens=6)
    with model.caching("*") as cache:
        assert torch.equal(model.generate(images, asked, max_new_tokens=6).ids[0], clean.ids[0])
    assert set(cache) == set(model.sites()) and cache["image.patches"].shape == (2, 64, 192)
    with model.hooks(mm.Zero(at="lm.tokens", tokens="image")):
        blind = model.generate(images, asked, max_new_tokens=6).texts
    assert blind[0] == blind[1] and len({blind[0], *clean.texts}) == 3
