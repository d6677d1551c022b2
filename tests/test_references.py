from __future__ import annotations

import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from refalign_ext.references import (
    letterbox,
    load_image,
    prepare_reference,
    reference_to_tensor,
    remove_background,
)
from refalign_ext.request import Role

RED, WHITE = (255, 0, 0), (255, 255, 255)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def quarters() -> Image.Image:
    """A picture with four different corners, wider than high."""
    corners = np.array([[RED, (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]], np.uint8)
    return Image.fromarray(corners.repeat(10, 0).repeat(20, 1))


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(2, Image.Transpose.FLIP_LEFT_RIGHT), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)],
)
def test_exif_orientation(tmp_path: Path, orientation: int, undo: Image.Transpose) -> None:
    upright = quarters()
    stored = upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(pixels(load_image(tmp_path / "photo.png")), pixels(upright))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.getpixel((0, 0)) == RED
    assert loaded.getpixel((1, 0)) == (127, 127, 127)
    assert loaded.getpixel((3, 3)) == WHITE


def test_transparent_palette(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=1)
    loaded = load_image(tmp_path / "palette.png")
    assert [loaded.getpixel((column, 0)) for column in (0, 1)] == [RED, WHITE]


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.new("LA", (16, 16), (40, 0)), "la.png", WHITE),
        (Image.new("L", (16, 16), 77), "grey.png", (77, 77, 77)),
        (Image.new("1", (16, 16), 1), "bit.png", WHITE),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "print.jpg", RED),
    ],
)
def test_modes_become_rgb(tmp_path: Path, image: Image.Image, name: str, expected: tuple) -> None:
    image.save(tmp_path / name, quality=100)
    assert np.abs(pixels(load_image(tmp_path / name))[8, 8] - expected).max() < 15


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 32768, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
    ],
)
def test_deep_grey_is_scaled_not_clipped(tmp_path: Path, values: np.ndarray, expected: list[int]) -> None:
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    loaded = pixels(load_image(tmp_path / "deep.tiff"))
    assert loaded[0, :, 0].tolist() == expected
    assert (loaded == loaded[..., :1]).all()


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("source", "size", "box"),
    [
        ((40, 20), (80, 80), (0, 20, 80, 60)),  # enlarged, bars above and below
        ((20, 40), (80, 80), (20, 0, 60, 80)),
        ((400, 200), (80, 80), (0, 20, 80, 60)),  # shrunk
        ((30, 30), (48, 32), (8, 0, 40, 32)),
        ((48, 32), (48, 32), (0, 0, 48, 32)),
        ((97, 301), (832, 480), (339, 0, 493, 480)),  # 154.7 wide: rounded down, as in the release
    ],
)
def test_letterbox(source: tuple[int, int], size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    boxed = letterbox(Image.new("RGB", source, RED), size)
    assert boxed.size == size
    inside = np.zeros((size[1], size[0]), bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    assert (pixels(boxed)[inside] == RED).all()
    assert (pixels(boxed)[~inside] == WHITE).all()


def test_letterbox_of_extreme_shapes_and_prepared_pictures() -> None:
    assert letterbox(Image.new("RGB", (1000, 1), RED), (64, 32)).size == (64, 32)
    prepared = letterbox(quarters(), (48, 48))
    assert np.array_equal(pixels(letterbox(prepared, (48, 48))), pixels(prepared))
    tensor = reference_to_tensor(Image.new("RGB", (3, 2), (0, 255, 51)))
    assert tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32
    assert tensor[:, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    (folder / "folder.png").mkdir()
    for name, data in {
        "empty.png": b"",
        "text.png": b"not a picture",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        "large.png": png_header(10_000, 7_000),
        "huge.png": png_header(60_000, 60_000),
        "cut.jpg": (folder / "cut.jpg").read_bytes()[:700],
    }.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "does not exist"),
        ("folder.png", "is a folder"),
        ("empty.png", "is empty"),
        ("text.png", "not a picture"),
        ("script.png", "not a picture"),
        ("large.png", "10000x7000.*64 megapixels"),
        ("huge.png", "64 megapixels"),
        ("cut.jpg", "is damaged"),
    ],
)
def test_bad_files_are_named(bad_files: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{message}") as caught:
        load_image(bad_files / name)
    assert "\n" not in str(caught.value)


def test_roles_and_settings() -> None:
    image = quarters()
    for role in ("subject", "face", "background", Role.FACE):
        assert prepare_reference(image, (32, 32), role=role).size == (32, 32)
    with pytest.raises(ValueError, match="'person'.*subject, face, background"):
        prepare_reference(image, (32, 32), role="person")
    with pytest.raises(ValueError, match="'yes'.*off, auto"):
        prepare_reference(image, (32, 32), matte="yes")


def test_matte_without_the_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ValueError, match=r'pip install "rembg\[cpu\]"'):
        prepare_reference(quarters(), (32, 32), matte="auto")
    # A background is never cut out, so it needs no package.
    assert prepare_reference(quarters(), (32, 32), role="background", matte="auto").size == (32, 32)


def test_matte_puts_the_cut_out_subject_on_white(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_left_half(image: Image.Image) -> Image.Image:
        layer = image.convert("RGBA")
        layer.paste((0, 0, 0, 0), (0, 0, 20, 20))
        return layer

    monkeypatch.setitem(sys.modules, "rembg", types.SimpleNamespace(remove=cut_left_half))
    cut = remove_background(quarters())
    assert cut.getpixel((5, 5)) == WHITE
    assert cut.getpixel((25, 5)) == (0, 255, 0)
    prepared = prepare_reference(quarters(), (40, 20), role="face", matte="auto")
    assert np.array_equal(pixels(prepared), pixels(cut))


# Red, green and blue as XYZ under D50, and the exponent of the tone curve.
PROFILES = {
    "Display P3": (((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)), 2.2),
    "Adobe RGB": (((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)), 2.2),
}
SRGB_FROM_XYZ = np.array(((3.1339, -1.6169, -0.4906), (-0.9788, 1.9161, 0.0335), (0.0719, -0.2290, 1.4052)))


def icc_profile(name: str) -> bytes:
    """A profile of version 2: three primaries and a power as tone curve (ICC.1:2001)."""
    primaries, exponent = PROFILES[name]

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256)) + bytes(2)
    text = name.encode() + b"\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78 + -len(text) % 4)
    tags = {b"desc": description, b"cprt": b"text" + bytes(4) + b"none" + bytes(4)}
    tags |= {b"wtpt": xyz((0.9642, 1.0, 0.8249)), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags |= {channel + b"XYZ": xyz(primary) for channel, primary in zip((b"r", b"g", b"b"), primaries)}
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = bytearray(128)
    header[8:12], header[12:24] = b"\x02\x10\0\0", b"mntrRGB XYZ "
    header[36:40], header[68:80] = b"acsp", xyz((0.9642, 1.0, 0.8249))[8:]
    profile = bytes(header) + table + data
    return struct.pack(">I", len(profile)) + profile[4:]


def in_srgb(name: str, pixel: tuple[int, ...]) -> np.ndarray:
    """What `pixel` of a profile is in sRGB, by the definition of both."""
    primaries, exponent = PROFILES[name]
    linear = SRGB_FROM_XYZ @ (np.array(primaries).T @ (np.array(pixel) / 255) ** exponent)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(
    "mode, suffix", [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "jpg"), ("RGB", "webp")]
)
def test_a_colour_profile_is_applied(tmp_path: Path, name: str, mode: str, suffix: str) -> None:
    pixel = (180, 90, 60)
    image = Image.new("RGB", (16, 16), pixel)
    image = image.quantize() if mode == "P" else image.convert(mode)
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0}
    image.save(tmp_path / f"a.{suffix}", icc_profile=icc_profile(name), **options)
    found = np.array(load_image(tmp_path / f"a.{suffix}"))[8, 8]
    assert np.abs(found - in_srgb(name, pixel)).max() < 3
    assert np.abs(found.astype(int) - pixel).max() > 8  # what was read without the profile


@pytest.mark.parametrize("profile", [b"damaged", icc_profile("Adobe RGB")[:200]], ids=["text", "cut off"])
def test_an_unusable_profile_is_ignored(tmp_path: Path, profile: bytes) -> None:
    Image.new("RGB", (4, 4), (10, 200, 30)).save(tmp_path / "a.png", icc_profile=profile)
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 200, 30)


def test_a_profile_of_srgb_changes_nothing(tmp_path: Path) -> None:
    levels = np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(levels).save(tmp_path / "a.png", icc_profile=srgb)
    np.testing.assert_array_equal(np.array(load_image(tmp_path / "a.png")), levels)
