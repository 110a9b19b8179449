"""Heads whose files were damaged: one bit flipped, cut off, mixed with another head's, killed between two saves.

A head that loads must be, bit for bit, one that was saved; everything else raises one of ours and names the path.
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MMHooksError
from mmhooks.heads import Head, load_head_dir
from mmhooks.heads import files as head_files

FILES = ("config.json", "model.safetensors")


def make(kind: str, seed: int = 0) -> Head:
    if kind == "batchtopk":
        head = mm.BatchTopKSAE(16, 48, 5, seed=seed)
        head.calibrate(torch.randn(200, 16, generator=torch.Generator().manual_seed(seed)))
    else:
        head = {"topk": lambda: mm.TopKSAE(16, 48, 5, seed=seed), "jumprelu": lambda: mm.JumpReLUSAE(16, 48, seed=seed),
                "ncl": lambda: mm.NCL(16, 48, hidden=20, seed=seed)}[kind]()  # fmt: skip
    head.info = {"fvu": 0.25, "data": f"noise {seed}"}
    return head


def content(head: Head) -> tuple:
    state = {k: v.numpy().tobytes() for k, v in head.state_dict().items()}
    return type(head), head.config(), head.name, head.info, state


def outcome(folder: Path, saved: list[Head]) -> str:
    """ "refused", "the head" or "told"; anything else is a fault of ours."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = load_head_dir(folder)
        except MMHooksError as error:
            assert folder.name in str(error), error
            return "refused"
    assert content(found) in [content(head) for head in saved], "a head that was never saved"
    return "told" if told else "the head"


def flipped(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "ncl"])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, rounds, kind, dtype) -> None:
    head = make(kind)
    path = head.save(tmp_path / "whole", dtype=dtype)
    saved, dice = [load_head_dir(path)], random.Random(f"{kind} {dtype}")
    seen: Counter[str] = Counter()
    for _ in range(rounds(30)):
        damaged = Path(shutil.copytree(path, tmp_path / "damaged", dirs_exist_ok=True))
        flipped(damaged / dice.choice(FILES), dice)
        seen[outcome(damaged, saved)] += 1
    print(dict(seen))
    assert seen["refused"] > 0.4 * seen.total()


def test_shipped_heads_are_found_changed(tmp_path, rounds) -> None:
    from mmhooks.utils.assets import ASSETS

    dice = random.Random(1)
    for name in ("sae", "ncl"):
        saved = [load_head_dir(ASSETS / "mini" / name)]
        path = Path(shutil.copytree(ASSETS / "mini" / name, tmp_path / name))
        for _ in range(rounds(8)):
            file = path / dice.choice(FILES)
            before = file.read_bytes()
            flipped(file, dice)
            outcome(path, saved)
            file.write_bytes(before)


def test_cut_off_files_and_files_of_two_heads(tmp_path, rounds) -> None:
    dice = random.Random(2)
    heads = [make("topk", seed) for seed in (0, 1)]
    a, b = (head.save(tmp_path / f"whole{i}") for i, head in enumerate(heads))
    for _ in range(rounds(30)):
        for file in FILES:
            damaged = Path(shutil.copytree(a, tmp_path / "damaged", dirs_exist_ok=True))
            data = (a / file).read_bytes()
            (damaged / file).write_bytes(data[: dice.randrange(len(data))])
            assert outcome(damaged, heads) == "refused"
    for file in FILES:  # B's weights never with A's configuration: whole or refused, and told
        mixed = Path(shutil.copytree(a, tmp_path / f"mixed {file}"))
        shutil.copy(b / file, mixed / file)
        assert outcome(mixed, heads) in ("told", "refused")


def test_a_kill_between_the_files_of_two_saves(tmp_path, rounds, monkeypatch) -> None:
    """The process ends before each of the steps that write a head over another one."""
    dice = random.Random(3)
    steps = ["make_folder", "save_file", "write_text"]
    for i in range(rounds(10)):
        old, new = make("topk", seed=i), make(dice.choice(["topk", "jumprelu", "ncl"]), seed=i + 1)
        folder = old.save(tmp_path / f"h{i}")
        with monkeypatch.context() as patch:

            def killed(*args, **kwargs):
                raise KeyboardInterrupt

            patch.setattr(head_files, dice.choice(steps), killed)
            with pytest.raises(KeyboardInterrupt):
                new.save(folder)
        assert outcome(folder, [old, new]) in ("the head", "told")
        assert not list(folder.glob(".*"))  # nothing left beside
        new.save(folder)
        assert outcome(folder, [new]) == "the head"
