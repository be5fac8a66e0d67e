import pytest

from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import scale_shape
from quantkit.formats.presets import ACTIVATION_SPECS, WEIGHT_SPECS, activation_spec, weight_spec

# What each preset makes of a MatMul's weight [K, N], and the shape of its scales for K = 300, N = 200.
WEIGHTS = {
    "int8": ("int8, per channel", (200,)),
    "int16": ("int8, per channel", (200,)),
    "w16a16": ("int16, per channel", (200,)),
    "fp8": ("fp8_e4m3, per channel", (200,)),
    "fp8-block": ("fp8_e4m3, block 128×128", (3, 2)),
    "int4": ("int4, block 128", (3, 200)),
    "w4a8": ("int4, block 128", (3, 200)),
    "w4a8-fp8": ("int4, block 128", (3, 200)),
    "int2": ("int2, block 32", (10, 200)),
    "nvfp4": ("fp4_e2m1, block 16, fp8_e4m3 scales", (19, 200)),
    "mxfp4": ("fp4_e2m1, block 32, e8m0 scales (rceil)", (10, 200)),
    "mxfp8": ("fp8_e4m3, block 32, e8m0 scales (rceil)", (10, 200)),
}
ACTIVATIONS = {
    "int8": "int8",
    "int16": "uint16, asymmetric",
    "w16a16": "int16",
    "fp8": "fp8_e4m3",
    "fp8-block": "fp8_e4m3, block 128, dynamic per block",
    "int4": None,
    "w4a8": "int8",
    "w4a8-fp8": "fp8_e4m3",
    "int2": None,
    "nvfp4": "fp4_e2m1, block 16, fp8_e4m3 scales, dynamic per block",
    "mxfp4": "fp4_e2m1, block 32, e8m0 scales (rceil), dynamic per block",
    "mxfp8": "fp8_e4m3, block 32, e8m0 scales (rceil), dynamic per block",
}
MATMUL = {"channel_axis": 1, "contraction_axis": 0}


def test_every_preset_is_in_the_table():
    assert set(WEIGHTS) == set(ACTIVATIONS) == set(WEIGHT_SPECS) >= set(ACTIVATION_SPECS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_preset_cuts_a_weight_along_the_axis_that_its_format_wants(name):
    spec = weight_spec(name, **MATMUL)
    assert (str(spec), scale_shape((300, 200), spec)) == WEIGHTS[name]
    transposed = weight_spec(name, channel_axis=0, contraction_axis=1)
    assert scale_shape((200, 300), transposed) == WEIGHTS[name][1][::-1]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_preset_says_what_becomes_of_activations(name):
    spec = activation_spec(name)
    assert (None if spec is None else str(spec)) == ACTIVATIONS[name]


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("int4", {"block_size": 32}, "int4, block 32"),
        ("int4", {"block_size": "channel"}, "int4, per channel"),
        ("int4", {"symmetric": False}, "uint4, block 128, asymmetric"),
        ("int2", {"block_size": 64, "symmetric": False}, "uint2, block 64, asymmetric"),
        ("int8", {"symmetric": False}, "int8, per channel, asymmetric"),
        ("fp8", {"per_tensor": True}, "fp8_e4m3"),
        ("mxfp4", {"scale_rule": "even"}, "fp4_e2m1, block 32, e8m0 scales (even)"),
    ],
)
def test_options_change_what_a_preset_leaves_open(name, options, text):
    assert str(weight_spec(name, **MATMUL, **options)) == text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "nvfp4",
            {"block_size": 32},
            "nvfp4: block_size 32 asked for, but its blocks are part of the format",
        ),
        ("fp8-block", {"per_tensor": True}, "fp8-block: per_tensor asked for"),
        ("int4", {"scale_rule": "ocp"}, "int4: scale_rule ocp asked for, but its scales are floats"),
        ("mxfp4", {"scale_rule": "floor"}, "no scale rule floor"),
        ("fp8", {"symmetric": False}, "float formats have no zero point"),
        ("int4", {"block_size": 0}, "int4: block_size 0"),
    ],
)
def test_options_that_a_format_does_not_have_are_refused(name, options, message):
    with pytest.raises(SpecError, match=message):
        weight_spec(name, **MATMUL, **options)


def test_an_unknown_preset_names_those_that_exist():
    with pytest.raises(UnknownNameError, match="preset fp6: no such format for weights; choose one of int8,"):
        weight_spec("fp6", **MATMUL)
    with pytest.raises(UnknownNameError, match="preset fp6"):
        activation_spec("fp6")
