"""Decoded images on disk, made once and mapped by every process of a node."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)
META = "meta.json"


def cache_folder() -> Path:
    """$DDPM_SEARCH_CACHE, or ~/.cache/ddpm-search.

    An environment variable, since the place belongs to a node and not to a training: as a setting it would go into
    checkpoints, and a run could not be resumed where that folder is another.
    """
    return Path(os.environ.get("DDPM_SEARCH_CACHE") or "~/.cache/ddpm-search").expanduser()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds a lock among the processes of a node: the kernel releases it when its process dies, however it dies.

    Yields False, without a lock, where the file system has none (some network ones).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


class RowsFile:
    """A .npy file of uint8 written row by row, whose number of rows is known at the end.

    Not a memory map: on a full disk writing into one kills the process (SIGBUS), and here it is an OSError.
    """

    def __init__(self, path: Path):
        self.rows = 0
        self._row_shape: tuple[int, ...] = ()
        self._digest = hashlib.sha256()
        self._file = path.open("wb")

    def write(self, row: np.ndarray) -> None:
        if self.rows == 0:
            self._row_shape = row.shape
            self._header()
        assert row.shape == self._row_shape
        assert row.dtype == np.uint8
        content = row.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.rows += 1

    def _header(self) -> None:
        # NumPy pads its header, so that one for any number of rows is as long.
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.rows, *self._row_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "RowsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def finish(self) -> str:
        """Writes the number of rows to the disk with them. Returns the SHA-256 of the rows."""
        length = self._file.tell()
        self._file.seek(0)
        self._header()
        assert self.rows == 0 or length == self._file.tell() + self.rows * int(np.prod(self._row_shape))
        self._file.flush()
        os.fsync(self._file.fileno())  # a rename must not outlive the content through a power cut
        return self._digest.hexdigest()


def entry(name: str, make: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """An entry of the cache: what make(folder) returned, and the .npy files it left there, mapped read-only.

    One process of a node makes them and the others wait: decoding would otherwise take every core, N times over.
    Correctness does not depend on that lock: a folder is filled under another name and renamed, and where two are
    made (no lock, a shared disk) the first one stays. What a killed process left is made again.
    """
    folder = cache_folder() / "images" / name
    found = _read(folder)
    if found is not None:
        return found
    _check_writable(folder.parent)
    making = f".making-{name}-{platform.node()}-"  # by node: a lock need not reach the others
    with locked(folder.with_name(f".{name}.lock")) as alone:
        if alone:
            for left in folder.parent.glob(f"{making}*"):
                shutil.rmtree(left, ignore_errors=True)
        found = _read(folder)
        if found is not None:
            return found
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=making, ignore_cleanup_errors=True) as scratch:
            if folder.exists():
                log.warning("%s is damaged: decoding the images again", folder)
                with contextlib.suppress(FileNotFoundError):  # another process has moved it away
                    folder.rename(Path(scratch) / "damaged")
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            meta = make(fresh)
            with (fresh / META).open("w") as file:
                json.dump(meta, file)
                file.flush()
                os.fsync(file.fileno())
            # An error here is another process that was first: a folder that is not empty is never replaced.
            with contextlib.suppress(OSError):
                fresh.rename(folder)
        found = _read(folder)
    if found is None:
        raise OSError(f"{folder} cannot be read back; set DDPM_SEARCH_CACHE to a folder on another disk")
    return found


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"decoded images cannot be kept in {folder} ({error}); set the environment variable DDPM_SEARCH_CACHE to a "
            "folder that can be written"
        ) from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """None where there is no whole entry. A cut .npy file cannot be mapped, and is noticed here."""
    try:
        meta = json.loads((folder / META).read_text())
        arrays = {
            # asarray: the same mapped memory as a plain array, which pickles as every array does
            path.stem: np.asarray(np.load(path, mmap_mode="r"))
            for path in folder.glob("*.npy")
        }
        whole = set(arrays) == set(meta["arrays"])
    except (OSError, ValueError, KeyError, EOFError):  # NumPy's for an empty file is an EOFError
        return None
    return (meta, arrays) if whole else None
