"""The command line: the only place that prints or exits. Every command only calls the Python API.

Exit codes: 0 done, 1 a goal was not met, 2 bad input, 130 interrupted.
"""

import sys
import warnings
from typing import Annotated, Any, TextIO

import typer

from quantkit import __version__
from quantkit.cli import cache, calibrate, evaluate, export, plugins
from quantkit.errors import QuantkitError

# The base of what Typer raises for a command line that it cannot read; it has no name in Typer's own face.
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="quantkit",
    help="Quantize a trained ONNX model to INT8 or FP8, from a folder of real inputs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("calibrate")(calibrate.calibrate)
app.command("export")(export.export)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(cache.app, name="cache")
app.command("plugins")(plugins.plugins)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line, and turn the errors that a user can mend into one line and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        app(standalone_mode=False)
    except QuantkitError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does.
        sys.stderr.close()
        sys.exit(1)
    except _USAGE_ERROR as error:
        error.show()
        sys.exit(2)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for a warning of ours; those of other packages are for their developers."""
    if issubclass(category, UserWarning):
        typer.echo(f"warning: {' '.join(str(message).split())}", err=True)
