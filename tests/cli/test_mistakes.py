"""Mistakes of a user on the command line: each ends with one sentence and exit code 2, and writes nothing."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedmomentum.cli.options import warn_if_nothing_to_resume
from fedmomentum.config.toml import to_toml
from fedmomentum.errors import ModelError
from fedmomentum.utils.process import Interruption
from tests.cli.test_commands import saved_adapters
from tests.runs import start, tiny_config
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mistakes")


@pytest.fixture(scope="module")
def job(folder):
    file = folder / "job.toml"
    file.write_text(to_toml(tiny_config(folder, federation={"num_rounds": 1})))
    return file


@pytest.fixture(scope="module")
def adapters(folder):
    base = tiny_llama(folder / "adapter-base")
    return saved_adapters(base, folder, [8.0, 4.0], [4, 2], shared=False)


# ── numbers ──


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.learning-rate=nan", "training.learning-rate must be a finite number; got nan"),
        ("training.learning-rate=inf", "training.learning-rate must be a finite number; got inf"),
        ("training.learning-rate=1e400", "must be a finite number; got inf"),
        ("training.local-epochs=nan", "training.local-epochs must be a finite number"),
        ("lora.lora-alpha=nan", "lora.lora-alpha must be a finite number"),
        ("lora.lora-alpha=0", "lora.lora-alpha must be above 0; got 0.0"),
        ("lora.rank=0", "lora.rank must be at least 1; got 0"),
        (
            "lora.clients.site0.lora-alpha=inf",
            "lora.clients.site0.lora-alpha must be a finite number",
        ),
        ("lora.clients.site0.rank=0", "lora.clients.site0.rank must be a whole number from 1"),
        ("federation.client-fraction=nan", "federation.client-fraction must be a finite number"),
        (
            "federation.outlier-norm-ratio=inf",
            "federation.outlier-norm-ratio must be a finite number",
        ),
        ("federation.round-timeout=nan", "federation.round-timeout must be a finite number"),
        ("data.test-fraction=nan", "data.test-fraction must be a finite number"),
        ("data.sizes=[1.0,nan]", "data.sizes must be a finite number"),
        (
            "training.arguments.weight_decay=nan",
            "training.arguments.weight_decay must be a finite number",
        ),
        (
            "training.arguments.lr_scheduler_kwargs={a={b=inf}}",
            "lr_scheduler_kwargs.a.b must be a finite number",
        ),
        ("method.settings.energy=nan", "method.settings.energy must be a finite number"),
        ("method.settings.energy=0", "energy is a fraction and must be in (0, 1]; got 0"),
        ("run.seed=-1", "run.seed must be"),
        ("run.seed=18446744073709551616", "run.seed must be a whole number of at most 64 bits"),
        (f"run.seed={'9' * 5000}", "run.seed must be"),
        ("run.threads=100000", "run.threads must be from 0 to 4096"),
        ("run.keep-checkpoints=0", "run.keep-checkpoints must be at least 1"),
        ("federation.num-rounds=0", "federation.num-rounds must be at least 1"),
        ("evaluation.num-examples=0", "evaluation.num-examples must be at least 1"),
        ("data.client-files.site0=5", "data.client-files.site0 must be of type str; got 5"),
        ("data.client-files=5", "data.client-files must be of type dict; got 5"),
    ],
)
def test_settings_are_finite_and_in_range(job, tmp_path, call, setting, message):
    code, _, err = call("run", job, setting, "--out", tmp_path / "out")
    assert code == 2 and message in err.replace("\n", " ") and "Traceback" not in err, err
    assert len(err) < 600 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "0"], "--rank must be at least 1; got 0"),
        (["--rank", "-2"], "--rank must be at least 1; got -2"),
        (["--lora-alpha", "0"], "--lora-alpha must be a number above 0; got 0"),
        (["--lora-alpha", "nan"], "--lora-alpha must be a number above 0; got nan"),
        (["--lora-alpha", "inf"], "--lora-alpha must be a number above 0; got inf"),
        (["--energy", "0"], "energy is a fraction and must be in (0, 1]; got 0.0"),
        (["--energy", "nan"], "energy must be a finite number; got nan"),
        (["--weights", "nan,1"], "--weights must be positive numbers; got 'nan,1'"),
        (["--weights", "inf,1"], "--weights must be positive numbers"),
        (["--weights", "0,1"], "--weights must be positive numbers"),
        (["--weights", "1e400,1"], "--weights must be positive numbers"),
        (["--weights", ""], "--weights must be numbers separated by commas"),
    ],
)
def test_zero_is_a_value_and_not_the_default(adapters, tmp_path, call, words, message):
    code, _, err = call("aggregate", *adapters, *words, "--out", tmp_path / "out")
    assert code == 2 and message in err.replace("\n", " ") and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["nan", "inf", "-0.1", "1.1"])
def test_a_target_is_a_fraction(job, tmp_path, call, target):
    for words in (
        ["compare", job, "--methods", "fedit", "--out", tmp_path / "out"],
        ["report", tmp_path],
    ):
        code, _, err = call(*words, "--target", target)
        assert code == 2 and "--target must be a fraction from 0 to 1" in err


def test_settings_of_a_compared_method_are_finite(job, tmp_path, call):
    for label in (
        "hetlora:strength=nan",
        "fedit:training.learning-rate=nan",
        "lorafair:strength=inf",
    ):
        code, _, err = call("compare", job, "--methods", label, "--out", tmp_path / "out")
        assert code == 2 and "must be a finite number" in err, err


@pytest.mark.parametrize("port", ["-1", "65536", "99999999"])
def test_ports_are_in_range(job, tmp_path, call, port):
    code, _, err = call("serve", job, "--port", port, "--out", tmp_path / "out")
    assert (
        code == 2
        and "--port must be from 0 (any free port) to 65535" in err
        and not (tmp_path / "out").exists()
    )


def test_a_file_with_a_byte_order_mark_is_read(job, tmp_path, call):
    file = tmp_path / "bom.toml"
    file.write_bytes(b"\xef\xbb\xbf" + job.read_bytes())
    assert call("run", file, "--plan", "--out", tmp_path / "out")[0] == 0
    for content in (b"\xff\xfe[run]", b"a = " + b"[" * 100_000, b"[run]\nseed = " + b"9" * 5000):
        file.write_bytes(content)
        code, _, err = call("run", file, "--out", tmp_path / "out")
        assert code == 2 and "is not a TOML file" in err and "Traceback" not in err


# ── plans, versions, places ──


def test_a_plan_writes_nothing_and_ignores_an_existing_run(job, tmp_path, call):
    out = tmp_path / "runs" / "job"
    code, printed, err = call("run", job, "--plan", "--out", out)
    assert code == 0 and "traffic" in printed and not out.parent.exists(), err
    config = cli_config(job)
    start(config, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, printed, err = call("run", job, "--plan", "--out", out)
    assert (
        code == 0
        and "traffic" in printed
        and f"{out} holds a run already; without --resume" in printed
    ), err
    code, printed, err = call(
        "run", job, "--plan", "--out", out, "--resume", "federation.num-rounds=9"
    )
    assert code == 0 and "9 with 3 clients" in printed and "holds a run already" not in printed, err
    code, _, err = call("run", job, "--plan", "--out", out, "--resume", "lora.rank=1")
    assert code == 2 and "these differ: lora.rank" in err
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert call("run", job, "--plan")[0] == 0


def cli_config(job):
    from fedmomentum.config.toml import load_config

    return load_config(job)


def test_version_prints_the_installed_version(call):
    from importlib.metadata import version

    assert call("--version") == (0, f"fedmomentum {version('fedmomentum')}\n", "")


def test_an_unwritable_directory_is_refused_before_anything_is_loaded(
    job, adapters, tmp_path, call, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("")
    commands = [
        ["run", job],
        ["aggregate", *adapters],
        ["compare", job, "--methods", "fedit"],
        ["serve", job],
        ["simulate", job],
        ["export", tmp_path, "--to", "merged"],
    ]
    for words in commands:
        for out in (file, file / "below", file / "far" / "below"):
            code, printed, err = call(*words, "--out", out)
            assert (
                code == 2
                and f"--out {out}: {file} is not a directory" in err
                and "Loading" not in printed
            ), err
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode != os.W_OK | os.X_OK
    )  # root may write anywhere
    for words in commands:
        code, printed, err = call(*words, "--out", tmp_path / "new")
        assert code == 2 and f"{tmp_path} is not writable" in err and "Loading" not in printed
    assert not (tmp_path / "new").exists() and file.read_text() == ""


def test_an_unwritable_home_directory_does_not_matter(job, tmp_path, call, monkeypatch):
    """The cache of hashes saves time; nothing depends on it."""
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    code, _, err = call("run", job, "--out", tmp_path / "out")
    assert code == 0, err


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            OSError(28, "No space left on device", "/x"),
            "No space left on device: /x. Make room or grant access",
        ),
        (OSError("the hub cannot be reached"), "the hub cannot be reached"),
        (PermissionError(13, "Permission denied"), "Permission denied. Make room or grant access"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ModelError("a sentence"), "a sentence"),
    ],
)
def test_running_out_of_resources_gives_no_traceback(
    job, tmp_path, call, monkeypatch, raised, message
):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("fedmomentum.run.setup.load_data", fail)
    code, _, err = call("run", job, "--out", tmp_path / "out")
    assert code == 2 and err.startswith(f"fedmomentum: {message}") and "Traceback" not in err


def test_a_bug_is_not_hidden(job, tmp_path, call, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr("fedmomentum.run.setup.load_data", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        call("run", job, "--out", tmp_path / "out")


# ── printed commands ──

ODD = "my runs; touch oops & $(x) 'quoted'"


def commands_in(text):
    found = []
    for line in text.splitlines():
        _, is_there, arguments = line.partition("fedmomentum ")
        if is_there and not line.startswith("fedmomentum:"):
            found.append(shlex.split(arguments))
    return found


def test_printed_commands_can_be_pasted(job, tmp_path, call, monkeypatch):
    out = tmp_path / ODD
    code, printed, _ = call("run", job, "--out", out)
    assert code == 0
    export, adapter, generate = commands_in(printed[printed.index("Next:") :])
    assert export == ["export", str(out), "--to", "merged", "--out", f"{out}-merged"]
    assert adapter == ["export", str(out), "--to", "adapter", "--out", f"{out}-adapter"]
    assert generate == ["generate", str(out), "--prompt", "..."]
    assert (
        call(*export)[0] == 0
        and Path(f"{out}-merged").is_dir()
        and not (tmp_path / "oops").exists()
    )

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmomentum.server.server.Server._train", stop)
    resume = ["run", str(out / "config.toml"), "--out", str(out), "--resume"]
    code, _, err = call(*resume, "federation.num-rounds=2")
    assert code == 130 and commands_in(err) == [resume]


def test_the_next_steps_of_a_run_with_a_model_for_each_client_name_one(folder, tmp_path, call):
    file = tmp_path / "job.toml"
    config = tiny_config(folder, method={"name": "fedsalora"}, federation={"num_rounds": 1})
    file.write_text(to_toml(config))
    code, printed, _ = call("run", file, "--out", tmp_path / "out")
    assert code == 0
    for words in commands_in(printed[printed.index("Next:") :]):
        assert words[2:4] == ["--client", "site0"]
        if words[0] == "export":
            assert call(*words)[0] == 0
    assert "--client site0 --to merged" in (tmp_path / "out" / "report.html").read_text()


# ── Ctrl-C ──


@pytest.mark.parametrize(
    ("words", "seconds"),
    [(["inspect", "{run}"], 1.5), (["generate", "{run}", "--prompt", "ab"], 3.0)],
)
def test_ctrl_c_ends_any_command_with_130(job, folder, words, seconds):
    run = folder / "run"
    if not run.exists():
        start(cli_config(job), run)
    words = [word.format(run=run) for word in words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedmomentum", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    time.sleep(seconds)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        # -2: the signal came before Python handled signals, or ended it; a shell shows 130 for both
        assert process.returncode in (130, -2), (process.returncode, err)
        assert err == "fedmomentum: interrupted\n" or (process.returncode == -2 and err == "")
    else:
        assert process.communicate() and process.returncode == 0


LOST = """
import os, signal, time
from fedmomentum.utils.process import Interruption

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(1)

interruption = Interruption()
interruption.listen(although_ignored=True)
finalized = Finalized()
try:
    del finalized
    print("lost", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    print("came", interruption.came)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_python_ignores_in_a_finalizer_is_raised_again(name):
    done = subprocess.run(
        [sys.executable, "-c", LOST.format(name=name)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == ["lost", "came", "True"]
    assert done.stderr == "" and done.returncode == 0


SLOW_MODULE = """
import os, signal, time
for _ in range({num_signals}):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.02)
time.sleep(0.5)
print("imported", flush=True)
"""
IMPORTING = """
import sys, time
from fedmomentum.utils.process import Interruption
interruption = Interruption()
interruption.listen(although_ignored=True)
try:
    import slow
    time.sleep(30)
except KeyboardInterrupt:
    print("came", interruption.came, "slow" in sys.modules)
    time.sleep(0.3)
    print("ended")
"""


@pytest.mark.parametrize(
    ("num_signals", "printed"),
    [(1, ["imported", "came", "True", "True", "ended"]), (2, ["came", "True", "False", "ended"])],
)
def test_a_signal_during_an_import_waits_for_its_end_and_a_second_one_does_not(
    tmp_path, num_signals, printed
):
    (tmp_path / "slow.py").write_text(SLOW_MODULE.format(num_signals=num_signals))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"},
    )
    assert done.stdout.split() == printed
    assert done.stderr == "" and done.returncode == 0


def test_ctrl_c_that_a_library_turns_into_another_error_still_ends_with_130(
    job, tmp_path, call, monkeypatch
):
    def fail(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("could not import module") from None

    # Imported here, so that no module is first imported, and keeps the name, while it is patched.
    import fedmomentum.run.evaluate
    import fedmomentum.run.federated_trainer  # noqa: F401

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setattr("fedmomentum.run.setup.load_data", fail)
        code, _, err = call("run", job, "--out", tmp_path / "out")
        assert (code, err) == (130, "fedmomentum: interrupted\n")
        monkeypatch.setattr("fedmomentum.run.saved_model.open_result", fail)
        code, _, err = call("evaluate", tmp_path)
        assert (code, err) == (130, "fedmomentum: interrupted\n")
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_where_sigint_is_ignored_it_stays_ignored(monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Interruption().listen()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_a_resume_of_nothing_is_said_so(tmp_path, capsys):
    """A mistyped --out trains from the beginning; service units rely on that."""
    warn_if_nothing_to_resume(tmp_path / "typo", resume=True)
    assert "typo holds no run to resume; a new one starts there" in " ".join(
        capsys.readouterr().err.split()
    )
    (tmp_path / "config.toml").write_text("")
    warn_if_nothing_to_resume(tmp_path, resume=True)
    warn_if_nothing_to_resume(tmp_path / "new", resume=False)
    assert capsys.readouterr().err == ""
