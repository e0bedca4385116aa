"""Records: a checksum over all fields, and any damage is refused by name."""

import json

import pytest

from fedmomentum.errors import ModelError
from fedmomentum.formats.run_files import ReportedFile
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
