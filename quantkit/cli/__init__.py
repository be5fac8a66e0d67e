"""The command line: the only place that prints or exits. Every command only calls the Python API.

Exit codes: 0 done, 1 a goal was not met, 2 bad input, 130 interrupted.
"""

import io
import sys
import warnings
from typing import Annotated, Any, NoReturn, TextIO

import typer

from quantkit import __version__
from quantkit.cli import cache, calibrate, evaluate, export, plugins
from quantkit.errors import QuantkitError

# The base of what Typer raises for a command line that it cannot read; it has no name in Typer's own face.
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_INTERRUPTED = 130

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


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line, and turn the errors that a user can mend into one line and exit code 2."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a sign such as ≤ shows a question mark, not a traceback.
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False, prog_name="quantkit")
    except QuantkitError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        # Of a file that is there but cannot be read: those that cannot be written raise FileError.
        _fail(
            f"{error.filename or 'a file'}: {(error.strerror or str(error)).lower()}; check its permissions."
        )
    except MemoryError:
        _fail("out of memory; give a smaller --batch-size, or --max-memory.")
    except _USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        command = error.ctx.command_path if error.ctx else "quantkit"
        _fail(f"{error.format_message().rstrip('. ')}; see `{command} --help`.")
    if code == _INTERRUPTED:
        typer.echo("interrupted; nothing was written", err=True)
    # Commands return nothing: what comes back is the code of a typer.Exit, and Typer's own for Ctrl-C.
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
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
