import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import FileError, QuantkitError
from quantkit.files import atomic_folder, atomic_write, check_folder, check_output


def write(path: Path, content: bytes, **beside: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        for suffix, other in beside.items():
            Path(f"{temporary}.{suffix}").write_bytes(other)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def refusal(path: Path, content: bytes = b"new") -> str:
    with pytest.raises(FileError) as caught:
        write(path, content)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


def test_a_file_is_written_and_nothing_else_stays(tmp_path):
    write(tmp_path / "a.calib", b"one")
    assert names(tmp_path) == ["a.calib"]
    assert (tmp_path / "a.calib").read_bytes() == b"one"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.calib"
    path.write_bytes(b"a longer old one")
    with path.open("rb") as reader:
        write(path, b"new")
        assert reader.read() == b"a longer old one"
    assert path.read_bytes() == b"new"


def test_the_temporary_path_has_the_final_name_and_lies_on_the_same_file_system(tmp_path):
    with atomic_write(tmp_path / "model.onnx") as temporary:
        temporary.touch()
        assert temporary.name == "model.onnx"
        assert temporary.parent.parent == tmp_path


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "a", b"", data=b"")
    finally:
        os.umask(before)
    for name in ("a", "a.data"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_a_relative_path_in_the_current_folder_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a"), b"x")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path, there):
    (tmp_path / "else").mkdir()
    target = tmp_path / "else" / "target"
    if there:
        target.write_bytes(b"old")
    (tmp_path / "link").symlink_to("else/target")
    (tmp_path / "link to link").symlink_to(tmp_path / "link")
    write(tmp_path / "link to link", b"new", data=b"beside")
    assert target.read_bytes() == b"new"
    assert names(tmp_path / "else") == ["target", "target.data"]
    assert names(tmp_path) == ["else", "link", "link to link"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link to link").is_symlink()


def test_links_in_a_circle_are_refused_and_kept(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "too many levels of symbolic links" in refusal(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_a_link_into_a_missing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "a").symlink_to("no/b")
    with pytest.raises(FileError, match="make its folder"):
        write(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux has /proc")
@pytest.mark.parametrize("kind", ["pipe", "file", "deleted file"])
def test_what_a_process_has_open_is_not_replaced(tmp_path, kind):
    if kind == "pipe":
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        descriptor = os.open(tmp_path / "open", os.O_WRONLY | os.O_CREAT)
        if kind == "deleted file":
            (tmp_path / "open").unlink()
    (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{descriptor}")
    before = names(tmp_path)
    try:
        for path in (tmp_path / "stdout", Path(f"/dev/fd/{descriptor}"), Path(f"/proc/self/fd/{descriptor}")):
            assert "not a regular file" in refusal(path)
            with pytest.raises(FileError, match="not a regular file"):
                check_output(path)
    finally:
        os.close(descriptor)
    assert names(tmp_path) == before


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failing_block_leaves_the_old_file_and_no_other(tmp_path, failure):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half")
            raise failure

    with pytest.raises(failure):
        write_half()
    assert names(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


# --- what the system refuses ---


def test_a_missing_folder_is_named(tmp_path):
    assert "make its folder" in refusal(tmp_path / "no" / "a")


def test_a_folder_in_the_place_of_the_file_is_named_and_kept(tmp_path):
    (tmp_path / "a").mkdir()
    assert "it is a folder" in refusal(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "a").touch()
    assert "not a directory" in refusal(tmp_path / "a" / "b")


def test_a_device_is_not_replaced():
    assert "not a regular file" in refusal(Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_name_that_is_too_long_is_refused_in_one_line(tmp_path):
    assert "shorter name" in refusal(tmp_path / ("a" * 300))
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "may write" in refusal(tmp_path / "a")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_flush_that_fails_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    assert os.strerror(code).lower() in refusal(path)
    assert names(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


def test_a_write_beyond_the_limit_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        message = refusal(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "file too large" in message
    assert names(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


def test_an_error_without_a_number_still_says_why(tmp_path):
    with (
        pytest.raises(FileError, match=re.escape("(12 requested and 3 written)")),
        atomic_write(tmp_path / "a"),
    ):
        raise OSError("12 requested and 3 written")


def test_an_error_about_another_file_is_not_blamed_on_this_one(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        (tmp_path / "elsewhere" / "input").read_bytes()
    assert names(tmp_path) == []


def test_an_error_of_quantkit_passes_unchanged(tmp_path):
    with pytest.raises(QuantkitError, match=r"^mine$"), atomic_write(tmp_path / "a"):
        raise QuantkitError("mine")


# --- groups ---


def test_a_group_is_published_with_the_file_that_refers_to_the_others_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace

    def record(source, target):
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    write(tmp_path / "m.onnx", b"model", data=b"weights", aux=b"more")
    assert order == ["m.onnx.aux", "m.onnx.data", "m.onnx"]
    assert names(tmp_path) == ["m.onnx", "m.onnx.aux", "m.onnx.data"]


def test_a_group_replaces_a_group(tmp_path):
    write(tmp_path / "m", b"1", data=b"1")
    write(tmp_path / "m", b"2", data=b"2")
    assert [(tmp_path / name).read_bytes() for name in names(tmp_path)] == [b"2", b"2"]


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_a_group_whose_renaming_fails_anywhere_is_undone(tmp_path, monkeypatch, failing, failure):
    path = tmp_path / "m"
    write(path, b"old", data=b"old")
    replace = os.replace
    calls = 0

    def fail_once(source, target):
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise failure
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    # Two old files are set aside, three new ones come.
    with pytest.raises((FileError, KeyboardInterrupt)):
        write(path, b"new", data=b"new", aux=b"new")
    assert names(tmp_path) == ["m", "m.data"]
    assert [(tmp_path / name).read_bytes() for name in names(tmp_path)] == [b"old", b"old"]


def test_a_group_is_refused_when_a_folder_bears_the_name_of_one_of_it(tmp_path):
    (tmp_path / "m.data").mkdir()
    (tmp_path / "m").write_bytes(b"old")
    with pytest.raises(FileError, match=r"m\.data: cannot be written \(it is a folder\)"):
        write(tmp_path / "m", b"new", data=b"new")
    assert names(tmp_path) == ["m", "m.data"]
    assert (tmp_path / "m").read_bytes() == b"old"


# --- folders ---


def write_folder(path: Path, replaceable: tuple[str, ...] = (), **files: bytes) -> None:
    with atomic_folder(path, replaceable=replaceable) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_folder_appears_with_all_its_files_and_nothing_else_stays(tmp_path):
    with atomic_folder(tmp_path / "q") as temporary:
        (temporary / "a").write_bytes(b"1")
        (temporary / "deep").mkdir()
        (temporary / "deep" / "b").write_bytes(b"2")
        assert not (tmp_path / "q").exists()
    assert names(tmp_path) == ["q"]
    assert names(tmp_path / "q") == ["a", "deep"]
    assert (tmp_path / "q" / "deep" / "b").read_bytes() == b"2"


def test_a_new_folder_has_the_permissions_of_any_other(tmp_path):
    before = os.umask(0o022)
    try:
        write_folder(tmp_path / "q", a=b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "q").stat().st_mode) == 0o755


def test_an_empty_folder_and_an_older_version_are_written_anew(tmp_path):
    (tmp_path / "q").mkdir()
    same = (tmp_path / "q").stat().st_ino
    write_folder(tmp_path / "q", a=b"1", b=b"1")
    write_folder(tmp_path / "q", a=b"2", b=b"2")
    assert contents(tmp_path / "q") == {"a": b"2", "b": b"2"}
    # It may be mounted, or somebody's current one.
    assert (tmp_path / "q").stat().st_ino == same


def test_files_of_an_older_version_that_are_not_written_any_more_go(tmp_path):
    write_folder(tmp_path / "q", **{"part-1": b"1", "part-2": b"1", "config": b"1"})
    write_folder(tmp_path / "q", ("part-?",), **{"part-1": b"2", "config": b"2"})
    assert contents(tmp_path / "q") == {"part-1": b"2", "config": b"2"}


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "q").mkdir()
    for name in ("a", "mine", "mine too", "x", "y"):
        (tmp_path / "q" / name).write_bytes(b"old")
    before = contents(tmp_path / "q")
    with pytest.raises(FileError, match=r"q: holds other files \(mine, mine too, x …\), which would be lost"):
        write_folder(tmp_path / "q", a=b"new")
    assert contents(tmp_path / "q") == before


def test_a_name_with_the_signs_of_a_pattern_stands_for_itself(tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "ab").write_bytes(b"old")
    with pytest.raises(FileError, match=r"other files \(ab\)"):
        write_folder(tmp_path / "q", **{"a*": b"new"})
    assert contents(tmp_path / "q") == {"ab": b"old"}


def test_the_current_folder_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(Path(), a=b"1")
    write_folder(Path("."), a=b"2")
    assert contents(tmp_path) == {"a": b"2"}


def test_a_link_to_a_folder_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("fresh")
    write_folder(tmp_path / "link", a=b"1")
    write_folder(tmp_path / "dangling", a=b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert contents(tmp_path / "real") == contents(tmp_path / "fresh") == {"a": b"1"}


@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failing_block_leaves_the_old_folder_and_no_other(tmp_path, failure, there):
    if there:
        write_folder(tmp_path / "q", a=b"old")

    def fail() -> None:
        with atomic_folder(tmp_path / "q") as temporary:
            (temporary / "a").write_bytes(b"new")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert names(tmp_path) == (["q"] if there else [])
    assert not there or contents(tmp_path / "q") == {"a": b"old"}


@pytest.mark.parametrize("failing", range(6))
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_a_folder_whose_renaming_fails_anywhere_is_as_before(tmp_path, monkeypatch, failing, failure):
    write_folder(tmp_path / "q", a=b"old", b=b"old", gone=b"old")
    replace = os.replace
    calls = 0

    def fail_once(source, target):
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise failure
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    # Three old files are set aside, three new ones come.
    with pytest.raises((FileError, KeyboardInterrupt)):
        write_folder(tmp_path / "q", ("gone",), a=b"new", b=b"new", c=b"new")
    assert names(tmp_path) == ["q"]
    assert contents(tmp_path / "q") == {"a": b"old", "b": b"old", "gone": b"old"}


def test_what_cannot_become_a_folder_is_refused_beforehand(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    for path, message in (
        (tmp_path / "file", "is a file, and a folder is to be written"),
        (tmp_path / "no" / "q", "make its folder first"),
        (tmp_path / "file" / "q", "choose a path whose parents are folders"),
    ):
        for refuse in (check_folder, write_folder):
            with pytest.raises(FileError, match=message) as caught:
                refuse(path)
            assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(FileError, match="choose a folder that you may write to"):
        check_folder(tmp_path / "q")


def test_other_files_are_found_before_long_work_where_the_names_are_known(tmp_path):
    write_folder(tmp_path / "q", a=b"1", mine=b"1")
    check_folder(tmp_path / "q")
    check_folder(tmp_path / "q", replaceable=("a", "m*"))
    with pytest.raises(FileError, match=r"holds other files \(mine\)"):
        check_folder(tmp_path / "q", replaceable=("a",))
    assert names(tmp_path / "q") == ["a", "mine"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_in_a_parent_without_permission_is_named(tmp_path):
    (tmp_path / "q").mkdir()
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FileError, match="choose a folder that you may write to"):
            write_folder(tmp_path / "p", a=b"1")
        # One that is there already can be written all the same.
        write_folder(tmp_path / "q", a=b"1")
    finally:
        tmp_path.chmod(0o700)


# --- killed processes ---

WRITER = """
import sys, time
from quantkit.files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    with temporary.open("wb") as file:
        file.write(b"half")
        file.flush()
        print("writing", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_process_leaves_the_old_file_and_the_next_write_clears_up(tmp_path, writer):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    writer.kill()
    writer.wait()
    assert path.read_bytes() == b"old"
    assert [p for p in names(tmp_path) if not p.startswith(".")] == ["a"]
    write(tmp_path / "b", b"new")
    assert names(tmp_path) == ["a", "b"]


def test_a_living_writer_keeps_its_temporary_file(tmp_path, writer):
    write(tmp_path / "b", b"new")
    assert [len(list(p.iterdir())) for p in tmp_path.glob(".quantkit-*")] == [1]


def test_the_hidden_folder_of_a_killed_process_is_no_other_file(tmp_path):
    (tmp_path / "q" / ".quantkit-dead.tmp").mkdir(parents=True)
    write_folder(tmp_path / "q", a=b"1")
    assert names(tmp_path / "q") == ["a"]
