"""Images in Parquet: Hugging Face's image column, or raw bytes."""

from __future__ import annotations

import itertools
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from typing import Any

import numpy as np

from simsiam.config import UserError
from simsiam.data.imageset import LABEL_COLUMNS, File, ImageSet, encode, one_line, row_keys, split_by_name

ENDINGS = (".parquet", ".pq")
_HELD_BYTES = 1 << 28


def open_parquet(name: str, root: str, files: list[File]) -> ImageSet:
    """The rows of all files as one image set.

    Raises UserError if a file is damaged or lacks a column, or if all are empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata: list[Any] = []
    starts = [0]  # first row of every row group, and the end
    raw_labels: list[Any] = []
    paths: list[str] = []
    row_names: list[str] = []
    columns: tuple[str, str | None, bool, list[str] | None] | None = None
    for file in files:
        try:
            with pq.ParquetFile(file.path) as parquet:
                columns = columns or _columns(parquet.schema_arrow, file)
                image, label, has_path, _ = columns
                wanted = [*([label] if label else []), *([f"{image}.path"] if has_path else [])]
                table = parquet.read(columns=wanted) if wanted else None
                metadata.append(parquet.metadata)
        except (OSError, UnicodeError, pa.ArrowException) as error:
            raise UserError(
                f"Cannot read {file.path} as Parquet ({one_line(error)}): copy or download it again."
            ) from None
        rows = metadata[-1].num_rows
        row_names += [f"{file.id}#{row}" for row in range(rows)]
        if table is not None and set(wanted) - {label} and image in table.column_names:
            paths += table.column(image).combine_chunks().flatten()[0].to_pylist() if rows else []
        if table is not None and label:
            if label not in table.column_names:
                raise UserError(
                    f"{file.path} has no column {label!r}, which {files[0].path} has. Name one data set at a time."
                )
            raw_labels += table.column(label).to_pylist()
        group_rows = (metadata[-1].row_group(g).num_rows for g in range(metadata[-1].num_row_groups))
        starts += itertools.accumulate(group_rows, initial=starts.pop())
    assert columns is not None
    if not row_names:
        raise UserError(f"{files[0].path} has no rows. Name a data set that holds images.")
    ids = paths if len(paths) == len(row_names) == len(set(paths)) and all(paths) else row_names
    labels, classes = encode(raw_labels, columns[3]) if raw_labels else (None, None)
    held_out = np.repeat(split_by_name([file.id for file in files]), [each.num_rows for each in metadata])
    read = _RowGroups([file.path for file in files], metadata, columns[0], starts)
    size = sum(each.row_group(g).total_byte_size for each in metadata for g in range(each.num_row_groups))
    parts = [row_keys(file, meta.num_rows) for file, meta in zip(files, metadata, strict=True)]
    test = np.flatnonzero(held_out)
    return ImageSet(name, root, ids, read, labels, classes, np.concatenate(parts), test, in_order=size > _HELD_BYTES)


def _columns(schema: Any, file: File) -> tuple[str, str | None, bool, list[str] | None]:
    """The image column, the label column, whether images have a path, and the class names."""
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def struct(kind: Any) -> bool:
        return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and binary(kind.field("bytes").type)

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        features = {}

    def declared(kind: str) -> list[str]:
        return [key for key, value in features.items() if isinstance(value, dict) and value.get("_type") == kind]

    holds_image = [field.name for field in schema if struct(field.type) or binary(field.type)]
    image = next((column for column in [*declared("Image"), "image", *holds_image] if column in holds_image), None)
    if image is None:
        there = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(
            f"{file.path} has no image column, only {there}. Images are binary or a struct with `bytes` (Hugging Face)."
        )
    label = next((column for column in [*LABEL_COLUMNS, *declared("ClassLabel")] if column in schema.names), None)
    kind = schema.field(image).type
    names = features.get(label, {}).get("names") if label in declared("ClassLabel") else None
    return image, label, struct(kind) and kind.get_field_index("path") >= 0, names


class _RowGroups:
    """Reads row i of Parquet files. Row groups are read whole; threads share those read last, up to `_HELD_BYTES`."""

    def __init__(self, paths: list[str], metadata: list[Any], column: str, starts: list[int]) -> None:
        self._paths, self._metadata, self._column, self._starts = paths, metadata, column, starts
        self._groups = [(f, g) for f, meta in enumerate(metadata) for g in range(meta.num_row_groups)]
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._bytes = 0
        """Size of the held groups; summing it at every read took longer than decoding a 32-pixel image."""
        self._lock = threading.Lock()

    def __call__(self, i: int) -> bytes:
        group = bisect_right(self._starts, i) - 1
        with self._lock:
            column = self._held.get(group)
            if column is None:
                self._held[group] = column = self._load(group)
                self._bytes += column.nbytes
                while len(self._held) > 2 and self._bytes > _HELD_BYTES:
                    self._bytes -= self._held.popitem(last=False)[1].nbytes
            else:
                self._held.move_to_end(group)
        return column[i - self._starts[group]].as_py() or b""

    def _load(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        f, g = self._groups[group]
        with pq.ParquetFile(self._paths[f], metadata=self._metadata[f]) as parquet:
            nested = pa.types.is_struct(parquet.schema_arrow.field(self._column).type)
            table = parquet.read_row_group(g, columns=[f"{self._column}.bytes" if nested else self._column])
        return (table.flatten() if nested else table).column(0)
