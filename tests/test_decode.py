"""decode: every kind of file found in folders of images, including broken ones."""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torchvision import transforms

from simsiam import kernels
from simsiam.data.decode import ENDINGS, DecodeError, decode, in_order

H, W = 60, 80


def scene(height: int = H, width: int = W) -> np.ndarray:
    """uint8 [H, W, 3], smooth (survives JPEG), with a different colour in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 60 * np.sin(x / 9)], axis=2).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def rotated(orientation: int, kind: str = "JPEG") -> bytes:
    """`scene()` stored rotated, with the EXIF tag that undoes it."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose values that undo the tag
    image = Image.fromarray(scene()).transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    # As bytes: pillow_heif then stores the rotation in the HEIF container, as phones do.
    return encode(image, kind, exif=exif.tobytes(), **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))


def write_nasty_folder(root: Path) -> tuple[list[str], dict[str, str]]:
    """Write real files of all kinds under `root`; return the good ids, and a part of the reason for each bad id."""
    rgb = Image.fromarray(scene())
    grey = rgb.convert("L")
    alpha = rgb.copy()
    alpha.putalpha(grey)
    jpeg = encode(rgb, "JPEG")
    good = {
        "plain.jpg": jpeg,
        "UPPER.JPEG": jpeg + b"\n",
        "rotated.jpg": rotated(6),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"),
        "progressive.jfif": encode(rgb, "JPEG", progressive=True),
        "grey.png": encode(grey),
        "deep.png": encode(np.asarray(grey).astype(np.uint16) * 257),
        "palette.gif": encode(rgb.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        "moving.gif": encode(rgb, "GIF", save_all=True, append_images=[ImageOps.invert(rgb)]),
        "see through.png": encode(alpha),
        "one bit.png": encode(grey.convert("1")),
        "deep/down/here/scan.tiff": encode(rgb, "TIFF"),
        "deep/float.tif": encode(np.asarray(grey).astype(np.float32) / 255, "TIFF"),
        "web.webp": encode(rgb, "WEBP"),
        "old.bmp": encode(rgb, "BMP"),
        "old.tga": encode(rgb, "TGA"),
        "raw.ppm": encode(rgb, "PPM"),
        "raw.pgm": encode(grey, "PPM"),
        "Zürich 東京/bild ü.jpg": encode(ImageOps.mirror(rgb), "JPEG"),
    }
    bad = {
        "cut.jpg": (jpeg[: len(jpeg) * 3 // 4], "truncated"),
        "cut.png": (encode(rgb)[:200], "truncated"),
        "nothing.jpg": (b"", "empty file"),
        "letter.jpg": (b"Dear reader,\nthis is no image.\n", "text, not an image"),
        "noise.png": (np.random.default_rng(0).bytes(500), "not an image"),
    }
    junk = {
        "notes.txt": b"x",
        ".hidden.jpg": jpeg,
        "__MACOSX/plain.jpg": b"x",
        ".thumbnails/t.jpg": jpeg,
        "labels.csv": b"a,b",
    }
    for name, content in [*good.items(), *((name, content) for name, (content, _) in bad.items()), *junk.items()]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return sorted(good), {name: reason for name, (_, reason) in bad.items()}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_files_come_back_exactly(kind: str) -> None:
    assert np.array_equal(decode(encode(scene(), kind)), scene())


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_files_come_back_nearly(kind: str) -> None:
    assert difference(decode(encode(scene(), kind, quality=95)), scene()) < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    """If not applied, or applied twice, the difference is above 50."""
    for short_side in (None, 30):
        expected = scene() if short_side is None else decode(encode(scene()), 30)
        assert difference(decode(rotated(orientation, kind), short_side), expected) < 5


def test_transparency_is_composited_over_white() -> None:
    alpha = np.zeros((H, W), dtype=np.uint8)
    alpha[:, W // 2 :] = 255
    rgba = np.dstack([scene(), alpha])
    expected = np.where(alpha[..., None] == 255, scene(), 255)
    assert np.array_equal(decode(encode(rgba)), expected)
    grey = np.asarray(Image.fromarray(scene()).convert("L"))
    out = decode(encode(Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))))
    assert np.array_equal(out, np.where(alpha == 255, grey, 255)[..., None].repeat(3, axis=2))


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.putpixel((0, 0), 1)
    for kind in ("PNG", "GIF"):
        out = decode(encode(image, kind, transparency=0))
        assert out[0, 0].tolist() == [10, 200, 10] and out[1, 1].tolist() == [255, 255, 255], kind


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_what_is_left_of_a_palettes_transparency_is_nothing(mode: str) -> None:
    """When Pillow converts a palette image, it keeps it in `info` in a form that is invalid for the new mode."""
    converted = Image.fromarray(scene()).convert(mode)
    expected = np.asarray(converted.convert("RGB"))
    converted.info["transparency"] = bytes(range(32))
    assert np.array_equal(decode(converted), expected)
    assert isinstance(converted.info["transparency"], bytes)  # the caller's image is unchanged


def test_premultiplied_alpha_is_understood() -> None:
    plain = Image.fromarray(scene()).convert("L")
    for mode, start in (("La", "LA"), ("RGBa", "RGBA")):
        pixels = decode(plain.convert(start).convert(mode))
        assert np.array_equal(pixels, np.asarray(plain.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    for kind in ("PNG", "TIFF"):
        out = decode(encode(ramp, kind))
        assert np.array_equal(out[..., 0], np.rint(ramp / 257).astype(np.uint8))
    twelve = (ramp >> 4).astype(np.uint16)  # a 12-bit camera file must not be nearly black
    assert np.array_equal(decode(encode(twelve))[..., 0], np.rint(twelve * (255 / 4095)).astype(np.uint8))
    eight = np.arange(256, dtype=np.uint16).reshape(4, 64)
    assert np.array_equal(decode(encode(eight))[..., 0], eight)
    dark = np.arange(256, dtype=np.uint16).reshape(4, 64) % 2  # 1 means 1 of 255, not white
    assert np.array_equal(decode(encode(dark))[..., 0], dark)


def test_32_bit_and_float_images_are_scaled() -> None:
    unit = np.linspace(0, 1, 256, dtype=np.float32).reshape(4, 64)
    assert np.array_equal(decode(encode(unit, "TIFF"))[..., 0].ravel(), np.arange(256))
    for stretched in (unit * 4000 - 2000, unit * 1.02, unit * 102, (unit * 2**24).astype(np.int32)):
        out = decode(encode(stretched, "TIFF"))[..., 0].ravel()
        assert difference(out, np.arange(256)) < 0.01
    with_nan = unit.copy()
    with_nan[0, 0] = np.nan
    assert np.array_equal(decode(encode(with_nan, "TIFF")), decode(encode(unit, "TIFF")))
    elevations = 1000 + 100 * unit
    elevations[0, 0] = np.nan
    assert difference(decode(encode(elevations, "TIFF"))[..., 0].ravel()[1:], np.arange(1, 256)) < 0.6
    assert decode(encode(np.full((3, 3), np.nan, dtype=np.float32), "TIFF")).max() == 0
    assert decode(encode(np.full((3, 3), -7.0, dtype=np.float32), "TIFF")).max() == 0  # constant: no division by zero


def test_cmyk_one_bit_and_first_frame() -> None:
    image = Image.fromarray(scene())
    assert difference(decode(encode(image.convert("CMYK"), "JPEG", quality=95)), scene()) < 5
    assert set(np.unique(decode(encode(image.convert("1"))))) == {0, 255}
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind in ("GIF", "WEBP", "TIFF"):
        out = decode(encode(red, kind, save_all=True, append_images=[blue]))
        assert out[4, 4, 0] > 240 and out[4, 4, 2] < 15, kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_short_side_is_exact_and_near_the_full_decode(kind: str) -> None:
    """The reference decodes at full size and reduces in float: the reduced DCT scale must not be visible."""
    big = scene(601, 802)
    options = {"quality": 95} if kind == "JPEG" else {}
    out = decode(encode(big, kind, **options), 50)
    assert min(out.shape[:2]) == 50 and out.shape == (50, 802 * 50 // 601, 3)
    channels = [
        Image.fromarray(big[..., c].astype(np.float32)).resize((66, 50), Image.Resampling.BICUBIC) for c in range(3)
    ]
    twin = np.stack([np.asarray(c) for c in channels], axis=2)
    assert np.abs(out - twin).mean() < 2


SIZES = [(375, 500), (756, 1008), (427, 640), (540, 960), (961, 540), (600, 400), (512, 512), (1080, 1920), (99, 101)]
"""Heights and widths, of which some have a long side of a fraction above one half when the short one is 32."""


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_pixels_are_those_of_torchvisions_resize(size: tuple[int, int], with_kernels: bool) -> None:
    """What docs/file-formats.md tells users of exported networks to apply."""
    image = Image.fromarray(scene(*size))
    with contextlib.nullcontext() if with_kernels else kernels.off():
        ours = decode(encode(image), 32)
    theirs = np.asarray(transforms.Resize(32, transforms.InterpolationMode.BICUBIC)(image))
    assert ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_reduced_scale_moves_nothing(size: tuple[int, int], with_kernels: bool) -> None:
    """A side of 427 pixels is decoded to 107 at a quarter, of which the image fills 106.75."""
    file = encode(scene(*size), "JPEG", quality=95)
    with contextlib.nullcontext() if with_kernels else kernels.off():
        ours = decode(file, 32)
    theirs = decode(Image.fromarray(decode(file)), 32)
    # The ramps from side to side; the waves are weakened in another way.
    assert ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs)[..., :2].max() <= 1


def test_reduction_is_antialiased() -> None:
    """A one-pixel checkerboard must become grey, not black or white."""
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    out = decode(encode(board), 32)
    assert abs(float(out.mean()) - 127.5) < 2 and out.std() < 5


def test_a_large_jpeg_is_decoded_at_a_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduced DCT scale makes photographs fast. At least twice the requested side is decoded."""
    shapes = []
    jpeg = simplejpeg.decode_jpeg

    def decoded(*given: Any, **asked: Any) -> np.ndarray:
        pixels: np.ndarray = jpeg(*given, **asked)
        shapes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decoded)
    data = encode(scene(1200, 1600), "JPEG")
    assert decode(data, 64).shape == (64, 85, 3) and decode(data, 299).shape == (299, 398, 3)
    assert shapes == [(150, 200), (600, 800)]


def test_never_enlarged() -> None:
    assert decode(encode(scene(20, 30)), 64).shape == (20, 30, 3)


def test_extreme_aspect_is_centre_cropped() -> None:
    wide = np.zeros((10, 400, 3), dtype=np.uint8)
    wide[:, 180:220] = 255
    out = decode(encode(wide), 64)
    assert np.array_equal(out, wide[:, 180:220])
    assert decode(encode(wide.transpose(1, 0, 2)), 5).shape == (20, 5, 3)
    assert decode(encode(wide)).shape == (10, 400, 3)  # full size if no short side is requested
    assert decode(encode(np.zeros((1, 500), dtype=np.uint8)), 32).shape == (1, 4, 3)


def test_bad_files_say_why(tmp_path: Path) -> None:
    _, bad = write_nasty_folder(tmp_path)
    for name, reason in bad.items():
        for short_side in (None, 16):
            with pytest.raises(DecodeError, match=reason):
                decode((tmp_path / name).read_bytes(), short_side)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA"])
@pytest.mark.parametrize("short_side", [None, 16])
def test_half_a_file_is_bad_in_every_format(kind: str, short_side: int | None) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    data = encode(noise, kind)
    with pytest.raises(DecodeError):
        decode(data[: len(data) // 2], short_side)


def test_any_damage_is_a_decode_error_or_an_image() -> None:
    """Pillow's plugins raise all kinds of errors on damaged headers; only DecodeError comes out."""
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA"):
        data = encode(scene(24, 32), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), 6):
                damaged[at] = rng.integers(0, 256)
            try:
                assert decode(bytes(damaged), 16).dtype == np.uint8
            except DecodeError as error:
                assert str(error)


def by_pillow(data: bytes) -> np.ndarray | None:
    try:
        image = Image.open(io.BytesIO(data))
        return np.array(image.convert("RGB"))
    except Exception:
        return None


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2, "quality": 30},
        {"progressive": True},
        {"restart_marker_blocks": 2},
        {"keep_rgb": True},
        {"icc_profile": b"not a profile"},
        {"comment": b"a word"},
    ],
    ids=str,
)
def test_a_jpeg_has_the_pixels_that_pillow_gives(options: dict[str, object]) -> None:
    """Bit-identical, whichever library decoded it."""
    noise = np.random.default_rng(0).integers(0, 255, (45, 67, 3), dtype=np.uint8)
    data = encode(noise, "JPEG", **options)
    assert np.array_equal(decode(data), by_pillow(data))
    assert np.array_equal(decode(data + b"more"), by_pillow(data))


def test_of_several_pictures_in_one_file_the_first_is_taken() -> None:
    pictures = [Image.fromarray(scene(h, 80)) for h in (60, 50, 40)]
    data = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    for short_side in (None, 16):
        assert np.array_equal(decode(data, short_side), decode(encode(pictures[0], "JPEG"), short_side))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_of_other_colours_has_the_pixels_that_pillow_gives(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (45, 67, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise).convert(mode), "JPEG")
    assert np.array_equal(decode(data), by_pillow(data))


def test_a_damaged_jpeg_is_what_pillow_makes_of_it() -> None:
    rng = np.random.default_rng(2)
    data = encode(scene(), "JPEG")
    kinds = set()
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.integers(300, len(data))] = rng.integers(0, 256)
        expected = by_pillow(bytes(damaged))
        kinds.add(expected is None)
        try:
            assert np.array_equal(decode(bytes(damaged)), expected)
        except DecodeError:
            assert expected is None
    assert kinds == {True, False}


def test_a_reduced_jpeg_has_the_pixels_that_pillow_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sides = [(int(h), int(w)) for h, w in rng.integers(10, 400, (60, 2))]
    sides += itertools.product(range(1, 10), repeat=2)
    files = [encode(rng.integers(0, 255, (*size, 3), dtype=np.uint8), "JPEG") for size in sides]
    asked = [None, 8, 16, 31]
    ours = [decode(file, short_side) for file in files for short_side in asked]

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", broken)
    theirs = [decode(file, short_side) for file in files for short_side in asked]
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_jpeg_is_not_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes up to twice as long."""
    monkeypatch.setattr(JpegImageFile, "load", lambda image: pytest.fail("Pillow decodes"))
    for short_side in (None, 40, 7):
        assert min(decode(encode(scene(), "JPEG"), short_side).shape[:2]) == (short_side or H)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_a_bad_file(monkeypatch: pytest.MonkeyPatch) -> None:
    data, opened = encode(scene(100, 100)), Image.fromarray(scene(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)  # Pillow warns of it, and would warn once more for every size
    assert np.array_equal(decode(data), decode(opened))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_999)
    for source in (data, opened):
        with pytest.raises(DecodeError, match=r"^more than 0 megapixels, .*decompression bomb"):
            decode(source)


def test_an_opened_image_is_accepted() -> None:
    assert np.array_equal(decode(Image.fromarray(scene())), scene())


def test_in_order_keeps_order_bounds_memory_and_passes_errors_on() -> None:
    running, peak, lock = set(), [0], threading.Lock()

    def work(i: int) -> int:
        with lock:
            running.add(i)
            peak[0] = max(peak[0], len(running))
        time.sleep(0.001 * (i % 3))
        return i

    seen = []
    for i in in_order(work, 101, workers=3, chunk=4):
        if not i:
            time.sleep(0.2)  # enough time for all work done ahead
        running.discard(i)
        seen.append(i)
    assert seen == list(range(101)) and 1 < peak[0] <= 2 * 3 * 4 + 4
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda i: 1 // (5 - i), 10, workers=2, chunk=1))


@pytest.mark.parametrize(
    ("kind", "orientation"), [("JPEG2000", 1), *itertools.product(["AVIF", "HEIF"], [1, 2, 3, 6, 8])]
)
def test_the_formats_of_cameras_are_upright_rgb(kind: str, orientation: int) -> None:
    ending = {"AVIF": ".avif", "HEIF": ".heic", "JPEG2000": ".jp2"}[kind]
    if ending not in ENDINGS:
        pytest.skip(f"this installation cannot read {ending}")
    stored = rotated(orientation, kind) if orientation != 1 else encode(scene(), kind)
    for short_side, expected in [(None, scene()), (30, decode(encode(scene()), 30))]:
        pixels = decode(stored, short_side)
        assert pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).mean() < 6
    with pytest.raises(DecodeError):
        decode(stored[: len(stored) // 2])
