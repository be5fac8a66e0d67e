"""The calibration files of other tools, both ways: TensorRT's cache, ONNX Runtime's tables, AIMET's encodings.

What such a file holds is a range a tensor, and no histogram: a cache made from one has fixed ranges, which every
format can be exported with, and no method can change.
"""

from quantkit.interchange.convert import EXPORT_FORMATS, ExportedTable, Imported, export_cache, import_cache
from quantkit.interchange.reading import IMPORT_FORMATS, read_table
from quantkit.interchange.table import RangeTable

__all__ = [
    "EXPORT_FORMATS",
    "IMPORT_FORMATS",
    "ExportedTable",
    "Imported",
    "RangeTable",
    "export_cache",
    "import_cache",
    "read_table",
]
