"""Tensors of a run: shapes without contents, contents a part at a time, the same as of one run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantkit
from quantkit.bench import feeding, fetching, run
from quantkit.bench.fetching import Fetched, shapes_of
from quantkit.graph import Graph, load_graph
from quantkit.runtime import Session
from tests.models import MODELS


class Counted(Session):
    """A session that tells what it was asked for."""

    asked: list[list[str]] = []  # noqa: RUF012

    def __init__(self, model: Any, *, outputs: Sequence[str], **options: Any) -> None:
        Counted.asked.append(list(outputs))
        super().__init__(model, outputs=outputs, **options)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    Counted.asked = []
    monkeypatch.setattr(fetching, "Session", Counted)
    return Counted.asked


def of(name: str) -> tuple[Graph, dict[str, np.ndarray], list[str]]:
    """A model, what it is fed, and its computed tensors."""
    graph = load_graph(MODELS[name].build())
    return graph, MODELS[name].feeds(1)[0], [str(n.outputs[0].name) for n in graph.model.graph]


RUNNING = [name for name, tiny in MODELS.items() if tiny.runs and not name.startswith("empty")][:12]


@pytest.mark.parametrize("name", RUNNING)
def test_shapes_and_parts_are_those_of_one_run(
    name: str, monkeypatch: pytest.MonkeyPatch, asked: list[list[str]]
) -> None:
    graph, batch, names = of(name)
    whole = Session(graph.model, outputs=names, optimize=False).run(batch)
    shapes = shapes_of(graph.model, names, batch)
    assert shapes == {key: value.shape for key, value in whole.items()}
    assert all(output.startswith("quantkit_shape_") for output in asked.pop())
    monkeypatch.setattr(fetching, "PART_BYTES", 1)
    found = Fetched(graph.model, batch, [[key] for key in names], shapes)
    assert asked == []
    for key in names:
        np.testing.assert_array_equal(found[key], whole[key])
    assert asked == [[key] for key in names]


def test_parts_are_no_larger_than_allowed_and_two_are_held(asked: list[list[str]]) -> None:
    graph, batch, names = of(RUNNING[0])
    shapes = dict.fromkeys(names, (fetching.PART_BYTES // 8,))
    found = Fetched(graph.model, batch, [[key] for key in names], shapes)
    for key in names:
        assert key in found
        found[key]
    assert [len(part) for part in asked] == [2] * (len(names) // 2) + [1] * (len(names) % 2)
    before = len(asked)
    found[names[-1]]
    assert len(asked) == before
    with pytest.raises(KeyError):
        found["nothing"]


def test_a_dry_run_fetches_nothing(folder: Path, asked: list[list[str]]) -> None:
    found = quantkit.bench_model("model.onnx", batches=[1], dry_run=True)
    assert len(asked) == 1
    assert all(name.startswith("quantkit_shape_") for name in asked[0])
    assert "activations: captured from calib (8 samples), repeated as needed" in found.notes


def test_of_a_batch_that_is_too_large_one_sample_is_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: list[list[str]]
) -> None:
    usual = quantkit.bench_model("model.onnx", batches=[3], formats=["int8"], dry_run=True)
    monkeypatch.setattr(feeding, "PART_BYTES", 1)
    monkeypatch.setattr(run, "_emulated", lambda case, family, prediction: {"origin": case.operands().origin})
    found = quantkit.bench_model("model.onnx", batches=[3], formats=["int8"], emulate=True)
    assert "activations: captured from calib (1 sample), repeated as needed" in found.notes
    assert [(r.work, r.calls) for r in found.rows] == [(r.work, r.calls) for r in usual.rows]
