"""List the files of a folder or of a zip archive, images told by their content; torch-free.

Names go wrong: cameras and browsers write .jfif or no ending at all, archives of Windows have backslashes between
folders, and systems add files of their own. Folders and archives go by the same rules, so that unpacking changes
nothing. simulate.data.load lists a path here; simulate.data.image_folders sorts what is found into classes.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from simulate.common.errors import InputError
from simulate.data.decode_images import DAMAGE, zip_members

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
IMAGE_MARKS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)  # fmt: skip
"""First bytes of JPEG, PNG, GIF, TIFF and JPEG 2000; those of WebP, AVIF, HEIC and BMP are not all at the start."""
IMAGE_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"})
SNIFFED_BYTES = 16
ENCRYPTED = 1
"""The bit of a zip archive's member that is set where it needs a password."""
COMPRESSIONS = (
    zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA,
    getattr(zipfile, "ZIP_ZSTANDARD", zipfile.ZIP_LZMA),  # from Python 3.14 on
)  # fmt: skip
SYSTEM_NAMES = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "@eadir", "system volume information"}
)
"""Files and folders that systems put beside what users put there, in lower case."""


@dataclass(frozen=True)
class Tree:
    """The files of a folder or an archive."""

    files: dict[str, tuple[int, int]]
    """Path below the root, with slashes → its bytes, and the time of its last change (in an archive: its checksum)."""
    bare_folders: frozenset[str]
    """Empty folders."""
    unnamed_images: frozenset[str] = frozenset()
    """Paths of images whose names do not end like an image's."""

    @property
    def images(self) -> list[str]:
        """Paths of images, sorted."""
        return sorted(path for path in self.files if path in self.unnamed_images or _ends_like_image(path))

    def stamp(self) -> str:
        """Return a digest of all names, sizes and times of change."""
        return hashlib.sha256(repr(sorted(self.files.items())).encode("utf-8", "surrogateescape")).hexdigest()


def _ends_like_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def is_hidden(path: str) -> bool:
    """Whether a path, with slashes, leads through what users do not see: hidden files and those that systems add."""
    parts = path.split("/")  # those of an archive may lead upwards
    return any(part.lower() in SYSTEM_NAMES or (part.startswith(".") and part not in (".", "..")) for part in parts)


def looks_like_image(start: bytes) -> bool:
    """Whether a file that begins so is an image of a common format."""
    if start.startswith(IMAGE_MARKS) or (start[4:8] == b"ftyp" and start[8:12] in IMAGE_BRANDS):
        return True
    # Text may begin with BM, too; in an image four bytes of zeros follow its size.
    return (start.startswith(b"RIFF") and start[8:12] == b"WEBP") or (start[:2] == b"BM" and start[6:10] == bytes(4))


def read_folder(root: Path) -> Tree:
    """List the files below a folder, without hidden ones; raises OSError, and InputError for links in a circle."""
    files: dict[str, tuple[int, int]] = {}
    bare, images = set(), set()
    for folder, entries in _walk(root, ()):
        prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        if not entries and prefix:
            bare.add(prefix.rstrip("/"))
        for entry in entries:
            if not entry.is_file():
                # What a version control of data has not fetched yet are such links.
                if entry.is_symlink() and not entry.is_dir() and not Path(entry.path).exists():
                    raise InputError(
                        f"data: the link {entry.path} leads to nothing; fetch what it stands for, or remove it"
                    )
                continue
            status = entry.stat()
            files[prefix + entry.name] = (status.st_size, status.st_mtime_ns)
            if not _ends_like_image(entry.name) and _file_looks_like_image(entry.path):
                images.add(prefix + entry.name)
    return Tree(files, frozenset(bare), frozenset(images))


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    # Windows has no such numbers, and links there are rare.
    if here in above and status.st_ino:
        raise InputError(f"data: the link {folder} leads back to a folder around it; remove it")
    with os.scandir(folder) as found:
        entries = [entry for entry in found if not is_hidden(entry.name)]
    yield folder, entries
    for entry in entries:
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*above, here))


def _file_looks_like_image(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            return looks_like_image(file.read(SNIFFED_BYTES))
    except OSError:  # what may not be read is named where it is needed
        return False


def read_zip(path: Path) -> Tree:
    """List the files of a zip archive; raises InputError where it is truncated or no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: member for name, member in zip_members(archive).items() if not is_hidden(name.rstrip("/"))}
            if any(member.flag_bits & ENCRYPTED for member in members.values()):
                raise InputError(f"data.path = {str(path)!r} is encrypted; unpack it and name the folder")
            if packed := next((m for m in members.values() if m.compress_type not in COMPRESSIONS), None):
                names: dict[int, str] = zipfile.compressor_names  # type: ignore[attr-defined]
                kind = names.get(packed.compress_type, f"method {packed.compress_type}")
                raise InputError(
                    f"data.path = {str(path)!r} is compressed by {kind}, which Python does not read; unpack it and "
                    "name the folder"
                )
            files = {name: (m.file_size, m.CRC) for name, m in members.items() if not name.endswith("/")}
            images = {n for n in files if not _ends_like_image(n) and _member_looks_like_image(archive, members[n])}
    except (zipfile.BadZipFile, EOFError):
        raise InputError(f"data.path = {str(path)!r} is a truncated or damaged zip archive; fetch it again") from None
    # In sorted order, a folder's content comes right after the folder: without any, it is empty.
    in_order = sorted(members)
    bare = {
        name.rstrip("/")
        for name, after in pairwise([*in_order, ""])
        if name.endswith("/") and not after.startswith(name)
    }
    return Tree(files, frozenset(bare), frozenset(images))


def _member_looks_like_image(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(member) as file:
            return looks_like_image(file.read(SNIFFED_BYTES))
    except DAMAGE:  # an encrypted or damaged file; as an image it would be named when it is decoded
        return False
