"""The command line: the only place that prints or exits. Every command only calls the Python API.

Exit codes: 0 done, 1 a goal was not met, 2 bad input, 130 interrupted, 141 the reader of the output has gone (as
`| head` does: what a shell says of a tool that such a pipe ended; the work itself was done).

Nothing heavy is imported before `main`, so that Ctrl-C is answered from the start.
"""

import atexit
import errno
import os
import signal
import sys
from typing import Any, TextIO

_BAD_INPUT = 2
_INTERRUPTED = 130
_READER_GONE = 141

# What only a write fails with. Every file goes through `atomic_write`, which names it; the rest is standard output.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Run the command line, and turn the errors that a user can mend into one line and exit code 2."""
    try:
        code = _run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = _interrupted()
    except BrokenPipeError:
        code = _reader_gone()
    except OSError as error:
        code = _failed(error)
    except SystemExit as error:
        # Typer's own answer to a broken pipe is 1, which means something else here.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = _reader_gone()
    except Exception as error:
        # Packages that catch everything while they are imported turn Ctrl-C into an error of theirs.
        if not _was_interrupted(error):
            raise
        code = _interrupted()
    # All has been said: an interrupt of Python's own way out has nothing to add.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _run() -> int:
    import io
    import warnings

    import typer

    from quantkit.cli.app import app
    from quantkit.cli.options import NothingWrittenError
    from quantkit.errors import QuantkitError

    # The base of what Typer raises for a command line that it cannot read; it has no name in Typer's own face.
    usage_error: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a sign such as ≤ shows a question mark, not a traceback.
            stream.reconfigure(errors="replace")
    try:
        # Commands return nothing: what comes back is the code of a typer.Exit, and Typer's own for Ctrl-C.
        code = app(standalone_mode=False, prog_name="quantkit") or 0
        return _interrupted() if code == _INTERRUPTED else int(code)
    except NothingWrittenError as error:
        return _interrupted(str(error))
    except QuantkitError as error:
        return _fail(str(error))
    except typer.Abort:
        return _interrupted()
    except MemoryError:
        return _fail("out of memory; give a smaller --batch-size, or --max-memory.")
    except usage_error as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return _BAD_INPUT
        command = error.ctx.command_path if error.ctx else "quantkit"
        return _fail(f"{error.format_message().rstrip('. ')}; see `{command} --help`.")


def _say(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _fail(message: str) -> int:
    _say(f"error: {' '.join(message.split())}")
    return _BAD_INPUT


def _failed(error: OSError) -> int:
    reason = (error.strerror or str(error)).lower()
    if error.filename is None and error.errno in _FULL:
        _drop_output()
        return _fail(
            f"standard output: cannot be written ({reason}); free some space there, or send it elsewhere."
        )
    # Of a file that is there but cannot be read: those that cannot be written raise FileError.
    return _fail(f"{error.filename or 'a file'}: {reason}; check its permissions.")


def _interrupted(said: str = "") -> int:
    _say(f"interrupted; {said}" if said else "interrupted")
    return _INTERRUPTED


def _was_interrupted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reader_gone() -> int:
    _drop_output()
    return _READER_GONE


def _drop_output() -> None:
    """Send what is still buffered nowhere, so that Python does not fail on it once more while it ends."""
    if sys.__stdout__ is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.__stdout__.fileno())
        os.close(null)


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
        _say(f"warning: {' '.join(str(message).split())}")
