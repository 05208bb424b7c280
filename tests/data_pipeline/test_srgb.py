"""Colours against the formulas, and what a reader that knows nothing of them sees in the stored file."""

import io
import struct

import pytest
from PIL import Image, ImageCms

from data_pipeline import images
from data_pipeline.images import Options, encode

P3 = ((0.4866, 0.2657, 0.1982), (0.2290, 0.6917, 0.0793), (0.0000, 0.0451, 1.0439))  # linear RGB -> XYZ, white D65
ADOBE = ((0.5767, 0.1856, 0.1882), (0.2973, 0.6274, 0.0753), (0.0270, 0.0707, 0.9911))
XYZ_TO_SRGB = ((3.2406, -1.5372, -0.4986), (-0.9689, 1.8758, 0.0415), (0.0557, -0.2040, 1.0570))
# Bradford: D65 to the D50 that profiles count in
ADAPT = ((1.0479, 0.0229, -0.0502), (0.0296, 0.9904, -0.0171), (-0.0092, 0.0151, 0.7519))
PATCHES = [(r, g, b) for r in (20, 128, 240) for g in (20, 128, 240) for b in (20, 128, 240)]


def times(matrix, vector):
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def icc(space: bytes, pcs: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2."""
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4s4s4s4s4s", start + len(body), b"none", bytes([2, 0x40, 0, 0]), kind, space, pcs)
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3I", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + table + body


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def text(words: bytes) -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", len(words) + 1) + words + bytes(1 + 78)


COMMON = {b"desc": text(b"test"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz((0.9642, 1.0, 0.8249))}


def rgb_profile(matrix, gamma: float = 2.2) -> bytes:
    columns = [times(ADAPT, column) for column in zip(*matrix, strict=True)]
    tags = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, columns), strict=True))
    return icc(b"RGB ", b"XYZ ", COMMON | tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma)))


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", b"XYZ ", COMMON | {b"kTRC": curve(gamma)})


def lab_of_ink(c: int, m: int, y: int, k: int) -> tuple[int, int, int]:
    """L, a, b of full inks on a made-up press, as its profile stores them (0 to 255, a and b around 128)."""
    light = 240 if not k else 20
    for ink, drop in ((c, 70), (m, 90), (y, 20)):
        light -= drop * ink if not k else 0
    spread = 0 if k else 50
    return max(light, 20), 128 + spread * (m - c), 128 + spread * (y - m * c)


def cmyk_profile() -> bytes:
    """Two points a side: the colours of the 16 mixtures of full inks, linear between them."""
    grid = b"".join(
        bytes(lab_of_ink(c, m, y, k)) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)
    )  # fmt: skip
    identity = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    straight = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + straight * 4 + grid + straight * 3
    return icc(b"CMYK", b"Lab ", COMMON | dict.fromkeys((b"A2B0", b"A2B1", b"A2B2"), lut), b"prtr")


def srgb_of(linear) -> tuple[int, ...]:
    """The transfer function of sRGB, IEC 61966-2-1."""
    clipped = [min(max(value, 0.0), 1.0) for value in linear]
    return tuple(round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in clipped)


def srgb_of_lab(lightness: float, a: float, b: float) -> tuple[int, ...]:
    fy = (lightness + 16) / 116
    parts = [t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29) for t in (fy + a / 500, fy, fy - b / 200)]
    d50 = tuple(part * white for part, white in zip(parts, (0.9642, 1.0, 0.8249), strict=True))
    back = ((0.9556, -0.0230, 0.0632), (-0.0283, 1.0099, 0.0210), (0.0123, -0.0205, 1.3299))  # Bradford, D50 to D65
    return srgb_of(times(XYZ_TO_SRGB, times(back, d50)))


def swatches(colours, mode: str = "RGB") -> Image.Image:
    """A picture of flat patches."""
    picture = Image.new(mode, (16 * len(colours), 32))
    for n, colour in enumerate(colours):
        picture.paste(colour, (16 * n, 0, 16 * n + 16, 32))
    return picture


def read_back(picture: Image.Image, number: int):
    return [picture.getpixel((16 * n + 8, 8)) for n in range(number)]


def plain_reader(data: bytes) -> Image.Image:
    """What those see who know nothing of orientation, profiles and transparency."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def furthest(left, right) -> int:
    return max(abs(a - b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("matrix", [P3, ADOBE], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize(("kind", "mode"), [("png", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("jpeg", "RGB")])
def test_a_wide_gamut_picture_shows_its_colours_to_every_reader(matrix, kind, mode):
    expected = [
        srgb_of(times(XYZ_TO_SRGB, times(matrix, [(channel / 255) ** 2.2 for channel in patch]))) for patch in PATCHES
    ]
    options = {"quality": 100, "subsampling": 0} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {}
    data = encode(swatches(PATCHES).convert(mode), kind, icc_profile=rgb_profile(matrix), **options)
    stored = images.prepare(data, Options(quality=98))
    assert stored.changes == ("colours_converted",)
    assert b"acsp" not in stored.data  # no profile is left that could be applied twice
    limit = 6 if kind == "jpeg" else 3
    assert furthest(read_back(plain_reader(stored.data), len(PATCHES)), expected) <= limit
    assert furthest(read_back(images.decode(data), len(PATCHES)), expected) <= limit


def test_a_profile_that_is_srgb_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encode(swatches(PATCHES), "png", icc_profile=profile)
    prepared = images.prepare(data, Options())
    assert (prepared.data, prepared.changes) == (data, ())
    assert images.decode(data).tobytes() == swatches(PATCHES).tobytes()


def test_a_grey_profile_is_applied():
    levels = [0, 40, 128, 220, 255]
    data = encode(swatches(levels, "L"), "png", icc_profile=grey_profile(1.0))
    stored = images.prepare(data, Options())
    assert stored.changes == ("colours_converted",)
    expected = [srgb_of([level / 255] * 3) for level in levels]
    assert furthest(read_back(plain_reader(stored.data), 5), expected) <= 2


@pytest.mark.parametrize(
    "profile",
    [
        b"not a profile",
        rgb_profile(P3)[:200],
        rgb_profile(P3)[:132] + b"\xff" * 400,
        grey_profile(1.8),
        cmyk_profile(),
        rgb_profile(P3) + bytes(5 << 20),
    ],
    ids=["words", "cut off", "broken table", "for grey pixels", "for inks", "5 MB"],
)
def test_a_profile_that_makes_no_sense_is_ignored_and_counted(profile):
    data = encode(swatches(PATCHES), "jpeg", icc_profile=profile)
    prepared = images.prepare(data, Options())
    assert prepared.changes == ("profile_ignored",)
    assert prepared.data is data


INKS = [
    (0, 0, 0, 0),
    (255, 0, 0, 0),
    (0, 255, 0, 0),
    (0, 0, 255, 0),
    (0, 0, 0, 255),
    (100, 50, 20, 10),
    (255, 255, 0, 0),
]


def ycck(picture: Image.Image) -> bytes:
    """The CMYK picture as Photoshop writes it: inverted, C, M and Y turned into luma and chroma, transform 2."""
    cyan, magenta, yellow, black = picture.split()
    luma = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    channels = [*(band.point(lambda value: 255 - value) for band in luma), black]  # Pillow inverts as it writes
    data = encode(Image.merge("CMYK", channels), "jpeg", quality=100, subsampling=0)
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\2" + data[at + 1 :]


@pytest.mark.parametrize("write", [lambda p: encode(p, "jpeg", quality=100), ycck], ids=["CMYK", "YCCK"])
def test_inks_without_a_profile_are_mixed_plainly(write):
    data = write(swatches(INKS, "CMYK"))
    expected = [tuple((255 - ink) * (255 - k) // 255 for ink in cmy) for *cmy, k in INKS]
    stored = images.prepare(data, Options(quality=98))
    assert stored.changes == ("colours_converted",)
    assert furthest(read_back(images.decode(data), len(INKS)), expected) <= 4
    assert furthest(read_back(plain_reader(stored.data), len(INKS)), expected) <= 8


def test_the_profile_of_a_press_is_applied():
    full = [ink for ink in INKS if set(ink) <= {0, 255}]
    data = encode(swatches(full, "CMYK"), "jpeg", quality=100, icc_profile=cmyk_profile())
    stored = [lab_of_ink(*(ink // 255 for ink in inks)) for inks in full]
    absolute = [srgb_of_lab(light * 100 / 255, a - 128, b - 128) for light, a, b in stored]
    found = read_back(images.decode(data), len(full))
    assert found[0] == (255, 255, 255)  # paper is white on screen
    assert furthest(found[1:], absolute[1:]) <= 3
    naive = read_back(Image.open(io.BytesIO(data)).convert("RGB"), len(full))
    assert furthest(found, naive) > 60  # it is the profile that was used


def test_a_converted_picture_is_shrunk_as_well():
    data = encode(swatches(INKS, "CMYK").resize((700, 400)), "jpeg", icc_profile=cmyk_profile())
    prepared = images.prepare(data, Options(resize=100))
    assert prepared.changes == ("resized", "colours_converted")
    assert images.header(prepared.data) == ("jpeg", 175, 100)


SEE_THROUGH = {
    "RGBA": (Image.new("RGBA", (20, 20), (255, 0, 0, 128)), (255, 127, 127)),
    "LA": (Image.new("LA", (20, 20), (0, 128)), (127, 127, 127)),
    "PA": (Image.new("RGBA", (20, 20), (0, 0, 255, 0)), (255, 255, 255)),
}


@pytest.mark.parametrize("mode", SEE_THROUGH)
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_transparency_is_laid_on_white_for_every_reader(mode, kind):
    picture, expected = SEE_THROUGH[mode]
    data = encode(picture, kind, lossless=True) if kind == "webp" else encode(picture, kind)
    prepared = images.prepare(data, Options())
    assert (prepared.extension, prepared.changes) == ("png", ("made_opaque",))
    assert plain_reader(prepared.data).getpixel((9, 9)) == pytest.approx(expected, abs=1)
    assert images.decode(data).getpixel((9, 9)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])], ids=["one colour", "a table"])
def test_transparent_palette_entries_are_white(transparency):
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    prepared = images.prepare(encode(palette, "png", transparency=transparency), Options())
    assert prepared.changes == ("made_opaque",)
    assert plain_reader(prepared.data).getpixel((9, 9)) == (255, 255, 255)


def test_an_alpha_channel_that_hides_nothing_changes_nothing():
    data = encode(Image.new("RGBA", (20, 20), (1, 2, 3, 255)), "png")
    assert images.prepare(data, Options()).data is data


def test_shrinking_does_not_mix_in_the_colour_of_transparent_pixels():
    picture = Image.new("RGBA", (400, 400), (0, 0, 0, 0))  # black where nothing is to be seen
    picture.paste((255, 0, 0, 255), (100, 100, 300, 300))
    shrunk = images.decode(images.prepare(encode(picture, "png"), Options(resize=40, quality=100)).data)
    edge = [shrunk.getpixel((x, 20)) for x in range(40)]
    assert min(red for red, _, _ in edge) > 200  # white, red, and pink between them: no grey seam


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bit_grey_is_scaled_for_every_reader(kind):
    picture = Image.new("I;16", (20, 20), 0x8080)
    data = encode(picture, kind) if kind != "ppm" else b"P5 20 20 65535\n" + b"\x80\x80" * 400
    prepared = images.prepare(data, Options())
    assert "eight_bits" in prepared.changes
    assert plain_reader(prepared.data).getpixel((9, 9)) == (128, 128, 128)


def test_pixels_without_a_range_are_refused():
    with pytest.raises(images.BadImage) as caught:
        images.decode(encode(Image.new("F", (20, 20), 0.5), "tiff"))
    assert caught.value.reason == "unsupported_pixels"
