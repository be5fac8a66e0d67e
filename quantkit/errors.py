"""The errors that quantkit raises on purpose.

QuantkitError                 everything below; the command line turns it into one line and exit code 2
 ├── DataError                calibration or evaluation data: missing, of the wrong name, shape or type, not finite
 ├── ModelError               an ONNX file that cannot be read, is not valid, or asks for what is not supported
 ├── CacheError               a calibration cache: damaged, of another model, overlapping, or lacking a statistic
 ├── SpecError                a number format, range or scale that does not fit its tensor
 ├── UnknownNameError         a method, format, target or preset nobody has registered
 ├── RecipeError              a recipe that cannot be read, or says what there is not
 ├── PlanError                a plan that does not fit the graph it is to be applied to
 ├── ExportError              a written model that does not do what its plan says
 ├── KernelError              a kernel that cannot be built or launched, or breaks a rule in the emulator
 └── FileError                a file that could not be written: disk full, no permission, no such folder

Each message names the thing, what was found, and the mend.
"""


class QuantkitError(Exception):
    """Base of every error that a user can mend."""


class DataError(QuantkitError):
    """Calibration or evaluation data that is missing or does not fit the model."""


class ModelError(QuantkitError):
    """An ONNX model that cannot be read or is not supported."""


class CacheError(QuantkitError):
    """A calibration cache that is damaged, or does not belong to this model."""


class SpecError(QuantkitError):
    """A `QuantSpec`, range or scale that does not fit the tensor it is meant for."""


class UnknownNameError(QuantkitError):
    """A name that no built-in and no plug-in answers to."""


class RecipeError(QuantkitError):
    """A recipe that cannot be read, or a rule in it that says what there is not."""


class PlanError(QuantkitError):
    """A plan that does not fit its graph."""


class ExportError(QuantkitError):
    """An emitted model that failed its verification."""


class FileError(QuantkitError):
    """A file that could not be written; nothing was left behind, and what was there before is whole."""


class KernelError(QuantkitError):
    """A GPU kernel that does not compile, cannot be launched so, or did what no GPU promises to do right."""
