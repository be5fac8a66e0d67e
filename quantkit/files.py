"""Writing files so that a reader finds the old one or the new one, and never half of either."""

import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.errors import FileError

_PREFIX, _SUFFIX = ".quantkit-", ".tmp"
# As Linux itself.
_MAX_LINKS = 40

_MENDS = {
    errno.ENOSPC: "free some space there, or choose another folder",
    errno.EDQUOT: "free some space there, or choose another folder",
    errno.EFBIG: "raise the limit on file sizes, or choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "make its folder first, or choose another",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; what the block writes there becomes `path` if the block ends well.

        with atomic_write("model.onnx") as temporary:
            onnx_ir.save(model, temporary, external_data=f"{temporary.name}.data")

    The temporary path has the final name, inside a hidden folder beside `path` (one file system, so that
    renaming is atomic). A group of files is published together: whatever else the block writes into that
    folder goes beside `path` under its own name, and `path` comes last, for it refers to the others. The
    files are flushed to disk before they are renamed. If anything fails, also an interrupt, the temporary
    folder goes, and what was at `path` and beside it is as before. A killed process leaves at most the hidden
    folder, which the next write into the same place clears away. Where a group replaces an older one, being
    killed between the renames leaves no `path` at all rather than an old one with new neighbours.

    Permissions are those of any new file (umask). A symbolic link stays one: its target is written, and the others
    of a group go beside the target, under its name. A link to what a process has open, as /dev/stdout is, leads to no
    file that could be renamed, and is refused.

    Raises:
        FileError: the file cannot be written there: disk full, no permission, no such folder, or it is one.
    """
    try:
        final = _target(Path(path))
        _check_target(final)
        _clear_stale(final.parent)
        holder = _make_folder(final.parent)
    except OSError as error:
        raise _refused(Path(path), error) from error
    folder, lock = holder
    try:
        yield folder / final.name
        _publish(folder, final)
    except OSError as error:
        if _is_foreign(error, folder, final.parent):
            raise
        raise _refused(final, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_output(
    path: str | os.PathLike[str], *, inputs: Iterable[str | os.PathLike[str] | None] = ()
) -> None:
    """Do nothing if `atomic_write(path)` could begin now: asked before long work, whose result would have no place.

    Args:
        path: where something is to be written.
        inputs: files that are read, and so must not be written over; None and what is not there count as nothing.

    Raises:
        FileError: it could not, or `path` is one of the inputs.
    """
    final = Path(path)
    # Where nothing is, nothing is lost; and finding out all inputs can take its time.
    for read in inputs if final.exists() else ():
        if read is not None and Path(read).exists() and final.samefile(read):
            raise FileError(f"{final}: is an input here and would be lost; choose another path to write to.")
    try:
        target = _target(final)
        _check_target(target)
        folder, lock = _make_folder(target.parent)
    except OSError as error:
        raise _refused(final, error) from error
    folder.rmdir()
    if lock is not None:
        os.close(lock)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder; what the block writes there becomes the folder `path` if the block ends well.

    A folder that is at `path` already is replaced if it is empty or holds files of the same names alone; otherwise
    somebody keeps other things there. Nothing is left behind where anything fails; a killed process leaves at most a
    hidden folder, as with `atomic_write`.

    Raises:
        FileError: the folder cannot be written there, or what is there would be lost.
    """
    final = Path(path)
    try:
        check_folder(final)
        _clear_stale(final.parent)
        holder, lock = _make_folder(final.parent)
    except OSError as error:
        raise _refused(final, error) from error
    fresh, old = holder / "new", holder / "old"
    try:
        fresh.mkdir()
        yield fresh
        written = {p.name for p in fresh.iterdir()}
        for name in written:
            _flush(fresh / name, os.O_RDWR)
        if final.is_dir():
            others = sorted({p.name for p in final.iterdir()} - written)
            if others:
                raise _holds_others(final, others)
            os.replace(final, old)
        try:
            os.replace(fresh, final)
        except OSError:
            if old.exists():
                os.replace(old, final)
            raise
    except OSError as error:
        if _is_foreign(error, holder, final.parent):
            raise
        raise _refused(final, error) from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Do nothing if `atomic_folder(path)` could begin now.

    Raises:
        FileError: a file is in its place, or no folder can be made there.
    """
    final = Path(path)
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise FileError(f"{final}: is a file, and a folder is to be written; choose another path.")
    try:
        folder, lock = _make_folder(final.parent)
    except OSError as error:
        raise _refused(final, error) from error
    folder.rmdir()
    if lock is not None:
        os.close(lock)


def _holds_others(path: Path, names: list[str]) -> FileError:
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return FileError(f"{path}: holds other files ({shown}), which would be lost; choose another folder.")


def _publish(folder: Path, final: Path) -> None:
    names = sorted(p.name for p in folder.iterdir() if p.name != final.name)
    assert (folder / final.name).is_file(), f"the block did not write {final.name}"
    for name in (*names, final.name):
        _check_target(final.parent / name)
        # For writing: Windows flushes no other.
        _flush(folder / name, os.O_RDWR)
    if names:
        _publish_group(folder, final, names)
    else:
        os.replace(folder / final.name, final)
    with suppress(OSError):
        # The renames have happened; some file systems cannot flush a folder.
        _flush(final.parent, os.O_RDONLY)


def _publish_group(folder: Path, final: Path, names: list[str]) -> None:
    """Rename a group into place, keeping what it replaces until all of it is there."""
    old = folder / ".replaced"
    old.mkdir()
    try:
        # The file that refers to the others goes first and comes last, so that it never meets the wrong ones.
        for name in (final.name, *names):
            if os.path.lexists(final.parent / name):
                os.replace(final.parent / name, old / name)
        for name in (*names, final.name):
            os.replace(folder / name, final.parent / name)
    except BaseException:
        for name in (*names, final.name):
            if os.path.lexists(old / name):
                os.replace(old / name, final.parent / name)
            elif not (folder / name).exists():
                (final.parent / name).unlink(missing_ok=True)
        raise


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _target(path: Path) -> Path:
    """Follow symbolic links to what is to be written, which need not be there yet.

    Raises:
        FileError: they lead through /proc, to what a process has open.
        OSError: they lead in a circle.
    """
    target = path
    for _ in range(_MAX_LINKS):
        if not target.is_symlink():
            return target
        if os.path.realpath(target.parent).startswith("/proc/"):
            raise _not_a_file(path, "not a regular file")
        target = target.parent / os.readlink(target)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _check_target(path: Path) -> None:
    """Refuse to replace a folder or a device such as /dev/null."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise _not_a_file(path, "a folder" if stat.S_ISDIR(mode) else "not a regular file")


def _not_a_file(path: Path, kind: str) -> FileError:
    return FileError(f"{path}: cannot be written (it is {kind}); choose the path of a file.")


def _make_folder(parent: Path) -> tuple[Path, int | None]:
    """Make the hidden folder, and lock it for as long as this process lives."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=_PREFIX, suffix=_SUFFIX))
        lock = _lock(folder, wait=True)
        if folder.exists():
            return folder, lock
        # Another process took it for a stale one before it was locked.
        if lock is not None:
            os.close(lock)


def _clear_stale(parent: Path) -> None:
    """Remove the hidden folders of processes that died: nobody holds their lock."""
    for folder in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        lock = _lock(folder, wait=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Return a descriptor that holds the folder's lock; None where it is taken or locks do not exist."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_foreign(error: OSError, folder: Path, parent: Path) -> bool:
    """Whether the error is about a file that is neither the temporary nor the final one (say, an input)."""
    if error.filename is None:
        return False
    path = Path(os.path.abspath(os.fsdecode(error.filename)))
    return Path(os.path.abspath(folder)) not in path.parents and path.parent != Path(os.path.abspath(parent))


def _refused(path: Path, error: OSError) -> FileError:
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    mend = _MENDS.get(error.errno or 0, "choose another path")
    return FileError(f"{path}: cannot be written ({reason}); {mend}.")
