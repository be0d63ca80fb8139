"""Tokenised rows in an Arrow file on disk, so that their number is not bound by memory.

Deliberately knows nothing of what the columns mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import DiskError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


def write_table(path: Path, batches: Iterable[dict[str, list[Any]]]) -> datasets.Dataset:
    """Write batches of columns to `path` and return the file as a memory-mapped data set.

    Lists of whole numbers (token ids, labels) take 32 bits each. The first batch decides the columns and types.
    The file appears whole or not at all; a batch is as much as is held in memory.

    Raises:
        ValueError: there is no row, or a batch has other columns than the first one.
        DiskError: the file cannot be written.
    """
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_stream(partial, batches)
        partial.replace(path)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Dataset.from_file(str(path))


def _write_stream(path: Path, batches: Iterable[dict[str, list[Any]]]) -> None:
    import pyarrow as pa

    writer: pa.ipc.RecordBatchStreamWriter | None = None
    with path.open("wb") as out:
        for columns in batches:
            if writer is None:
                schema = pa.schema([(name, _column_type(values)) for name, values in columns.items()])
                writer = pa.ipc.new_stream(out, schema)
            if columns.keys() != set(schema.names):
                raise ValueError(f"columns {sorted(columns)} differ from the first batch's {sorted(schema.names)}")
            arrays = [pa.array(columns[column.name], type=column.type) for column in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        if writer is None:
            raise ValueError("no rows to write")
        writer.close()
        out.flush()
        os.fsync(out.fileno())


def _column_type(values: list[Any]) -> pa.DataType:
    import pyarrow as pa

    return _narrow(pa.array(values).type)


def _narrow(kind: pa.DataType) -> pa.DataType:
    """Make integers in lists 32 bits wide; a list that is empty throughout is one of integers."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return kind
    inner = kind.value_type
    whole = pa.types.is_integer(inner) or pa.types.is_null(inner)
    return pa.list_(pa.int32() if whole else _narrow(inner))
