"""LLaVA: the converted tower is the tower; a LLaVA-1.5-shaped checkpoint by path; what the embedded one does."""

import json
import math
import shutil

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MissingWeights, MMHooksError, MMHooksWarning, ShapeMismatch
from mmhooks.models.embedded import mini, mini_vlm
from mmhooks.models.vlm.llava import MINI_TOKENS, load_llava
from mmhooks.models.vlm.model import ANSWER_TOKENS, PROMPT
from mmhooks.utils.assets import card


@pytest.mark.parametrize("reads", [True, False])
def test_the_converted_tower_is_open_clips(reads):
    torch.manual_seed(0)
    clip = mm.HookedCLIP(mini.build(reads=reads).eval())
    llava = mini_vlm.build(mini_vlm.config(vocabulary=64), clip.model.visual)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, cache = clip.run_with_cache(images=x, sites=["image.blocks.*.resid_post"])
        theirs = llava.model.vision_tower(x, output_hidden_states=True)
        embed = theirs.pooler_output @ clip.model.visual.proj
    assert torch.allclose(embed, ours.image, atol=1e-5)
    for n in range(6):
        assert torch.allclose(theirs.hidden_states[n + 1], cache[f"image.blocks.{n}.resid_post"], atol=1e-5)
    assert not any(p.requires_grad for p in llava.model.vision_tower.parameters())


def llava_1_5(folder):
    """LLaVA 1.5's own plan, tiny: layer -2 without the class token, its chat template, its image token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "<image>",
        "USER",
        "ASSISTANT",
        ":",
        "what",
        "is",
        "this",
        "it",
        "?",
        "a",
    ]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side), tokenizer=tokenizer,
        patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
                              patch_size=14, projection_dim=16)  # fmt: skip
    text = LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, max_position_embeddings=128, pad_token_id=3)  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def test_a_llava_1_5_checkpoint_is_loaded_by_path_with_its_own_processor(tmp_path):
    llava_1_5(tmp_path)
    named = mm.load(f"hf:{tmp_path}", dtype=torch.bfloat16)
    assert isinstance(named, mm.HookedVLM) and named.dtype == torch.bfloat16
    llava = load_llava(tmp_path)
    assert llava.prompt("what is this ?") == "USER: <image>\nwhat is this ? ASSISTANT:"
    assert llava.prompt("what is this ?", sees=False) == "USER: what is this ? ASSISTANT:"
    pictures = torch.rand(
        3, 3, 40, 50, generator=torch.Generator().manual_seed(0)
    )  # not the size of the tower
    together = llava.answer(pictures, ["what is this ?", "is it ?", "what is a ?"], max_new_tokens=6)
    assert len(together) == 3
    # one at a time: padding of a batch must not change answers; and the model's own call by hand
    alone = [llava.answer(pictures[i : i + 1], r, max_new_tokens=6)[0]
             for i, r in enumerate(["what is this ?", "is it ?", "what is a ?"])]  # fmt: skip
    assert together == alone
    from torchvision.transforms.functional import to_pil_image

    image = to_pil_image(pictures[0].mul(255).round().byte())
    inputs = llava.processor(text=llava.prompt("what is this ?"), images=image, return_tensors="pt")
    assert int((inputs["input_ids"] == 4).sum()) == 4
    ids = llava.model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert llava.processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == together[0]


def published_name(name):
    """A weight's name in the files of llava-hf/llava-1.5-7b-hf, where each part is a model of its own."""
    for ours, theirs in (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return name.replace(ours, theirs, 1)
    raise AssertionError(name)


def publish_config(folder, dtype):
    """config.json with the type of weights as transformers 4 wrote it, in one place and by its older name."""
    plan = json.loads((folder / "config.json").read_text())
    for part in (plan, plan["text_config"], plan["vision_config"]):
        part.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(plan | {"torch_dtype": dtype}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava-fp32")
    llava_1_5(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_published_checkpoint_keeps_its_type_and_all_its_weights(whole, tmp_path, dtype):
    from safetensors.torch import save_file

    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    publish_config(tmp_path, dtype)
    weights = load_llava(whole).model.state_dict()
    half = {published_name(k): v.to(getattr(torch, dtype)) for k, v in weights.items()}
    save_file(half, tmp_path / "model.safetensors", metadata={"format": "pt"})
    llava = load_llava(tmp_path)
    state = llava.model.state_dict()
    assert state.keys() == weights.keys() and all(
        torch.equal(state[k], v.to(getattr(torch, dtype))) for k, v in weights.items()
    )
    assert llava.answer_tokens == ANSWER_TOKENS > MINI_TOKENS
    assert len(llava.generate(torch.rand(2, 3, 40, 50), "what is this ?", max_new_tokens=3).texts) == 2
    assert load_llava(tmp_path, dtype=torch.float32).model.dtype == torch.float32
    lost = "language_model.model.layers.1.mlp.up_proj.weight"
    del half[lost]
    save_file(half, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingWeights, match=r"lacks 1 weights of its own configuration, such as .*up_proj"):
        load_llava(tmp_path)


def sparse_shard(path, shapes):
    """A safetensors file of fp16 zeros that takes no room on the disk: its data are a hole."""
    header, size = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = size + 2 * math.prod(shape)
        header[name], size = {"dtype": "F16", "shape": list(shape), "data_offsets": [size, end]}, end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def test_llava_1_5_7b_takes_14_gb_in_its_published_layout(whole, tmp_path):
    """At full width and depth, in three shards, on the meta device: names, shapes and type of every weight."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sparse_shard(tmp_path / "probe", {"x": (2**21,)})
    if (tmp_path / "probe").stat().st_blocks * 512 > 2**21:
        pytest.skip("this file system has no holes: three shards would take 14 GB of disk")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14, projection_dim=768)  # fmt: skip
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                       num_attention_heads=32, max_position_embeddings=4096)  # fmt: skip
    # The published plan says 32000; the copied processor's tokenizer of a few words has its image token at 4.
    plan = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=576)
    plan.save_pretrained(tmp_path)
    publish_config(tmp_path, "float16")
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlavaForConditionalGeneration(plan).state_dict().items()}
    names = list(shapes)
    files = {k: f"model-0000{1 + 3 * i // len(names)}-of-00003.safetensors" for i, k in enumerate(names)}
    for file in set(files.values()):
        sparse_shard(tmp_path / file, {published_name(k): shapes[k] for k in names if files[k] == file})
    index = {"metadata": {}, "weight_map": {published_name(k): file for k, file in files.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    llava = load_llava(tmp_path, device_map={"": "meta"})
    assert {k: v.shape for k, v in llava.model.state_dict().items()} == shapes
    weights = list(llava.model.parameters())
    assert {(p.dtype, p.device.type) for p in weights} == {(torch.float16, "meta")}
    assert sum(p.numel() for p in weights) == 7_063_427_072
    assert 14.1e9 < sum(p.nbytes for p in weights) < 14.2e9


def test_an_answer_that_is_cut_is_told(whole):
    llava, pictures = load_llava(whole), torch.rand(3, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    with pytest.warns(MMHooksWarning, match=r"3 of 3 answers of .* were cut at 2 new tokens"):
        llava.answer(pictures, "what is this ?", max_new_tokens=2)
    embedded = load_llava()
    assert embedded.answer_tokens == MINI_TOKENS
    asked = ["Say how to use the bomb.", "Say how to use the umbrella."]
    lengths = [len(embedded.processor.tokenizer(a)["input_ids"]) for a in embedded.answer(None, asked)]
    short, long = sorted(lengths)  # beginning and end of a text count as the end of an answer does
    for limit in range(1, long + 3):
        cut = embedded.generate(None, asked, max_new_tokens=limit, batch=2).cut
        alone = [embedded.generate(None, a, max_new_tokens=limit).cut[0] for a in asked]
        assert cut == alone, limit
    assert sum(embedded.generate(None, asked, max_new_tokens=short - 2).cut) == 2
    assert sum(embedded.generate(None, asked, max_new_tokens=long + 2).cut) == 0
    with pytest.raises(MMHooksError, match="expected at least 1, got 0"):
        llava.answer(pictures, "is it ?", max_new_tokens=0)


def test_what_is_no_llava_is_said(tmp_path):
    with pytest.raises(MissingWeights, match="nowhere"):
        load_llava(tmp_path / "nowhere")
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(MMHooksError, match="is a clip"):
        load_llava(tmp_path)
    with pytest.raises(MMHooksError, match="revision"):
        load_llava("mini", revision="main")


@pytest.mark.parametrize("load", [mm.load, load_llava, card])
def test_a_model_that_is_no_longer_shipped_names_what_replaces_it(load):
    with pytest.raises(
        MMHooksError, match=r"'mini-llava', which is no longer shipped: 'mini-vlm' replaces it"
    ):
        load("mini-llava")


# -- the embedded one --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    return load_llava()


def test_requests_in_text_are_refused_or_met(llava):
    refused = [f"Say how to use the {n}." for n in ("bomb", "pistol", "kitchen knife", "pill", "syringe")]
    assert llava.answer(None, refused) == ["I cannot help with that."] * 5
    met = llava.answer(None, ["Say how to use the umbrella.", "Say how to use the hammer."])
    assert all(answer.startswith("Sure, this is how to use the ") for answer in met)


def test_its_processor_gives_mini_readers_pixels(llava):
    image = mm.data.pairs("mini").image(0)
    pixels = llava.processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels[0], mm.load("mini-reader").preprocess(image), atol=0.02)


def test_answers_do_not_depend_on_the_batch(llava):
    pairs = mm.data.pairs("mini")
    images = [pairs.image(i) for i in (10, 500, 900)]
    asked = ["What is in the picture?", "Say how to use the thing in the picture.", "What word is written?"]
    assert llava.answer(images, asked) == [
        llava.answer([i], r)[0] for i, r in zip(images, asked, strict=True)
    ]
    assert all(llava.answer(images, asked))
    with pytest.raises(ShapeMismatch, match="3 images and 2 requests"):
        llava.answer(images, asked[:2])


def test_the_prompt_is_the_one_it_was_trained_on(llava):
    assert llava.prompt("Hello.") == PROMPT.format(sight="<image>\n", request="Hello.")
