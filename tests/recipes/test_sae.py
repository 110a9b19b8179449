"""What the SAE of mini is trained on and measured against: crossed names, the pursuit and its bounds."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import nnls
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from embedded.heads import fvu_floor as sae_floor
from embedded.heads import train as train_heads

from mmhooks.data.splits import split_of
from mmhooks.heads import TopKSAE, reconstruction


def test_crossed_names_are_made_of_two_names_and_never_held_out() -> None:
    names = ["woman farmer", "red panda", "old house", "fox"]
    dice = random.Random(0)
    for _ in range(300):
        words = train_heads.crossed(names, dice).split()
        cut = [
            (one, two)
            for one, two in itertools.product(names, repeat=2)
            for i in range(1, len(words))
            if words[:i] == one.split()[:i] and words[i:] == two.split()[-len(words[i:]) :]
        ]
        assert cut and split_of("", " ".join(words)) != "heldout_concepts"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    names = ["red fox", "blue whale", "green tree", "old house", "small boat", "big sun"]
    splits = ("train", "train", "heldout_pictures", "heldout_concepts")
    rows = [
        {"style": "s", "name": names[i % 6], "keywords": ["thing"], "toned": False, "concept": names[i % 6],
         "split": splits[i % 4]}
        for i in range(24)
    ]  # fmt: skip
    folder = tmp_path / "corpus"
    folder.mkdir()
    rgba = torch.randint(
        0, 256, (24, 72, 72, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    save_file({"rgba": rgba}, folder / "rgba.safetensors")
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def test_vectors_are_unit_aligned_and_read_the_second_time(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = train_heads.vectors("mini", corpus, 0)
    assert [len(x) for x in data[:6]] == [12, 12, 24, 72, 12, 12] and data.pictures == 6
    assert all(torch.allclose(x.norm(dim=1), torch.ones(len(x)), atol=1e-5) for x in data[:6])
    image, text = data.pairs("captions", "names")
    assert torch.equal(image[24:], data.image) and torch.equal(text[24:], data.names)
    assert torch.equal(image[12:24], data.image)
    monkeypatch.setattr(train_heads, "embed", lambda *_: pytest.fail("embedded again"))
    assert torch.equal(train_heads.vectors("mini", corpus, 0).crossed, data.crossed)


def test_best_values_of_chosen_atoms_are_those_of_scipy() -> None:
    g = torch.Generator().manual_seed(0)
    atoms, x = normalize(torch.randn(12, 8, generator=g), dim=1), torch.randn(20, 8, generator=g)
    chosen = torch.stack([torch.randperm(12, generator=g)[:5] for _ in x])
    found = sae_floor.explained(x, atoms, chosen, sweeps=400)
    for row, places, got in zip(x, chosen, found, strict=True):
        _, rest = nnls(atoms[places].T.double().numpy(), row.double().numpy())
        assert float((row - got).norm()) == pytest.approx(rest, abs=1e-3)


def test_pursuit_of_one_atom_is_the_best_one_and_more_never_hurt() -> None:
    g = torch.Generator().manual_seed(1)
    atoms, x = normalize(torch.randn(12, 8, generator=g), dim=1), torch.randn(20, 8, generator=g)
    error = [(x - sae_floor.pursuit(x, atoms, k)).square().sum(1) for k in (1, 2, 4, 8)]
    by_hand = x.square().sum(1) - (x @ atoms.T).clamp_min(0).amax(1).square()
    torch.testing.assert_close(error[0], by_hand, rtol=1e-4, atol=1e-5)
    for fewer, more in itertools.pairwise(error):
        assert bool((more <= fewer + 1e-4).all())


def test_pursuit_finds_a_sparse_vector_again() -> None:
    atoms = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2))).Q
    codes = torch.zeros(5, 16)
    codes[:, 3], codes[:, 7], codes[:, 11] = 1.0, 2.0, 0.5
    torch.testing.assert_close(sae_floor.pursuit(codes @ atoms, atoms, 3), codes @ atoms, atol=1e-5, rtol=0)


def test_bounds_are_ordered_and_start_at_fidelity() -> None:
    x = normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    sae = TopKSAE(16, 64, 6)
    found = sae_floor.bounds(sae, x)
    assert found["head"] == pytest.approx(reconstruction(sae, x).fvu, rel=1e-4)
    assert found["pursuit"] < found["own"] < found["head"]
