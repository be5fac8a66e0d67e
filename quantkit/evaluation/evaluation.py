"""The proof that a quantized model is still right: what its outputs and its layers lost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from quantkit.metrics.outputs import OutputMetrics
from quantkit.tables import Cell, Table

# Field → how its row is headed, how its value is shown. A row appears where an output has the measure.
_MEASURES: dict[str, tuple[str, str]] = {
    "sqnr_db": ("SQNR", "{:.2f} dB"),
    "cosine": ("cosine", "{:.6f}"),
    "top1_agreement": ("same top-1", "{:.2%}"),
    "kl_mnat": ("KL to float", "{:.3f} mnat"),
    "accuracy_float": ("accuracy, float", "{:.2%}"),
    "accuracy_quantized": ("accuracy, quantized", "{:.2%}"),
    "perplexity_float": ("perplexity, float", "{:.4f}"),
    "perplexity_quantized": ("perplexity, quantized", "{:.4f}"),
}


@dataclass(frozen=True, kw_only=True)
class LayerMetrics:
    """What the output of one layer lost.

    Attributes:
        name: of the node.
        op_type: of the node.
        sqnr_db: of its output against the float model's, errors of all layers before included; None where the
            layer's output could not be compared.
    """

    name: str
    op_type: str
    sqnr_db: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a quantized model lost against its float model on some samples.

    Attributes:
        model: the float model's path.
        quantized: the quantized model's path.
        samples: how many samples both were run on.
        outputs: output name → its metrics, in the model's order.
        layers: in the order of execution; empty unless asked for.
        notes: what one has to know of how the quantized model was run, a sentence each.
    """

    model: str
    quantized: str
    samples: int
    outputs: Mapping[str, OutputMetrics]
    layers: Sequence[LayerMetrics] = field(default=())
    notes: Sequence[str] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON would hold it.

        JSON has no infinity: such a number becomes the text "inf", "-inf" or "nan", which float() reads back.
        None is a measure that does not apply.
        """
        return {
            "model": self.model,
            "quantized": self.quantized,
            "samples": self.samples,
            "outputs": {name: _plain(asdict(metrics)) for name, metrics in self.outputs.items()},
            "layers": [_plain(asdict(layer)) for layer in self.layers],
            "notes": list(self.notes),
        }

    def worst_layers(self, count: int = 5) -> list[LayerMetrics]:
        """Return the layers of least SQNR, the worst first."""
        compared = [layer for layer in self.layers if layer.sqnr_db is not None]
        return sorted(compared, key=lambda layer: (layer.sqnr_db, layer.name))[:count]

    def output_table(self) -> Table:
        """Return a table of one column an output and one row a measure."""
        rows: list[list[Cell]] = []
        for key, (label, form) in _MEASURES.items():
            values = [getattr(metrics, key) for metrics in self.outputs.values()]
            if any(value is not None for value in values):
                rows.append([label, *(None if v is None else _shown(v, form) for v in values)])
        if any(metrics.broken_count for metrics in self.outputs.values()):
            rows.append(["NaN or inf, not so in float", *(m.broken_count for m in self.outputs.values())])
        return Table((f"{self.samples:,} sample{'' if self.samples == 1 else 's'}", *self.outputs), rows)

    def layer_table(self) -> Table:
        """Return a table of one row a layer."""
        rows = [
            (x.name, x.op_type, None if x.sqnr_db is None else _shown(x.sqnr_db, "{:.2f}"))
            for x in self.layers
        ]
        return Table(("layer", "operator", "SQNR dB"), rows)

    def __str__(self) -> str:
        tables = [self.output_table(), *([self.layer_table()] if self.layers else [])]
        return "\n\n".join([*(table.text() for table in tables), *self.notes])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return self.output_table().html() + (self.layer_table().html() if self.layers else "") + notes


def _shown(value: float, form: str) -> str:
    if math.isinf(value) and value > 0 and "dB" in form:
        return "identical"
    return form.format(value)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
