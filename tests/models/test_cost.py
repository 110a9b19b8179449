"""What a call costs: FLOPs against closed forms, memory against closed forms and against what the allocator did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.models.blueprints import clip_blueprint, llava_blueprint, painter_blueprint
from mmhooks.models.cost import PeakMemory, cost_of, weight_bytes

META = torch.device("meta")


def block_flops(tokens: int, d: int, hidden: int, *, matrices: int = 2) -> int:
    """A transformer block on one sequence: four projections, scores and their sum, and the matrices of its MLP."""
    return 2 * tokens * 4 * d * d + 4 * tokens**2 * d + 2 * matrices * tokens * d * hidden


def test_a_vision_transformer_is_its_closed_form() -> None:
    """ViT-B/32: 49 patches and a class token of 768, twelve blocks, patches cut by a matrix, a projection to 512."""
    model, batch = clip_blueprint("ViT-B-32"), 3
    with torch.no_grad():
        image = cost_of(
            lambda: model.encode_image(torch.zeros(batch, 3, 224, 224, device=META)), model.visual
        )
        tokens = torch.zeros(batch, 77, dtype=torch.long, device=META)
        text = cost_of(lambda: model.encode_text(tokens))
    patches, projection = 2 * 49 * 768 * 3 * 32 * 32, 2 * 768 * 512
    assert image.flops == batch * (patches + 12 * block_flops(50, 768, 3072) + projection)
    assert text.flops == batch * (12 * block_flops(77, 512, 2048) + 2 * 512 * 512)
    assert image.weights == weight_bytes(model.visual) == 4 * 87_849_216


def test_a_backward_pass_to_the_input_costs_a_forward_pass_and_to_weights_another() -> None:
    layers = nn.Sequential(nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)).to(META)
    x = torch.zeros(10, 64, device=META, requires_grad=True)
    once = 2 * 10 * 2 * 64 * 256
    assert cost_of(lambda: layers(x)).flops == once
    assert cost_of(lambda: layers(x).sum().backward()).flops == 3 * once
    layers.requires_grad_(False)
    assert cost_of(lambda: layers(x).sum().backward()).flops == 2 * once


def test_a_llama_reads_and_writes_by_its_closed_form() -> None:
    """LLaVA-1.5-7b: 32 blocks of 4,096 with gated MLPs of 11,008; one new token sees 300 old ones."""
    model = llava_blueprint("llava-hf/llava-1.5-7b-hf")
    assert model.dtype == torch.float16 and weight_bytes(model) > 2 * 7_063_427_072
    core, d, hidden, old = model.model.language_model, 4096, 11008, 300
    with torch.no_grad():
        cache = core(inputs_embeds=torch.zeros(2, old, d, dtype=torch.float16, device=META), use_cache=True)
        token = torch.zeros(2, 1, d, dtype=torch.float16, device=META)
        made = cost_of(
            lambda: core(inputs_embeds=token, past_key_values=cache.past_key_values, use_cache=True)
        )
        layer = 2 * 4 * d * d + 4 * (old + 1) * d + 2 * 3 * d * hidden
    rotary = 2 * 2 * 64  # positions times frequencies, computed as a matrix product
    assert 0 <= made.flops - 2 * 32 * layer <= 10 * rotary


@pytest.mark.parametrize(
    ("source", "unet", "vae", "text"),
    [
        ("stabilityai/stable-diffusion-2-base", 865_910_724, 83_653_863, 340_387_840),
        ("mini", None, None, None),
    ],
)
def test_pipelines_have_their_published_sizes(
    source: str, unet: int | None, vae: int | None, text: int | None
) -> None:
    made = painter_blueprint(source)
    found = [sum(p.numel() for p in part.parameters()) for part in (made.unet, made.vae, made.text_encoder)]
    assert all(part.device.type == "meta" for part in (made.unet, made.vae))
    assert found == [unet, vae, text] if unet else min(found) > 0


def test_folders_are_read_without_their_weights(tmp_path: Path) -> None:
    from .pipelines import build
    from .test_llava import llava_1_5

    llava_1_5(tmp_path / "llava")
    shutil.copytree(tmp_path / "llava", tmp_path / "plan", ignore=shutil.ignore_patterns("*.safetensors"))
    plan = json.loads((tmp_path / "plan" / "config.json").read_text())
    (tmp_path / "plan" / "config.json").write_text(json.dumps(plan | {"dtype": "bfloat16"}))
    model = llava_blueprint(str(tmp_path / "plan"))
    assert model.device.type == "meta" and model.dtype == torch.bfloat16
    pipe = build("sd2")
    pipe.save_pretrained(tmp_path / "pipe")
    for file in (tmp_path / "pipe").rglob("*.safetensors"):
        file.unlink()
    made = painter_blueprint(str(tmp_path / "pipe"), torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        assert {k: v.shape for k, v in getattr(made, part).state_dict().items()} == {
            k: v.shape for k, v in getattr(pipe, part).state_dict().items()
        }
    assert made.unet.dtype == torch.float16 and made.side == pipe.unet.config.sample_size
    for blueprint in (llava_blueprint, painter_blueprint):
        with pytest.raises(MissingWeights, match="no configuration of 'some/where'"):
            blueprint("some/where")
    with pytest.raises(MMHooksError, match="no model 'ViT-B-33'"):
        clip_blueprint("ViT-B-33")


# -- memory ------------------------------------------------------------------------------------------------


def test_the_peak_is_what_lives_at_once() -> None:
    """x of 4,000 bytes is held; y of 40,000 and its activation live together; y is gone when z is made."""
    one, two = nn.Linear(10, 100, bias=False, device=META), nn.Linear(100, 10, bias=False, device=META)
    x = torch.zeros(100, 10, device=META)
    with torch.no_grad():
        assert cost_of(lambda: two(one(x).relu())).activations == 80_000
        assert cost_of(lambda: two(two.weight.new_zeros(100, 100))).activations == 44_000


@pytest.mark.parametrize("backward", [False, True])
def test_memory_without_weights_is_that_of_real_tensors(backward: bool) -> None:
    """The same small network on the meta device, on the CPU, and by what the CPU's allocator handed out."""

    def run(device: str) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        parts = [
            nn.Linear(64, 512),
            nn.GELU(),
            nn.LayerNorm(512),
            nn.Linear(512, 512),
            nn.SiLU(),
            nn.Linear(512, 64),
        ]
        return nn.Sequential(*parts).to(device), torch.zeros(256, 64, device=device)

    def call(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            y = net(x)
            if backward:
                y.sum().backward()
        return y

    counted = []
    for device in ("meta", "cpu"):
        net, x = run(device)
        with PeakMemory() as memory:
            call(net, x)
        counted.append(memory.peak)
    net, x = run("cpu")
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        call(net, x)
    live = peak = 0
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert counted[0] == counted[1]
    assert abs(counted[0] / peak - 1) < 0.05, (
        counted,
        peak,
    )  # the allocator also lends kernels room to work in


def test_views_are_not_counted_twice_and_storage_is_given_back() -> None:
    with PeakMemory() as memory:
        x = torch.zeros(10, 10, device=META)
        assert x.view(100)[::2].unsqueeze(0).expand(3, 50).shape == (3, 50)
        assert memory.peak == memory.live == 400 and memory.operators == 1
        del x
        assert memory.live == 0
        torch.zeros(3, device=META).add_(1)
    assert memory.peak == 400 and memory.operators == 3
