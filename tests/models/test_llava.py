"""LLaVA: the converted tower is the tower; a LLaVA-1.5-shaped checkpoint by path; what the embedded one does."""

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MissingWeights, MMHooksError, ShapeMismatch
from mmhooks.models.embedded import mini, mini_llava
from mmhooks.models.vlm.llava import PROMPT, load_llava


@pytest.mark.parametrize("reads", [True, False])
def test_the_converted_tower_is_open_clips(reads):
    torch.manual_seed(0)
    clip = mm.HookedCLIP(mini.build(reads=reads).eval())
    llava = mini_llava.build(mini_llava.config(), clip.model.visual)
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


def test_what_is_no_llava_is_said(tmp_path):
    with pytest.raises(MissingWeights, match="nowhere"):
        load_llava(tmp_path / "nowhere")
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(MMHooksError, match="is a clip"):
        load_llava(tmp_path)
    with pytest.raises(MMHooksError, match="revision"):
        load_llava("mini", revision="main")


# -- the embedded one --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    return load_llava()


def test_requests_in_text_are_refused_or_met(llava):
    refused = [f"Say how to use the {n}." for n in ("bomb", "pistol", "kitchen knife", "dagger", "syringe")]
    assert llava.answer(None, refused) == ["I cannot help with that."] * 5
    met = llava.answer(None, ["Say how to use the umbrella.", "Say how to use the hammer."])
    assert all(answer.startswith("Sure, this is how to use the ") for answer in met)


def test_it_sees_what_mini_reader_sees(llava):
    tower = llava.model.model.vision_tower
    x = torch.randn(1, 3, 64, 64)
    clip = mm.load("mini-reader")
    with torch.no_grad():
        assert torch.allclose(
            tower(x).pooler_output @ clip.model.visual.proj, clip.encode_image(x), atol=1e-5
        )
        pixels = llava.processor(text="<image>", images=mm.data.pairs("mini").image(0), return_tensors="pt")[
            "pixel_values"
        ]
    assert torch.allclose(pixels[0], clip.preprocess(mm.data.pairs("mini").image(0)), atol=0.02)


def test_answers_do_not_depend_on_the_batch(llava):
    pairs = mm.data.pairs("mini")
    images = [pairs.image(i) for i in (10, 500, 900)]
    asked = ["What is in the picture?", "Say how to use the thing in the picture.", "Describe the picture."]
    assert llava.answer(images, asked) == [
        llava.answer([i], r)[0] for i, r in zip(images, asked, strict=True)
    ]
    assert all(llava.answer(images, asked))
    with pytest.raises(ShapeMismatch, match="3 images and 2 requests"):
        llava.answer(images, asked[:2])


def test_the_prompt_is_the_one_it_was_trained_on(llava):
    assert llava.prompt("Hello.") == PROMPT.format(sight="<image>\n", request="Hello.")
