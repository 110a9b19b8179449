"""The studies on top of the decomposition: what they draw, what they compute by hand, and whole runs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.errors import DataError

grounds = pytest.importorskip("grounds")
from mmhooks.studies.common.write import Results  # noqa: E402
from mmhooks.studies.segmentation import samples as segmentation_data  # noqa: E402
from mmhooks.studies.segmentation import study as segmentation  # noqa: E402
from mmhooks.studies.spurious import accuracy as spurious_judge  # noqa: E402
from mmhooks.studies.spurious import samples as spurious_data  # noqa: E402
from mmhooks.studies.spurious import study as spurious  # noqa: E402
from mmhooks.studies.spurious import trials as spurious_trials  # noqa: E402


@pytest.mark.parametrize("kind", grounds.BACKGROUNDS)
def test_grounds_come_from_their_seed(kind):
    one, same, other = (np.asarray(grounds.ground(kind, 32, seed)) for seed in (1, 1, 2))
    assert one.shape == (32, 32, 3) and (one == same).all() and (one != other).mean() > 0.1


def test_a_drawing_hides_its_ground_just_where_its_mask_is():
    red = Image.new("RGBA", (10, 10), (255, 0, 0, 255))
    picture, mask = grounds.paste_on(red, Image.new("RGB", (40, 40), "blue"), scale=0.5, at=(1.0, 0.0))
    assert mask.sum() == 400 and mask[:20, 20:].all()
    assert ((np.asarray(picture)[..., 0] == 255) == mask).all()


def test_masks_go_the_way_of_their_pictures():
    from torchvision import transforms

    steps = transforms.Compose(
        [
            transforms.Resize(8),
            transforms.CenterCrop(8),
            transforms.ToTensor(),
            transforms.Normalize([0.4], [0.3]),
        ]
    )
    mask = np.zeros((16, 32), bool)
    mask[:, 16:] = True  # the crop keeps columns 8 to 24
    picture = Image.new("RGB", (32, 16))
    half, whole = (segmentation_data.Sample(picture, m, "x", "x") for m in (mask, np.ones_like(mask)))
    kept, pixels, masks = segmentation_data.prepared(steps, [half, whole, half])
    assert kept == [half, half] and pixels.shape == (2, 3, 8, 8)  # of the whole one, no ground is seen
    assert masks.shape == (2, 8, 8) and masks[0, :, 4:].all() and not masks[0, :, :4].any()
    with pytest.raises(DataError, match="1 of 2 pictures show both"):
        segmentation_data.prepared(steps, [half, whole])


def test_a_folder_of_masks(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a.jpg")
    with pytest.raises(DataError, match="classes.csv is missing"):
        segmentation_data.from_folder(tmp_path, 5, 0)
    (tmp_path / "classes.csv").write_text("file,class\na.jpg,apple\n")
    with pytest.raises(DataError, match=r"a\.png is not there"):
        segmentation_data.from_folder(tmp_path, 5, 0)
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "masks" / "a.png")
    samples, _ = segmentation_data.from_folder(tmp_path, 5, 0)
    assert samples[0].name == "apple" and samples[0].mask.sum() == 8


def imagenet_segmentation(path, fields=("img", "gt", "target")) -> None:
    """A file laid out as MATLAB 7.3 lays out gtsegs_ijcv.mat: references to transposed arrays, masks in a cell."""
    h5py = pytest.importorskip("h5py")
    rows = {"img": [], "gt": [], "target": []}
    with h5py.File(path, "w") as file:

        def put(array):
            found = file.create_dataset(
                f"#refs#/{len(file['#refs#']) if '#refs#' in file else 0}", data=array
            )
            return found.ref

        for i, wordnet in enumerate(("n01440764", "n02084071")):
            picture = np.zeros((6, 10, 3), np.uint8)  # rows, columns
            picture[:, :4, 0] = 200 + i
            rows["img"].append(put(picture.T))
            mask = put((picture[..., 0] > 0).astype(np.uint8).T)
            rows["gt"].append(put(np.array([[mask]], h5py.ref_dtype)))
            rows["target"].append(put(np.array([[ord(c)] for c in wordnet], np.uint16)))
        for field in fields:
            file.create_dataset(f"value/{field}", data=np.array(rows[field], h5py.ref_dtype)[:, None])


def test_imagenet_segmentation_is_read_from_its_own_file(tmp_path):
    path = tmp_path / "gtsegs_ijcv.mat"
    imagenet_segmentation(path)
    samples, _ = segmentation_data.samples_of(str(path), 5, 0)
    assert [s.name for s in samples] == ["tench", "dog"]  # ImageNet-1k has the one, 22k the other
    for i, s in enumerate(samples):
        assert s.picture.size == (10, 6) and s.picture.getpixel((1, 5)) == (200 + i, 0, 0)
        assert s.mask.shape == (6, 10) and s.mask[:, :4].all() and not s.mask[:, 4:].any()
    imagenet_segmentation(path, fields=("img", "gt"))
    with pytest.raises(DataError, match="lacks value/target"):
        segmentation_data.from_mat(path, 5, 0)
    path.write_text("MATLAB 5.0 MAT-file")
    with pytest.raises(DataError, match="no HDF5 file"):
        segmentation_data.from_mat(path, 5, 0)
    with pytest.raises(DataError, match="is not there"):
        segmentation_data.from_mat(tmp_path / "x.mat", 5, 0)
    with pytest.raises(DataError, match="'n0' is no WordNet id"):
        segmentation_data.synset_name("n0")


def test_heads_are_chosen_and_judged_on_other_animals():
    opened: list[int] = []

    def preprocess(image: Image.Image) -> torch.Tensor:
        opened.append(hash(image.tobytes()))
        return torch.zeros(3, 4, 4)

    found = spurious_data.drawn(preprocess, n=64, correlation=0.9, scale=0.5, seed=3)
    assert torch.bincount(found.judge.groups).tolist() == [16, 16, 16, 16]
    assert float(found.shares[[0, 3]].sum()) > 0.7
    assert not set(opened[:64]) & set(opened[64:])


def test_worst_group_and_its_bootstrap():
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3])
    right = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1]).bool()
    assert spurious_judge.worst_group(right, groups) == 0.5
    report = spurious_judge.measured(right, groups, torch.tensor([0.5, 0.25, 0.0, 0.25]), seed=0)
    assert report["worst"].value == 0.5 and report["average"].value == pytest.approx(0.875)
    assert list(report["groups"]) == [spurious_data.GROUPS[g] for g in (0, 1, 3)]
    drawn, own = spurious_judge.group_draws(torch.stack([right, right]), groups, seed=0)
    assert torch.equal(drawn[0], drawn[1]) and own[0].tolist() == [1, 0.5, 1]  # the same pictures for both


def test_contrast_finds_the_head_that_the_background_moves():
    animals, places = torch.tensor([0, 0, 1, 1] * 8), torch.tensor([0, 1] * 16)
    outputs = torch.zeros(32, 2, 3, 4)
    outputs[:, 1, 2, 0] = places.float()  # this one carries the background, the next the animal
    outputs[:, 0, 1, 0] = 5 * animals.float()
    texts = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])
    scenes = SimpleNamespace(animals=animals, places=places)
    assert spurious_trials.by_contrast(outputs, [4, 5], scenes, texts) == [(5, 2)]


def test_text_span_finds_the_head_whose_texts_are_places(tmp_path):
    mini = mm.load("mini")
    pool = tmp_path / "pool.txt"
    pool.write_text("# place\na beach\na forest\n# colour\nred\nblue\n")
    from mmhooks.models.clip.embed_texts import embed_texts

    texts = mm.data.text_pool(str(pool))
    embedded = embed_texts(mini, texts.texts)
    beach, red = embedded[0], embedded[2]
    outputs = 0.01 * torch.randn(40, 1, 2, 256, generator=torch.Generator().manual_seed(0))
    outputs[:, 0, 0] += torch.linspace(-1, 1, 40)[:, None] * red
    outputs[:, 0, 1] += torch.linspace(-1, 1, 40)[:, None] * beach
    named, order, reach = spurious_trials.by_text_span(texts, embedded, outputs, [5], ["place"])
    assert named["5.1"][0] == "a beach" and order[0] == (5, 1) and 0.8 < reach <= 1
    (tmp_path / "plain.txt").write_text("a beach\n")
    with pytest.raises(DataError, match="no kinds"):
        spurious_trials.by_text_span(
            mm.data.text_pool(str(tmp_path / "plain.txt")), embedded[:1], outputs, [5], ["place"]
        )


def test_a_claim_that_does_not_hold_says_so():
    groups = torch.arange(200) % 4
    plain, worse = torch.ones(200).bool(), torch.arange(200) % 3 > 0
    right = {"plain": plain, "TextSpan": worse}
    random = spurious_judge.spread(torch.full((10,), 0.9))
    claims = spurious_judge.compared("TextSpan", [1], right, groups, random, 0)
    assert [verdict for verdict, _, _ in claims] == ["differs", "differs"]
    assert spurious_judge.compared("TextSpan", [0], right, groups, random, 0)[0][0] == "open"


def written(found: Results) -> dict:
    """What ``results.json`` holds, which is what the run returned; every file is one that it names."""
    out = found.paths[0].parent
    assert {p.suffix for p in out.iterdir()} == {".json", ".md", ".png", ".html"}
    assert set(found.paths) == set(out.iterdir())
    assert json.loads((out / "results.json").read_text()) == found.found
    return found.found


@pytest.mark.slow
def test_segmentation_on_mini_beats_what_knows_no_text(tmp_path):
    found = written(segmentation.run(segmentation.Options(limit=80, out=tmp_path / "s", quiet=True)))
    verdicts = {
        claim.split(" beat ")[1].removesuffix(" on mIoU"): verdict for verdict, claim, _ in found["claims"]
    }
    assert verdicts["raw attention"] == verdicts["rollout"] == "same"


@pytest.mark.slow
def test_whole_studies_on_another_model(tmp_path):
    """ViT-B/32 with random weights: no claim, but everything runs and is written."""
    small = segmentation.Options(model="ViT-B-32", limit=8, batch=4, out=tmp_path / "s", quiet=True)
    assert written(segmentation.run(small))["n"] == 8
    pool = tmp_path / "pool.txt"
    pool.write_text("# place\na beach\na forest\nthe sea\n# colour\nred things\nblue things\n")
    found = spurious.run(
        spurious.Options(
            model="ViT-B-32", limit=8, draws=2, layers=1, batch=8, splits=2, pool=str(pool), out=tmp_path / "p",
            quiet=True,
        )
    )  # fmt: skip
    assert written(found)["n"] == {"choose": 16, "judge": 16}


@pytest.mark.slow
def test_spurious_on_data_of_ones_own(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [Image.new("RGB", (64, 64), (40 * i, 20, 90)) for i in range(8)],
        "y": [0, 0, 1, 1] * 2, "place": [0, 1] * 4,
    }  # fmt: skip
    features = datasets.Features(
        {"image": datasets.Image(), "y": datasets.Value("int64"), "place": datasets.Value("int64")}
    )
    one = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"validation": one, "test": one}).save_to_disk(str(tmp_path / "d"))
    mini = mm.load("mini")
    names = ("a bird", "a fish")
    found = spurious_data.real(
        mini.preprocess, str(tmp_path / "d"), label="y", place="place", names=names, limit=8, seed=0
    )
    assert found.judge.pixels.shape == (8, 3, 64, 64) and found.shares.tolist() == [0.25] * 4
    with pytest.raises(DataError, match="no column sky"):
        spurious_data.real(
            mini.preprocess, str(tmp_path / "d"), label="y", place="sky", names=names, limit=8, seed=0
        )
