import json
import subprocess
import sys

import pytest

from fedmomentum.errors import SecureSumError
from fedmomentum.secure_sum import journal as module
from fedmomentum.secure_sum.journal import PartyJournal
from tests.secure_sum.sums import make_plan


def at(server_round, number, attempt, run_id="run"):
    return make_plan(server_round=server_round, number=number, attempt=attempt, run_id=run_id)


def test_sums_go_forward_only_and_each_run_has_its_own(tmp_path):
    journal = PartyJournal(tmp_path / "sums.json")
    journal.begin(at(1, 1, 1))
    journal.begin(at(1, 1, 3))
    journal.open(at(1, 1, 3))
    journal.begin(at(1, 2, 1))
    journal.open(at(1, 2, 1))
    for behind in (at(1, 1, 4), at(1, 2, 2), at(0, 9, 9)):
        with pytest.raises(SecureSumError, match="opens no sum twice"):
            PartyJournal(journal.file).begin(behind)
        with pytest.raises(SecureSumError, match="has opened shares of this sum already"):
            PartyJournal(journal.file).open(behind)
    journal.begin(at(1, 1, 1, "another run"))
    journal.begin(at(2, 1, 2))
    with pytest.raises(SecureSumError, match="has begun attempt 2 at sum 1 of round 2"):
        journal.begin(at(2, 1, 1))
    for not_begun in (at(2, 1, 1), at(2, 1, 3), at(5, 1, 1)):
        with pytest.raises(SecureSumError, match="has begun a later attempt since"):
            journal.open(not_begun)


def test_an_entry_is_on_disk_before_the_call_returns(tmp_path, monkeypatch):
    synced = []
    real = module.write_json
    monkeypatch.setattr(
        module, "write_json", lambda path, table: (real(path, table), synced.append(1))
    )
    journal = PartyJournal(tmp_path / "sums.json")
    journal.begin(at(1, 1, 1))
    journal.open(at(1, 1, 1))
    assert len(synced) == 2


def test_another_process_sees_it(tmp_path):
    journal = PartyJournal(tmp_path / "sums.json")
    journal.begin(at(4, 1, 1))
    journal.open(at(4, 1, 1))
    code = (
        "import sys; from pathlib import Path;"
        "from fedmomentum.secure_sum.journal import PartyJournal;"
        "from tests.secure_sum.sums import make_plan;"
        "PartyJournal(Path(sys.argv[1])).begin(make_plan(server_round=4, number=1, attempt=2))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(journal.file)], capture_output=True, text=True, timeout=60
    )
    assert "opens no sum twice" in ended.stderr and ended.returncode == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"opened": [', '"opened": [ 9, '),
        lambda text: json.dumps(json.loads(text) | {"runs": {}}),
        lambda text: json.dumps(json.loads(text) | {"format_version": 2}),
    ],
)
def test_a_damaged_file_is_refused_and_not_replaced(tmp_path, spoil):
    journal = PartyJournal(tmp_path / "sums.json")
    journal.begin(at(1, 1, 1))
    journal.file.write_text(spoil(journal.file.read_text()))
    before = journal.file.read_text()
    with pytest.raises(SecureSumError, match="sums.json"):
        journal.begin(at(2, 1, 1))
    assert journal.file.read_text() == before
