"""Files with several captions for each picture, in the layouts that the retrieval benchmarks are handed around in.

    COCO             {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    Karpathy         {"images": [{"filepath"?, "filename", "split", "sentences": [{"raw"}]}]}: dataset_coco.json, …
    Flickr tokens    1000092795.jpg#0<TAB>Two young guys …          Flickr8k.token.txt, results_20130124.token
    tables           CSV with a header, parted by `,`, `|` or tabs: one of NAME, one of TEXT, and maybe split
    Parquet          key, captions (a list, or one text a row), and maybe image, split
    WebDataset       KEY.jpg with KEY.txt, a caption a line, or KEY.json with `captions` or `caption`
    a shard set      its own captions

Parquet files and tars may be several, in a folder.

Names of pictures are only looked up below the folder that is given with them; one that points outside is refused.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_bytes, sha256_file
from data_pipeline.sources.tar import Member
from eval.sources.parquet import IMAGE, ParquetImages, column, parquet_files, read_columns, read_keys, schema
from eval.sources.shards import open_shards
from eval.sources.source import Read
from eval.sources.tars import MAX_LABEL, Tar

NAME: Final = ("image", "image_name", "filename", "file_name", "filepath", "image_path", "key")
TEXT: Final = ("caption", "comment", "captions", "raw", "sentences", "sentence", "title", "text")
MAX_FIELD: Final = 1 << 20  # characters of one field of a table; ours


@dataclass
class Captions:
    """Pictures by name with what is said of each, in the order of the file."""

    where: str
    sha256: str
    names: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)  # one per picture, or none at all
    read: Read | None = None  # None: the pictures lie in a folder
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, texts: Iterable[Any], split: str | None = None) -> None:
        """One picture; what is no text is counted."""
        kept = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
        self.names.append(name)
        self.texts.append(kept)
        if split is not None:
            self.splits.append(split)


def read_captions(path: Path) -> Captions:
    """A file or a shard set in one of the layouts above; DataError names what is missing."""
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".parquet":
        return _from_parquet(path)
    if path.suffix == ".tar":
        return _from_tar(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read captions from {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); captions come as JSON, text or Parquet"
        ) from None
    found = Captions(str(path), sha256_bytes(data))
    if text.lstrip().startswith(("{", "[")):
        _from_json(text, found)
    elif "#" in (line := text.lstrip().partition("\n")[0]).partition("\t")[0] and "\t" in line:
        _from_tokens(text, found)
    else:
        _from_table(text, found)
    return found


# ---------------------------------------------------------------------------------------------------------------- JSON


def _from_json(text: str, found: Captions) -> None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{found.where} is not JSON: {error}") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
        raise DataError(f"{found.where} has no list of 'images'; expected COCO's captions or Karpathy's splits")
    if all("sentences" in image for image in images):
        _karpathy(images, found)
    elif isinstance(content.get("annotations"), list):
        _coco(images, content["annotations"], found)
    else:
        raise DataError(f"{found.where} has neither 'annotations' (COCO) nor 'sentences' in its images (Karpathy)")


def _coco(images: Sequence[dict[str, Any]], annotations: Sequence[Any], found: Captions) -> None:
    texts: dict[Any, list[Any]] = {}
    for number, image in enumerate(images):
        if not isinstance(image.get("file_name"), str) or not isinstance(image.get("id"), (int, str)):
            raise DataError(f"images[{number}] of {found.where} needs 'id' and 'file_name'")
        texts[image["id"]] = []
    for annotation in annotations:
        if not isinstance(annotation, dict) or "caption" not in annotation:
            raise DataError(f"{found.where} holds annotations without 'caption'; give the captions_*.json of COCO")
        own = annotation.get("image_id")
        if isinstance(own, (int, str)) and own in texts:
            texts[own].append(annotation["caption"])
        else:
            found.left_out["caption_without_image"] += 1
    for image in images:
        found.add(image["file_name"], texts[image["id"]])


def _karpathy(images: Sequence[dict[str, Any]], found: Captions) -> None:
    for number, image in enumerate(images):
        name, folder, sentences = image.get("filename"), image.get("filepath", ""), image["sentences"]
        if not isinstance(name, str) or not isinstance(folder, str) or not isinstance(sentences, list):
            raise DataError(f"images[{number}] of {found.where} needs 'filename' and a list of 'sentences'")
        split = str(image.get("split", ""))
        texts = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
        found.add(f"{folder}/{name}" if folder else name, texts, "train" if split == "restval" else split)


# ---------------------------------------------------------------------------------------------------------------- text


def _from_tokens(text: str, found: Captions) -> None:
    """Flickr's own files: name, #, number of the caption, tab, caption."""
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        head, tab, caption = line.partition("\t")
        if not tab or "#" not in head:
            raise DataError(f"line {number} of {found.where} is not NAME#NUMBER<TAB>CAPTION")
        texts.setdefault(head.rpartition("#")[0], []).append(caption)
    for name, captions in texts.items():
        found.add(name, captions)


def _from_table(text: str, found: Captions) -> None:
    head = text.lstrip().partition("\n")[0]
    mark = max("|\t,", key=head.count)
    csv.field_size_limit(MAX_FIELD)
    quoting = csv.QUOTE_MINIMAL if mark == "," else csv.QUOTE_NONE  # a caption may begin with a quotation mark
    rows = csv.reader(io.StringIO(text.lstrip()), delimiter=mark, skipinitialspace=True, quoting=quoting)
    try:
        names = [name.strip().lower() for name in next(rows, [])]
        name, caption, split = column(names, NAME), column(names, TEXT), column(names, ("split",))
        if name is None or caption is None:
            raise DataError(
                f"{found.where} begins with '{head[:60].strip()}'; expected JSON, NAME#NUMBER<TAB>CAPTION, or a header "
                f"with {' or '.join(NAME[:3])} and {' or '.join(TEXT[:2])}"
            )
        places = [names.index(wanted) for wanted in (name, caption, split) if wanted]
        texts: dict[str, list[Any]] = {}
        splits: dict[str, str] = {}
        for row in rows:
            if row and len(row) <= max(places):  # a few lines of the public Flickr tables have lost a separator
                found.left_out["short_row"] += 1
            elif row:
                own = row[places[0]].strip()
                texts.setdefault(own, []).extend(_several(row[places[1]]))
                splits |= {own: row[places[2]].strip()} if split else {}
    except csv.Error as error:
        raise DataError(f"{found.where} is not a table of text (line {rows.line_num}: {error})") from None
    for own, captions in texts.items():
        found.add(own, captions, splits.get(own))


def _several(cell: str) -> list[Any]:
    """One caption, or a JSON list of them (flickr_annotations_30k.csv)."""
    if cell.lstrip().startswith("["):
        try:
            listed = json.loads(cell)
        except (ValueError, RecursionError):
            return [cell]
        return listed if isinstance(listed, list) else [cell]
    return [cell]


# ------------------------------------------------------------------------------------------------- with their pictures


def _from_folder(path: Path) -> Captions:
    if (path / "manifest.json").is_file() or (path / ".work").is_dir():
        return _from_shards(path)
    if parquet := parquet_files(path):
        return _merged(path, [_from_parquet(file) for file in parquet])
    if tars := sorted(path.glob("*.tar")):
        return _merged(path, [_from_tar(file, prefix=len(tars) > 1) for file in tars])
    raise DataError(f"{path} is no shard set and holds neither Parquet files nor tars with captions")


def _merged(path: Path, parts: Sequence[Captions]) -> Captions:
    """Several files as one."""
    if len(parts) == 1:
        return parts[0]
    found = Captions(str(path), sha256_bytes("\n".join(part.sha256 for part in parts).encode()))
    places = [(part, row) for part in parts for row in range(len(part.names))]
    for part in parts:
        found.names += part.names
        found.texts += part.texts
        found.splits += part.splits
        found.left_out += part.left_out

    def read(position: int) -> bytes:
        part, row = places[position]
        assert part.read is not None
        return part.read(row)

    found.read = read if all(part.read for part in parts) else None
    return found


def _from_tar(path: Path, prefix: bool = False) -> Captions:
    opened, found = Tar(path), Captions(str(path), sha256_file(path))
    start = f"{path.stem}-{found.sha256[:8]}/" if prefix else ""
    pictures: list[Member] = []
    for sample in opened.samples(found.left_out):
        member = sample.members.get("txt") or sample.members.get("json")
        if sample.picture is None or member is None or member.size > MAX_LABEL:
            found.left_out["missing_image" if sample.picture is None else "no_caption"] += 1
            continue
        data = opened.read(member)
        try:
            texts = data.decode("utf-8-sig").splitlines() if "txt" in sample.members else _of_record(json.loads(data))
        except (ValueError, RecursionError):
            found.left_out["bad_caption"] += 1
            continue
        pictures.append(sample.picture)
        found.add(start + sample.key, texts)
    found.read = lambda row: opened.read(pictures[row])
    return found


def _of_record(record: Any) -> list[Any]:
    own = record.get("captions", record.get("caption")) if isinstance(record, dict) else None
    return own if isinstance(own, list) else [own]


def _from_parquet(path: Path) -> Captions:
    names = schema(path).names
    image, caption, split = column(names, IMAGE), column(names, ("captions", *TEXT)), column(names, ("split",))
    key = column(names, ("key", "filename", "file_name", "image_name"))
    if caption is None or (key is None and image is None):
        raise DataError(f"{path} has the columns {', '.join(names)}; expected key, captions (a list), and maybe image")
    table = read_columns(path, [name for name in (key, caption, split) if name])
    found = Captions(str(path), sha256_file(path))
    images = ParquetImages(path, image) if image else None
    if key and key != "key":
        table = table.rename_columns(["key" if name == key else name for name in table.column_names])
    keys = read_keys(table, path, found.sha256, table.num_rows)
    place: dict[str, int] = {}
    rows: list[int] = []
    splits = table[split].to_pylist() if split else [None] * len(keys)
    for row, (own, texts, part) in enumerate(zip(keys, table[caption].to_pylist(), splits, strict=True)):
        texts = texts if isinstance(texts, list) else [texts]
        if own in place:  # a caption a row
            found.texts[place[own]] += [text.strip() for text in texts if isinstance(text, str) and text.strip()]
            continue
        place[own] = len(rows)
        rows.append(row)
        found.add(own, texts, None if part is None else str(part))
    if images is not None:
        found.read = lambda position: images(rows[position])
    return found


def _from_shards(path: Path) -> Captions:
    shards, source = open_shards(path)
    found = Captions(str(path), shards.sha256, read=source.read)
    for shard, size in enumerate(shards.shard_sizes):
        for row in range(size):
            record = shards.record(shard, row)
            found.add(str(record.get("key")), [record.get("caption")])
    found.names = source.keys
    return found
