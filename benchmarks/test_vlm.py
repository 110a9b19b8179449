"""What it costs to watch a vision-language model write: its stream, and where its last token looks.

    python -m pytest benchmarks/test_vlm.py --benchmark-only

LLaVA 1.5's shape with 32 layers of width 64, 8 attention heads on 4 key heads, 576 image tokens; 64 new tokens, greedy.
At such a width a step is nearly all Python, so hooks weigh more than in a model of real width. Correctness first, then
turns round by round, as in race.py; processor time. Against transformers' own ways: ``output_hidden_states``, and
``output_attentions``, which needs eager attention.
"""

from __future__ import annotations

import gc
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from race import TABLE, race

import mmhooks as mm

NEW, LAYERS, HEADS, IMAGE, SIDE = 64, 32, 8, 5, 24
pytestmark = pytest.mark.usefixtures("no_grad")


def build(attention: str = "sdpa") -> Any:
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"intermediate_size": 128, "num_attention_heads": HEADS}
    vision = hf.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, image_size=14 * SIDE, patch_size=14, **sizes
    )
    text = hf.LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=LAYERS, num_key_value_heads=4, eos_token_id=None, **sizes
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=SIDE**2
    )
    return hf.LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def vlm() -> mm.HookedVLM:
    return mm.hook(build())


def write(model: Any, **options: Any) -> Any:
    """A generation over one image and a short request."""
    ids = torch.tensor([[1, *[IMAGE] * SIDE**2, *range(10, 26)]])
    pixels = torch.randn(1, 3, 14 * SIDE, 14 * SIDE, generator=torch.Generator().manual_seed(0))
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False, pad_token_id=0,
        max_new_tokens=NEW, min_new_tokens=NEW, return_dict_in_generate=True, **options,
    )  # fmt: skip


def keeping(vlm: mm.HookedVLM, sites: str, **options: Any) -> tuple[Any, Any]:
    with vlm.caching(sites, **options) as cache:
        return write(vlm.model), cache


STREAM, PATTERN = "lm.blocks.*.resid_post", "lm.blocks.*.attn.pattern"


def test_the_stream(benchmark, vlm):
    """``resid_post`` of every layer, at every step."""
    plain = write(vlm.model, output_hidden_states=True)
    out, cache = keeping(vlm, STREAM)
    assert torch.equal(out.sequences, plain.sequences) and len(cache) == LAYERS
    for n in range(LAYERS - 1):  # transformers shows the last layer's behind the norm
        theirs = torch.cat([step[n + 1] for step in plain.hidden_states], 1)
        assert torch.equal(cache.sequence(f"lm.blocks.{n}.resid_post"), theirs)
    contenders = {
        "plain generate": lambda: write(vlm.model),
        "mmhooks, resid_post of 32 layers": lambda: keeping(vlm, STREAM),
        "output_hidden_states": lambda: write(vlm.model, output_hidden_states=True),
    }
    result = race(benchmark, f"the stream over {NEW} tokens", contenders, timer=time.process_time)
    at_most(
        "the stream, median within rounds", result.within_rounds("mmhooks, resid_post of 32 layers")[1], 1.05
    )


def test_where_the_last_token_looks(benchmark, vlm):
    """The pattern of the last token at every layer and step, against eager attention, which returns every row."""
    eager = build("eager")
    eager.load_state_dict(vlm.model.state_dict())
    plain = write(vlm.model)
    out, cache = keeping(vlm, PATTERN, tokens="last")
    theirs = write(eager, output_attentions=True)
    assert torch.equal(out.sequences, plain.sequences) and torch.equal(out.sequences, theirs.sequences)
    for n in range(LAYERS):
        for step in range(NEW):
            ours = cache.at(step)[f"lm.blocks.{n}.attn.pattern"] if n in (0, LAYERS - 1) else None
            if ours is not None:
                torch.testing.assert_close(ours, theirs.attentions[step][n][:, :, -1:], atol=1e-5, rtol=1e-4)
    contenders = {
        "plain generate": lambda: write(vlm.model),
        "mmhooks, the last token's pattern": lambda: keeping(vlm, PATTERN, tokens="last"),
        "mmhooks, every token's pattern": lambda: keeping(vlm, PATTERN),
        "eager, output_attentions": lambda: write(eager, output_attentions=True),
    }
    result = race(
        benchmark, f"patterns over {NEW} tokens", contenders, rounds=(4, 60), timer=time.process_time
    )
    ratio = result.within_rounds("mmhooks, the last token's pattern")[1]
    at_most("the last token's pattern, median within rounds", ratio, 1.25)
    memory(vlm, contenders)


def at_most(what: str, value: float, limit: float) -> None:
    """Says in the table whether a goal was met."""
    TABLE.append(
        f"| {what} | | {value:.3f}, goal at most {limit:g}: {'met' if value <= limit else 'MISSED'} | | | |"
    )


def memory(vlm: mm.HookedVLM, contenders: Any) -> None:
    """The process's peak during one run of each contender, and what of it the run added."""
    peaks: dict[str, float] = {}
    for name, run in contenders.items():
        gc.collect()
        rest = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        kept = run()
        peaks[name] = _status("VmHWM")
        TABLE.append(
            f"| peak memory | {name} | {peaks[name]:.0f} MiB, {peaks[name] - rest:.0f} above rest | | | |"
        )
        del kept
    plain, ours = peaks["plain generate"], peaks["mmhooks, the last token's pattern"]
    at_most("peak memory of the process, last token's pattern", ours / plain, 1.2)


def _status(field: str) -> float:
    """A size of this process in MiB, as Linux tells it."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
