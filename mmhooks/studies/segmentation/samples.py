"""Pictures with an object's exact mask and its name: drawings on grounds, a folder, or ImageNet-Segmentation's own file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Sample:
    """A picture, where its object is, and the object's name."""

    picture: Image.Image
    mask: np.ndarray
    name: str
    ground: str


def samples_of(data: str, limit: int, seed: int) -> tuple[list[Sample], str]:
    """Samples and their attribution: ``mini``, the file ``gtsegs_ijcv.mat``, or a folder."""
    if data == "mini":
        return drawings(limit, seed)
    return (from_mat if data.endswith(".mat") else from_folder)(data, limit, seed)


def drawings(limit: int, seed: int) -> tuple[list[Sample], str]:
    """OpenMoji drawings of animals, food, things and plants that fill a tenth to two thirds of the picture, half of
    them on each kind of ground."""
    import mmhooks as mm
    from mmhooks.data.synthetic.backgrounds import draw_background, paste_on

    pairs = mm.data.pairs("mini")
    draw = np.random.default_rng(seed)
    samples: list[Sample] = []
    for i in draw.permutation(len(pairs)).tolist():
        code = str(pairs.meta[i].get("codepoints", ""))
        if "-" in code or not code.startswith(("1f3", "1f4", "1f5", "1f6", "1f9", "1fa")):
            continue  # flags, signs, skin tones and joined people
        kind = ("photo-like", "patterned")[len(samples) % 2]
        background = draw_background(kind, 128, seed * 100_003 + i)  # type: ignore[arg-type]
        at = (float(draw.random()), float(draw.random()))
        picture, mask = paste_on(pairs.rgba(i), background, scale=float(draw.uniform(0.55, 0.9)), at=at)
        if 0.05 < mask.mean() < 0.7:
            samples.append(Sample(picture, mask, pairs.texts[i], kind))
        if len(samples) == limit:
            break
    return samples, f"{pairs.attribution} Licence of the drawings: {pairs.licence}."


def from_folder(folder: str | Path, limit: int, seed: int) -> tuple[list[Sample], str]:
    """``images/NAME.*``, ``masks/NAME.png`` (object: not 0) and ``classes.csv`` with the columns file and class.

    Raises:
        DataError: something of these is missing; names the first.
    """
    from mmhooks.data.sources.images import open_image, open_mask, rgb
    from mmhooks.data.sources.local_files import DataRoot
    from mmhooks.errors import DataError

    place = Path(folder).expanduser()
    listing = place / "classes.csv"
    if not listing.is_file():
        raise DataError(
            f"{listing} is missing: a table with the columns file and class, a row a picture in images/"
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
            picture = rgb(open_image(home.read(f"images/{file}")))
            mask = open_mask(home.read(str(mask_name)))
        except DataError as fault:
            raise DataError(f"{listing} names {file!r}: its image or mask cannot be used: {fault}") from fault
        if mask.shape != (picture.height, picture.width):
            raise DataError(f"{listing}: the image {file!r} is {picture.size}, its mask {mask.shape[::-1]}")
        samples.append(Sample(picture, mask, name, "photographs"))
    return samples, f"Pictures: {place.name}."


def _rows(listing: Path) -> list[dict[str, str]]:
    from mmhooks.data.sources.tables import read_table
    from mmhooks.errors import DataError

    lines = read_table(listing, ("file", "class"))
    bad = next((line for line in lines if line.fault), None)
    if bad is not None:
        raise DataError(f"{listing}, line {bad.number}: {bad.fault}")
    if not lines:
        raise DataError(f"{listing} needs the columns file and class and at least one row")
    return [line.entry for line in lines]


def from_mat(path: str | Path, limit: int, seed: int) -> tuple[list[Sample], str]:
    """ImageNet-Segmentation as it is distributed: one MATLAB 7.3 file (HDF5) with a struct ``value`` of 4,276 pictures
    ``img``, masks ``gt`` (each in a cell) and WordNet ids ``target`` (Guillaumin et al. 2014). MATLAB stores columns
    first, so every array lies transposed.

    Raises:
        DataError: no such file, not HDF5, a field missing, or a mask that does not fit its picture.
    """
    from mmhooks.errors import DataError

    try:
        import h5py
    except ImportError as error:
        raise DataError("a .mat file of MATLAB 7.3 is read by h5py: pip install h5py") from error
    file_path = Path(path).expanduser()
    if not file_path.is_file():
        raise DataError(f"{file_path} is not there")
    if not h5py.is_hdf5(file_path):
        raise DataError(f"{file_path} is no HDF5 file, which MATLAB 7.3 and gtsegs_ijcv.mat are")
    samples = []
    file: Any
    with h5py.File(file_path) as file:
        missing = [field for field in ("img", "gt", "target") if f"value/{field}" not in file]
        if missing:
            raise DataError(f"{file_path} lacks value/{', value/'.join(missing)}; it has {', '.join(file)}")
        images, masks, targets = (np.ravel(file[f"value/{field}"][()]) for field in ("img", "gt", "target"))
        for i in chosen(len(images), limit, seed):
            pixels = np.asarray(file[images[i]])
            if pixels.ndim == 2:  # a grey picture
                pixels = np.stack([pixels] * 3)
            mask = np.asarray(file[np.ravel(file[masks[i]][()])[0]]).T
            if mask.shape != pixels.T.shape[:2]:
                raise DataError(
                    f"{file_path}, picture {i}: mask {mask.shape}, picture {pixels.T.shape[:2]} (rows, columns)"
                )
            wordnet = "".join(map(chr, np.ravel(file[targets[i]][()])))
            samples.append(Sample(Image.fromarray(pixels.T), mask > 0, synset_name(wordnet), "photographs"))
    return samples, f"Pictures: ImageNet-Segmentation ({file_path.name})."


def synset_name(wordnet: str) -> str:
    """The first name of an ImageNet class by its WordNet id, from timm's tables.

    Raises:
        DataError: an id that ImageNet-22k does not have.
    """
    from timm.data.imagenet_info import ImageNetInfo

    from mmhooks.errors import DataError

    for table in ("imagenet-1k", "imagenet-22k"):
        info = ImageNetInfo(table)
        if wordnet in info.label_names():
            return info.label_name_to_description(wordnet).split(",")[0].strip()
    raise DataError(f"{wordnet!r} is no WordNet id of ImageNet")


def chosen(n: int, limit: int, seed: int) -> list[int]:
    """At most ``limit`` of ``n`` rows, in their order."""
    return sorted(np.random.default_rng(seed).permutation(n)[:limit].tolist())


def prepared(preprocess: Any, samples: Sequence[Sample]) -> tuple[list[Sample], Any, Any]:
    """Samples, their pixels, and masks as the model sees them: the mask takes the way of its picture, as black and
    white. Pictures of whose mask the model's crop leaves nothing, or nothing else, are left out.

    Raises:
        DataError: fewer than two pictures are left.
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
            pixels.append(preprocess(sample.picture))
            masks.append(mask)
    if len(kept) < 2:
        raise DataError(
            f"{len(kept)} of {len(samples)} pictures show both object and ground after the model's crop; at least 2 are needed"
        )
    return kept, torch.stack(pixels), torch.stack(masks)
