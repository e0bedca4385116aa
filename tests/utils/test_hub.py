"""Names on the hub are distinguished from paths, and every error of the hub says what to do."""

import logging
import os

import pytest

from fedmomentum.errors import HubError
from fedmomentum.utils.hub import (
    HubName,
    download,
    explain,
    parse_hub_name,
    split_revision,
    without_secrets,
)
from tests.hub_double import TOKEN

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "run.py": b"", "old.bin": b"x"}


def get(name, patterns=("*.json", "*.safetensors")):
    return download(name, allow_patterns=patterns, ignore_patterns=["*/*"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", HubName("org/model")),
        ("org/model@v1.0", HubName("org/model", "v1.0")),
        ("org/model@refs/pr/3", HubName("org/model", "refs/pr/3")),
        ("model", None),
        ("org/model/file", None),
        ("org/model@", None),
        ("./org/model", None),
        ("../model", None),
        ("~/model", None),
        ("/org/model", None),
        ("org/", None),
        ("o rg/model", None),
    ],
)
def test_a_text_is_a_name_or_a_path(text, expected):
    assert parse_hub_name(text) == expected
    if expected is not None:
        assert str(expected) == text


def test_an_existing_directory_is_a_path_whatever_it_looks_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "org/model@v1"):
        assert parse_hub_name(name) is not None
        os.makedirs(name)
        assert parse_hub_name(name) is None
        assert split_revision(name) == (name, None)
    assert split_revision("gpt2@v1") == ("gpt2", "v1")
    assert split_revision("org/other@v1") == ("org/other", "v1")
    assert split_revision("/somewhere/model@v1") == ("/somewhere/model@v1", None)


def test_only_requested_files_of_the_named_revision_are_downloaded(hub):
    repository = hub.add("org/model", FILES)
    first = repository.refs["main"]
    repository.refs["v1"] = first
    repository.refs["refs/pr/1"] = first
    repository.commit({**FILES, "config.json": b'{"new": 1}'})
    newest = get(HubName("org/model"))
    assert sorted(file.name for file in newest.iterdir()) == ["config.json", "model.safetensors"]
    assert (newest / "config.json").read_bytes() == b'{"new": 1}'
    for revision in ("v1", first, "refs/pr/1"):
        directory = get(HubName("org/model", revision))
        assert directory.name == first
        assert (directory / "config.json").read_bytes() == b"{}"
    assert not hub.asked("GET", r"run\.py|old\.bin") and not hub.asked("HEAD", r"run\.py|old\.bin")
    # large files are on another host, which gets no login
    for request in hub.requests:
        assert (request.authorization == f"Bearer {TOKEN}") == (request.host == "127.0.0.1")
    assert {request.host for request in hub.requests} == {"127.0.0.1", "localhost"}


def test_a_private_repository_needs_the_login(hub, monkeypatch):
    hub.add("org/secret", FILES, private=True)
    assert (get(HubName("org/secret")) / "model.safetensors").read_bytes() == b"weights"
    monkeypatch.delenv("HF_TOKEN")
    hub.add("org/secret2", FILES, private=True)
    with pytest.raises(HubError, match=r"no repository org/secret2, or none .*hf auth login"):
        get(HubName("org/secret2"))


def test_errors_of_the_hub_are_reported_by_name(hub, monkeypatch):
    hub.add("org/model", FILES)
    hub.add("org/gated", FILES, gated=True)
    cases = {
        "org/none": "the hub has no repository org/none.*Correct the name",
        "org/model@v9": "org/model has no revision 'v9'; give a branch, tag or commit",
        "org/gated": f"org/gated is gated: ask for access at {hub.endpoint}/org/gated",
        "org/a..b": "'org/a..b' is no name of a repository; wanted OWNER/NAME",
    }
    for name, expected in cases.items():
        with pytest.raises(HubError, match=expected):
            get(HubName(*split_revision(name)))
    for status, expected in ((503, "overloaded or failing. Try again"), (429, "Try again later")):
        hub.fail("GET", "org/model", *[status] * 10)
        with pytest.raises(HubError, match=f"the hub replied {status}, 'not now': .*{expected}"):
            get(HubName("org/model", "main"))
    hub.failures.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError, match=r"replied 401.*login is not valid. Log in again"):
        get(HubName("org/model"))


def test_without_a_network_the_cache_is_used_and_missing_files_are_named(hub, monkeypatch):
    from huggingface_hub import constants

    hub.add("org/model", FILES)
    directory = get(HubName("org/model"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get(HubName("org/model")) == directory
    with pytest.raises(HubError, match=r"does not hold all of org/other@v1, and HF_HUB_OFFLINE is"):
        get(HubName("org/other", "v1"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127.0.0.1:9 cannot be reached \(.*network and"):
        get(HubName("org/other"))


def test_no_message_and_no_log_contains_a_token(hub, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    hub.echoes = True
    hub.add("org/model", FILES)
    hub.fail("GET", "org/model", 403)
    with pytest.raises(HubError, match=r"replied 403, 'not now, \[token\]'.*may not do that"):
        get(HubName("org/model"))
    monkeypatch.setenv("HF_TOKEN", "of-another-kind")
    hub.fail("GET", "org/model", 400)
    with pytest.raises(HubError, match=r"replied 400, 'not now, ") as caught:
        get(HubName("org/model"))
    text = str(caught.value) + explain(RuntimeError(TOKEN), HubName("org/model"))
    for secret in (TOKEN, "of-another-kind"):
        assert secret not in text
        assert secret not in caplog.text
    assert without_secrets(f"a {TOKEN} b") == "a [token] b"
