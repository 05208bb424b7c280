"""A corpus of everything strangers put among their pictures, the same on every call.

    files/     loose pictures with captions, and Parquet files
    tables/    tables that name pictures, and tars

`write(root)` gives, by key, the reasons one of which each bad record must be dropped for. Keys with `good` in them are
sound and must come through.
"""

import gzip
import io
import json
import os
import random
import socket
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Reasons = frozenset[str]

DAMAGED: Final = frozenset({"truncated", "undecodable", "unsupported_format", "empty_image", "too_many_pixels"})
HUGE: Final = frozenset({"too_many_pixels", "undecodable", "truncated", "out_of_memory", "too_small"})
NO_LABEL: Final = frozenset({"no_hashtags", "no_synset", "no_caption", "below_min_count"})
KINDS: Final = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm")


class Case(NamedTuple):
    name: str  # of the picture's file
    image: bytes
    caption: bytes | None
    reasons: Reasons  # one of these; empty if it may also be kept


def picture(seed: int, kind: str = "png", size: tuple[int, int] = (24, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3)).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path) -> dict[str, Reasons]:
    """The whole corpus; reasons by key."""
    expected = write_files(root / "files") | SPECIAL
    tables = root / "tables"
    tables.mkdir()
    write_pictures(tables / ".pictures")
    write_lines(tables / "lines.jsonl")
    write_table(tables / "table.csv")
    write_tars(tables)
    write_damaged(tables, (root / "files" / "rows.parquet").read_bytes())
    return expected | dict.fromkeys(GOOD_IN_TABLES, frozenset())


GOOD_IN_TABLES: Final = (
    *("good_first_line", "good_last_line", "good_first_row", "good_last_row"),
    *("tables/strange/good_member", "tables/strange/good_end", "tables/changed/good_end", "tables/cut/good_member"),
)


def write_files(root: Path) -> dict[str, Reasons]:
    root.mkdir(parents=True)
    expected: dict[str, Reasons] = {}
    for case in (*good(), *broken_pictures(), *bombs(), *not_pictures(), *bad_captions(), *odd_names()):
        path = root / case.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(case.image)
        if case.caption is not None:
            path.with_suffix(".txt").write_bytes(case.caption)
        expected[f"files/{case.name.rsplit('.', 1)[0]}"] = case.reasons
    write_special_files(root)
    return expected | write_parquet(root / "rows.parquet")


def good() -> Iterator[Case]:
    for number, kind in enumerate(KINDS * 2):
        extension = "tif" if kind == "tiff" else kind
        yield Case(f"good{number:02d}.{extension}", picture(number, kind), b"a walk #dog #snow", frozenset())
    yield Case("good_png_named.jpg", picture(50), b"#dog", frozenset())
    yield Case("good_with_bom.png", picture(51), "\ufeff#dog".encode(), frozenset())
    yield Case("good_with_marks.png", picture(52), "\u202e#dog\u202c \u200f#cat\u0007".encode(), frozenset())


def broken_pictures() -> Iterator[Case]:
    """Cut off at many points, and with a byte changed at many points."""
    for number, kind in enumerate(KINDS):
        whole = picture(100 + number, kind)
        for percent in (1, 5, 20, 50, 80):
            cut = whole[: max(1, len(whole) * percent // 100)]
            yield Case(f"cut_{kind}_{percent:02d}.png", cut, b"#dog", DAMAGED)
    whole = picture(120, "png")
    for place in range(8, 40, 4):  # the header, whose checksum then is wrong
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        yield Case(f"changed_{place:02d}.png", bytes(changed), b"#dog", DAMAGED | HUGE)
    yield Case("noise.jpg", b"\xff\xd8\xff" + random.Random(1).randbytes(5000), b"#dog", DAMAGED)
    yield Case("noise.png", b"\x89PNG\r\n\x1a\n" + random.Random(2).randbytes(5000), b"#dog", DAMAGED)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, data: bytes = b"\0" * 100) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bombs() -> Iterator[Case]:
    """Small files that ask for gigabytes."""
    zeros = zlib.compress(bytes(300 << 20), 9)
    yield Case("bomb_pixels.png", png(60000, 60000), b"#dog", HUGE)
    yield Case("bomb_largest.png", png(2**31 - 1, 2**31 - 1), b"#dog", HUGE)
    yield Case("bomb_line.png", png(2**31 - 1, 8), b"#dog", HUGE)
    yield Case("bomb_no_pixels.png", png(0, 0), b"#dog", HUGE | DAMAGED)
    yield Case("bomb_text.png", png(24, 20, chunk(b"zTXt", b"a\0\0" + zeros)), b"#dog", HUGE | DAMAGED)
    yield Case("bomb_profile.png", png(24, 20, chunk(b"iCCP", b"a\0\0" + zeros)), b"#dog", HUGE | DAMAGED)
    yield Case("bomb_data.png", png(16, 16, data=bytes(300 << 20)), b"#dog", frozenset())
    yield Case("bomb.ppm", b"P6 99999 99999 255\n" + bytes(100), b"#dog", HUGE)
    yield Case("bomb_digits.ppm", b"P6 " + b"9" * 5000 + b" 10 255\n" + bytes(100), b"#dog", HUGE)
    yield Case("bomb.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";", b"#dog", HUGE | DAMAGED)
    size = struct.pack("<IiiHHIIiiII", 40, 100000, 100000, 1, 24, 0, 0, 0, 0, 0, 0)
    yield Case("bomb.bmp", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + size + bytes(100), b"#dog", HUGE)
    size = struct.pack("<IiiHHIIiiII", 40, -24, -20, 1, 24, 0, 0, 0, 0, 0, 0)
    yield Case("negative.bmp", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + size + bytes(100), b"#dog", HUGE | DAMAGED)
    loop = b"II*\0" + struct.pack("<IHI", 8, 0, 8)  # the next directory is this one
    yield Case("loop.tif", loop, b"#dog", DAMAGED | HUGE)
    tags = [(256, 4, 1, 100000), (257, 4, 1, 100000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    bomb = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    yield Case("bomb.tif", bomb, b"#dog", HUGE | DAMAGED)
    riff = b"VP8X" + struct.pack("<IB3x", 10, 0) + (16382).to_bytes(3, "little") * 2
    yield Case("bomb.webp", b"RIFF" + struct.pack("<I", len(riff) + 4) + b"WEBP" + riff, b"#dog", HUGE)
    yield Case("dot.png", picture(130, size=(1, 1)), b"#dog", frozenset({"too_small"}))
    yield Case("line.png", picture(131, size=(2000, 1)), b"#dog", frozenset({"too_small"}))


def not_pictures() -> Iterator[Case]:
    """Other things under a picture's name."""
    things = {
        "text": b"hello",
        "page": b"<!doctype html><html><body>404 not found</body></html>",
        "drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "entities": b'<!DOCTYPE lolz [<!ENTITY lol "lol">]><svg>&lol;</svg>',
        "archive": b"PK\x03\x04" + bytes(200),
        "tar": b"x.jpg" + bytes(507) + bytes(512),
        "document": b"%PDF-1.7\n" + bytes(200),
        "program": b"\x7fELF" + bytes(200),
        "film": bytes(4) + b"ftypisom" + bytes(200),
        "heic": bytes(4) + b"ftypheic" + bytes(200),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n",
        "zeros": bytes(1000),
        "nothing": b"",
    }
    for name, data in things.items():
        yield Case(f"not_{name}.jpg", data, b"#dog", frozenset({"unsupported_format", "empty_image", "undecodable"}))


def bad_captions() -> Iterator[Case]:
    long, utf8 = frozenset({"caption_too_long"}), frozenset({"caption_not_utf8"})
    cases: list[tuple[str, bytes | None, Reasons]] = [
        ("missing", None, NO_LABEL),
        ("empty", b"", NO_LABEL),
        ("blank", b" \n\t\r\n", NO_LABEL),
        ("no_hashtag", b"a dog in the snow", NO_LABEL),
        ("no_noun", b"#qwxzv #\xf0\x9f\x98\x80", NO_LABEL),
        ("only_hashes", b"#" * 9000, NO_LABEL),
        ("latin1", b"caf\xe9 #dog", utf8),
        ("utf16", "#dog".encode("utf-16"), utf8),
        ("half_a_character", b"#dog \xe2\x82", utf8),
        ("surrogate", b"#dog \xed\xa0\x80", utf8),
        ("overlong", b"#dog \xc0\xaf", utf8),
        ("ten_megabytes", b"#dog " * (2 << 20), long),
        ("just_too_long", b"#dog " + b"x" * 10_000, long),
        ("zeros", b"\0" * 5000, frozenset({"nul_byte"})),
        ("one_long_word", b"#" + b"a" * 9990, NO_LABEL),
        ("many_hashtags", b" ".join(b"#%d" % n for n in range(1500)), NO_LABEL),
        ("accents_on_accents", b"#z" + "\u0301".encode() * 4000, NO_LABEL),
    ]
    for number, (name, caption, reasons) in enumerate(cases):
        yield Case(f"caption_{name}.png", picture(200 + number), caption, reasons)


def odd_names() -> Iterator[Case]:
    """Sound pictures under names that are hard to handle: kept under a key that is safe, or dropped."""
    bad_key = frozenset({"bad_key"})
    for number, (name, reasons) in enumerate(
        [
            ("new\nline.png", frozenset()),
            ("bell\a.png", frozenset()),
            ("back\\slash.png", frozenset()),
            ("quote'\".png", frozenset()),
            ("dots...png", frozenset()),
            (" space .png", frozenset()),
            ("right\u202eto left.png", frozenset()),
            ("composed\u00e9.png", frozenset()),
            ("composede\u0301.png", frozenset()),
            ("-rf.png", frozenset()),
            ("$(true);`true`.png", frozenset()),
            ("%00%2e%2e%2f.png", frozenset()),
            ("CON.png", frozenset()),
            ("n" * 240 + ".png", frozenset()),
            ("same.png", frozenset()),
            ("same.jpg", frozenset({"duplicate_key"})),
            (os.fsdecode(b"not\xffutf8.png"), bad_key),
            (os.fsdecode(b"\x80\x81.png"), bad_key),
        ]
    ):
        yield Case(name, picture(300 + number), b"#dog", reasons)


def write_special_files(root: Path) -> None:
    """What opens, but is not a file of bytes: none is a record, and none may stop or delay the build."""
    (root / "folder.jpg").mkdir()
    (root / "folder.txt").mkdir()
    (root / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "up").symlink_to("..")
    for number, device in enumerate(("/dev/zero", "/dev/urandom", "/dev/stdin", "/dev/tty", "/proc/self/mem")):
        (root / f"device{number}.jpg").symlink_to(device)
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "pipe.parquet")
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(root)  # names of sockets are short
        try:
            made.bind("socket.jpg")
        finally:
            os.chdir(here)
    for name in ("captioned_by_pipe", "captioned_by_device", "captioned_by_folder", "captioned_by_nothing"):
        (root / f"{name}.png").write_bytes(picture(400))
    os.mkfifo(root / "captioned_by_pipe.txt")
    (root / "captioned_by_device.txt").symlink_to("/dev/zero")
    (root / "captioned_by_folder.txt").mkdir()
    (root / "captioned_by_nothing.txt").symlink_to("nowhere.txt")
    with (root / "sparse.jpg").open("wb") as file:
        file.truncate(1 << 30)
    (root / "sparse.txt").write_text("#dog")


SPECIAL: Final = {
    **{f"files/captioned_by_{by}": NO_LABEL for by in ("pipe", "device", "folder", "nothing")},
    "files/sparse": frozenset({"too_many_bytes"}),
}


def write_parquet(path: Path) -> dict[str, Reasons]:
    """Rows whose texts, keys and pictures are wrong in every way a column can be."""
    expected: dict[str, Reasons] = {}
    rows: list[tuple[bytes | None, bytes | None, bytes | None, list[bytes | None] | None]] = []

    def add(
        key: str | bytes | None,
        reasons: Reasons | None,
        image: bytes | None = None,
        caption: bytes | None = b"#dog",
        tags: list[bytes | None] | None = None,
    ) -> None:
        raw = key.encode() if isinstance(key, str) else key
        rows.append((raw, picture(500 + len(rows)) if image is None else image, caption, tags))
        if isinstance(key, str) and reasons is not None:
            expected[key] = reasons

    for number in range(5):
        add(f"good_row{number}", frozenset())
    add("row_no_image", frozenset({"missing_image", "empty_image"}), image=b"")
    add("row_null_caption", NO_LABEL, caption=None)
    add("row_latin1", frozenset({"caption_not_utf8"}), caption=b"caf\xe9 #dog")
    add("row_long", frozenset({"caption_too_long"}), caption=b"#dog " * (2 << 20))
    add("row_bad_tag", frozenset({"caption_not_utf8"}), caption=b"", tags=[b"\xff\xfe"])
    add("row_many_tags", NO_LABEL | {"too_many_hashtags"}, caption=b"", tags=[b"%d" % n for n in range(100_000)])
    add("row_long_tag", NO_LABEL | {"too_many_hashtags", "caption_too_long"}, caption=b"", tags=[b"x" * (5 << 20)])
    add("row_null_tags", frozenset(), tags=[None, b"", b"dog"])
    for key in (None, "", b"\xff\xfe"):
        add(key, None)  # bad_key, and no name to look for
    for key in ("/etc/passwd", "../../up", "a/../b", ".", "..", "with\0zero", "k" * 10_000, "t\nwo", "\u202egpj.exe"):
        add(key, None)  # kept under a safe key, or dropped
    add("row_twice", frozenset())
    add("row_twice", None)  # duplicate_key
    columns = list(zip(*rows, strict=True))
    texts = [pa.array(columns[n], pa.binary()).cast(pa.binary()) for n in (0, 2)]
    strings = [pa.Array.from_buffers(pa.string(), len(text), text.buffers()) for text in texts]  # unchecked UTF-8
    tags = pa.array(columns[3], pa.list_(pa.binary()))
    values = tags.values
    tags = pa.ListArray.from_arrays(
        tags.offsets, pa.Array.from_buffers(pa.string(), len(values), values.buffers()), mask=tags.is_null()
    )
    table = pa.table({"key": strings[0], "image": columns[1], "caption": strings[1], "hashtags": tags})
    pq.write_table(table, path, row_group_size=8)
    return expected


def write_pictures(folder: Path) -> None:
    """Sound ones for tables to name; nobody looks for pictures in a hidden folder."""
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:02d}.png").write_bytes(picture(700 + number))


def write_lines(path: Path) -> None:
    """Two sound records, and between them lines that are not what JSON should be, each with a picture of its own."""
    lines = [b'{"path": ".pictures/00.png", "caption": "#dog", "key": "good_first_line"}']
    for number, line in enumerate(strange_json(), start=1):
        named = b'{"path": ".pictures/%02d.png", ' % number
        lines.append(line.replace(b"{", named, 1) if line.startswith(b'{"') else line)
    lines.append(b'{"path": ".pictures/99.png", "caption": "#dog", "key": "good_last_line"}')
    path.write_bytes(b"\n".join(lines))


def strange_json() -> Iterator[bytes]:
    yield b'{"caption": "#dog'
    yield b"17"
    yield b'["#dog"]'
    yield b"null"
    yield b'{"caption": NaN}'
    yield b'{"caption": "#dog", "weight": 1e999}'
    yield b'{"caption": ' + b"9" * 10_000 + b"}"
    yield b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield b'{"caption": "#dog", "caption": "#cat"}'
    yield b'{"caption": "caf\xe9 #dog"}'
    yield b'{"caption": "#dog \\ud800"}'
    yield b'{"caption": "#dog \\u0000"}'
    yield b'{"caption": {"a": [1, 2]}}'
    yield b'{"caption": true}'
    yield json.dumps({str(n): n for n in range(50_000)}).encode()
    yield b""
    yield b'{"caption": "#dog \x01\x02"}'
    yield b'{"caption": "' + b"#dog " * (2 << 20) + b'"}'
    yield b"\x00\x00\x00"
    yield b'{"caption": "#dog", "path": "/etc/passwd"}'
    yield b'{"caption": "#dog", "path": "/dev/zero"}'
    yield b'{"caption": "#dog", "path": "pipe.jpg"}'
    yield b'{"caption": "#dog", "path": "folder.jpg"}'
    yield b'{"caption": "#dog", "path": "loop.jpg"}'
    yield b'{"caption": "#dog", "path": "http://169.254.169.254/latest/meta-data"}'
    yield b'{"caption": "#dog", "path": "file:///etc/passwd"}'
    yield b'{"caption": "#dog", "path": "no\\u0000where.png"}'
    yield b'{"caption": "#dog", "path": "' + b"a/" * 5000 + b'x.png"}'


def write_table(path: Path) -> None:
    rows = [
        b"path,caption,key",
        b".pictures/50.png,#dog,good_first_row",
        b".pictures/51.png",
        b".pictures/52.png,#dog,too,many,columns",
        b".pictures/53.png,caf\xe9 #dog,latin",
        b".pictures/54.png,#dog \x00,zero",
        b'.pictures/55.png,"#dog""quoted"x,quotes',
        b".pictures/56.png," + b"#dog " * (1 << 20) + b",long",
        b",,",
        b"../../../etc/passwd,#dog,up",
        b".pictures/57.png,#dog,good_last_row",
        b'.pictures/58.png,"#dog and a quote that never closes,open',
    ]
    path.write_bytes(b"\r\n".join(rows))


def write_tars(root: Path) -> None:
    """Tars of everything a tar can hold, and others that are cut off, damaged, of something else, or bombs."""
    (root / "strange.tar").write_bytes(strange_tar(1000))
    (root / "cut.tar").write_bytes(strange_tar(1100)[:5000])
    whole = strange_tar(1200)
    (root / "changed.tar").write_bytes(whole[:1024] + random.Random(3).randbytes(512) + whole[1536:])
    (root / "named.tar").write_bytes(b"not a tar at all")
    (root / "empty.tar").write_bytes(b"")
    (root / "cut.tar.gz").write_bytes(gzip.compress(whole, mtime=0)[:3000])
    (root / "zeros.tar.gz").write_bytes(gzip.compress(bytes(200 << 20), mtime=0))


def strange_tar(first: int) -> bytes:
    """Its pictures begin with this number."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, link
            tar.addfile(member, io.BytesIO(data))

        def sample(name: str, number: int) -> None:
            add(f"{name}.png", picture(first + number))
            add(f"{name}.txt", b"#dog")

        sample("good_member", 0)
        unsafe = ("../up", "/etc/cron", "a/../../b", "C:\\boot", "new\nline", "bell\a", "zer\x7fo", "x" * 300)
        for number, name in enumerate(unsafe, start=1):
            sample(name, number)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"):
            add(f"kind{kind.decode()}.png", kind=kind, link="/etc/passwd")
        add("folder.png", kind=tarfile.DIRTYPE)
        add("empty.png")
        add("empty.txt", b"#dog")
        add("lonely.txt", b"#dog")
        add("cut.png", picture(first + 50)[:200])
        add("cut.txt", b"#dog")
        add("deep.png", picture(first + 51))
        add("deep.json", b"[" * 100_000)
        for _ in range(2):
            sample("twice", 52)
        add("latin.png", picture(first + 53))
        add("latin.txt", b"caf\xe9 #dog")
        sample("good_end", 54)
    return buffer.getvalue()


def write_damaged(root: Path, whole: bytes) -> None:
    """Tables without an end, without a middle, without anything, and noise that begins like one."""
    (root / "cut.parquet").write_bytes(whole[:-100])
    (root / "middle.parquet").write_bytes(whole[:2000] + random.Random(6).randbytes(3000) + whole[5000:])
    (root / "empty.parquet").write_bytes(b"")
    (root / "noise.arrow").write_bytes(b"ARROW1\0\0" + random.Random(4).randbytes(3000))
    (root / "noise.csv").write_bytes(random.Random(5).randbytes(3000))
