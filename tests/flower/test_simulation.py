"""The two apps under Flower's simulation engine; needs Ray, see `make simulation`."""

import subprocess
import sys

import pytest

from fedmomentum.config.toml import to_toml
from tests.runs import chain, objects, start, timeless, tiny_config

pytestmark = pytest.mark.long
pytest.importorskip("ray")


def simulate(config, folder, *more):
    file = folder / "job.toml"
    file.write_text(to_toml(config))
    command = [
        sys.executable,
        "-m",
        "fedmomentum",
        "simulate",
        str(file),
        "--out",
        str(folder / "run"),
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)


def test_the_simulation_makes_the_run_of_one_process(tmp_path):
    config = tiny_config(tmp_path, federation={"num_rounds": 2})
    result = simulate(config, tmp_path)
    assert result.returncode == 0, result.stderr
    start(config, tmp_path / "one", function=None)
    assert chain(tmp_path / "run") == chain(tmp_path / "one") and objects(
        tmp_path / "run"
    ) == objects(tmp_path / "one")
    accepted = [row["accepted"] for row in timeless(tmp_path / "run")]
    assert accepted == [[], *[["site0", "site1", "site2"]] * 2]


def test_a_simulation_that_fails_says_so_by_its_exit_code(tmp_path):
    config = tiny_config(tmp_path, model={"name": str(tmp_path / "nowhere")})
    (tmp_path / "data").mkdir()
    result = simulate(config, tmp_path)
    assert result.returncode == 2 and "none of 3 clients could start the run" in result.stderr
