"""Image folders: the values of every kind of image, what is refused, what is skipped."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import equalized
from torch import Tensor

from fastfuse import calibrate, cli, load_calibration
from fastfuse.calibration.images import ImageFolder

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")

GREY = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5957  # 0..65527
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
BYTES, COLOUR_BYTES = (GREY >> 8).astype(np.uint8), (COLOUR >> 8).astype(np.uint8)


def raw(folder: Path, **options: Any) -> Tensor:
    """The images of a folder in 0..1."""
    return torch.cat(list(ImageFolder(folder, mean=(0, 0, 0), std=(1, 1, 1), **options)))


def twice(folder: Path, name: str, image: Any, **options: Any) -> Path:
    """A folder of two copies of an image."""
    for copy in ("a", "b"):
        image.save(folder / f"{copy}.{name}", **options)
    return folder


def png16(samples: Any, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel, which pillow does not write for colour."""
    height, width = samples.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)

    def chunk(kind: bytes, data: bytes) -> bytes:
        length, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return length + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def palette(**transparency: Any) -> Any:
    image = Image.fromarray((np.arange(12) % 2).reshape(3, 4).astype(np.uint8)).convert("P")
    image.putpalette([255, 128, 0, 0, 64, 255])
    image.info.update(transparency)
    return image


def with_alpha(pixels: Any) -> Any:
    alpha = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    return np.concatenate([pixels.reshape(3, 4, -1), alpha], -1)


ODD = (np.arange(12) % 2).reshape(3, 4, 1)
OF_PALETTE = np.where(ODD, [0, 64, 255], [255, 128, 0]) / 255
CMYK = with_alpha(COLOUR_BYTES)
FLOATS = (GREY / 65535).astype(np.float32)

# kind: (ending, image, its values (H, W, 1 or 3) in 0..1, options of saving)
KINDS: dict[str, tuple[str, Callable[[], Any], Any, dict[str, Any]]] = {
    "8 bits": ("png", lambda: Image.fromarray(BYTES), BYTES / 255, {}),
    "1 bit": ("png", lambda: Image.fromarray(BYTES > 99), BYTES > 99, {}),
    "16 bits": ("png", lambda: Image.fromarray(GREY), GREY / 65535, {}),
    "16 bits, TIFF": ("tif", lambda: Image.fromarray(GREY), GREY / 65535, {}),
    "16 bits, big end first": (
        "tiff",
        lambda: Image.fromarray(GREY.astype(">u2")),
        GREY / 65535,
        {},
    ),
    "16 of 32 bits": ("tif", lambda: Image.fromarray(GREY.astype(np.int32)), GREY / 65535, {}),
    "8 of 32 bits": (
        "tif",
        lambda: Image.fromarray((GREY >> 8).astype(np.int32)),
        (GREY >> 8) / 65535,
        {},
    ),
    "float": ("tif", lambda: Image.fromarray(FLOATS), FLOATS, {}),
    "palette": ("png", palette, OF_PALETTE, {}),
    "palette, one transparent": ("png", palette, OF_PALETTE, {"transparency": 1}),
    "palette with alpha": ("png", palette, OF_PALETTE, {"transparency": b"\0\x80"}),
    "grey with alpha": (
        "png",
        lambda: Image.fromarray(with_alpha(BYTES), "LA"),
        BYTES / 255,
        {},
    ),
    "RGBA": ("png", lambda: Image.fromarray(with_alpha(COLOUR_BYTES)), COLOUR_BYTES / 255, {}),
    "RGBA, WebP": (
        "webp",
        lambda: Image.fromarray(with_alpha(COLOUR_BYTES)),
        COLOUR_BYTES / 255,
        {"lossless": True, "exact": True},
    ),
    "16 bits, one transparent": ("png", lambda: Image.fromarray(GREY), GREY / 65535, {}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, tmp_path: Path) -> None:
    ending, make, expected, options = KINDS[kind]
    images = raw(twice(tmp_path, ending, make(), **options))
    values = torch.from_numpy(np.ascontiguousarray(expected)).reshape(3, 4, -1).permute(2, 0, 1)
    torch.testing.assert_close(images, values.float().expand(2, 3, 3, 4), rtol=0, atol=1e-7)


def test_cmyk(tmp_path: Path) -> None:
    """The complement of each ink, times that of black, rounded to 8 bits."""
    images = raw(twice(tmp_path, "tif", Image.fromarray(CMYK, "CMYK")))
    inks = torch.from_numpy(CMYK / 255).permute(2, 0, 1)
    expected = ((1 - inks[:3]) * (1 - inks[3:])).float().expand(2, 3, 3, 4)
    torch.testing.assert_close(images, expected, rtol=0, atol=1 / 255)


@pytest.mark.parametrize(("colour_type", "samples"), [(2, COLOUR), (4, with_alpha(GREY))])
def test_sixteen_bits_beside_others(colour_type: int, samples: Any, tmp_path: Path) -> None:
    """Pillow reads the upper 8."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png16(samples, colour_type))
    expected = torch.from_numpy(COLOUR if colour_type == 2 else np.stack([GREY] * 3, -1))
    expected = (expected.double() / 65535).float().permute(2, 0, 1).expand(2, 3, 3, 4)
    torch.testing.assert_close(raw(tmp_path), expected, rtol=0, atol=1 / 255)


def test_sixteen_bits_resized(tmp_path: Path) -> None:
    """In floating point, not at 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 65536, (24, 20), np.uint16)
    images = raw(twice(tmp_path, "png", Image.fromarray(pixels)), size=(8, 10))
    exact = torch.from_numpy(pixels / 65535).float().expand(2, 3, -1, -1)
    exact = F.interpolate(exact, (8, 10), mode="bilinear", antialias=True)
    torch.testing.assert_close(images, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation(ending: str, orientation: int, tmp_path: Path) -> None:
    """EXIF says how the camera was held; images are upright."""
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]  # by 90 degrees, counterclockwise
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    exif[274] = orientation
    images = raw(twice(tmp_path, ending, Image.fromarray(pixels), exif=exif.tobytes()))
    expected = torch.from_numpy(np.rot90(pixels, turns).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(images, expected.expand(2, -1, -1, -1), rtol=0, atol=0.02)


# ---- what cannot be read ------------------------------------------------------------------------


def noise(side: int = 256) -> Any:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def damaged(path: Path) -> None:
    """A chunk of pixels that is none."""
    noise().save(path)
    content = bytearray(path.read_bytes())
    at = content.rfind(b"IDAT")
    content[at : at + 4] = b"XX\0\1"
    path.write_bytes(content)


def truncated(path: Path) -> None:
    noise().save(path)
    path.write_bytes(path.read_bytes()[:-2000])


def floats(value: float) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        pixels = FLOATS.copy()
        pixels[1, 1] = value
        Image.fromarray(pixels).save(path, "TIFF")

    return save


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "it is empty"),
    "no image": (
        lambda p: p.write_text("nonsense"),
        "finds no image in it; it starts with b'nonse",
    ),
    "damaged in its head": (
        lambda p: p.write_bytes(png16(COLOUR, 2).replace(b"IDAT", b"IDAX")),
        "pillow finds no image in it; it starts with b'.x89PNG",
    ),
    "truncated": (truncated, "truncated"),
    "damaged": (damaged, "broken PNG file"),
    "a bomb": (
        lambda p: Image.new("1", (15000, 13000)).save(p),
        "195000000 pixels.* Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS",
    ),
    "17 bits": (
        lambda p: Image.fromarray(GREY.astype(np.int32) + 9).save(p, "TIFF"),
        r"integer pixels must be in 0..65535; got 9..65536",
    ),
    "negative": (
        lambda p: Image.fromarray(GREY.astype(np.int32) - 1).save(p, "TIFF"),
        r"integer pixels must be in 0..65535; got -1..",
    ),
    "floats in 0..255": (floats(255), r"floating-point pixels must be in 0..1; got 0..255"),
    "NaN": (floats(float("nan")), r"floating-point pixels must be in 0..1; got nan"),
    "a broken link": (lambda p: p.symlink_to(p.parent / "gone.png"), "No such file"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable(kind: str, tmp_path: Path) -> None:
    """Named, with the reason; the others are as without it where it is skipped."""
    make, message = UNREADABLE[kind]
    generator = np.random.default_rng(0)
    for name in ("a", "c", "d"):
        pixels = generator.integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    expected = raw(tmp_path)
    make(tmp_path / "b.png")
    whole = rf"{tmp_path / 'b.png'} cannot be read as an image: .*{message}.*--skip-unreadable"
    with pytest.raises(ValueError, match=whole):
        raw(tmp_path)
    images = ImageFolder(tmp_path, 2, mean=(0, 0, 0), std=(1, 1, 1), skip_unreadable=True)
    for _ in range(2):  # every pass counts anew
        assert torch.equal(torch.cat(list(images)), expected[:2])
        assert [path.name for path in images.skipped] == ["b.png"]
        assert images.dropped == tmp_path / "d.png"
    assert torch.equal(raw(tmp_path, skip_unreadable=True), expected)


@pytest.mark.parametrize("readable", [0, 1])
def test_too_few_are_left(readable: int, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    for name in ("a", "b", "c")[:readable]:
        Image.new("L", (4, 3)).save(tmp_path / f"{name}.png")
    message = rf"at least 2 images must be readable; got {readable} of 3: .*it is empty"
    with pytest.raises(ValueError, match=message):
        list(ImageFolder(tmp_path, 2, skip_unreadable=True))


def test_sizes_are_never_skipped(tmp_path: Path) -> None:
    for i in range(2):
        Image.new("L", (4 + i, 3)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="images must have one size"):
        list(ImageFolder(tmp_path, skip_unreadable=True))


def test_a_folder_named_as_an_image(tmp_path: Path) -> None:
    (tmp_path / "c.png").mkdir()
    twice(tmp_path, "png", Image.new("L", (4, 3)))
    assert len(ImageFolder(tmp_path).files) == 2


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence without the option; with it the same statistics as without the file."""
    torch.set_num_threads(1)  # the models are too small for more
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "c", "d", "e"):
        pixels = generator.integers(0, 65536, (32, 40), np.uint16)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    expected = calibrate(equalized(), ImageFolder(folder, 2))
    damaged(folder / "b.png")
    output = tmp_path / "equalizers.json"
    arguments = ["calibrate", "small_models:equalized", "--data", str(folder), "--batch-size", "2"]
    arguments += ["--output", str(output)]
    assert cli.main(arguments) == 2
    (last,) = capsys.readouterr().err.strip().splitlines()[1:]
    assert last.startswith(f"calibrate: {folder / 'b.png'} cannot be read as an image: broken PNG")
    assert not output.exists()
    assert cli.main([*arguments, "--skip-unreadable"]) == 0
    printed = capsys.readouterr().err
    assert f"1 of 5 images are skipped:\n  {folder / 'b.png'} cannot be read" in printed
    assert load_calibration(equalized(), output) == expected
    picture = tmp_path / "scale.png"
    arguments = ["report", "small_models:plain", *arguments[2:-1], str(picture)]
    assert cli.main([*arguments, "--skip-unreadable"]) == 0
    assert "1 of 5 images are skipped:" in capsys.readouterr().err
    assert picture.exists()
