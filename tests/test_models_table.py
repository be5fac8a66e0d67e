from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.models import MODELS, REFUSED, Feed, TinyModel, external_weights

TABLE = {**MODELS, **REFUSED}
every_model = pytest.mark.parametrize("tiny", TABLE.values(), ids=TABLE)


def _run(model: bytes | str, feed: Feed) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


@every_model
def test_every_model_is_valid_onnx(tiny: TinyModel) -> None:
    onnx.checker.check_model(tiny.build(), full_check=True)


@pytest.mark.parametrize("tiny", [m for m in TABLE.values() if m.runs], ids=lambda m: m.name)
def test_every_model_runs_and_gives_finite_outputs(tiny: TinyModel) -> None:
    model = tiny.build().SerializeToString()
    for feed in tiny.feeds(2):
        for output in _run(model, feed):
            assert output.size > 0
            assert np.isfinite(output).all()


@every_model
def test_every_model_is_built_the_same_twice(tiny: TinyModel) -> None:
    assert tiny.build() == tiny.build()


@every_model
def test_every_model_says_what_is_awkward_about_it(tiny: TinyModel) -> None:
    assert tiny.about


@every_model
def test_feeds_depend_on_the_seed_alone(tiny: TinyModel) -> None:
    for one, other in zip(tiny.feeds(3, seed=1), tiny.feeds(3, seed=1), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_external_weights_lie_in_a_second_file(tmp_path: Path) -> None:
    path = tmp_path / "external.onnx"
    external_weights(path)
    inline = MODELS["conv_relu"].build().SerializeToString()
    feed = MODELS["conv_relu"].feeds(1)[0]
    assert (tmp_path / "external.onnx.data").stat().st_size >= 16 * 3 * 9 * 4
    assert path.stat().st_size < 2000
    np.testing.assert_array_equal(_run(str(path), feed)[0], _run(inline, feed)[0])


def test_infinities_and_nans_arise_where_the_table_says_so() -> None:
    for name, value, found in [
        ("infinite_activation", "l", np.isinf),
        ("nan_activation", "s", np.isnan),
        ("masked_attention", "m", np.isinf),
    ]:
        model = MODELS[name].build()
        model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
        assert found(_run(model.SerializeToString(), MODELS[name].feeds(1)[0])[-1]).any()
