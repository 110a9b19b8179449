"""mini-sd: its parts against independent witnesses, and the shipped pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

import mmhooks as mm
from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.models import zoo
from mmhooks.models.embedded import mini, mini_sd
from mmhooks.utils.assets import card

PROMPTS = ["", "a drawing of a red panda", "hi! what's 12 t-shirts?!", "é café — naïve, o'clock", "cat " * 30]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return mini_sd.mini_pipeline()


def ids_of(prompts: list[str]) -> torch.Tensor:
    tokenizer = mini_sd.tokenizer()
    return tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt").input_ids  # fmt: skip


def test_tokens_are_minis_apart_from_the_padding() -> None:
    prompts = PROMPTS + [row["name"] for row in mini_sd.drawings()]
    ids = ids_of(prompts)
    assert torch.equal(torch.where(ids == mini.mask_id(), 0, ids), mini.tokenizer()(prompts))


@torch.no_grad()
def test_hidden_states_are_minis() -> None:
    model = zoo.load("mini").model
    seen: list[torch.Tensor] = []
    handle = model.ln_final.register_forward_hook(lambda module, args, out: seen.append(out))
    model.encode_text(mini.tokenizer()(PROMPTS))
    handle.remove()
    assert torch.equal(mini_sd.text_encoder()(ids_of(PROMPTS)).last_hidden_state, seen[0])


@torch.no_grad()
def test_encoder_without_blocks_is_the_linear_map() -> None:
    torch.manual_seed(0)
    basis, mean, pixels = torch.randn(24, 192), torch.rand(192), torch.rand(2, 3, 64, 64)
    latents = mini_sd.autoencoder(mean, basis).encode(pixels * 2 - 1).latents
    patches = F.unfold(pixels, 8, stride=8).transpose(1, 2)
    expected = ((patches - mean) @ basis.T).transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


def test_schedule_ends_in_noise_and_sampling_starts_there() -> None:
    scheduler = mini_sd.scheduler()
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[-1] < 1e-6


def test_directory_that_diffusers_opens_draws_the_same(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    again = StableDiffusionPipeline.from_pretrained(mini_sd.write(tmp_path / "mini-sd"))

    def draw(one: StableDiffusionPipeline) -> torch.Tensor:
        noise = torch.Generator().manual_seed(3)
        return torch.from_numpy(
            one("a cat!", num_inference_steps=3, guidance_scale=3.0, generator=noise, output_type="np").images
        )

    assert draw(again).shape == (1, 64, 64, 3)
    assert torch.equal(draw(again), draw(pipe))


def test_autoencoder_gives_drawings_back(pipe: StableDiffusionPipeline) -> None:
    """White stays white: the patches' mean and the trained decoder are in the weights."""
    with torch.no_grad():
        white = torch.ones(1, 3, 64, 64)
        back = pipe.vae.decode(pipe.vae.encode(white).latents).sample
    assert (back - white).abs().mean() < 0.05


def test_draws_what_it_is_told(pipe: StableDiffusionPipeline) -> None:
    """Of 16 names the drawing made for each is likest to that of another seed, not to that of another name."""
    names = [row["name"] for row in mini_sd.drawings()][::32]

    def draw(seed: int) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(seed + i) for i in range(len(names))]
        return pipe(
            names, num_inference_steps=10, guidance_scale=3.0, generator=noise, output_type="pt"
        ).images

    distance = torch.cdist(draw(0).flatten(1), draw(1000).flatten(1))
    assert (distance.argmin(1) == torch.arange(len(names))).float().mean() >= 0.75


def test_card_names_data_and_scores() -> None:
    known = card("mini-sd")
    assert len(mini_sd.drawings()) == known["data"][0]["trained_on"] >= 500
    assert len({row["name"] for row in mini_sd.drawings()}) == len(mini_sd.drawings())
    for space in ("efficientnet", "pixels"):
        assert known["exam"][space]["first 1"]["n"] == len(mini_sd.drawings())
    assert sum(path.stat().st_size for path in mini_sd.FOLDER.iterdir()) < 18e6


def test_loaded_by_name(pipe: StableDiffusionPipeline) -> None:
    sd = mm.load_diffusion("mini")
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    drawn = [p("cat", generator=torch.Generator().manual_seed(0), **options).images for p in (sd.pipe, pipe)]
    assert (drawn[0] == drawn[1]).all()
    with pytest.raises(MMHooksError, match="takes no options"):
        mm.load_diffusion("mini", variant="fp16")


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mini_sd, "FOLDER", tmp_path)
    with pytest.raises(MissingWeights, match="unet.safetensors"):
        mini_sd.mini_pipeline()
