"""The segmentation study: masks, its three kinds of data, and whole runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmhooks.errors import DataError
from mmhooks.studies.segmentation import samples as segmentation_data
from mmhooks.studies.segmentation import study as segmentation
from mmhooks.studies.segmentation.page import OURS, PRIMARIES, claims_of, decided

from ..written_files import written


def test_masks_are_preprocessed_like_their_images():
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
    image = Image.new("RGB", (32, 16))
    half, whole = (segmentation_data.Sample(image, m, "x", "x") for m in (mask, np.ones_like(mask)))
    kept, pixels, masks = segmentation_data.prepared(steps, [half, whole, half])
    assert kept == [half, half] and pixels.shape == (2, 3, 8, 8)  # of the whole one, no ground is seen
    assert masks.shape == (2, 8, 8) and masks[0, :, 4:].all() and not masks[0, :, :4].any()
    with pytest.raises(DataError, match="got 1 of 2"):
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
            image = np.zeros((6, 10, 3), np.uint8)  # rows, columns
            image[:, :4, 0] = 200 + i
            rows["img"].append(put(image.T))
            mask = put((image[..., 0] > 0).astype(np.uint8).T)
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
        assert s.image.size == (10, 6) and s.image.getpixel((1, 5)) == (200 + i, 0, 0)
        assert s.mask.shape == (6, 10) and s.mask[:, :4].all() and not s.mask[:, 4:].any()
    imagenet_segmentation(path, fields=("img", "gt"))
    with pytest.raises(DataError, match="missing value/target"):
        segmentation_data.from_mat(path, 5, 0)
    path.write_text("MATLAB 5.0 MAT-file")
    with pytest.raises(DataError, match="not an HDF5 file"):
        segmentation_data.from_mat(path, 5, 0)
    with pytest.raises(DataError, match="is not there"):
        segmentation_data.from_mat(tmp_path / "x.mat", 5, 0)
    with pytest.raises(DataError, match="'n0' is not a WordNet id"):
        segmentation_data.synset_name("n0")


def test_the_predicted_class_is_sought():
    """Two classes whose texts are read right from the image, and a third that no image shows."""
    import mmhooks as mm
    from mmhooks.errors import MMHooksError
    from mmhooks.models.clip.embed_texts import embed_texts
    from mmhooks.studies.segmentation.maps import directions

    mini = mm.load("mini")
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    names = ["a dog", "a cup", "the sea", "a dog"]
    texts = embed_texts(mini, sorted(set(names)))
    with torch.no_grad():
        nearest = (mini.encode_image(pixels).float() @ texts.T).argmax(1)
    true = torch.tensor([sorted(set(names)).index(n) for n in names])
    found = directions(mini, pixels, names, segmentation.Options(classes="predicted", batch=3))
    torch.testing.assert_close(found.own, (texts - texts.mean(0))[nearest])
    assert found.right == pytest.approx(float((nearest == true).float().mean()))
    own = directions(mini, pixels, names, segmentation.Options())
    torch.testing.assert_close(own.own, (texts - texts.mean(0))[true])
    with pytest.raises(MMHooksError, match="--classes: expected true, predicted, imagenet, got 'x'"):
        directions(mini, pixels, names, segmentation.Options(classes="x"))


def test_methods_are_compared_over_kinds_of_objects():
    """Ten images of each class move together: planted gains are shown, and a difference within the classes' scatter is not."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(200) // 10
    by_class = torch.randn(20, generator=generator)
    by_class = 0.1 * (by_class - by_class.mean()) / by_class.std()

    ours = 0.6 + 0.05 * torch.randn(200, generator=generator)
    gains = {"raw attention": 0.2, "rollout": -0.2, "gradient attention": 0.03, "LeGrad": 0.0}
    rest = [SimpleNamespace(name=n, ious=ours - gain - by_class[clusters]) for n, gain in gains.items()]
    scores = [SimpleNamespace(name=OURS, ious=ours), *rest]
    found = decided(scores, clusters)
    assert list(found) == [p.name for p in PRIMARIES.values()] and len(found) == 4
    outcomes = dict(zip(PRIMARIES, (d.outcome for d in found.values()), strict=True))
    assert outcomes == {
        "raw attention": "shown", "rollout": "opposite", "gradient attention": "undecided", "LeGrad": "undecided",
    }  # fmt: skip
    one = found[PRIMARIES["gradient attention"].name]
    assert (
        one.adjusted == pytest.approx(2 * one.p) and one.detectable > 0.03
    )  # two are left after the first two
    assert one.estimate.value == pytest.approx(0.03, abs=1e-6)
    alone = decided(scores, torch.arange(200))  # as if no two images were of one class
    assert alone[one.name].outcome == "shown"
    assert [verdict for verdict, _, _ in claims_of(found)] == ["same", "differs", "open", "open"]


@pytest.mark.slow
def test_segmentation_on_mini_beats_what_knows_no_text(tmp_path):
    found = written(segmentation.run(segmentation.Options(limit=80, out=tmp_path / "s", quiet=True)))
    verdicts = {
        claim.split(" beat ")[1].removesuffix(" on mIoU"): verdict for verdict, claim, _ in found["claims"]
    }
    assert verdicts["raw attention"] == verdicts["rollout"] == "same"


@pytest.mark.slow
def test_whole_study_on_another_model(tmp_path: Path) -> None:
    """ViT-B/32 with random weights: no claim, but everything runs and is written."""
    small = segmentation.Options(model="ViT-B-32", limit=8, batch=4, out=tmp_path / "s", quiet=True)
    assert written(segmentation.run(small))["n"] == 8


def test_the_papers_settings_run_and_are_accounted_for(tmp_path):
    path = tmp_path / "gtsegs_ijcv.mat"
    imagenet_segmentation(path)
    options = segmentation.Options.of_paper(
        model="mini", pretrained="", data=str(path), classes="predicted", quiet=True, out=tmp_path / "out"
    )
    found = segmentation.run(options)
    status = {s["option"]: s["status"] for s in found["paper"]["settings"] if s["option"]}
    assert found["settings"]["limit"] == 4276 and found["n"] == 2
    assert (
        status["data"] == "given" and status["classes"] == "overridden" and status["limit"] == "the paper's"
    )
    for name in ("index.html", "tables.md"):
        assert "GradCAM, LRP" in (tmp_path / "out" / name).read_text()
