"""Images with an object's exact mask and name: drawings on backgrounds, a folder, or ImageNet-Segmentation's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmhooks.data.families import drawing_family

DRAWN = ("photo-like", "patterned")  # backgrounds of drawings


@dataclass(frozen=True)
class Sample:
    """An image, the mask and name of its object, and the kind of background.

    Images of one kind of object (a class, a family of drawings) are one cluster where methods are compared.
    """

    image: Image.Image
    mask: np.ndarray
    name: str
    ground: str

    @property
    def kind(self) -> str:
        return drawing_family(self.name) if self.ground in DRAWN else self.name


def samples_of(data: str, limit: int, seed: int) -> tuple[list[Sample], str]:
    """Returns samples and their attribution: of ``mini``, the file ``gtsegs_ijcv.mat``, or a folder."""
    if data == "mini":
        return drawings(limit, seed)
    return (from_mat if data.endswith(".mat") else from_folder)(data, limit, seed)


def drawings(limit: int, seed: int) -> tuple[list[Sample], str]:
    """Returns OpenMoji drawings of animals, food, things and plants that cover 5 to 70 % of the image.

    Half of them are on each kind of background.
    """
    import mmhooks as mm
    from mmhooks.data.synthetic.backgrounds import draw_background, paste_on

    pairs = mm.data.pairs("mini")
    draw = np.random.default_rng(seed)
    samples: list[Sample] = []
    for i in draw.permutation(len(pairs)).tolist():
        code = str(pairs.meta[i].get("codepoints", ""))
        if "-" in code or not code.startswith(("1f3", "1f4", "1f5", "1f6", "1f9", "1fa")):
            continue  # flags, signs, skin tones and joined people
        kind = DRAWN[len(samples) % 2]
        background = draw_background(kind, 128, seed * 100_003 + i)  # type: ignore[arg-type]
        at = (float(draw.random()), float(draw.random()))
        image, mask = paste_on(pairs.rgba(i), background, scale=float(draw.uniform(0.55, 0.9)), at=at)
        if 0.05 < mask.mean() < 0.7:
            samples.append(Sample(image, mask, pairs.texts[i], kind))
        if len(samples) == limit:
            break
    return samples, f"{pairs.attribution} Licence of the drawings: {pairs.licence}."


def from_folder(folder: str | Path, limit: int, seed: int) -> tuple[list[Sample], str]:
    """Reads ``images/NAME.*``, ``masks/NAME.png`` (object: not 0) and ``classes.csv`` with the columns file and class.

    Raises:
        DataError: one of these is missing or unusable; names the first.
    """
    from mmhooks.data.sources.images import open_image, open_mask, rgb
    from mmhooks.data.sources.local_files import DataRoot
    from mmhooks.errors import DataError

    place = Path(folder).expanduser()
    listing = place / "classes.csv"
    if not listing.is_file():
        raise DataError(
            f"{listing} is missing: expected a table with the columns file and class, one row per image in images/"
        )
    rows = _rows(listing)
    home = DataRoot(place)
    samples = []
    for entry in (rows[i] for i in chosen(len(rows), limit, seed)):
        file, name = entry["file"], entry["class"]
        mask_name = Path("masks", file).with_suffix(".png")
        for path in (place / "images" / file, place / mask_name):
            if not path.is_file():
                raise DataError(f"{listing} names {file!r}, but {path} is not there")
        try:
            image = rgb(open_image(home.read(f"images/{file}")))
            mask = open_mask(home.read(str(mask_name)))
        except DataError as fault:
            raise DataError(f"{listing} names {file!r}: its image or mask cannot be used: {fault}") from fault
        if mask.shape != (image.height, image.width):
            raise DataError(f"{listing}: the image {file!r} is {image.size}, its mask {mask.shape[::-1]}")
        samples.append(Sample(image, mask, name, "photographs"))
    return samples, f"Images: {place.name}."


def _rows(listing: Path) -> list[dict[str, str]]:
    from mmhooks.data.sources.tables import read_table
    from mmhooks.errors import DataError

    lines = read_table(listing, ("file", "class"))
    bad = next((line for line in lines if line.fault), None)
    if bad is not None:
        raise DataError(f"{listing}, line {bad.number}: {bad.fault}")
    if not lines:
        raise DataError(f"{listing}: expected the columns file and class and at least one row, got no row")
    return [line.entry for line in lines]


def from_mat(path: str | Path, limit: int, seed: int) -> tuple[list[Sample], str]:
    """Reads ImageNet-Segmentation from the file that is distributed, in MATLAB 7.3 format (HDF5).

    Its struct ``value`` has 4,276 images ``img``, masks ``gt`` (each in a cell) and WordNet ids ``target`` (Guillaumin
    et al. 2014). MATLAB stores columns first, so every array is transposed.

    Raises:
        DataError: no such file, not HDF5, a missing field, or a mask that does not fit its image.
    """
    from mmhooks.errors import DataError

    try:
        import h5py
    except ImportError as error:
        raise DataError("reading a .mat file of MATLAB 7.3 needs h5py: pip install h5py") from error
    file_path = Path(path).expanduser()
    if not file_path.is_file():
        raise DataError(f"{file_path} is not there")
    if not h5py.is_hdf5(file_path):
        raise DataError(
            f"{file_path} is not an HDF5 file: expected MATLAB 7.3, the format of gtsegs_ijcv.mat"
        )
    samples = []
    file: Any
    with h5py.File(file_path) as file:
        missing = [field for field in ("img", "gt", "target") if f"value/{field}" not in file]
        if missing:
            raise DataError(
                f"{file_path}: missing value/{', value/'.join(missing)}; it has {', '.join(file)}"
            )
        images, masks, targets = (np.ravel(file[f"value/{field}"][()]) for field in ("img", "gt", "target"))
        for i in chosen(len(images), limit, seed):
            pixels = np.asarray(file[images[i]])
            if pixels.ndim == 2:  # a greyscale image
                pixels = np.stack([pixels] * 3)
            mask = np.asarray(file[np.ravel(file[masks[i]][()])[0]]).T
            if mask.shape != pixels.T.shape[:2]:
                raise DataError(
                    f"{file_path}, image {i}: mask {mask.shape}, image {pixels.T.shape[:2]} (rows, columns)"
                )
            wordnet = "".join(map(chr, np.ravel(file[targets[i]][()])))
            samples.append(Sample(Image.fromarray(pixels.T), mask > 0, synset_name(wordnet), "photographs"))
    return samples, f"Images: ImageNet-Segmentation ({file_path.name})."


def synset_name(wordnet: str) -> str:
    """Returns the first name of an ImageNet class by its WordNet id, from timm's tables.

    Raises:
        DataError: an id that is not in ImageNet-22k.
    """
    from timm.data.imagenet_info import ImageNetInfo

    from mmhooks.errors import DataError

    for table in ("imagenet-1k", "imagenet-22k"):
        info = ImageNetInfo(table)
        if wordnet in info.label_names():
            return info.label_name_to_description(wordnet).split(",")[0].strip()
    raise DataError(f"{wordnet!r} is not a WordNet id of ImageNet")


def chosen(n: int, limit: int, seed: int) -> list[int]:
    """Samples at most ``limit`` of ``n`` rows, sorted."""
    return sorted(np.random.default_rng(seed).permutation(n)[:limit].tolist())


def prepared(preprocess: Any, samples: Sequence[Sample]) -> tuple[list[Sample], Any, Any]:
    """Preprocesses the samples: returns them with their pixels, and their masks as the model sees them.

    A mask is preprocessed like its image, as black and white. Images whose crop shows no object, or only object, are
    left out.

    Raises:
        DataError: fewer than two images are left.
    """
    import torch

    from mmhooks.errors import DataError

    kept, pixels, masks = [], [], []
    for sample in samples:
        shape = (*sample.mask.shape, 3)
        white = preprocess(Image.fromarray(np.full(shape, 255, np.uint8)))
        black = preprocess(Image.fromarray(np.zeros(shape, np.uint8)))
        grey = preprocess(
            Image.fromarray(np.repeat(255 * sample.mask[..., None].astype(np.uint8), 3, axis=2))
        )
        mask = ((grey - black) / (white - black)).mean(0) > 0.5
        if bool(mask.any()) and not bool(mask.all()):
            kept.append(sample)
            pixels.append(preprocess(sample.image))
            masks.append(mask)
    if len(kept) < 2:
        raise DataError(
            f"expected at least 2 images that show both object and background after the model's crop, got {len(kept)} of "
            f"{len(samples)}; give larger images or other --data"
        )
    return kept, torch.stack(pixels), torch.stack(masks)
