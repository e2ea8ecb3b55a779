"""Read the forms in which text is kept as UTF-8: plain, compressed, JSON lines, Parquet; torch-free.

Data sets come as .jsonl.gz, .jsonl.zst or Parquet more often than as plain text. Content, not names, tells how a file
is packed, since names go wrong; a name that promises more than the content has is refused, since it may be a page that
says why there is no file. A name alone says that lines are JSON, which text may look like, too. Files are read in
blocks, so that memory need not hold the text. simulate.data.text reads all by `text_blocks`, simulate.data.text_size
a part by `sample_text`.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from simulate.common.encodings import MARK_BYTES, encoding_of
from simulate.common.errors import InputError
from simulate.common.progress import Advance, count_nothing, task

BLOCK_BYTES = 1 << 18
"""Bytes read at a time. They fit a processor's cache; freed blocks leave 40 MB in the allocator, those of 4 MiB 280."""
SAMPLED_READ_BYTES = 1 << 13
PARQUET_BUFFER_BYTES, PARQUET_ROWS = 1 << 20, 1000
SNIFFED_BYTES = 512
"""Bytes at a file's start that tell its form; a tar archive's mark ends at 262."""
PARQUET, TAR = b"PAR1", (257, b"ustar")
RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson"})
"""Endings of files that hold one JSON object a line, before the ending of a compressed file."""
PACKED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})
ARCHIVES = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"PK\x03\x04": "zip", b"\x1f\x9d": "compress"}
"""First bytes of archives that nothing here reads."""
SHOWN_BYTES = 24
"""Bytes of a file that is not what its name says, in the error."""
NAMED_FIELDS = 8
"""Fields that an error lists at most."""
UNFINISHED = (EOFError, zlib.error, lzma.LZMAError)
"""The exceptions of decompression, beside OSErrors without a number."""


def _zstd(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, _pyarrow(".zst").CompressedInputStream(file, "zstd"))


UNPACKERS: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    b"BZh": lambda file: cast(BinaryIO, bz2.BZ2File(file)),
    b"\xfd7zXZ\x00": lambda file: cast(BinaryIO, lzma.LZMAFile(file)),  # noqa: SIM115
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""First bytes of a compressed file → what reads it, in the order in which it was written."""


def is_packed(path: Path) -> bool:
    """Whether a file is compressed, or Parquet: text that does not look like text. Raises OSError."""
    with path.open("rb") as file:
        return file.read(SNIFFED_BYTES).startswith((PARQUET, *UNPACKERS))


def refuse_archive(path: Path) -> None:
    """Raise InputError for an archive of files, compressed or not; reads its first bytes alone."""
    if not _is_parquet(path):
        with _opened(path) as file:
            _check_start(file.read(SNIFFED_BYTES), path)


def is_plain(path: Path) -> bool:
    """Whether a file's bytes are its text, as far as its first bytes and its name tell; raises OSError."""
    with path.open("rb") as file:
        start = file.read(SNIFFED_BYTES)
    return not start.startswith((PARQUET, *UNPACKERS)) and encoding_of(start) == "utf-8" and not _is_records(path)


def text_blocks(files: Sequence[Path], field: str | None) -> Iterator[bytes]:
    """Yield the texts of files as UTF-8 in blocks, a newline between two; `field` names the records' field of text.

    Raises InputError for a file that is damaged, binary, in another encoding, or without such a field.
    """
    _check_kinds(files, field)
    title = f"reading {files[0].name}" if len(files) == 1 else f"reading {len(files)} files of text"
    with task(title, sum(file.stat().st_size for file in files)) as advance:
        for number, file in enumerate(files):
            if number:
                yield b"\n"
            yield from _blocks_of(file, field, advance)


@dataclass(frozen=True)
class TextSample:
    """The first texts of some files."""

    content: bytes
    file_bytes: float
    """Bytes of the files, as they are on the disk, that hold the content."""


def sample_text(files: Sequence[Path], field: str | None, limit_bytes: int) -> TextSample:
    """Return about `limit_bytes` of text from the beginnings of files; raises InputError as `text_blocks` does."""
    _check_kinds(files, field)
    content, file_bytes = bytearray(), 0.0
    for file in files:
        reads: list[float] = []
        end = len(content) + limit_bytes // len(files)
        # A few bytes at a time, since what decompression reads ahead would count as used.
        for block in _blocks_of(file, field, reads.append, SAMPLED_READ_BYTES):
            content += block
            if len(content) >= end:
                break
        file_bytes += sum(reads)
    return TextSample(bytes(content), file_bytes)


def _check_kinds(files: Sequence[Path], field: str | None) -> None:
    """Raise InputError where records lie beside plain text, a field is named of plain text, or a name is wrong."""
    for file in files:
        _check_ending(file)
    kinds = {_is_records(file): file for file in reversed(files)}
    if len(kinds) == 2:  # else a README would be trained on, or lines of JSON as they are
        raise InputError(
            f"data: {kinds[True]} holds records and {kinds[False]} plain text; keep them in folders of their own"
        )
    if field is not None and True not in kinds:
        raise InputError(
            f"data.field = {field!r} is for records (.jsonl, Parquet), and {files[0]} holds plain text; remove the key"
        )


def _blocks_of(
    path: Path, field: str | None, advance: Advance = count_nothing, read_bytes: int | None = None
) -> Iterator[bytes]:
    """Yield a file's text in blocks; `advance` counts bytes of the file, read at most `read_bytes` at a time."""
    read_bytes = read_bytes or BLOCK_BYTES
    if _is_parquet(path):
        yield from _joined(_parquet_texts(path, field, advance))
        return
    with _opened(path, advance, read_bytes) as file:
        blocks = _utf8(file, path, read_bytes)
        yield from _joined(_json_texts(blocks, path, field)) if _is_records(path) else blocks


def _joined(texts: Iterator[bytes]) -> Iterator[bytes]:
    for number, text in enumerate(texts):
        yield b"\n" + text if number else text


class _CountedFile(io.RawIOBase):
    """A file that counts what is read of it, at most `read_bytes` at a time."""

    def __init__(self, file: BinaryIO, advance: Advance, read_bytes: int) -> None:
        self._file, self._advance, self._read_bytes = file, advance, read_bytes

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(min(size, self._read_bytes) if size >= 0 else self._read_bytes)
        self._advance(len(content))
        return content


@contextmanager
def _opened(path: Path, advance: Advance = count_nothing, read_bytes: int = SNIFFED_BYTES) -> Iterator[BinaryIO]:
    """Open a file, to be read as what it was before it was compressed; raises InputError where that fails."""
    try:
        with path.open("rb") as file:
            start = file.read(SNIFFED_BYTES)
            file.seek(0)
            counted = cast(BinaryIO, _CountedFile(file, advance, read_bytes))
            yield next((unpack(counted) for mark, unpack in UNPACKERS.items() if start.startswith(mark)), counted)
    except UNFINISHED as error:
        raise InputError(f"data: {path} is a damaged or truncated compressed file ({error}); fetch it again") from None
    except OSError as error:
        if error.errno is None:  # of decompression
            raise InputError(
                f"data: {path} is a damaged or truncated compressed file ({error}); fetch it again"
            ) from None
        raise InputError(f"data: {path} cannot be read ({error.strerror}); check its permissions") from None


def _check_ending(path: Path) -> None:
    """Raise InputError for a file whose name says that it is packed, and whose content is not."""
    ending = path.suffix.lower()
    if ending not in (*PACKED_SUFFIXES, ".parquet"):
        return
    with suppress(OSError), path.open("rb") as file:  # reading it all names the error
        start = file.read(SNIFFED_BYTES)
        if not start.startswith((PARQUET, *UNPACKERS, *ARCHIVES)):
            raise InputError(
                f"data: {path} ends in {ending}, and is no such file (it begins with {start[:SHOWN_BYTES]!r}); fetch "
                "it again, or, if that is its text, rename it"
            )


def holds_records(files: Sequence[Path]) -> bool:
    """Whether files have fields, of which one is to be named as the text."""
    return any(map(_is_records, files))


def _is_records(path: Path) -> bool:
    """Whether a file holds records, each with fields, of which one is text."""
    name = PurePath(path.name.lower())
    if (name.with_suffix("") if name.suffix in PACKED_SUFFIXES else name).suffix in RECORD_SUFFIXES:
        return True
    return _is_parquet(path)


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(PARQUET)) == PARQUET
    except OSError:  # reading it all names the error
        return False


def _utf8(file: BinaryIO, path: Path, block_bytes: int) -> Iterator[bytes]:
    """Yield a text's blocks in UTF-8, without a byte order mark; raises InputError where it is no text."""
    block = start = file.read(SNIFFED_BYTES)
    _check_start(start, path)
    encoding, read_bytes = encoding_of(start[:MARK_BYTES]), 0
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while block:
            read_bytes += len(block)
            text = _without_nul(decoder.decode(block), path)
            yield block if encoding == "utf-8" else text.encode()
            block = file.read(block_bytes)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The decoder counts from the start of what it holds, whose end is the last byte that was read.
        place = read_bytes - len(error.object) + error.start
        if encoding != "utf-8":
            raise InputError(
                f"data: {path} begins as {encoding.removesuffix('-sig').upper()}, and is not from byte {place} on; "
                "write it anew, or leave it out of the folder"
            ) from None
        raise InputError(
            f"data: {path} is not UTF-8 text (byte {place}); convert it, for example by iconv -f LATIN1 -t UTF-8, or "
            "leave it out of the folder"
        ) from None


def _check_start(start: bytes, path: Path) -> None:
    offset, mark = TAR
    kind = (
        "tar" if start[offset:].startswith(mark) else next((n for m, n in ARCHIVES.items() if start.startswith(m)), "")
    )
    if kind:
        raise InputError(f"data: {path} is a {kind} archive; unpack it and name the folder")
    if start.startswith((PARQUET, *UNPACKERS)):  # in a file that was unpacked already
        raise InputError(f"data: {path} is compressed twice; unpack it once")


def _without_nul(text: str, path: Path) -> str:
    if "\x00" in text:
        raise InputError(
            f"data: {path} is binary (it holds a NUL byte), or UTF-16 without a byte order mark; give UTF-8 text"
        )
    return text


def _json_texts(blocks: Iterator[bytes], path: Path, field: str | None) -> Iterator[bytes]:
    for number, line in enumerate(_lines(blocks), 1):
        if not line.strip():
            continue
        try:
            # Numbers are not used, and Python refuses whole ones of thousands of digits.
            record = json.loads(line, parse_int=lambda digits: int(digits[:9]))
        except (ValueError, RecursionError) as error:
            raise InputError(f"data: {path}:{number} is not JSON ({error}); mend the line, or remove it") from None
        if not isinstance(record, dict):
            raise InputError(f'data: {path}:{number} is no JSON object; each line needs one, such as {{"text": "…"}}')
        if field is None:
            field = _text_field(list(record), [key for key, value in record.items() if isinstance(value, str)], path)
        if field not in record:
            raise _no_field(f"{path}:{number}", field, list(record))
        if record[field] is not None:  # a record without text adds none
            yield _text_bytes(record[field], f"{path}:{number}", field)


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield lines without their ends; JSON escapes line ends within a text."""
    pieces: list[bytes] = []
    for block in blocks:
        first, *rest = block.split(b"\n")
        pieces.append(first)
        for line in rest:
            yield b"".join(pieces)
            pieces = [line]
    yield b"".join(pieces)


def _parquet_texts(path: Path, field: str | None, advance: Advance) -> Iterator[bytes]:
    arrow = _pyarrow("Parquet")
    import pyarrow.parquet

    try:
        # A buffer, since without one all of a row group's column is read at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES) as file:
            schema = file.schema_arrow
            strings = [column.name for column in schema if _holds_text(arrow, column.type)]
            if field is None:
                field = _text_field(schema.names, strings, path)
            if field not in schema.names:
                raise _no_field(str(path), field, schema.names)
            bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    advance(bytes_per_row)
                    if text is not None:
                        yield _text_bytes(text, str(path), field)
    except arrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"data: {path} is a damaged Parquet file ({reason}); fetch it again") from None


def _holds_text(arrow: Any, kind: Any) -> bool:
    """Whether a column's type is text, also where each text is stored once and numbered."""
    stored = kind.value_type if arrow.types.is_dictionary(kind) else kind
    return str(stored) in ("string", "large_string", "string_view")


def _text_field(fields: Sequence[str], texts: Sequence[str], path: Path) -> str:
    """Return the only field of text; raises InputError where several, or none, are text."""
    if not texts:
        raise InputError(
            f"data: {path} has the fields {_listed(fields)}, of which none holds text as a string; write the text into "
            "a field of its own"
        )
    if len(texts) != 1:
        raise InputError(
            f"data: {path} has the fields {_listed(fields)}, of which {_listed(texts)} hold text; "
            "name one with --set data.field=NAME"
        )
    return texts[0]


def _no_field(place: str, field: str, fields: Sequence[str]) -> InputError:
    return InputError(
        f"data: {place} has no field {field!r} (but {_listed(fields)}); name another with --set data.field=NAME"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED_FIELDS]) + (", …" if len(names) > NAMED_FIELDS else "")


def _text_bytes(text: Any, place: str, field: str) -> bytes:
    if not isinstance(text, str):
        raise InputError(
            f"data: {place} holds {type(text).__name__} in the field {field!r}; name one of text with "
            "--set data.field=NAME"
        )
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can escape one half of a pair
        raise InputError(
            f"data: {place}: the field {field!r} holds half of a character (a lone surrogate); mend the record, or "
            "remove it"
        ) from None


def _pyarrow(form: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError(
            f"data: {form} files need the pyarrow library; pip install 'lte[text]', or unpack them"
        ) from None
    return pyarrow
