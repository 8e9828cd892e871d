"""Images of one's own: pixels as they are stored, the layout of folders and lists, and errors that name the file."""

import io

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'ltkernels[trainer]'")

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.data import folders  # noqa: E402
from ltkernels.trainer.data.images import MissingDataError  # noqa: E402


def pixels(seed, height=32, width=32):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def save(array, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def make_folders(root, classes=("ant", "bee", "cow"), train=(3, 2, 1)):
    """Images of 32 x 32, seeds 100 * class + number for training and 50 more for the one test image of each class."""
    for label, (name, count) in enumerate(zip(classes, train, strict=True)):
        for number in range(count):
            save(pixels(100 * label + number), root / "train" / name / f"{number}.png")
        save(pixels(100 * label + 50), root / "test" / name / "0.png")


def make_lists(root):
    lines = {"train": [], "test": []}
    for label in range(3):
        for number in range(2):
            save(pixels(10 * label + number), root / "all images" / f"{label}_{number}.png")
            lines["test" if number else "train"].append(f"all images/{label}_{number}.png {label}")
    for part, text in lines.items():
        (root / f"{part}.txt").write_text("\n".join([*reversed(text), "", ""]))


def test_a_folder_of_images_by_class(tmp_path):
    make_folders(tmp_path)
    data = folders.load_folder(tmp_path)
    assert data.train.class_names == ("ant", "bee", "cow")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 2] and data.test.labels.tolist() == [0, 1, 2]
    assert data.train.images.dtype == np.uint8 and data.train.labels.dtype == np.int64
    seeds = [0, 1, 2, 100, 101, 200]
    assert all((image == pixels(seed)).all() for image, seed in zip(data.train.images, seeds, strict=True))
    assert all((image == pixels(seed)).all() for image, seed in zip(data.test.images, [50, 150, 250], strict=True))
    assert data.train.num_classes == data.test.num_classes == 3


def test_mean_and_deviation_are_those_of_the_training_images(tmp_path):
    make_folders(tmp_path)
    data = folders.load_folder(tmp_path)
    values = data.train.images.reshape(-1, 3) / 255
    assert data.mean == pytest.approx(values.mean(axis=0), abs=1e-12)
    assert data.std == pytest.approx(values.std(axis=0), abs=1e-12)


def test_statistics_of_many_images():
    images = np.random.RandomState(0).randint(0, 256, (9000, 2, 2, 3)).astype(np.uint8)
    images[..., 2] = 7
    mean, std = folders.channel_statistics(images)
    assert mean == pytest.approx(images.reshape(-1, 3).mean(axis=0) / 255)
    assert std[:2] == pytest.approx(images[..., :2].reshape(-1, 2).std(axis=0) / 255)
    assert std[2] == 1 / 255  # a constant channel can still be divided by it


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (32, 48), (7, 7)])
def test_images_of_other_shapes_are_cut_to_their_centre_and_resized(tmp_path, shape):
    make_folders(tmp_path)
    image = np.zeros((*shape, 3), dtype=np.uint8)
    height, width = shape
    side = min(shape)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = (200, 100, 50)  # all but the centre square is black
    save(image, tmp_path / "train" / "ant" / "0.png")
    read = folders.load_folder(tmp_path).train.images[0]
    assert read.shape == (32, 32, 3)
    assert (read[1:-1, 1:-1] == (200, 100, 50)).all()  # at the border the filter may see what was cut off


def test_another_side(tmp_path):
    make_folders(tmp_path)
    data = folders.load_folder(tmp_path, side=16)
    assert data.train.images.shape == (6, 16, 16, 3) and data.test.images.shape == (3, 16, 16, 3)
    average = pixels(0).reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.corrcoef(data.train.images[0].ravel(), average.ravel())[0, 1] > 0.9


def test_grey_images_palettes_and_large_jpegs(tmp_path):
    make_folders(tmp_path)
    grey = pixels(1)[..., 0]
    save(grey, tmp_path / "train" / "ant" / "0.png")
    Image.fromarray(pixels(2)).quantize(16).save(tmp_path / "train" / "ant" / "1.png")
    save(np.full((700, 900, 3), (10, 200, 90), dtype=np.uint8), tmp_path / "train" / "ant" / "2.JPEG")
    (tmp_path / "train" / "ant" / "2.png").unlink()
    images = folders.load_folder(tmp_path).train.images
    assert (images[0] == grey[..., None]).all()
    expected = np.asarray(Image.open(tmp_path / "train" / "ant" / "1.png").convert("RGB"))
    assert (images[1] == expected).all()
    assert np.abs(images[2].astype(int) - (10, 200, 90)).max() <= 3


@pytest.mark.parametrize("name", ["0.png", "0.tif", "0.pgm"])
def test_grey_values_of_16_bits_are_scaled(tmp_path, name):
    make_folders(tmp_path)
    ramp = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
    (tmp_path / "train" / "ant" / "0.png").unlink()
    save(ramp, tmp_path / "train" / "ant" / name)
    read = folders.load_folder(tmp_path).train.images[0]
    assert np.abs(read - (ramp / 257)[..., None]).max() <= 0.5


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(tmp_path, dtype):
    make_folders(tmp_path)
    save(pixels(0)[..., 0].astype(dtype), tmp_path / "train" / "ant" / "0.tif")
    with pytest.raises(TrainerError, match=f"{tmp_path}/train/ant/0.tif: .* mode .*, have no range that is known"):
        folders.load_folder(tmp_path)


def test_photos_are_upright(tmp_path):
    """Orientation 6 of EXIF: the first row of the file is the right side of the picture."""
    make_folders(tmp_path)
    file = tmp_path / "train" / "ant" / "0.png"
    upright = pixels(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright)).save(file, exif=exif)
    assert (folders.load_folder(tmp_path).train.images[0] == upright).all()
    Image.fromarray(upright).save(file, exif=b"Exif\0\0damaged")
    assert (folders.load_folder(tmp_path).train.images[0] == upright).all()


def test_files_that_are_no_images_by_name_are_left_out(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("x")
    (tmp_path / "train" / "ant" / ".hidden.png").write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "README").write_text("x")
    assert len(folders.load_folder(tmp_path).train) == 6


def test_layouts_that_are_wrong_are_named(tmp_path):
    with pytest.raises(MissingDataError, match=f"{tmp_path}/train: no such folder. Make {tmp_path}/train/CLASS.*LTK"):
        folders.load_folder(tmp_path)
    make_folders(tmp_path / "a")
    (tmp_path / "a" / "test" / "dog").mkdir()
    with pytest.raises(TrainerError, match=f"{tmp_path}/a/test/dog: no class of this name in"):
        folders.load_folder(tmp_path / "a")
    make_folders(tmp_path / "b")
    (tmp_path / "b" / "test" / "cow" / "0.png").unlink()
    with pytest.raises(TrainerError, match=f"{tmp_path}/b/test/cow: no images"):
        folders.load_folder(tmp_path / "b")
    make_folders(tmp_path / "c")
    (tmp_path / "c" / "train" / "dog").mkdir()
    with pytest.raises(TrainerError, match=f"{tmp_path}/c/train/dog: no images"):
        folders.load_folder(tmp_path / "c")
    make_folders(tmp_path / "d", ("ant",), (2,))
    with pytest.raises(TrainerError, match="at least 2 classes, got 1"):
        folders.load_folder(tmp_path / "d")


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="png")
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"text", png(pixels(0))[:200], png(pixels(0, 200, 200))[:-30000]])
def test_damaged_images_are_named(tmp_path, content):
    make_folders(tmp_path)
    file = tmp_path / "train" / "bee" / "1.png"
    file.write_bytes(content)
    with pytest.raises(TrainerError, match=f"{file}: cannot be read as an image"):
        folders.load_folder(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_absurd_size_is_an_error(tmp_path, monkeypatch):
    make_folders(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(TrainerError, match="cannot be read as an image .*decompression bomb"):
        folders.load_folder(tmp_path)


def test_lists_of_images(tmp_path):
    make_lists(tmp_path)
    data = folders.load_list(tmp_path)
    assert data.name == "list" and data.train.num_classes == 3 and data.train.class_names == ()
    assert data.train.labels.tolist() == data.test.labels.tolist() == [2, 1, 0]
    assert all((image == pixels(seed)).all() for image, seed in zip(data.train.images, [20, 10, 0], strict=True))
    assert all((image == pixels(seed)).all() for image, seed in zip(data.test.images, [21, 11, 1], strict=True))
    assert data.mean == pytest.approx(data.train.images.reshape(-1, 3).mean(axis=0) / 255)


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("train", "", "train.txt: lists no image"),
        ("train", "all images/0_0.png 0\nimage.png\n", "train.txt, line 2: expected 'path label'"),
        ("train", "all images/0_0.png 0\nall images/1_0.png 0\n", "train.txt: expected labels of at least 2 classes"),
        ("train", "all images/0_0.png -1\n", "train.txt, line 1: expected 'path label'"),
        ("train", "all images/0_0.png 1.0\n", "train.txt, line 1: expected 'path label'"),
        ("test", "\nall images/none.png 0\n", "test.txt, line 2: .*/all images/none.png: no such image"),
        (
            "train",
            "all images/0_0.png 0\nall images/1_0.png 2\n",
            r"train.txt: no image of class 1, but labels of train.txt go to 2 \(1_0.png\)",
        ),
        (
            "train",
            "all images/0_0.png 99999999999\n",
            r"train.txt: no image of class 0, but labels of train.txt go to 99999999999 \(0_0",
        ),
        (
            "test",
            "all images/0_1.png 0\nall images/1_1.png 1\n",
            r"test.txt: no image of class 2, but labels of train.txt go to 2 \(",
        ),
        (
            "test",
            "".join(f"all images/0_1.png {label}\n" for label in (0, 1, 2, 3)),
            r"test.txt: expected labels in 0..2 as in train.txt, got 3 \(",
        ),
    ],
)
def test_lists_that_are_wrong_are_named(tmp_path, part, text, message):
    make_lists(tmp_path)
    (tmp_path / f"{part}.txt").write_text(text)
    with pytest.raises(TrainerError, match=message):
        folders.load_list(tmp_path)


def test_lists_as_editors_of_windows_save_them(tmp_path):
    make_lists(tmp_path)
    expected = folders.load_list(tmp_path).train
    text = (tmp_path / "train.txt").read_text().strip().replace("\n", "\r\n")
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    read = folders.load_list(tmp_path).train
    assert (read.images == expected.images).all() and (read.labels == expected.labels).all()


def test_a_list_that_is_no_text(tmp_path):
    make_lists(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(TrainerError, match="train.txt: not readable as text"):
        folders.load_list(tmp_path)


def test_missing_lists_tell_what_to_write(tmp_path):
    with pytest.raises(
        MissingDataError, match=f"{tmp_path}/train.txt: no such file. Write .*'path label'.*LTKERNELS_D"
    ):
        folders.load_list(tmp_path)
