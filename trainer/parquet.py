"""Images and labels from Parquet files, in the Hugging Face layout: encoded bytes, a batch of rows at a time."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.datasets import SPLIT_NAMES, Listing, Source, files_below
from trainer.decode import Item

BATCH = 256  # rows read at once


def find(path: Path, config: DataConfig) -> Source:
    if path.is_dir():
        files = sorted(files_below(path, (".parquet",)))
    elif path.exists():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute pattern)
    if not files:
        raise FileNotFoundError(
            f"data.name: no Parquet file at {path}; give parquet:PATH of a file, of a folder of files, "
            "or a pattern such as parquet:data/train-*.parquet"
        )
    _refuse_splits(path, files)
    return Source(files, lambda: _listing(files, config), config.image_size)


def _refuse_splits(path: Path, files: list[Path]) -> None:
    """A published test split must not be trained on because it lies beside the rest."""
    patterns: dict[str, Path] = {}  # of each split
    for file in files:
        found = re.match("([A-Za-z]+)[-_]?", file.name)
        if found and found[1].lower() in SPLIT_NAMES:
            patterns.setdefault(found[1].lower(), file.with_name(f"{found[0]}*.parquet"))
        elif file.parent.name.lower() in SPLIT_NAMES:
            patterns.setdefault(file.parent.name.lower(), file.with_name("*.parquet"))
    if len(patterns) > 1:
        raise ValueError(
            f"data.name: the Parquet files of {path} are of several splits ({', '.join(sorted(patterns))}); give one "
            f"of them, such as parquet:{patterns.get('train') or min(patterns.values())}, and data.train_fraction "
            "splits it"
        )


def _listing(files: list[Path], config: DataConfig) -> Listing:
    """Only the labels: images are read, in batches of rows, where they are asked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts, columns, labels = [], [], []
    for file in files:
        try:
            with pq.ParquetFile(file, pre_buffer=False) as opened:
                counts.append(opened.metadata.num_rows)
                schema = opened.schema_arrow
                columns.append(_image_column(file, schema, config.image_column))
                if config.labels and config.label_column in schema.names:
                    labels.append(opened.read([config.label_column], use_threads=False)[config.label_column])
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"data.name: {file} is no Parquet file, or is damaged ({error}); make it again") from error
    # The default may be absent, for images may have no labels; a column that was named is wanted.
    if config.labels and not labels and config.label_column != DataConfig.model_fields["label_column"].default:
        raise ValueError(
            f"data.label_column={config.label_column!r} is in none of the Parquet files; the columns of {file} are "
            f"{schema.names}; name one of them, or set data.labels to false"
        )
    if labels and len(labels) < len(files):
        raise ValueError(
            f"data.label_column={config.label_column!r} is in {len(labels)} of the {len(files)} Parquet files; "
            "give files that have it, or set data.labels to false"
        )
    ends = np.cumsum(counts)

    def read(index: np.ndarray) -> Iterator[Item]:
        row = 0
        for file, column in zip(files, columns, strict=True):
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
                for group in range(opened.num_row_groups):
                    rows = opened.metadata.row_group(group).num_rows
                    wanted = _between(index, row, row + rows)
                    row += rows
                    if not wanted.size:
                        continue
                    try:
                        yield from _read_group(opened, group, column, wanted)
                    except (OSError, pa.ArrowException) as error:
                        raise ValueError(
                            f"data.name: row group {group} of {file} cannot be read ({error}); make the file again, "
                            "or leave it out"
                        ) from error

    def where(i: int) -> str:
        number = int(np.searchsorted(ends, i, side="right"))
        return f"row {i - (ends[number] - counts[number])} of {files[number]}"

    return Listing(int(ends[-1]), _classes(labels, config) if labels else None, read, where)


def _read_group(opened: Any, group: int, column: str, index: np.ndarray) -> Iterator[bytes | None]:
    """The images at ascending indices, counted from the row group's first."""
    import pyarrow as pa

    row = 0
    for batch in opened.iter_batches(BATCH, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        values = values.field(0) if pa.types.is_struct(values.type) else values
        for i in _between(index, row, row + len(batch)):
            yield values[i].as_py()
        row += len(batch)


def _between(index: np.ndarray, start: int, end: int) -> np.ndarray:
    """The part of ascending indices in start..end-1, counted from start."""
    first, last = np.searchsorted(index, [start, end])
    return index[first:last] - start


def _image_column(file: Path, schema: Any, wanted: str | None) -> str:
    """The column, or the field `bytes` in it, that holds encoded images."""
    import pyarrow as pa

    name = next((name for name in ([wanted] if wanted else ["img", "image"]) if name in schema.names), None)
    if name is None:
        raise ValueError(
            f"data.image_column={wanted or 'img or image'} is not in {file}; its columns are {schema.names}"
        )
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{name}.bytes"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return name
    raise ValueError(
        f"data.image_column={name!r} must hold encoded images (binary, or struct<bytes, path>), "
        f"but in {file} it is {kind}"
    )


def _classes(columns: list[Any], config: DataConfig) -> np.ndarray:
    """0..K-1 in the order of the column's values, which may be numbers or names."""
    import pyarrow as pa

    name = f"data.label_column={config.label_column!r}"
    kinds = [column.type.value_type if pa.types.is_dictionary(column.type) else column.type for column in columns]
    for column, kind in zip(columns, kinds, strict=True):
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{name} must hold integers or names, but holds {kind}; or set data.labels to false")
        if column.null_count:
            raise ValueError(
                f"{name} is empty in {column.null_count} rows; leave them out, or set data.labels to false"
            )
    if len({pa.types.is_integer(kind) for kind in kinds}) > 1:
        raise ValueError(
            f"{name} must hold integers in every Parquet file, or names in every one, but holds "
            f"{' and '.join(sorted({str(kind) for kind in kinds}))}; or set data.labels to false"
        )
    values = np.concatenate([column.to_numpy() for column in columns])
    if values.dtype.kind == "i" and values.min(initial=0) < 0:
        raise ValueError(f"{name} must be at least 0, but got {values.min()}; or set data.labels to false")
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
