import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantkit.data import ImagePreprocessing, open_data, reopen_data
from tests.data.helpers import IMAGE, VECTOR, read, refused, spec

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def _folder(path, count=3, suffix=".png"):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((4, 5, 3), i, np.uint8)).save(path / f"{i}{suffix}")
    return path


def _firsts(samples):
    return [round(float(s["image"].flat[0]) * 255) for s in samples]


def test_a_folder_is_read_in_the_order_of_its_paths_with_subfolders(tmp_path):
    for name in ("b/2.npy", "a/3.npy", "b/10.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, np.full(4, float(Path(name).stem), np.float32))
    assert [s["x"][0, 0] for s in read(tmp_path, VECTOR)] == [3, 10, 2]


def test_files_of_one_sample_and_of_several_go_together(tmp_path):
    np.save(tmp_path / "a.npy", X[0])
    np.save(tmp_path / "b.npy", X[1:])
    source = open_data(tmp_path, [VECTOR])
    assert len(source) == 3
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in source]), X)


def test_a_source_can_be_gone_through_again(tmp_path):
    source = open_data(_folder(tmp_path / "calib"), [IMAGE])
    assert _firsts(source) == _firsts(source) == [0, 1, 2]


@pytest.mark.parametrize(("wanted", "got"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_samples_takes_the_first_and_at_most_what_is_there(tmp_path, wanted, got):
    source = open_data(_folder(tmp_path / "calib"), [IMAGE], samples=wanted)
    assert len(source) == got
    assert _firsts(source) == list(range(got))
    assert len(open_data(X, [VECTOR], samples=wanted)) == len(read(X, VECTOR, samples=wanted)) == got


def test_samples_that_leave_class_folders_out_are_warned_of(tmp_path):
    _folder(tmp_path / "cat")
    _folder(tmp_path / "dog")
    with pytest.warns(UserWarning, match="1 of 2 folders"):
        open_data(tmp_path, [IMAGE], samples=3)


def test_what_the_cache_remembers_is_json_and_opens_the_same_data_again(tmp_path):
    image = ImagePreprocessing(mean=(0.25,), std=(0.5,))
    source = open_data(_folder(tmp_path / "calib"), [IMAGE], image=image, samples=2)
    description = json.loads(json.dumps(source.description))
    assert description["kind"] == "images"
    assert description["files"] == 3
    again = reopen_data(description, [IMAGE])
    assert again.description == description
    for a, b in zip(source, again, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    refused(lambda: reopen_data(open_data(X, [VECTOR]).description, [VECTOR]), "--data")


def test_the_default_preprocessing_of_pictures_is_recorded(tmp_path):
    source = open_data(_folder(tmp_path / "calib"), [IMAGE])
    assert source.description["preprocessing"] == ImagePreprocessing.preset("0-1").to_json()


def test_a_mapping_is_recorded_and_used_again(tmp_path):
    np.savez(tmp_path / "a.npz", first=X, second=X)
    source = open_data(tmp_path, [VECTOR], mapping={"x": "second"})
    assert source.description["ignored"] == ["first"]
    assert len(list(reopen_data(source.description, [VECTOR]))) == 3


def test_hidden_files_labels_and_other_files_are_no_data(tmp_path):
    for name in ("a.npy", ".b.npy", "labels.npy", ".cache/c.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, X)
    (tmp_path / "README.md").write_text("hello")
    assert len(open_data(tmp_path, [VECTOR])) == 3


def test_a_link_back_up_ends(tmp_path):
    np.save(tmp_path / "a.npy", X)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(open_data(tmp_path, [VECTOR])) == 3


def test_a_list_of_files_is_read_in_its_own_order(tmp_path):
    folder = _folder(tmp_path / "calib")
    assert _firsts(read([folder / "2.png", str(folder / "0.png")], IMAGE)) == [2, 0]


def test_suffixes_are_read_in_any_case(tmp_path):
    _folder(tmp_path / "calib", suffix=".PNG")
    assert len(open_data(tmp_path / "calib", [IMAGE])) == 3


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _folder(tmp_path / "calib")
    assert len(open_data("~/calib", [IMAGE])) == 3


def test_no_data_is_an_error_that_names_what_is_there(tmp_path):
    refused(lambda: open_data(tmp_path / "calib", [VECTOR]), "calib", "no such file or folder")
    refused(lambda: open_data(tmp_path, [VECTOR]), str(tmp_path), "found nothing")
    (tmp_path / "a.csv").write_text("1,2")
    (tmp_path / "b.csv").write_text("1,2")
    refused(lambda: open_data(tmp_path, [VECTOR]), "2 .csv", ".npz")
    refused(lambda: open_data(tmp_path / "a.csv", [VECTOR]), "a.csv", ".npz")


def test_kinds_are_not_mixed(tmp_path):
    np.save(_folder(tmp_path / "calib") / "a.npy", X)
    refused(lambda: open_data(tmp_path / "calib", [IMAGE]), "3 images, 1 npy")


def test_no_samples_are_refused_wherever_they_are_missing(tmp_path):
    empty = np.zeros((0, 4), np.float32)
    np.save(tmp_path / "a.npy", empty)
    refused(lambda: open_data(tmp_path, [VECTOR]), "no samples")
    np.save(tmp_path / "b.npy", empty)
    refused(lambda: read(tmp_path, VECTOR), "no samples")
    refused(lambda: open_data(empty, [VECTOR]), "no samples")
    refused(lambda: open_data([], [VECTOR]), "no samples")
    refused(lambda: read(iter(()), VECTOR), "no samples")
    refused(lambda: open_data(X, [VECTOR], samples=0), "samples 0")
    refused(lambda: open_data(X, []), "no inputs")


def test_an_empty_shard_among_others_is_nothing_to_complain_of(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 4), np.float32))
    np.save(tmp_path / "b.npy", X)
    assert len(read(tmp_path, VECTOR)) == 3


def test_a_wrong_file_further_on_is_refused_when_it_is_reached(tmp_path):
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "b.npy", X[:, :3])
    source = open_data(tmp_path, [VECTOR])
    refused(lambda: list(source), "b.npy", "float32[3, 3]", "x: float32[batch, 4]")
    refused(lambda: len(source), "b.npy")


def test_a_damaged_picture_is_named(tmp_path):
    folder = _folder(tmp_path / "calib")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    refused(lambda: read(folder, IMAGE), "1.png", "decoded")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path):
    locked = _folder(tmp_path / "calib")
    locked.chmod(0)
    try:
        refused(lambda: open_data(locked, [IMAGE]), "calib", "permissions")
    finally:
        locked.chmod(0o700)


def test_a_folder_of_npz_feeds_several_inputs_of_any_length(tmp_path):
    ids, mask = (spec("b", "s", name=n, dtype=np.int64) for n in ("ids", "mask"))
    for i, length in enumerate((5, 3, 3)):
        np.savez(tmp_path / f"{i}.npz", ids=np.arange(length), mask=np.ones(length, np.int32))
    samples = read(tmp_path, ids, mask)
    assert [s["ids"].shape for s in samples] == [(1, 5), (1, 3), (1, 3)]
    assert samples[0]["mask"].dtype == np.int64
