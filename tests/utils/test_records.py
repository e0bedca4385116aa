"""Records: a checksum over all fields, and any damage is refused by name."""

import json
import os
import stat

import pytest

from fedmomentum.errors import ModelError
from fedmomentum.formats.run_files import ReportedFile
from fedmomentum.utils.io import write_atomically
from fedmomentum.utils.records import parse_record, with_checksum


def record() -> bytes:
    table = {"rounds": {"tensorboard": 3}, "run_id": "r", "of a newer release": "text"}
    return json.dumps(with_checksum(table)).encode()


def test_a_record_with_fields_of_a_newer_release_is_read():
    assert parse_record(record(), ReportedFile, "x").rounds == {"tensorboard": 3}


def test_every_changed_byte_is_refused_by_name():
    data = record()
    for position in range(len(data)):
        for byte in (0xC9, 0x00, data[position] ^ 1):
            damaged = data[:position] + bytes([byte]) + data[position + 1 :]
            if json.loads(data) == _loads(damaged):
                continue  # white space
            with pytest.raises(ModelError, match="^x"):
                parse_record(damaged, ReportedFile, "x")


def _loads(data: bytes):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_private_file_is_never_readable_by_others(tmp_path, monkeypatch):
    """Not even for the moment before it has its name, nor with the most permissive mask."""
    seen = []
    rename = os.replace

    def note(source, target):
        seen.append(stat.S_IMODE(os.stat(source).st_mode))
        rename(source, target)

    monkeypatch.setattr(os, "replace", note)
    before = os.umask(0)
    try:
        write_atomically(tmp_path / "file", b"secret", permissions=0o600)
    finally:
        os.umask(before)
    assert seen == [0o600] and stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
