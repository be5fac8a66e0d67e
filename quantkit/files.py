"""Writing files so that a reader finds the old one or the new one, and never half of either."""

import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
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
def atomic_folder(path: str | os.PathLike[str], *, replaceable: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty temporary folder; what the block writes there becomes the folder `path` if the block ends well.

    A new folder appears at once, whole. One that is there already stays the folder it is (it may be mounted, or
    somebody's current one): its files are moved out, then the new ones in, and where anything fails, also an
    interrupt, they are back. It must hold nothing else: neither files that the block writes too, nor `replaceable`
    ones, and somebody would miss them. A killed process leaves at most a hidden folder, as with `atomic_write`.

    Args:
        path: the folder; a symbolic link stays one, and its target is written.
        replaceable: patterns of names that go where they are there: an older version may have had other files.

    Raises:
        FileError: the folder cannot be written there, or what is there would be lost.
    """
    patterns = tuple(replaceable)
    try:
        final = _target(Path(path))
        _check_folder(final)
        place = final if final.is_dir() else final.parent
        _clear_stale(place)
        holder, lock = _make_folder(place)
    except OSError as error:
        raise _refused(Path(path), error) from error
    fresh = holder / "new"
    try:
        fresh.mkdir()
        yield fresh
        written = sorted(p.name for p in fresh.iterdir())
        for file in fresh.rglob("*"):
            if file.is_file():
                _flush(file, os.O_RDWR)
        with suppress(OSError):
            # Some file systems cannot flush a folder; its files are on disk.
            _flush(fresh, os.O_RDONLY)
        if final.is_dir():
            _check_others(final, (*patterns, *map(_literally, written)))
            gone = [p.name for p in final.iterdir() if p.name not in written and not _is_holder(p.name)]
            _exchange(fresh, final, written, gone)
        else:
            os.replace(fresh, final)
        with suppress(OSError):
            # The renames have happened; some file systems cannot flush a folder.
            _flush(place, os.O_RDONLY)
    except OSError as error:
        if _is_foreign(error, holder, final.parent) and _is_foreign(error, holder, final):
            raise
        raise _refused(final, error) from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_folder(path: str | os.PathLike[str], *, replaceable: Iterable[str] | None = None) -> None:
    """Do nothing if `atomic_folder(path)` could begin now: asked before long work, whose result would have no place.

    Args:
        path: where a folder is to be written.
        replaceable: patterns of the names that will be written or replaced; None where they are not known yet.

    Raises:
        FileError: a file is in its place, no folder can be made there, or one is there that holds something else.
    """
    final = Path(path)
    try:
        target = _target(final)
        _check_folder(target)
        if replaceable is not None and target.is_dir():
            _check_others(target, tuple(replaceable))
        folder, lock = _make_folder(target if target.is_dir() else target.parent)
    except OSError as error:
        raise _refused(final, error) from error
    folder.rmdir()
    if lock is not None:
        os.close(lock)


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileError(f"{path}: is a file, and a folder is to be written; choose another path.")


def _check_others(path: Path, patterns: tuple[str, ...]) -> None:
    """Refuse a folder that holds what no pattern is for."""
    names = sorted(p.name for p in path.iterdir() if not _is_holder(p.name))
    others = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if others:
        shown = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
        raise FileError(f"{path}: holds other files ({shown}), which would be lost; choose another folder.")


def _literally(name: str) -> str:
    """A pattern that this name alone fits."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _is_holder(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def _publish(folder: Path, final: Path) -> None:
    names = sorted(p.name for p in folder.iterdir() if p.name != final.name)
    assert (folder / final.name).is_file(), f"the block did not write {final.name}"
    for name in (*names, final.name):
        _check_target(final.parent / name)
        # For writing: Windows flushes no other.
        _flush(folder / name, os.O_RDWR)
    if names:
        _exchange(folder, final.parent, (*names, final.name))
    else:
        os.replace(folder / final.name, final)
    with suppress(OSError):
        # The renames have happened; some file systems cannot flush a folder.
        _flush(final.parent, os.O_RDONLY)


def _exchange(source: Path, target: Path, names: Sequence[str], gone: Sequence[str] = ()) -> None:
    """Rename a group into place, keeping what it replaces until all of it is there.

    Args:
        source, target: the folders; what is replaced waits in the first one.
        names: of the group. The last one refers to the others: it goes first and comes last, so that it never meets
            the wrong ones.
        gone: what else goes out of the target.
    """
    old = source / ".replaced"
    old.mkdir()
    try:
        for name in (*reversed(names), *gone):
            if os.path.lexists(target / name):
                os.replace(target / name, old / name)
        for name in names:
            os.replace(source / name, target / name)
    except BaseException:
        for name in (*gone, *names):
            if name in names and not os.path.lexists(source / name):
                os.replace(target / name, source / name)
            if os.path.lexists(old / name):
                os.replace(old / name, target / name)
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
