"""Encodings: UTF-8, what Windows writes where that is plain, and what the user names; else refused."""

import gzip

import pytest

from fedmomentum.data import read_rows
from fedmomentum.data.decoding import fits_windows
from fedmomentum.errors import DataError

WESTERN = {
    "German": "Größe „über“ alles – 5 €, Straße Nr. 3²",
    "French": "L’été, où l’œuvre créée naît à Noël : «ça va»",
    "Spanish": "¿Cómo está el niño? ¡Bien!",
    "Italian": "Perché è così? Più tardi, però.",
    "Portuguese": "Não há solução às três",
    "Danish": "Blåbærgrød på øen",
    "Swedish": "Räksmörgås på ön",
}
OTHERS = {
    "Polish": ("Zażółć gęślą jaźń, łódź", "cp1250"),
    "Czech": ("Příliš žluťoučký kůň úpěl", "cp1250"),
    "Hungarian": ("Árvíztűrő tükörfúrógép", "cp1250"),
    "Russian": ("Привет, мир", "cp1251"),
    "Greek": ("ναι, όχι", "cp1253"),
    "Turkish": ("ışık, şeker, ağaç", "cp1254"),
    "German, DOS": ("Größe, März, Übung", "cp850"),
    "French, Mac": ("été, où", "mac-roman"),
    "Japanese": ("こんにちは", "shift-jis"),
}


def write(path, text, encoding):
    path.write_bytes(f"question,answer\nq,{text!r}\n".replace("'", '"').encode(encoding))
    return path


@pytest.mark.parametrize("language", WESTERN)
def test_windows_csv_is_recognized_and_reported(language, tmp_path, caplog):
    file = write(tmp_path / "d.csv", WESTERN[language], "cp1252")
    assert read_rows(file)["answer"] == [WESTERN[language]]
    assert "d.csv: not UTF-8; read as Windows' cp1252, in which line 2 reads" in caplog.text
    assert read_rows(file).origin.encoding == "cp1252"


@pytest.mark.parametrize("language", OTHERS)
def test_other_encodings_are_refused_and_read_when_named(language, tmp_path):
    text, encoding = OTHERS[language]
    file = write(tmp_path / "d.csv", text, encoding)
    with pytest.raises(DataError, match=r"d\.csv, line 2: not UTF-8 text.* data\.encoding = "):
        read_rows(file)
    assert read_rows(file, encoding=encoding)["answer"] == [text]


def test_windows_text_must_fit_a_single_language():
    assert fits_windows("Müller") and fits_windows("plain")
    assert not fits_windows("Müller, Señor Ñandú, Ångström")


def test_json_is_utf_8_unless_another_encoding_is_named(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes('{"question": "ä?", "answer": "b"}\n'.encode("cp1252"))
    with pytest.raises(DataError, match='line 1: not UTF-8 text .*would read .*"ä'):
        read_rows(file)
    assert read_rows(file, encoding="cp1252")["question"] == ["ä?"]
    file.write_bytes('{"question": "ä?", "answer": "b"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match='or set data.encoding = "utf-16"'):
        read_rows(file)
    assert read_rows(file, encoding="utf-16")["question"] == ["ä?"]


def test_a_named_encoding_that_does_not_fit_is_refused_by_line(tmp_path):
    file = tmp_path / "d.csv"
    file.write_bytes("question,answer\na,b\nä,c\n".encode("cp1252"))
    with pytest.raises(DataError, match="d.csv, line 3: not ascii text.*holds for all files"):
        read_rows(file, encoding="ascii")


def test_gzip_is_unpacked_whatever_the_name_and_damage_is_reported(tmp_path):
    packed = gzip.compress(b'{"question": "a", "answer": "b"}\n' * 100)
    for name in ("d.jsonl.gz", "D.JSONL.GZ", "d.jsonl"):
        (tmp_path / name).write_bytes(packed)
        assert read_rows(tmp_path / name).num_rows == 100
    (tmp_path / "d.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(DataError, match="d.jsonl.gz: not a complete gzip file"):
        read_rows(tmp_path / "d.jsonl.gz")
    (tmp_path / "d.jsonl.gz").write_bytes(b'{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match="is called .gz and is not compressed"):
        read_rows(tmp_path / "d.jsonl.gz")
    (tmp_path / "d.parquet.gz").write_bytes(packed)
    with pytest.raises(DataError, match=".parquet files are compressed in themselves"):
        read_rows(tmp_path / "d.parquet.gz")
