"""Retrieval in both directions: against a plain loop, in blocks, no reward for a collapsed encoder; and its files."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.errors import DataError, UsageError
from eval import results
from eval.captions import open_captions
from eval.evaluators import retrieval
from eval.evaluators.retrieval import Config, Retrieval, chosen, recall_ranks
from eval.features import open_encoder
from eval.sources.captions import read_captions
from eval.texts import embed
from maws.release import load_two_tower, open_release
from tests.eval.conftest import NAMES, picture, write_parquet, write_shards, write_tar

SYNSETS = [f"{name}.n.01" for name in NAMES]


def vectors(count: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain_recall(images, texts, owners, k: int) -> tuple[float, float]:
    """The definition, one query after another: sort everything, look at the first k."""
    similarity = (images.double() @ texts.double().T).tolist()  # N M
    right_images = 0
    for image, row in enumerate(similarity):
        nearest = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
        right_images += any(owners[caption] == image for caption in nearest)
    right_texts = 0
    for caption in range(len(texts)):
        column = [similarity[image][caption] for image in range(len(images))]
        right_texts += owners[caption] in sorted(range(len(column)), key=lambda i: (-column[i], i))[:k]
    return right_images / len(images), right_texts / len(texts)


@pytest.mark.parametrize("blocks", [(4, 5), (1, 1), (100, 1000)])
def test_recall_is_that_of_a_plain_loop_whatever_the_blocks(monkeypatch, blocks):
    """Pictures with one to four captions; a block of the similarities is all that exists at a time."""
    monkeypatch.setattr(retrieval, "PICTURES", blocks[0])
    monkeypatch.setattr(retrieval, "CAPTIONS", blocks[1])
    sizes, before = [], retrieval._before
    monkeypatch.setattr(retrieval, "_before", lambda s, *more: (sizes.append(s.numel()), before(s, *more))[1])
    images = vectors(17, 6, 0)
    owners = torch.tensor([image for image in range(17) for _ in range(1 + image % 4)])
    texts = F.normalize(images[owners] + 1.2 * vectors(len(owners), 6, 1), dim=1)
    of_images, of_texts = recall_ranks(images, texts, owners)
    for k in (1, 2, 5, 17):
        found = ((of_images < k).double().mean().item(), (of_texts < k).double().mean().item())
        assert found == pytest.approx(plain_recall(images, texts, owners.tolist(), k))
    assert 0 < (of_images < 1).sum() < 17 and 0 < (of_texts < 1).sum() < len(texts)
    assert max(sizes) <= blocks[0] * blocks[1]


def test_equal_pictures_and_captions_are_ordered_by_index():
    images = vectors(4, 8, 0)[[0, 1, 1, 3]]  # the third is a copy of the second
    owners = torch.arange(4)
    of_images, of_texts = recall_ranks(images, images.clone(), owners)
    assert of_images.tolist() == [0, 0, 1, 0] and of_texts.tolist() == [0, 0, 1, 0]


def test_a_collapsed_encoder_scores_no_more_than_chance(monkeypatch):
    """Also when the same vector is a rounding error apart from batch to batch."""
    monkeypatch.setattr(retrieval, "PICTURES", 7)
    monkeypatch.setattr(retrieval, "CAPTIONS", 11)
    same = F.normalize(torch.ones(1, 300), dim=1)
    images, texts = same.repeat(50, 1), same.repeat(250, 1)
    images[40:] *= 1 + 2e-7
    owners = torch.arange(50).repeat_interleave(5)
    of_images, of_texts = recall_ranks(images, texts, owners)
    assert of_images.tolist() == [5 * image for image in range(50)]
    assert of_texts.tolist() == owners.tolist()  # right at rank k for the captions of the first k pictures: k / N


def test_nan_is_no_recall():
    images = vectors(3, 4, 0)
    with pytest.raises(ValueError, match="nan or infinity"):
        recall_ranks(images, images * torch.nan, torch.arange(3))


# --------------------------------------------------------------------------------------------------------------- files

SAID = {
    "1.jpg": ["A red thing.", 'He said "red", twice'],
    "22.jpg": ["green on grey"],
    "img/3.jpg": ["blue", "the third, blue", "Ein blaues Ding – größer"],
}
SPLITS = {"1.jpg": "test", "22.jpg": "restval", "img/3.jpg": "test"}


def write_said(path, layout: str):
    """The same captions in every layout."""
    pairs = [(name, number, text) for name, texts in SAID.items() for number, text in enumerate(texts)]
    if layout == "coco":
        ids = {name: 100 - place for place, name in enumerate(SAID)}  # annotations lie in any order
        images = [{"id": ids[name], "file_name": name} for name in SAID]
        notes = [{"id": i, "image_id": ids[name], "caption": text} for i, (name, _, text) in enumerate(pairs)]
        notes = sorted(notes, key=lambda note: (note["id"] % 2, note["id"]))
        content = json.dumps({"images": images, "annotations": [*notes, {"image_id": 5, "caption": "of no image"}]})
    elif layout == "karpathy":
        images = []
        for name, texts in SAID.items():
            folder, _, file = name.rpartition("/")
            sentences = [{"raw": text, "tokens": []} for text in texts]
            images.append(
                {"filename": file, "split": SPLITS[name], "sentences": sentences}
                | ({"filepath": folder} if folder else {})
            )
        content = json.dumps({"images": images, "dataset": "coco"})
    elif layout == "tokens":
        content = "".join(f"{name}#{number}\t{text}\n" for name, number, text in pairs)
    elif layout == "pipes":  # as flickr30k's results.csv
        content = "image_name| comment_number| comment\n" + "".join(f"{a}| {b}| {c}\n" for a, b, c in pairs)
    elif layout == "csv":
        quoted = ((name, text.replace('"', '""')) for name, _, text in pairs)
        content = "image,caption\n" + "".join(f'{name},"{text}"\n' for name, text in quoted)
    elif layout == "lists":  # as flickr_annotations_30k.csv
        lists = ((json.dumps(texts).replace('"', '""'), name) for name, texts in SAID.items())
        content = "raw,split,filename\n" + "".join(f'"{text}",{SPLITS[name]},{name}\n' for text, name in lists)
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", ["coco", "karpathy", "tokens", "pipes", "csv", "lists"])
def test_every_layout_says_the_same(tmp_path, layout):
    found = read_captions(write_said(tmp_path / "captions", layout))
    in_order = {name: sorted(texts) for name, texts in zip(found.names, found.texts, strict=True)}
    assert in_order == {name: sorted(texts) for name, texts in SAID.items()}
    assert found.names == list(SAID)
    wanted = [("train" if split == "restval" else split) for split in SPLITS.values()]
    assert found.splits == ({"karpathy": wanted, "lists": list(SPLITS.values())}.get(layout, []))
    assert found.left_out == ({"caption_without_image": 1} if layout == "coco" else {})


@pytest.fixture
def images(tmp_path):
    for label, name in enumerate(SAID):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(picture(label, 1))
    return tmp_path / "images"


def test_a_split_is_the_files_own_or_a_list_of_names(tmp_path, images):
    karpathy, tokens = (write_said(tmp_path / layout, layout) for layout in ("karpathy", "tokens"))
    assert open_captions(karpathy, images).pictures.keys == ("1.jpg", "img/3.jpg")  # test, unless asked
    assert open_captions(karpathy, images, "train").pictures.keys == ("22.jpg",)
    (tmp_path / "names.txt").write_text("22.jpg\n1.jpg\n")
    assert open_captions(tokens, images, str(tmp_path / "names.txt")).pictures.keys == ("1.jpg", "22.jpg")
    everything = open_captions(tokens, images)
    assert [everything.captions[i] for i in np.flatnonzero(everything.owners == 2)] == SAID["img/3.jpg"]
    assert everything.pictures.read(2) == picture(2, 1)
    with pytest.raises(UsageError, match=r"has no split 'tset'; did you mean test\?"):
        open_captions(karpathy, images, "tset")
    with pytest.raises(UsageError, match=r"--split test: .*tokens has no splits, and there is no file test"):
        open_captions(tokens, images, "test")


def test_parquet_tars_and_shard_sets_bring_their_pictures(tmp_path):
    keys, stored = list(SAID), [picture(label, 1) for label in range(3)]
    listed = write_parquet(tmp_path / "a.parquet", key=keys, image=stored, captions=list(SAID.values()))
    rows = [(key, image, text) for key, image in zip(keys, stored, strict=True) for text in SAID[key]]
    by_row = write_parquet(tmp_path / "b.parquet", key=[r[0] for r in rows], image=[r[1] for r in rows],
                           caption=[r[2] for r in rows])  # fmt: skip
    for path in (listed, by_row):
        data = open_captions(path)
        assert [data.pictures.read(row) for row in range(3)] == stored
        assert list(data.captions) == [text for texts in SAID.values() for text in texts]
        assert data.owners.tolist() == [0, 0, 1, 2, 2, 2]
    for number in range(3):  # two captions in the first file, and so on, in both forms
        part = {"image": [stored[number]], "caption": [list(SAID.values())[number]]}
        write_parquet(tmp_path / "set" / f"test-{number}.parquet", **part)
        text = {"txt": "\n".join(part["caption"][0]), "json": json.dumps({"captions": part["caption"][0]})}
        endings = ("txt", "json", "txt")
        members = [("0.png", stored[number]), (f"0.{endings[number]}", text[endings[number]].encode())]
        write_tar(
            tmp_path / "tars" / f"{number}.tar", [*members, ("1.png", stored[0]), ("2.png", b""), ("2.json", b"{")]
        )
    for folder, left in (("set", {}), ("tars", {"no_caption": 3, "bad_caption": 3})):
        data = open_captions(tmp_path / folder)
        assert [data.pictures.read(row) for row in range(3)] == stored and len(set(data.pictures.keys)) == 3
        assert list(data.captions) == [text for texts in SAID.values() for text in texts]
        assert data.owners.tolist() == [0, 0, 1, 2, 2, 2] and data.pictures.left_out == left
    shards = write_shards(tmp_path / "shards", [("a", stored[0], [0]), ("b", stored[1], [1])], SYNSETS)
    with pytest.raises(DataError, match=r"gives no picture with a caption \(2 no_caption\)"):  # conftest's say nothing
        open_captions(shards)


def test_the_hashes_follow_pictures_and_captions(tmp_path, images):
    first = open_captions(write_said(tmp_path / "a", "tokens"), images)
    same = open_captions(write_said(tmp_path / "b", "pipes"), images)
    assert (first.sha256, first.pictures.sha256) == (same.sha256, same.pictures.sha256)
    (images / "1.jpg").write_bytes(picture(5, 5))
    other = open_captions(tmp_path / "a", images)
    assert other.sha256 == first.sha256 and other.pictures.sha256 != first.pictures.sha256


def test_missing_and_unsafe_pictures(tmp_path, images, caplog):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(0, 0))
    lines = [f"{number}.jpg#0\tone more" for number in range(1000, 1197)]
    for number in range(1000, 1197):
        (images / f"{number}.jpg").write_bytes(b"x")
    file = tmp_path / "captions.txt"
    file.write_text("\n".join([*lines, "1.jpg#0\tred", "../secret.jpg#0\tout of here", "gone.jpg#0\tgone"]))
    data = open_captions(file, images)
    assert len(data.pictures) == 198 and data.pictures.left_out == {"unsafe_name": 1, "missing_image": 1}
    assert "2 pictures are not in" in caplog.text
    file.write_text("\n".join([*lines[:97], "1.jpg#0\tred", "gone.jpg#0\tgone", "lost.jpg#1\tlost"]))
    with pytest.raises(DataError, match=r"2 of the 100 pictures that .* names are not in .*images: gone.jpg, lost.jpg"):
        open_captions(file, images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not JSON"),
        ('{"annotations": []}', "has no list of 'images'"),
        ('{"images": [{"id": 1, "file_name": "a"}]}', r"neither 'annotations' \(COCO\) nor 'sentences'"),
        ('{"images": [{"file_name": "a"}], "annotations": []}', r"images\[0\] of .* needs 'id' and 'file_name'"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"bbox": []}]}', "annotations without 'caption'"),
        ("a.jpg#0\tx\nb.jpg y\n", "line 2 of .* is not NAME#NUMBER<TAB>CAPTION"),
        ("what,ever\n1,2\n", "begins with 'what,ever'; expected JSON"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_refused_captions(tmp_path, text, message):
    (tmp_path / "c").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        open_captions(tmp_path / "c", tmp_path)


# ------------------------------------------------------------------------------------------------------- the evaluator


@pytest.fixture
def captioned(tmp_path):
    """21 pictures with one to three captions each, in a Parquet file."""
    names = [NAMES[number % 7] for number in range(21)]
    texts = [
        [f"a photo of a {name} thing #{name}"[: 12 + 5 * j] for j in range(1 + n % 3)] for n, name in enumerate(names)
    ]
    stored = [picture(number % 7, number) for number in range(21)]
    return write_parquet(tmp_path / "c.parquet", key=[f"k{n}" for n in range(21)], image=stored, captions=texts)


def test_the_scores_are_those_of_the_towers_themselves(lit_run, captioned):
    data, encode = open_captions(captioned), open_encoder(lit_run, torch.device("cpu"))
    scores = {score.metric: score for score in Retrieval(Config(k=(1, 3)), data, 0).run(encode)}
    from data_pipeline.images import decode
    from maws.data.transforms import normalise

    release = open_release(lit_run)
    stacked = torch.stack([release.preprocess(decode(data.pictures.read(row))) for row in range(21)])
    with torch.no_grad():
        pictures = load_two_tower(release).encode_image(normalise(stacked, release.preprocess))
    texts = embed(encode, data.captions)
    for k in (1, 3):
        of_images, of_texts = plain_recall(pictures, texts, data.owners.tolist(), k)
        assert scores[f"image_to_text/R@{k}"].value == pytest.approx(of_images)
        assert scores[f"text_to_image/R@{k}"].value == pytest.approx(of_texts)
    assert scores["image_to_text/R@1"].n == 21 and scores["text_to_image/R@1"].n == len(data.captions)


def test_captions_of_unreadable_pictures_are_left_out_and_the_first_few_can_be_taken(captioned):
    data = open_captions(captioned)
    rows = torch.tensor([row for row in range(21) if row != 4])  # 1, 2 and 3 captions by turns
    captions, owners = chosen(data, rows, 2)
    assert not (data.owners[captions.numpy()] == 4).any()
    assert torch.bincount(owners).tolist() == [min(2, 1 + row % 3) for row in rows.tolist()]
    assert [data.captions[i] for i in captions.tolist()[:3]] == [data.captions[0], data.captions[1], data.captions[2]]
    assert rows[owners].tolist() == data.owners[captions.numpy()].tolist()


def test_from_the_command_line_beside_an_evaluator_of_labelled_pictures(evaluate, lit_run, files, captioned, caplog):
    labelled = ("--data", files.test, "--classes", files.classes)
    outcome = evaluate("zeroshot", "retrieval", "--run", lit_run, *labelled, "--captions", captioned)
    assert outcome.code == 0, outcome.err
    lines = [line for line in results.read(lit_run / "results.jsonl") if line.evaluator == "retrieval"]
    directions = ("image_to_text", "text_to_image")
    assert [line.metric for line in lines] == [f"{way}/R@{k}" for way in directions for k in (1, 5, 10)]
    assert set(lines[0].hashes) == {"weights", "data", "captions"} and lines[0].n == 21
    assert lines[0].config["paths"] == {"captions": str(captioned), "images": None, "split": None}
    assert lines[0].config["captions"] == 42 and lines[0].contamination["status"] == "not checked"
    values = [line.value for line in lines]
    assert values[:3] == sorted(values[:3]) and all(0 <= value <= 1 for value in values)
    assert "captions: 42, 2.0 per picture" in caplog.text


def test_wrong_usage_is_told(evaluate, run, lit_run, files, captioned):
    def refused(*arguments):
        outcome = evaluate(*arguments)
        assert outcome.code == 2 and "Traceback" not in outcome.err
        return outcome.err.splitlines()[-1]

    assert "give them with --captions FILE and --images FOLDER" in refused("retrieval", "--run", lit_run)
    assert "retrieval needs a text tower" in refused("retrieval", "--run", run, "--captions", captioned)
    knn = ("knn", "--run", run, "--data", files.test, "--train", files.train, "--captions", captioned)
    assert "--captions, --images and --split belong to retrieval" in refused(*knn)
    named = write_said(lit_run.parent / "tokens", "tokens")
    assert "say where they are with --images FOLDER" in refused("retrieval", "--run", lit_run, "--captions", named)
    settings = ("retrieval", "--run", lit_run, "--captions", captioned, "--set", "k=0")
    assert "k must be one or more whole numbers from 1" in refused(*settings)
