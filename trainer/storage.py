"""Files of a run on any pyarrow file system: a local folder, NFS, S3, GCS."""

import contextlib
import functools
import itertools
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from pyarrow import fs as pafs

PATIENCE_SECONDS = 120.0
OBJECT_STORES = ("s3", "gcs")
PASSING = (
    "NETWORK_CONNECTION",
    "SLOW_DOWN",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "REQUEST_TIMEOUT",
    "HTTP status 5",
    "HTTP status 416",  # a shorter object was written between asking for its size and for so many bytes
)

Call = TypeVar("Call", bound=Callable[..., Any])


def _patient(call: Call) -> Call:
    """Tries again where an object store is away for a while: a search outlives two minutes of that."""

    @functools.wraps(call)
    def tries(*args: Any, **kwargs: Any) -> Any:
        end = time.monotonic() + PATIENCE_SECONDS
        for attempt in itertools.count():
            try:
                return call(*args, **kwargs)
            except OSError as error:
                if time.monotonic() > end or not any(word in str(error) for word in PASSING):
                    raise
                time.sleep(min(5.0, 0.5 * 2**attempt))

    return cast(Call, tries)


class Storage:
    """A folder. Paths given to its methods are relative to it, with forward slashes.

    `uri` is a local path or an address such as s3://bucket/folder. A write is atomic: a reader sees the old
    file or the new one (object stores write a whole object at once; elsewhere a temporary file is renamed).
    """

    def __init__(self, uri: str | Path):
        text = str(uri)
        if "://" in text:
            self.fs, self.root = pafs.FileSystem.from_uri(text)
            self.uri = text.rstrip("/")
        else:
            self.fs = pafs.LocalFileSystem()
            self.root = self.uri = str(Path(text).expanduser().resolve())

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.uri,)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def at(self, *parts: str) -> "Storage":
        """A folder inside this one."""
        address, question, options = self.uri, "", ""
        if "://" in self.uri:  # s3://bucket/folder?endpoint_override=…; a folder's name may hold a question mark
            address, question, options = self.uri.partition("?")
        return Storage("/".join((address.rstrip("/"), *parts)) + question + options)

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    @_patient
    def exists(self, path: str = "") -> bool:
        return self.fs.get_file_info(self._full(path)).type != pafs.FileType.NotFound

    @_patient
    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError where there is no such file."""
        while True:
            with self.fs.open_input_stream(self._full(path), compression=None) as stream:
                what, content = stream.metadata(), stream.read()
            if self.fs.type_name not in OBJECT_STORES:
                return content
            # pyarrow asks for the size, and then for so many bytes: of another object, where one was written meanwhile.
            with self.fs.open_input_stream(self._full(path), compression=None) as stream:
                if stream.metadata() == what:  # the ETag is in it
                    return content

    @_patient
    def write(self, path: str, content: bytes) -> None:
        full = self._full(path)
        parent = full.rsplit("/", 1)[0]
        if (
            self.fs.type_name not in OBJECT_STORES
        ):  # these have no folders; marking each would be three requests a write
            self.fs.create_dir(parent, recursive=True)
        if not self.is_local:
            with self.fs.open_output_stream(full, compression=None) as stream:
                stream.write(content)
            return
        temporary = f"{parent}/.{uuid.uuid4().hex}.tmp"
        try:
            with Path(temporary).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a rename must not outlive its content through a power cut
            Path(temporary).replace(full)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def read_json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    @_patient
    def names(self, path: str = "") -> list[str]:
        """Names directly in a folder, sorted; empty where there is no such folder."""
        selector = pafs.FileSelector(self._full(path), allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    @_patient
    def delete(self, path: str) -> None:
        """Deletes a file or a folder with all that is in it; nothing where there is none."""
        info = self.fs.get_file_info(self._full(path))
        with contextlib.suppress(FileNotFoundError):
            if info.type == pafs.FileType.Directory:
                self.fs.delete_dir(info.path)
            elif info.type == pafs.FileType.File:
                self.fs.delete_file(info.path)

    def check_writable(self) -> None:
        """Raises OSError where nothing can be written here."""
        name = f".write-test-{uuid.uuid4().hex}"
        self.write(name, b"")
        self.delete(name)
