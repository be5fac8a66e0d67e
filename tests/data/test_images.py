import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from quantkit.data import ImagePreprocessing, InputSpec
from quantkit.data.images import ImageTransform
from tests.data.helpers import IMAGE, read, refused, spec

PIXELS = np.random.default_rng(1).integers(0, 256, (4, 5, 3), np.uint8)
FREE = spec("n", 3, "h", "w")


def _save(path, pixels, mode=None):
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_pixels_become_normalized_values_rounded_once(tmp_path, dtype):
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    (sample,) = read(
        _save(tmp_path / "a.png", PIXELS),
        spec("n", 3, 4, 5, dtype=dtype),
        image=ImagePreprocessing(mean=mean, std=std),
    )
    wanted = ((PIXELS / 255 - mean) / std).transpose(2, 0, 1)[None].astype(dtype)
    assert sample["x"].dtype == dtype
    np.testing.assert_array_equal(sample["x"], wanted)


def test_without_a_preprocessing_pixels_are_scaled_to_one(tmp_path):
    (sample,) = read(_save(tmp_path / "a.png", PIXELS), IMAGE)
    np.testing.assert_array_equal(sample["image"][0].transpose(1, 2, 0), (PIXELS / 255).astype(np.float32))


def test_nhwc_is_found_from_the_models_shape(tmp_path):
    (sample,) = read(_save(tmp_path / "a.png", PIXELS), spec("n", 4, 5, 3))
    np.testing.assert_array_equal(sample["x"][0], (PIXELS / 255).astype(np.float32))


def test_a_layout_that_cannot_be_told_is_asked_for(tmp_path):
    path = _save(tmp_path / "a.png", PIXELS)
    refused(lambda: read(path, spec("n", "a", "b", "c")), "--layout")
    refused(lambda: read(path, spec(1, 3, 224, 3)), "--layout")
    (sample,) = read(path, spec("n", "a", "b", "c"), image=ImagePreprocessing(layout="NHWC"))
    assert sample["x"].shape == (1, 4, 5, 3)


def test_a_uint8_input_takes_pixels_as_they_are(tmp_path):
    path, raw = _save(tmp_path / "a.png", PIXELS), spec("n", 4, 5, 3, dtype=np.uint8)
    (sample,) = read(path, raw)
    np.testing.assert_array_equal(sample["x"][0], PIXELS)
    refused(lambda: read(path, raw, image=ImagePreprocessing(mean=(0.5,))), "--mean")
    refused(lambda: read(path, spec("n", 4, 5, 3, dtype=np.int64)), "int64")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"])
@pytest.mark.parametrize(("channels", "target"), [(1, "L"), (3, "RGB")])
def test_every_mode_becomes_what_the_model_has_channels_for(tmp_path, mode, channels, target):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    _save(path, PIXELS, mode)
    (sample,) = read(path, spec("n", channels, 4, 5))
    wanted = np.asarray(Image.fromarray(PIXELS).convert(mode).convert(target)) / 255
    wanted = wanted[None] if channels == 1 else wanted.transpose(2, 0, 1)
    if mode == "P":  # through the file, the palette is what was stored
        with Image.open(path) as stored:
            wanted = np.asarray(stored.convert("RGB").convert(target)) / 255
        wanted = wanted[None] if channels == 1 else wanted.transpose(2, 0, 1)
    np.testing.assert_array_equal(sample["x"][0], wanted.astype(np.float32))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    (sample,) = read(_save(tmp_path / "a.png", grey), spec("n", 1, 1, 4))
    np.testing.assert_array_equal(sample["x"].ravel(), (np.array([0, 1, 128, 255]) / 255).astype(np.float32))


def test_float_pixels_of_unknown_range_are_refused(tmp_path):
    path = _save(tmp_path / "a.tif", np.ones((4, 5), np.float32))
    refused(lambda: read(path, spec("n", 1, 4, 5)), "a.tif", ".npy")


def test_a_picture_is_scaled_to_the_models_size(tmp_path):
    flat = np.full((9, 7, 3), 51, np.uint8)
    (sample,) = read(_save(tmp_path / "a.png", flat), IMAGE)
    assert sample["image"].shape == (1, 3, 4, 5)
    assert (sample["image"] == np.float32(0.2)).all()


def test_with_free_sizes_pictures_keep_theirs_unless_one_is_given(tmp_path):
    _save(tmp_path / "a.png", PIXELS)
    _save(tmp_path / "b.png", PIXELS[:3])
    assert [s["x"].shape for s in read(tmp_path, FREE)] == [(1, 3, 4, 5), (1, 3, 3, 5)]
    sized = read(tmp_path, FREE, image=ImagePreprocessing(size=(6, 2)))
    assert [s["x"].shape for s in sized] == [(1, 3, 6, 2)] * 2


def test_a_size_that_is_not_the_models_is_refused(tmp_path):
    path = _save(tmp_path / "a.png", PIXELS)
    refused(lambda: read(path, IMAGE, image=ImagePreprocessing(size=(5, 4))), "(5, 4)", "--size")
    refused(lambda: read(path, spec("n", 3, 4, "w")), "--size")


def _imagenet(height: int, width: int, input_spec: InputSpec) -> np.ndarray:
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    pixels = np.repeat(np.repeat(ramp[None, :, None], height, 0), 3, 2)
    return ImageTransform(ImagePreprocessing.preset("imagenet"), input_spec).apply(pixels), pixels


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (100, 90), (256, 256)])
def test_imagenet_is_short_side_256_and_the_middle_224(shape):
    found, pixels = _imagenet(*shape, FREE)
    short = min(shape)
    resized = Image.fromarray(pixels).resize(
        (256 * shape[1] // short, 256 * shape[0] // short), Image.Resampling.BILINEAR
    )
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    cut = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_array_equal(found[0], ((cut / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32))


def test_imagenet_follows_the_models_own_size():
    found, _ = _imagenet(300, 300, spec("n", 3, 32, 48))
    assert found.shape == (1, 3, 32, 48)


def test_a_picture_of_the_right_size_is_not_cropped_again():
    found, pixels = _imagenet(224, 224, FREE)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_array_equal(
        found[0], ((pixels / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("image", "word"),
    [({"mean": (0.1, 0.2)}, "2 values of --mean"), ({"std": (0.1,) * 4}, "4 values of --std")],
)
def test_as_many_means_as_channels_are_wanted(tmp_path, image, word):
    path = _save(tmp_path / "a.png", PIXELS)
    refused(lambda: read(path, IMAGE, image=ImagePreprocessing(**image)), word, "3")


def test_a_model_that_takes_no_pictures_says_so(tmp_path):
    path = _save(tmp_path / "a.png", PIXELS)
    refused(lambda: read(path, spec("n", 4)), "x: float32[n, 4]", "rank 4")
    refused(lambda: read(path, spec("n", 17, 4, 5), image=ImagePreprocessing(layout="NCHW")), "17 channels")
    refused(lambda: read(path, IMAGE, spec("n", 4)), "one input", "image: float32", ".npz")


def test_a_std_that_overflows_the_inputs_type_is_refused():
    image = ImagePreprocessing(std=(1e-6,))
    refused(lambda: ImageTransform(image, spec("n", 3, 4, 5, dtype=np.float16)), "float16", "--std")
