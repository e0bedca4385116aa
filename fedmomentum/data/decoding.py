"""Decodes text files: compression, encodings, damage.

Files are UTF-8. CSV files saved by Excel are often in Windows' encoding, cp1252, but nothing in the
file says so. It is therefore detected only when no other encoding is likely, and logged; otherwise
the user must name the encoding.
"""

from __future__ import annotations

import gzip
import logging
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable

AUTO = "auto"
"""The `data.encoding` for UTF-8 or, in a CSV file, the detected encoding."""
GZIP_START = b"\x1f\x8b"
WINDOWS = "cp1252"
# The non-ASCII letters of languages that use cp1252. Text in another encoding that is read as
# cp1252 has letters of several languages.
ALPHABETS = {
    "German": "äöüßéèàáê",
    "French": "àâäçéèêëîïôöùûüÿœæ",
    "Spanish": "áéíóúüñ",
    "Italian": "àèéìíîòóùú",
    "Portuguese": "áâãàçéêíóôõúü",
    "Dutch": "áéèêëïíóöôúü",
    "Danish, Norwegian": "æøåéèêóòôü",
    "Swedish, Finnish": "åäöéèáü",
    "Catalan": "àçéèíïóòúü",
}
WITHIN_WORDS = "’\u00ad·–—"
"""The non-ASCII symbols that may occur between two letters."""
MAX_SHOWN = 60

_WORD = re.compile(r"[^\W\d_]+")
_WITHIN_WORD = re.compile(r"(?<=[^\W\d_])[^\x00-\x7f](?=[^\W\d_])")
# Opening punctuation never follows a letter.
_AFTER_LETTER = re.compile(r"[^\W\d_][‚„¿¡]")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodedText:
    """The text of a file.

    Attributes:
        text: The text, without a byte order mark, line endings unchanged.
        encoding: The encoding.
        is_compressed: Whether the file is gzip-compressed.
    """

    text: str
    encoding: str
    is_compressed: bool


def read_text(path: Path, encoding: str = AUTO, *, may_be_windows: bool = False) -> DecodedText:
    """Read the text of a file.

    Args:
        path: The file; gzip-compressed files are decompressed, whatever their name.
        encoding: The encoding; `AUTO` means UTF-8.
        may_be_windows: Whether text that is not UTF-8 may be detected as cp1252.

    Raises:
        DataError: If the file has another encoding, is damaged or empty, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    is_compressed = data.startswith(GZIP_START)
    if is_compressed:
        data = _unpack(path, data)
    elif path.suffix.lower() == ".gz":
        raise DataError(f"{path}: is called .gz and is not compressed by gzip; rename it")
    if encoding == AUTO:
        text, encoding = _decode_auto(path, data, may_be_windows)
    else:
        text = _decode(path, data, encoding)
    _check_text(path, text)
    return DecodedText(text, encoding, is_compressed)


def _unpack(path: Path, data: bytes) -> bytes:
    """Decompress gzip data."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not a complete gzip file: {error}; copy or download it again"
        ) from None


def _decode(path: Path, data: bytes, encoding: str) -> str:
    """Decode text in the encoding that the user named."""
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        place = ""
        if isinstance(error, UnicodeDecodeError):
            line = data.count(b"\n", 0, error.start) + 1
            place = f", line {line}"
        raise DataError(
            f'{path}{place}: not {encoding} text ({error}); data.encoding = "{encoding}" holds for '
            "all files: correct it, or save the file as UTF-8"
        ) from None


def _decode_auto(path: Path, data: bytes, may_be_windows: bool) -> tuple[str, str]:
    """Return a file's text and its encoding: UTF-8, or cp1252 if that is clear."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path}: not UTF-8 text but UTF-16 (or UTF-32), by its first bytes; save it as UTF-8, "
            'or set data.encoding = "utf-16"'
        )
    try:
        return data.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError as error:
        position = error.start
    line = data.count(b"\n", 0, position) + 1
    try:
        windows = data.decode(WINDOWS)
    except UnicodeDecodeError:
        windows = ""
    sample = _line_at(windows, position)
    if may_be_windows and windows and fits_windows(windows):
        _log.warning(
            '%s: not UTF-8; read as Windows\' %s, in which line %d reads "%s". If that is wrong, '
            "name the right one in data.encoding",
            path,
            WINDOWS,
            line,
            sample,
        )
        return windows, WINDOWS
    hint = f', which in {WINDOWS} would read "{sample}"' if sample else ""
    raise DataError(
        f"{path}, line {line}: not UTF-8 text (byte {position}){hint}; save it as UTF-8, or name "
        f'its encoding, such as data.encoding = "{WINDOWS}"'
    )


def _line_at(text: str, position: int) -> str:
    """Return the text around a position, within its line; empty if there is none."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : end if end >= 0 else len(text)]
    first = max(0, position - start - MAX_SHOWN // 2)
    return printable(line[first : first + MAX_SHOWN].strip(), MAX_SHOWN)


def fits_windows(text: str) -> bool:
    """Return whether text read as cp1252 is unlikely to be in another encoding.

    Its letters must be those of one Western European language, no word may consist only of
    non-ASCII letters, and symbols must occur only where symbols do.
    """
    # The non-ASCII letters must all belong to one language.
    letters = {character.lower() for character in text if not character.isascii()}
    letters = {character for character in letters if character.isalpha() and character not in "ªºµ"}
    if not any(letters.issubset(alphabet) for alphabet in ALPHABETS.values()):
        return False
    for word in _WORD.findall(text):
        if len(word) > 1 and not any(character.isascii() for character in word):
            return False
    # A symbol between two letters is a letter in another encoding, such as the Polish "ł".
    for found in _WITHIN_WORD.findall(text):
        if found not in WITHIN_WORDS and (not found.isalpha() or found in "ªºµ"):
            return False
    return _AFTER_LETTER.search(text) is None


def _check_text(path: Path, text: str) -> None:
    """Reject damaged or empty text."""
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}, line {line}: holds a NUL character; the file is damaged, or in UTF-16: "
            "restore it, or save it as UTF-8"
        )
    if not text.strip():
        raise DataError(f"{path}: empty file; an empty data set cannot be used")
