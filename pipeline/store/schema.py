"""What a store's shards hold, and the check that they hold nothing else.

A shard is an Arrow IPC file with one record batch; C channels, H and W pixels.
"""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa

from pipeline.core.errors import ArtefactError

SCHEMA_VERSION = 2
_MAGIC = b"ARROW1"
_EXTENSION = "arrow.fixed_shape_tensor"


def image_type(image_shape: tuple[int, int, int]) -> pa.FixedShapeTensorType:
    """The type of a picture [C, H, W]."""
    return pa.fixed_shape_tensor(pa.uint8(), image_shape)


def shard_schema(image_shape: tuple[int, int, int]) -> pa.Schema:
    """The columns of every shard."""
    return pa.schema(
        [
            pa.field("image", image_type(image_shape), nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
        ]
    )


def refuse_foreign_types(path: Path, content: memoryview) -> None:
    """Refuse a shard whose schema names anything but our columns and the tensor type.

    Merely parsing a schema runs the decoder of each extension type that is registered in the
    process, and some libraries register types that unpickle their metadata (CVE-2023-47248,
    CVE-2026-41486). So this looks at the raw footer: flatbuffers store each string as a 32-bit
    length, its bytes and a zero byte, hence a name that is in the schema is found here.

    Raises:
        ArtefactError: there is a string that a shard of ours does not have.
    """
    for text in _strings(_footer(path, content)):
        if text not in {"image", "label", "name", _EXTENSION} and not _TENSOR_KEYS.fullmatch(text):
            raise ArtefactError(
                f"{path} holds a column, type or metadata that stores do not have: {text[:80]!r}. "
                "It was not written by this program; do not open it elsewhere. Make the store "
                "again (`dvc repro`)."
            )


_TENSOR_KEYS = re.compile(
    r'ARROW:extension:(name|metadata)|element|item|\{"shape":\[\d+,\d+,\d+\]\}', re.ASCII
)


def _footer(path: Path, content: memoryview) -> bytes:
    size, tail = len(content), len(_MAGIC) + 4
    if size >= tail:
        trailer = bytes(content[-tail:])
        length = int.from_bytes(trailer[:4], "little")
        if trailer.endswith(_MAGIC) and length <= size - tail:
            return bytes(content[size - tail - length : size - tail])
    raise ArtefactError(f"{path} is not an Arrow file. Make the store again (`dvc repro`).")


def _strings(content: bytes) -> list[str]:
    """Every length-prefixed, zero-ended run of three or more printable ASCII bytes."""
    found = []
    for match in re.finditer(rb"[\x20-\x7e]{3,}(?=\x00)", content):
        end = match.end()
        for start in range(max(match.start(), 4), end - 2):
            if int.from_bytes(content[start - 4 : start], "little") == end - start:
                found.append(content[start:end].decode("ascii"))
    return found
