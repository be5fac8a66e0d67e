"""Calibration and evaluation data: from files and Python objects to the samples that a model takes.

    what was given ──▶ records ───────▶ samples ──▶ batches
    opening.py         files.py         slicing.py  batching.py
    folder.py          python_data.py   images.py

Samples are read when they are asked for, checked against the model's inputs, and refused with the place, what
was found and what the model wants. Nothing is ever made up.
"""

from quantkit.data.batching import batch_length, batches, fill_batch, peek, sample_fingerprint
from quantkit.data.folder import data_files
from quantkit.data.inputs import InputSpec, Sample, batch_axes, fixed_batch_size
from quantkit.data.labels import open_labels
from quantkit.data.opening import open_data, reopen_data
from quantkit.data.preprocessing import ImagePreprocessing
from quantkit.data.source import SampleSource

__all__ = [
    "ImagePreprocessing",
    "InputSpec",
    "Sample",
    "SampleSource",
    "batch_axes",
    "batch_length",
    "batches",
    "data_files",
    "fill_batch",
    "fixed_batch_size",
    "open_data",
    "open_labels",
    "peek",
    "reopen_data",
    "sample_fingerprint",
]
