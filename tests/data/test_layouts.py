"""Tiny copies of public data sets, file by file as they are distributed: their pairs, ids, families and refusals."""

from __future__ import annotations

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.layout_files import CAPTIONS, NAMES, coco, images, put, read, shown
from data.tiny import encoded
from mmhooks.data import families
from mmhooks.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


# -- COCO and Karpathy's splits ------------------------------------------------------------------------------


def test_coco_captions(tmp_path):
    path = coco(tmp_path)
    images(tmp_path / "val2017", *NAMES)
    pairs = read(path)
    assert pairs.ids == NAMES and pairs.texts == ["A woman in a room.", "A big brown bear.", "A bedroom."]
    assert shown(pairs) == [0, 1, 2] and pairs[2].meta == {"image_id": 632, "captions": CAPTIONS[632]}
    every = read(path, captions="all")
    assert every.texts == [text for number in (139, 285, 632) for text in CAPTIONS[number]]
    assert families(every).tolist() == [0, 1, 1, 2, 2, 2] and shown(every) == [0, 1, 1, 2, 2, 2]
    assert read(path, limit=2, captions="all", seed=1).ids[0].endswith("#0")
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    (tmp_path / "annotations").rename(tmp_path / "json")
    path = tmp_path / "json" / "captions_val2017.json"
    with pytest.raises(
        DataError, match=r"such as '000000000139\.jpg', in .*json, got none of them there.*images="
    ):
        read(path)
    assert read(path, images=tmp_path / "elsewhere").fingerprint == pairs.fingerprint


def test_what_is_wrong_in_coco_is_told(tmp_path):
    path = coco(tmp_path, CAPTIONS | {99: ["An image that is not listed."], 139: []})
    images(tmp_path / "val2017", *NAMES)
    with pytest.raises(DataError, match="annotation 5: there is no image 99; fix it"):
        read(path)
    pairs = read(path, on_error="skip")
    assert pairs.ids == NAMES[1:]
    assert pairs.skipped == {"annotation 5": "there is no image 99", NAMES[0]: "its text is empty"}
    boxes = {
        "images": [{"id": 1, "file_name": "x.jpg"}],
        "annotations": [{"image_id": 1, "id": 2, "bbox": []}],
    }
    with pytest.raises(
        DataError, match="annotations with image_id, id, bbox and images with id, file_name; missing caption"
    ):
        read(put(tmp_path / "instances_val2017.json", json.dumps(boxes)))
    for content, said in (
        ('{"a": 1, "b": 2}', "got a, b"),
        ("{", "expected JSON"),
        ('{"images": [{"x": 1}]}', "its images have x"),
    ):
        with pytest.raises(DataError, match=said):
            read(put(tmp_path / "other.json", content))


def karpathy(top, with_folders):
    names = [
        "COCO_val2014_000000391895.jpg",
        "COCO_train2014_000000522418.jpg",
        "COCO_val2014_000000184613.jpg",
    ]
    listed, number = [], 0
    for i, (name, split) in enumerate(zip(names, ["test", "restval", "test"], strict=True)):
        sentences = []
        for text in [f"A man number {i}.", f"A person number {i}."]:
            tokens = text.lower().strip(".").split()
            sentences.append({"tokens": tokens, "raw": text, "imgid": i, "sentid": number})
            number += 1
        entry = {"sentids": [s["sentid"] for s in sentences], "filename": name, "imgid": i, "split": split}
        entry |= {"sentences": sentences}
        if with_folders:
            entry |= {"filepath": name.split("_")[1], "cocoid": int(name[-10:-4])}
        listed.append(entry)
    return put(top / "dataset_coco.json", json.dumps({"images": listed, "dataset": "coco"})), names


@pytest.mark.parametrize("with_folders", [True, False])  # COCO's file, Flickr's files
def test_karpathy_splits(tmp_path, with_folders):
    path, names = karpathy(tmp_path, with_folders)
    for i, name in enumerate(names):
        put(tmp_path / (name.split("_")[1] if with_folders else "images") / name, encoded(i))
    test = read(path, split="test", captions="all")
    assert test.ids == [f"{names[i]}#{j}" for i in (0, 2) for j in (0, 1)] and shown(test) == [0, 0, 2, 2]
    assert test.texts[:2] == ["A man number 0.", "A person number 0."] and families(test).tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert test[0].meta.get("cocoid") == (391895 if with_folders else None)
    assert read(path).splits == ["test", "restval", "test"]
    with pytest.raises(DataError, match=r"no pair in split 'train'; it has test \(2\), restval \(1\)"):
        read(path, split="train")


def test_karpathy_images_in_one_folder(tmp_path):
    """Both folders of COCO in one, as many copies have them."""
    path, names = karpathy(tmp_path / "json", True)
    images(tmp_path / "all", *names)
    assert shown(read(path, images=tmp_path / "all")) == [0, 1, 2]


# -- tables --------------------------------------------------------------------------------------------------

FLICKR = {
    # Kaggle's Flickr8k; quotes as the csv module writes them.
    "captions.txt": (
        "image,caption\n1000268201_693b08cb0e.jpg,A child in a pink dress .\n"
        '1000268201_693b08cb0e.jpg,"A girl , going in ."\n1001773457_577c3a7d70.jpg,A black dog .\n',
        ["1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg"],
        [["A child in a pink dress .", "A girl , going in ."], ["A black dog ."]],
    ),
    # The original, without a header; a quote is a character like others there.
    "Flickr8k.token.txt": (
        "1000268201_693b08cb0e.jpg#0\tA child in a pink dress .\n1000268201_693b08cb0e.jpg#1\t\"Girl\" going in .\n"
        "1001773457_577c3a7d70.jpg#0\tA black dog .\n",
        ["1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg"],
        [["A child in a pink dress .", '"Girl" going in .'], ["A black dog ."]],
    ),
    # Flickr30k.
    "results.csv": (
        "image_name| comment_number| comment\n1000092795.jpg| 0| Two young guys , one in green .\n"
        '1000092795.jpg| 1| Two men "outside" .\n10002456.jpg| 0| Several men in hard hats .\n',
        ["1000092795.jpg", "10002456.jpg"],
        [["Two young guys , one in green .", 'Two men "outside" .'], ["Several men in hard hats ."]],
    ),
    # Flickr30k on the Hub: lists in JSON, Karpathy's splits.
    "flickr_annotations_30k.csv": (
        "raw,sentids,split,filename,img_id\n"
        '"[""Two young guys."", ""Two men, outside.""]","[0, 1]",train,1000092795.jpg,0\n'
        '"[""Several men.""]",[5],test,10002456.jpg,1\n',
        ["1000092795.jpg", "10002456.jpg"],
        [["Two young guys.", "Two men, outside."], ["Several men."]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLICKR)
def test_flickr(tmp_path, name):
    table, names, captions = FLICKR[name]
    path = put(tmp_path / name, table)
    images(tmp_path / "Images", *names)
    pairs = read(path)
    assert pairs.ids == names and pairs.texts == [texts[0] for texts in captions] and shown(pairs) == [0, 1]
    assert [meta["captions"] for meta in pairs.meta] == captions
    every = read(path, captions="all")
    assert every.texts == [text for texts in captions for text in texts]
    assert every.image_numbers == families(every).tolist() == [0, 0, 1]
    if "annotations" in name:
        assert read(path, split="test").ids == names[1:]


def test_the_broken_line_of_flickr30k(tmp_path):
    """Line 19,999 of Flickr30k's results.csv lacks a delimiter."""
    table = FLICKR["results.csv"][0] + "10002456.jpg| 4   A dog runs across the grass .\n"
    path = put(tmp_path / "results.csv", table)
    images(tmp_path / "flickr30k_images", "1000092795.jpg", "10002456.jpg")
    with pytest.raises(
        DataError, match=r"line 5: expected 3 fields \(image_name, comment_number, comment\), got 2"
    ):
        read(path)
    pairs = read(path, on_error="skip", captions="all")
    assert len(pairs) == 3 and list(pairs.skipped) == ["line 5"]


def test_open_clip_csv(tmp_path):
    """--csv-img-key filepath --csv-caption-key title --csv-separator tab, its defaults; paths are often absolute."""
    images(tmp_path / "photos", "0.jpg", "1.jpg")
    path = put(
        tmp_path / "train.csv", "filepath\ttitle\nphotos/0.jpg\ta red bus, parked\nphotos/1.jpg\ta blue bus\n"
    )
    pairs = read(path)
    assert pairs.ids == ["photos/0.jpg", "photos/1.jpg"] and pairs.texts == [
        "a red bus, parked",
        "a blue bus",
    ]
    absolute = put(tmp_path / "tables" / "train.csv", f"title,filepath\na red bus,{tmp_path}/photos/0.jpg\n")
    with pytest.raises(DataError, match="got none of them there"):
        read(absolute)
    for options in ({"images": tmp_path / "photos"}, {"allow_outside": True}):
        assert shown(read(absolute, **options)) == [0]
    other = put(tmp_path / "other.csv", "picture;words\n0.jpg;x\n")
    with pytest.raises(
        DataError, match=r"a column of images .*and one of texts .*got picture;words; name them"
    ):
        read(other)
    named = put(tmp_path / "named.csv", "picture,words\nphotos/0.jpg,a bus\n")
    with pytest.raises(DataError, match="got picture, words"):
        read(named)
    assert read(named, image_column="picture", text_column="words").texts == ["a bus"]
    assert not read(named, image_column="picture", captions="none").has_texts


def test_records_in_json(tmp_path):
    """BLIP's coco_karpathy_val.json, and JSON lines."""
    images(tmp_path, "val2014/a.jpg", "val2014/b.jpg")
    records = [
        {"image": "val2014/a.jpg", "caption": ["A man.", "A person."]},
        {"image": "val2014/b.jpg", "caption": "A dog."},
    ]
    pairs = read(put(tmp_path / "coco_karpathy_val.json", json.dumps(records)), captions="all")
    assert pairs.texts == ["A man.", "A person.", "A dog."] and shown(pairs) == [0, 0, 1]
    lines = put(tmp_path / "val.jsonl", "\n".join(map(json.dumps, records)))
    assert read(lines, captions="all").texts == pairs.texts
    translated = [{"image": "val2014/a.jpg", "translation": {"en": "A man.", "de": "Ein Mann."}}]
    path = put(tmp_path / "t.json", json.dumps(translated))
    assert read(path, text_column="translation.de").texts == ["Ein Mann."]
    with pytest.raises(DataError, match="got image, translation"):
        read(path)
    with pytest.raises(DataError, match=r"record 0: there is no 'translation\.fr'"):
        read(path, text_column="translation.fr")


@pytest.fixture
def web(tmp_path):
    """Serves a folder at an address of this machine."""
    images(tmp_path / "served", "a.png", "b.png")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "line"), [("Train_GCC-training.tsv", "{text}\t{url}"), ("cc12m.tsv", "{url}\t{text}")]
)
def test_conceptual_captions_are_urls(tmp_path, web, name, line):
    rows = [
        (f"{web}/a.png", 'a very typical "bus station'),
        (f"{web}/gone.png", "gone"),
        (f"{web}/b.png", "sierra"),
    ]
    path = put(tmp_path / name, "\n".join(line.format(url=url, text=text) for url, text in rows))
    with pytest.raises(DataError, match="got 3 URLs .*img2dataset.*allow_outside=True"):
        read(path)
    pairs = read(path, allow_outside=True, on_error="skip")
    assert pairs.texts == ['a very typical "bus station', "sierra"] and shown(pairs) == [0, 1]
    assert pairs.ids == [f"{web}/a.png", f"{web}/b.png"] and list(pairs.skipped) == [f"{web}/gone.png"]
    assert "the server answered 404" in pairs.skipped[f"{web}/gone.png"]
    put(path, line.format(url="http://127.0.0.1:1/a.png", text="nobody answers"))
    with pytest.raises(DataError, match="1 of 1 images.*it cannot be downloaded"):
        read(path, allow_outside=True)


# -- text files beside the images, and none ------------------------------------------------------------------


def test_text_files_beside_the_images(tmp_path):
    place = tmp_path / "photos"
    images(place, "a.jpg", "b.png", "more/c.webp")
    for name, text in (("a", "a cat\n"), ("b", "a dog"), ("more/c", "a cup")):
        put(place / f"{name}.txt", text)
    put(place / ".hidden" / "x.jpg", b"no image")
    pairs = read(place)
    assert pairs.ids == ["a.jpg", "b.png", "more/c.webp"] and pairs.texts == ["a cat", "a dog", "a cup"]
    assert shown(pairs) == [0, 1, 2] and pairs[2].meta["folder"] == "more"
    put(place / "a.txt", "a cat\na grey cat")
    with pytest.raises(DataError, match=r"a\.jpg: its a\.txt: its txt has 2 lines: text_column='txt\.lines'"):
        read(place)
    assert len(read(place, text_column="txt.lines", captions="all")) == 4
    (place / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.png: its b\.txt: there is no such file"):
        read(place, text_column="txt.lines")
    assert read(place, text_column="txt.lines", on_error="skip").ids == ["a.jpg", "more/c.webp"]
    with pytest.raises(DataError, match="expected a text_column in the files beside the images, txt or json"):
        read(place, text_column="caption")


def test_img2dataset_files(tmp_path):
    """--output_format files: a folder a shard with image, text and metadata, and the shard's table beside it."""
    place = tmp_path / "out"
    for i, text in enumerate(["a cat", "a dog"]):
        put(place / "00000" / f"{i:09d}.jpg", encoded(i))
        put(place / "00000" / f"{i:09d}.txt", text)
        about = {"url": f"https://x/{i}", "caption": f"{text}, again", "key": f"{i:09d}", "status": "success"}
        put(place / "00000" / f"{i:09d}.json", json.dumps(about))
    put(place / "00000_stats.json", '{"count": 2}')
    put(place / "00000.parquet", b"not read")
    pairs = read(place)
    assert pairs.ids == ["00000/000000000.jpg", "00000/000000001.jpg"] and pairs.texts == ["a cat", "a dog"]
    assert read(place, text_column="json.caption").texts == ["a cat, again", "a dog, again"]


def test_a_folder_of_images_alone(tmp_path):
    place = tmp_path / "photos"
    images(place, "cat/a.jpg", "cat/b.jpg", "dog/c.jpg")
    pairs = read(place)
    assert not pairs.has_texts and pairs.ids == ["cat/a.jpg", "cat/b.jpg", "dog/c.jpg"]
    assert families(pairs, "folder").tolist() == [0, 0, 1] and shown(pairs) == [0, 1, 2]
    assert sum(len(read(place, split=split)) for split in set(pairs.splits)) == 3
    put(place / "cat" / "b.jpg", b"broken")
    with pytest.raises(DataError, match=r"1 of 3 images cannot be used, the first is cat/b\.jpg"):
        read(place)
    assert len(read(place, on_error="skip", limit=2)) >= 1
    with pytest.raises(DataError, match="expected it with a file of captions"):
        read(place, images=place)


def test_rows_of_metadata_csv_that_name_one_image_are_its_captions(tmp_path):
    place = tmp_path / "photos"
    images(place, "a.png", "b.png")
    put(place / "metadata.csv", "file_name,text\na.png,a cat\na.png,a grey cat\nb.png,a dog\n")
    assert read(place).texts == ["a cat", "a dog"] and read(place)[0].meta == {
        "captions": ["a cat", "a grey cat"]
    }
    assert read(place, captions="all").ids == ["a.png#0", "a.png#1", "b.png#0"]
    assert read(place, captions="none").ids == ["a.png", "b.png"]


def test_a_folder_with_a_file_of_captions_is_not_read_as_images_alone(tmp_path):
    images(tmp_path / "Images", "a.jpg")
    put(tmp_path / "captions.txt", "image,caption\na.jpg,a cat\n")
    put(tmp_path / "LICENSE.txt", "CC0")
    with pytest.raises(DataError, match="got none, and captions.txt: name a file of captions itself"):
        read(tmp_path)
    assert read(tmp_path, captions="none").ids == ["Images/a.jpg"]
    assert read(tmp_path / "captions.txt").texts == ["a cat"]
