import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.data import ImagePreprocessing
from quantkit.errors import UnknownNameError
from tests.data.helpers import refused

preprocessings = st.builds(
    ImagePreprocessing,
    mean=st.lists(st.floats(0, 1), min_size=1, max_size=4).map(tuple),
    std=st.lists(st.floats(1e-3, 10), min_size=1, max_size=4).map(tuple),
    size=st.none() | st.tuples(st.integers(1, 999), st.integers(1, 999)),
    layout=st.sampled_from([None, "NCHW", "NHWC"]),
    crop_pct=st.none() | st.floats(0.1, 1),
)


@given(preprocessings)
def test_json_gives_back_the_same_preprocessing(image):
    assert ImagePreprocessing.from_json(json.loads(json.dumps(image.to_json()))) == image


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({"mean": (123.675, 116.28, 103.53)}, "divide"),
        ({"mean": (float("nan"),)}, "0…1"),
        ({"mean": ()}, "0…1"),
        ({"std": (0.0,)}, "above 0"),
        ({"std": (float("inf"),)}, "above 0"),
        ({"size": (0, 5)}, "height, width"),
        ({"layout": "HWC"}, "NCHW or NHWC"),
        ({"crop_pct": 1.5}, "0.875"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_mend(fields, mend):
    refused(lambda: ImagePreprocessing(**fields), mend)


def test_one_number_serves_every_channel():
    assert ImagePreprocessing(mean=0.5).mean == (0.5,)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(UnknownNameError, match="imagenet, 0-1"):
        ImagePreprocessing.preset("imagnet")
