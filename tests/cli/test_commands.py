"""The user's path: commands, what they print, and how mistakes end."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.cli import main
from fedmomentum.config.toml import to_toml
from fedmomentum.formats.directories import retained_rounds
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.utils.terminal import log_file
from tests.runs import chain, start, timeless, tiny_config, write_data
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def finished(folder):
    """A run's folder, made without the command line."""
    start(tiny_config(folder, federation={"num_rounds": 2}), folder / "finished", function=None)
    return folder / "finished"


@pytest.fixture(scope="module")
def adapters(folder):
    base = folder / "adapter-base"
    tiny_llama(base)
    paths = []
    for i, (r, alpha) in enumerate([(4, 16), (2, 3)]):
        torch.manual_seed(i)
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.data.normal_(0, 0.1)
        paths.append(folder / f"a{i}")
        model.save_pretrained(paths[-1])
    return base, paths


def test_run_from_a_users_files_to_results(folder, tmp_path, call):
    files = write_data(folder)
    base = folder / "base"
    if not base.exists():
        tiny_llama(base)
    config = tmp_path / "mine.toml"
    config.write_text(
        f'[model]\nname = "{base}"\ndtype = "float32"\n[lora]\nrank = 2\ntarget-modules = '
        f'["q_proj"]\n'
        "[data]\ntest-fraction = 0.25\n[data.client-files]\n"
        + "".join(f'{client} = "{file}"\n' for client, file in files.items())
        + "[training]\nlocal-steps = 1\n[federation]\nnum-rounds = 2\n[run]\nthreads = 1\n"
    )
    out = tmp_path / "out"
    code, printed, _ = call("run", config, "federation.num-rounds=1", "--out", out)
    assert code == 0
    assert (
        "FedMomentum(split='balanced'" in printed and "site0" in printed and "held out" in printed
    )
    assert (
        "round 0" in printed
        and "round 1 *" in printed
        and "Exact match on held-out examples" in printed
    )
    assert f"fedmomentum export {out} --to merged" in printed
    assert (out / "report.html").stat().st_size > 10_000
    assert len(timeless(out)) == 2
    partition = json.loads((out / "partition.json").read_text())
    assert set(partition["clients"]) == set(files)
    code, _, err = call("run", config, "federation.num-rounds=1", "--out", out)
    assert code == 2 and "holds a run already" in err and "Traceback" not in err
    code, printed, _ = call(
        "run", out / "config.toml", "federation.num-rounds=2", "--out", out, "--resume"
    )
    assert code == 0 and len(timeless(out)) == 3
    code, printed, _ = call("run", config, "--plan", "--out", tmp_path / "planned")
    assert (
        code == 0 and "traffic" in printed and not (tmp_path / "planned" / "metrics.jsonl").exists()
    )


def test_export_inspect_report_generate_evaluate(folder, finished, tmp_path, call):
    code, printed, _ = call("export", finished, "--to", "merged", "--out", tmp_path / "merged")
    assert code == 0 and "100.00% of the change arrived" in printed
    code, printed, _ = call(
        "export", finished, "--to", "adapter", "--round", "best", "--out", tmp_path / "adapter"
    )
    assert code == 0 and "scaling 1" in printed
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert set(plain.state_dict()) and merged.config.hidden_size == 32
    code, printed, _ = call(
        *("export", finished, "--to", "merged", "--dtype", "bfloat16", "--device", "cpu"),
        *("--out", tmp_path / "half"),
    )
    assert code == 0 and "in bfloat16" in printed
    for what in (finished, tmp_path / "adapter"):
        code, printed, _ = call("inspect", what)
        # All columns, though a pipe counts as 80 characters wide.
        assert what != finished or "merged norm" in printed
        assert code == 0 and "model.layers.0.self_attn.q_proj" in printed and "SHA-256" in printed
    model = GlobalModel.load(finished)
    assert model.version in call("inspect", finished)[1]
    code, printed, _ = call("report", finished)
    assert code == 0 and printed.strip().endswith("report.html")
    for what in (finished, tmp_path / "adapter"):
        code, printed, _ = call(
            "generate", what, "--prompt", "0 ab 1", "--prompt", "[bold]x", "--max-new-tokens", "4"
        )
        assert (
            code == 0
            and printed.count("base ") == 2
            and printed.count("tuned") == 2
            and "[bold]x" in printed
        )
    data = folder / "site0.jsonl"
    code, printed, _ = call("evaluate", finished, "--data", data, "--category-column", "kind")
    assert code == 0 and "12 examples" in printed and "perplexity" in printed and "ab" in printed
    code, printed, _ = call(
        "evaluate", tmp_path / "adapter", "--data", data, "--generate", "--limit", "3"
    )
    assert code == 0 and "3 examples" in printed and "generated" in printed


def test_compare_resumes_and_prints_the_results(folder, tmp_path, call):
    file, out = tmp_path / "mine.toml", tmp_path / "out"
    file.write_text(to_toml(tiny_config(folder, federation={"num_rounds": 1})))
    asked = [
        "compare",
        file,
        "training.local-steps=1",
        "--methods",
        "fedit,fedmomentum:split=singular;energy=1.0,local",
    ]
    code, printed, err = call(*asked, "--seeds", "3", "--out", out, "--target", "0")
    assert code == 0, err
    assert "Run 5 of 5: local (site2), seed 3" in printed and "Difference to fedit" in printed
    assert (out / "fedmomentum-split-singular-energy-1.0" / "seed-3" / "metrics.jsonl").is_file()
    assert "--methods 'fedit,fedmomentum:split=singular;energy=1.0,local'" in (
        out / "comparison.html"
    ).read_text().replace("&#39;", "'")
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-3/**/metrics.jsonl")}
    assert len(stamps) == 5
    code, printed, err = call(
        *asked, "--seeds", "3,4", "--out", out, "--target", "0", "--baseline", "local"
    )
    assert (
        code == 0
        and "Run 6 of 10" in printed
        and "Run 5 of 10" not in printed
        and "Difference to local" in printed
    )
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    code, printed, _ = call("report", out)
    assert code == 0 and printed.strip().endswith("comparison.html")
    runs = [out / "fedit" / f"seed-{seed}" for seed in (3, 4)]
    code, printed, _ = call("report", *runs, "--out", tmp_path / "two", "--target", "0.1")
    assert code == 0 and (tmp_path / "two" / "comparison-data" / "loss.csv").is_file()
    for wrong, message in (
        (["--methods", "fedavg"], "unknown method 'fedavg'"),
        (["--methods", "fedit", "--seeds", "0,x"], "--seeds must be whole numbers"),
        (["--methods", "fedit", "--baseline", "flora"], "--baseline must be one of the methods"),
        (["--methods", "fedit", "--target", "50"], "--target must be a fraction"),
        (["--methods", "fedit", "lora.rank=1"], "lora.rank"),
        (["--methods", "fedit", "evaluation.every=0"], "evaluation.every must be 1 or more"),
    ):
        code, _, err = call("compare", file, *wrong, "--out", out)
        assert code == 2 and message in err.replace("\n", " ") and "Traceback" not in err, wrong
    code, _, err = call("report", out, runs[0])
    assert code == 2 and "not both together" in err
    for words, message in (
        ([out, "--target", "0.1"], "run compare again with --target"),
        ([runs[0], "--target", "0.1"], "--target is for the report of several runs"),
        ([runs[0], "--out", tmp_path / "three"], "the report of a run is written to"),
    ):
        code, _, err = call("report", *words)
        assert code == 2 and message in err.replace("\n", " "), err
    assert not (tmp_path / "three").exists()
    assert call("report", out, "--out", tmp_path / "three")[0] == 0
    assert (tmp_path / "three" / "comparison.html").is_file()


def test_ctrl_c_in_a_comparison_prints_how_to_resume(folder, tmp_path, call, monkeypatch):
    from fedmomentum.run import compare

    def stopped(planned_run, *, callbacks, **_):
        raise KeyboardInterrupt

    file = tmp_path / "mine.toml"
    file.write_text(to_toml(tiny_config(folder)))
    monkeypatch.setattr(compare, "execute_run", stopped)
    code, _, err = call("compare", file, "--methods", "fedit,flora", "--out", tmp_path / "out")
    assert code == 130 and "Stopped in fedit, seed 0" in err
    assert f"fedmomentum compare {file} --methods fedit,flora --out {tmp_path / 'out'}" in err


def test_aggregate_writes_a_global_model_of_the_weighted_sum(adapters, tmp_path, call):
    base, (one, two) = adapters
    code, printed, err = call(
        "aggregate", one, two, "--weights", "3,1", "--rank", "3", "--out", tmp_path / "global"
    )
    assert code == 0 and "2 adapters by FedMomentum(" in printed, err
    model = GlobalModel.load(tmp_path / "global")
    assert model.base.name == str(base) and model.base.sha256 is None
    code, printed, _ = call(
        "aggregate",
        two,
        one,
        "--weights",
        "1,3",
        "--rank",
        "3",
        "--to",
        "adapter",
        "--out",
        tmp_path / "plain",
    )
    assert code == 0
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "plain"
    ).merge_and_unload()
    stock = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), p).merge_and_unload()
        for p in (one, two)
    ]
    key = "model.layers.1.self_attn.q_proj.weight"
    start_ = AutoModelForCausalLM.from_pretrained(base).state_dict()[key].double()
    wanted = (
        sum(w * m.state_dict()[key].double() for w, m in zip((0.75, 0.25), stock, strict=True))
        - start_
    )
    assert ((merged.state_dict()[key].double() - start_) - wanted).norm() / wanted.norm() < 1e-5
    assert "global" in call("inspect", tmp_path / "global")[1]
    code, _, _ = call("export", tmp_path / "global", "--to", "merged", "--out", tmp_path / "merged")
    assert code == 0
    code, printed, _ = call(
        "aggregate",
        one,
        two,
        "--split",
        "singular",
        "--energy",
        "0.9",
        "--lora-alpha",
        "8",
        "--out",
        tmp_path / "g2",
    )
    assert code == 0 and "energy=0.9" in printed
    assert (
        GlobalModel.load(tmp_path / "g2").adapter.scalings["model.layers.0.self_attn.q_proj"] == 2.0
    )


def saved_adapters(base, folder, alphas, ranks, *, shared):
    """PEFT adapters as a user has them: every factor trained, or all with one A that nobody trained."""
    paths = []
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(
                r=r, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            ),
        )
        generator = torch.Generator().manual_seed(i)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name or ("lora_A" in name and not shared):
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        paths.append(folder / f"adapter{i}")
        model.save_pretrained(paths[-1])
    return paths


@pytest.mark.parametrize("name", METHODS)
def test_aggregate_by_every_method(adapters, tmp_path, call, name):
    """Scalings 4, 1.5 and 2.25, and unequal ranks where the method takes them; a result that plain PEFT loads."""
    base, method = adapters[0], METHODS[name]()
    ranks = (4, 2, 3) if method.unequal_ranks else (4, 4, 4)
    alphas = [scaling * r for scaling, r in zip((4, 1.5, 2.25), ranks, strict=True)]
    paths = saved_adapters(
        base, tmp_path, alphas, ranks, shared="A" not in method.trained_factors(1)
    )
    asked = ["aggregate", *paths, "--weights", "3,1,2", "--method", name, "--lora-alpha", "10"]
    code, printed, err = call(*asked, "--to", "adapter", "--out", tmp_path / "plain")
    if method.reads_base:
        assert (
            code == 2
            and "works within a run only" in err.replace("\n", " ")
            and not (tmp_path / "plain").exists()
        )
        return
    assert code == 0 and f"3 adapters by {method!r}" in printed.replace("\n", " "), err
    assert call(*asked, "--out", tmp_path / "global")[0] == 0
    untouched = AutoModelForCausalLM.from_pretrained(base).state_dict()

    def change(path):
        """What a stock merge adds to each weight."""
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), path
        ).merge_and_unload()
        return {
            k: t.double() - untouched[k].double()
            for k, t in loaded.state_dict().items()
            if ".q_proj." in k or ".v_proj." in k
        }

    got, theirs = change(tmp_path / "plain"), [change(path) for path in paths]
    model = GlobalModel.load(tmp_path / "global")
    assert set(model.adapter.scalings.values()) == {2.5}
    for key, delta in got.items():
        effective = model.effective(key.removesuffix(".weight"))
        effective = effective.dense() if isinstance(effective, LowRank) else effective
        assert float((delta - effective).norm()) < 1e-5 * float(delta.norm())
        wanted = sum(w * other[key] for w, other in zip((3 / 6, 1 / 6, 2 / 6), theirs, strict=True))
        wrong = float((delta - wanted).norm() / wanted.norm())
        assert wrong < 1e-5 if method.exact else 1e-5 < wrong < 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.toml"], "no configuration file nowhere.toml"),
        (["aggregate", "nowhere", "--out", "x"], "nowhere does not exist"),
        (
            ["aggregate", "{one}", "{two}", "--weights", "3,x", "--out", "x"],
            "must be numbers separated by commas",
        ),
        (
            ["aggregate", "{one}", "{two}", "--weights", "3", "--out", "x"],
            "2 adapters and 1 weights",
        ),
        (["aggregate", "{one}", "{two}", "--weights", "3,-1", "--out", "x"], "positive numbers"),
        (
            ["aggregate", "{one}", "{two}", "--method", "fedavg", "--out", "x"],
            "unknown method 'fedavg'",
        ),
        (
            ["aggregate", "{one}", "{two}", "--method", "fedit", "--out", "x"],
            "needs every client at rank 4",
        ),
        (
            ["aggregate", "{one}", "{two}", "--method", "fedit", "--energy", "0.5", "--out", "x"],
            "no setting 'energy'",
        ),
        (["aggregate", "{one}", "{two}", "--split", "equal", "--out", "x"], "split must be"),
        (
            ["aggregate", "{one}", "{two}", "--rank", "99", "--out", "x"],
            "rank must be from 1 to 32",
        ),
        (
            ["aggregate", "{one}", "{two}", "--to", "merged", "--out", "x"],
            "--to must be global or adapter",
        ),
        (["aggregate", "{one}", "{two}", "--out", "{one}"], "not empty"),
        (["export", "{finished}", "--to", "gguf", "--out", "x"], "--to must be merged or adapter"),
        (
            ["export", "{finished}", "--to", "merged", "--round", "77", "--out", "x"],
            "keeps the rounds",
        ),
        (
            ["export", "{finished}", "--to", "merged", "--round", "first", "--out", "x"],
            "a number, last or best",
        ),
        (
            ["export", "{finished}", "--to", "merged", "--dtype", "int9", "--out", "x"],
            "choose auto, float32",
        ),
        (
            ["export", "{finished}", "--to", "adapter", "--dtype", "bfloat16", "--out", "x"],
            "--dtype bfloat16 is for --to merged",
        ),
        (
            ["export", "{finished}", "--to", "adapter", "--device", "tpu", "--out", "x"],
            "'tpu' cannot be used",
        ),
        (
            ["export", "{finished}", "--to", "merged", "--base", "{other}", "--out", "x"],
            "base model differs",
        ),
        (["export", "nowhere", "--to", "merged", "--out", "x"], "nowhere does not exist"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["report", "nowhere"], "nowhere"),
        (["evaluate", "{finished}", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (
            ["generate", "{finished}", "--prompt", "x", "--base", "/nowhere"],
            "no directory /nowhere",
        ),
    ],
)
def test_mistakes_end_with_2_and_one_message(
    arguments, message, adapters, finished, tmp_path, call, monkeypatch
):
    base, (one, two) = adapters
    other = tmp_path / "other"
    if "{other}" in arguments:
        tiny_llama(other, seed=9)
    monkeypatch.chdir(tmp_path)
    names = {"one": one, "two": two, "finished": finished, "other": other}
    code, _, err = call(*(argument.format(**names) for argument in arguments))
    assert code == 2, err
    assert message in err.replace("\n", " ") and "Traceback" not in err
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def test_debug_shows_the_traceback(call):
    from fedmomentum.errors import ConfigError

    with pytest.raises(ConfigError):
        call("--debug", "run", "nowhere.toml")


def test_debug_shows_tracebacks_that_are_only_logged(call, monkeypatch, tmp_path):
    logger = logging.getLogger("fedmomentum")

    def command(arguments, standalone_mode):
        with log_file(tmp_path / "run.log"):
            try:
                raise KeyError("boom")
            except KeyError as error:
                logger.debug("client north failed", exc_info=error)
        try:
            raise KeyError("boom")
        except KeyError as error:
            logger.debug("client south failed", exc_info=error)

    monkeypatch.setattr(main, "app", command)
    for one in (logging.getLogger(), logger):
        monkeypatch.setattr(one, "handlers", [])  # pytest's own
    assert call("run") == (0, "", "") and not (tmp_path / "run.log").read_text()
    _, _, err = call("run", "--debug")
    assert "client south failed\nTraceback" in err and "KeyError: 'boom'" in err
    log = (tmp_path / "run.log").read_text()
    assert "client north failed\nTraceback" in log and "KeyError: 'boom'" in log
    assert call("run") == (0, "", "")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_an_encoding_without_our_characters_does_not_end_a_command(encoding):
    ended = subprocess.run(
        [sys.executable, "-m", "fedmomentum", "methods"],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"},
    )
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    text = ended.stdout.decode(encoding)
    assert "fedmomentum" in text and (encoding == "utf-8") == ("?" not in text)


def test_an_unknown_option_ends_with_2(call):
    assert call("run", "--colour")[0] == 2
    assert call("--help")[0] == 0


def launch(config: Path, out: Path, *more: str, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fedmomentum", "run", str(config), "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_for_rounds(process: subprocess.Popen, out: Path, count: int) -> None:
    for _ in range(1200):
        if process.poll() is not None or len(list((out / "rounds").glob("*.json"))) >= count:
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the run made no progress")


def test_ctrl_c_saves_and_prints_how_to_resume_and_resuming_equals_never_stopping(folder, tmp_path):
    config = tiny_config(
        folder, federation={"num_rounds": 40}, evaluation={"every": 0}, run={"keep_checkpoints": 50}
    )
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    out = tmp_path / "run"
    process = launch(file, out)
    wait_for_rounds(process, out, 2)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Stopped; everything up to round" in err and "--resume" in err and "Traceback" not in err
    finished = len(timeless(out))
    assert 2 <= finished < 40 and (out / "report.html").is_file()
    short = tiny_config(
        folder,
        federation={"num_rounds": finished + 1},
        evaluation={"every": 0},
        run={"keep_checkpoints": 50},
    )
    start(short, out, function=None, resume=True)
    start(short, tmp_path / "whole", function=None)
    assert timeless(out) == timeless(tmp_path / "whole") and chain(out) == chain(tmp_path / "whole")


@pytest.mark.long
def test_a_run_gives_the_same_metrics_whatever_the_hash_seed(folder, tmp_path):
    """Sets of names have another order in every process; no sum may follow it."""
    config = tiny_config(
        folder,
        federation={"num_rounds": 2},
        lora={"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]},
    )
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    runs = [launch(file, tmp_path / seed, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    for process in runs:
        assert process.communicate(timeout=120) and process.returncode == 0
    assert timeless(tmp_path / "1") == timeless(tmp_path / "2") and chain(tmp_path / "1") == chain(
        tmp_path / "2"
    )


@pytest.mark.long
def test_many_kills_at_random_moments_lose_nothing(folder, tmp_path):
    """kill -9 at random moments, resume, again; the end equals the run that was never killed."""
    import random

    rounds = {
        "federation": {"num_rounds": 120},
        "evaluation": {"every": 3},
        "run": {"keep_checkpoints": 3},
    }
    config = tiny_config(folder, **rounds)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    out = tmp_path / "run"
    generator = random.Random(0)
    num_kills = 0
    for _ in range(12):
        process = launch(file, out, *(["--resume"] if (out / "config.toml").exists() else []))
        # Loading takes longer on a busy machine: wait for a round of this process, then kill.
        last_round = max(retained_rounds(out), default=-1)
        while process.poll() is None and max(retained_rounds(out), default=-1) == last_round:
            time.sleep(0.05)
        try:
            process.communicate(timeout=generator.uniform(0, 2))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            num_kills += 1
            continue
        assert process.returncode == 0
        break
    assert num_kills >= 3
    process = launch(file, out, "--resume")
    process.communicate(timeout=600)
    assert process.returncode == 0
    start(config, tmp_path / "whole", function=None)
    assert timeless(out) == timeless(tmp_path / "whole") and chain(out) == chain(tmp_path / "whole")


@pytest.mark.long
def test_memory_stays_flat_over_rounds(folder, tmp_path):
    """RSS after 20 rounds at most 1.05 times that after 2."""
    import psutil

    seen = []

    def observe(event, facts):
        if event == "row":
            seen.append(psutil.Process().memory_info().rss)

    start(
        tiny_config(folder, federation={"num_rounds": 20}),
        tmp_path / "run",
        function=None,
        observer=observe,
    )
    assert seen[20] <= 1.05 * seen[2], [s // 2**20 for s in seen]


def test_help_shows_no_markup(call):
    """typer escapes the brackets of defaults for rich, which does not print them here."""
    for command in main.app.registered_commands:
        code, out, _ = call(command.callback.__name__, "--help")
        assert code == 0 and "\\[" not in out, command.callback.__name__


def test_a_run_that_was_partly_deleted_is_still_called_a_run(finished, tmp_path, call):
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    (damaged / "plan.json").unlink()
    code, _, message = call("report", damaged)
    assert code == 2 and "damaged is the directory of a run, but its plan.json is" in message
    shutil.rmtree(damaged / "rounds")
    for words in (("inspect", damaged), ("export", damaged, "--to", "merged", "--out", "x")):
        code, _, message = call(*words)
        assert code == 2 and "damaged finished round 2, but" in message and "missing" in message
