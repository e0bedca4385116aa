"""How a process shares its machine: which cores it may use, and how its threads wait."""

import os
import subprocess
import sys

import pytest

from fedmomentum.utils import process


@pytest.mark.parametrize(
    ("texts", "limit"),
    [
        (("200000 100000",), 2),
        (("150000 100000",), 2),
        (("50000 100000",), 1),
        (("max 100000",), 4),
        (("300000", "100000"), 3),
        (("-1", "100000"), 4),
        (("",), 4),
    ],
)
def test_cores_are_those_of_the_container_and_the_affinity(texts, limit, tmp_path, monkeypatch):
    files = [tmp_path / str(number) for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text + "\n")
    limits = ((str(files[0]), str(files[1]) if len(files) > 1 else None),)
    monkeypatch.setattr(process, "CPU_LIMITS", limits)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert process.available_cpus() == limit
    monkeypatch.setattr(process, "CPU_LIMITS", (("/none", None),))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert process.available_cpus() == 1


@pytest.mark.parametrize("name", process.WAIT_SETTINGS)
def test_threads_wait_briefly_unless_the_user_says_otherwise(name, monkeypatch):
    for setting in process.WAIT_SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    assert process.describe_waiting() == "busy waiting"
    monkeypatch.setenv(name, "7")
    process.wait_briefly()
    assert process.describe_waiting() == f"{name}=7"
    monkeypatch.delenv(name)
    process.wait_briefly()
    assert process.describe_waiting() == "OMP_WAIT_POLICY=PASSIVE, GOMP_SPINCOUNT=1000"
    for setting in process.BRIEF_WAITING:
        monkeypatch.delenv(setting)


def test_the_command_line_sets_it_before_torch_is_loaded():
    code = (
        "import sys, os\n"
        "from fedmomentum.cli import main\n"
        "before = main.wait_briefly\n"
        "def check():\n"
        "    assert 'torch' not in sys.modules\n"
        "    before()\n"
        "    print(os.environ['OMP_WAIT_POLICY'])\n"
        "main.wait_briefly = check\n"
        "sys.argv = ['fedmomentum', '--version']\n"
        "main.main()\n"
    )
    clean = {key: value for key, value in os.environ.items() if key not in process.WAIT_SETTINGS}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    )
    assert ended.stdout.startswith("PASSIVE\nfedmomentum ")
