"""Files of a run: whole or not there, wherever they are."""

import pickle
import threading
from pathlib import Path

import pytest

from trainer.storage import Storage


@pytest.fixture(params=["path", "file://", "mock://"])
def storage(request, tmp_path):
    """A local folder by path and by address, and one that is not local: pyarrow's own, in memory."""
    if request.param == "mock://":
        return Storage("mock:///run")
    return Storage(tmp_path / "run" if request.param == "path" else f"file://{tmp_path}/run")


def test_what_is_written_is_read(storage):
    assert not storage.exists("a/b.bin")
    storage.write("a/b.bin", b"\x00first")
    storage.write("a/b.bin", b"second")
    assert storage.read("a/b.bin") == b"second"
    assert storage.exists("a/b.bin")
    assert storage.exists("a")
    storage.write("empty", b"")
    assert storage.read("empty") == b""
    with pytest.raises(FileNotFoundError):
        storage.read("a/nothing")


def test_names_are_sorted_and_of_one_level(storage):
    assert storage.names() == []
    for path in ("b", "a/2", "a/1", "c/d/e"):
        storage.write(path, b"x")
    assert storage.names() == ["a", "b", "c"]  # no temporary file is left
    assert storage.names("a") == ["1", "2"]
    assert storage.names("nothing") == []


def test_deleting_takes_files_folders_and_nothing(storage):
    for path in ("a/1", "a/2", "b"):
        storage.write(path, b"x")
    for path in ("a", "b", "nothing", "no/thing"):
        storage.delete(path)
    assert storage.names() == []


def test_json_is_whole_numbers_and_text_and_never_nan(storage):
    value = {"a": [1, 2.5, None], "b": "ü"}
    storage.write_json("x.json", value)
    assert storage.read_json("x.json") == value
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json("x.json", {"a": float("nan")})
    assert storage.read_json("x.json") == value


def test_a_content_that_is_compressed_by_name_stays_as_it_is(storage):
    storage.write("x.json.gz", b"not gzip")
    assert storage.read("x.json.gz") == b"not gzip"


@pytest.mark.parametrize("name", ["plain", "with space", "ünï-漢", "lr?1"])
def test_a_folder_inside_is_the_same_place_by_every_way(tmp_path, name):
    inner = Storage(tmp_path).at(name, "train")
    assert inner.root == f"{tmp_path}/{name}/train"
    inner.write("x", b"1")
    assert (tmp_path / name / "train" / "x").read_bytes() == b"1"
    assert Storage(tmp_path).read(f"{name}/train/x") == b"1"
    assert pickle.loads(pickle.dumps(inner)).read("x") == b"1"
    assert inner.at("a").root == f"{tmp_path}/{name}/train/a"


def test_an_address_keeps_its_form_in_folders_and_pickles(tmp_path):
    storage = Storage(f"file://{tmp_path}/run/")
    assert storage.is_local
    assert (storage.uri, storage.at("a").uri) == (f"file://{tmp_path}/run", f"file://{tmp_path}/run/a")
    copy = pickle.loads(pickle.dumps(storage.at("a", "b")))
    assert (copy.uri, copy.root) == (f"file://{tmp_path}/run/a/b", f"{tmp_path}/run/a/b")


def test_the_options_of_an_address_stay_behind_its_path():
    """An S3 that is not Amazon's is named by an option: a folder's name after it would be lost, and runs overlap."""
    storage = Storage("s3://key:secret@bucket/runs?region=us-east-1&endpoint_override=localhost:1")
    inner = storage.at("mine", "train")
    assert inner.root == "bucket/runs/mine/train"
    assert inner.uri == "s3://key:secret@bucket/runs/mine/train?region=us-east-1&endpoint_override=localhost:1"
    assert inner.fs == storage.fs
    assert not inner.is_local


def test_a_path_does_not_depend_on_where_its_user_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    storage, home = Storage("runs"), Storage("~/runs")
    monkeypatch.chdir("/")
    assert storage.root == home.root == str(tmp_path / "runs")
    assert Storage(Path("runs")).root == "/runs"


def test_a_reader_sees_the_old_or_the_new_and_nothing_between(tmp_path):
    storage, done, seen = Storage(tmp_path), threading.Event(), set()
    sizes = (1, 300_000)
    storage.write("x", b"a" * sizes[0])

    def read() -> None:
        while not done.is_set() or len(seen) < 2:
            seen.add(len(storage.read("x")))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for turn in range(60):
        storage.write("x", b"a" * sizes[turn % 2])
    done.set()
    reader.join(timeout=10)
    storage.write("x", b"")
    assert seen == set(sizes)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.write("x", b"old")
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write("x", b"new")
    assert storage.read("x") == b"old"
    assert storage.names() == ["x"]


@pytest.mark.parametrize("place", ["file/below", "/proc/nothing/here"])
def test_a_place_that_cannot_be_written_says_so(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="directory"):
        Storage(tmp_path / place).check_writable()


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    Storage(tmp_path).check_writable()
    assert list(tmp_path.iterdir()) == []
