"""An upload is private unless asked, one commit, refused before any work, and leaves what was exported."""

import json
import logging
import shlex

import pytest

from fedmomentum.errors import HubError
from fedmomentum.utils.hub_upload import Destination, choose_destination, upload
from tests.hub_double import TOKEN

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "my export"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags: []\n---\n# Card\n")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return folder


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_new_repository_is_private_and_holds_what_was_exported(hub, export, caplog, capfd):
    caplog.set_level(logging.INFO)
    destination = choose_destination("alice/model", is_public=False)
    assert not hub.asked("POST", ".") and not hub.repositories
    address = upload(export, destination, "FedMomentum(), round 3")
    repository = hub.repositories["alice/model"]
    assert repository.private
    assert repository.files == {**content(export), ".gitattributes": b"*.safetensors filter=lfs\n"}
    assert address == f"{hub.endpoint}/alice/model/commit/{repository.refs['main']}"
    # one commit for all of it
    (commit,) = hub.asked("POST", "/commit/")
    assert json.loads(commit.body.splitlines()[0])["value"]["summary"] == "FedMomentum(), round 3"
    # the login goes to the hub, in its header, and nowhere else
    for request in hub.requests:
        assert (request.authorization == f"Bearer {TOKEN}") == (request.host == "127.0.0.1")
        assert TOKEN not in request.path and TOKEN.encode() not in request.body
    captured = capfd.readouterr()
    assert hub.asked("PUT", "/objects/") and TOKEN not in caplog.text + captured.out + captured.err


def test_a_bare_name_belongs_to_the_user_and_public_must_be_requested(hub, export):
    destination = choose_destination("model", is_public=True)
    assert destination == Destination("alice/model", True)
    upload(export, destination, "m")
    assert not hub.repositories["alice/model"].private


def test_uploads_that_cannot_succeed_are_refused_before_anything_is_sent(
    hub, monkeypatch, tmp_path
):
    from huggingface_hub import constants

    hub.add("alice/open", {"a": b""})
    hub.add("alice/closed", {"a": b""}, private=True)

    def refusal(name, is_public=False):
        with pytest.raises(HubError) as caught:
            choose_destination(name, is_public=is_public)
        return str(caught.value)

    assert "alice/open is public: everybody could read the model" in refusal("alice/open")
    assert "alice/closed is private, and --public was given" in refusal("closed", True)
    for name in ("alice/model@v1", "a/b/c", "a b", "https://x/y"):
        assert "no name of a repository; wanted OWNER/NAME" in refusal(name)
    assert "'alice/a--b' is no name" in refusal("alice/a--b")
    hub.role = "read"
    assert "a token that may write, and this login's may only read" in refusal("alice/model")
    hub.role = "write"
    hub.fail("GET", "whoami", 503)
    assert "the hub replied 503" in refusal("alice/model")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "the login is not valid" in refusal("alice/model")
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.requests)
    assert "needs a login to the hub, and there is none; log in with `hf auth" in refusal("alice/m")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "needs a network, and HF_HUB_OFFLINE is set" in refusal("alice/m")
    assert len(hub.requests) == asked
    assert sorted(hub.repositories) == ["alice/closed", "alice/open"]
    assert not hub.asked("POST", ".") and not hub.asked("PUT", ".")


def test_a_login_in_the_clients_own_file_counts(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    with open(constants.HF_TOKEN_PATH, "w") as file:
        file.write(TOKEN)
    assert choose_destination("model", is_public=False).repository == "alice/model"


def test_an_existing_model_is_replaced_and_other_files_stay(hub, export):
    others = {"LICENSE": b"MIT", "images/plot.png": b"png", "eval.json": b"{}"}
    model = {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": b"1",
        "model.safetensors.index.json": b"{}",
        "adapter_model.bin": b"p",
        "chat_template.jinja": b"t",
        "README.md": b"old",
    }
    repository = hub.add("alice/model", {**model, **others}, private=True)
    before = repository.refs["main"]
    upload(export, choose_destination("alice/model", is_public=False), "m")
    assert repository.files == {**content(export), **others}
    assert repository.commits[before] == {**model, **others}
    # the same again: nothing to do but a commit of the same files
    upload(export, choose_destination("alice/model", is_public=False), "m")
    assert repository.files == {**content(export), **others}


def test_the_client_tries_again_and_sends_all_of_it(hub, export):
    hub.fail("PUT", "/objects/", 503, 500)
    hub.fail("POST", "/preupload/", 502)
    hub.fail("POST", "objects/batch", 429)
    upload(export, choose_destination("alice/model", is_public=False), "m")
    assert len(hub.asked("PUT", "/objects/")) == 3
    assert [request.body for request in hub.asked("PUT", "/objects/")] == [WEIGHTS] * 3
    assert hub.repositories["alice/model"].files["adapter_model.safetensors"] == WEIGHTS


@pytest.mark.parametrize(
    ("method", "pattern", "status"),
    [
        ("POST", "repos/create", 500),
        ("PUT", "/objects/", 500),
        ("POST", "/commit/", 504),
        ("POST", "/commit/", 412),
        ("GET", "/api/models/alice/model", 500),
    ],
)
def test_a_failure_keeps_the_export_and_says_how_to_retry(hub, export, method, pattern, status):
    hub.add("alice/model", {"config.json": b"{}"}, private=True)
    before = content(export)
    destination = choose_destination("alice/model", is_public=False)
    hub.echoes = True
    hub.fail(method, pattern, *[status] * 6)
    with pytest.raises(
        HubError, match=f"upload to alice/model failed: the hub replied {status}"
    ) as e:
        upload(export, destination, "m")
    text = str(e.value)
    assert content(export) == before and f"is complete in {export}" in text and TOKEN not in text
    words = shlex.split(text.partition("upload it later with: ")[2])
    delete = ["--delete", "config.json"]
    assert words == ["hf", "upload", "alice/model", str(export), ".", "--private", *delete]
    assert hub.repositories["alice/model"].files == {"config.json": b"{}"}


def test_a_repository_that_became_public_gets_nothing(hub, export):
    destination = choose_destination("alice/model", is_public=False)
    hub.add("alice/model", {"a": b""})
    with pytest.raises(HubError, match=r"nothing was uploaded: .* is public.* is complete in") as e:
        upload(export, destination, "m")
    assert "hf upload" not in str(e.value)
    assert hub.repositories["alice/model"].files == {"a": b""} and not hub.asked("PUT", ".")


def test_a_commit_of_another_user_in_between_is_not_undone(hub, export, monkeypatch):
    import huggingface_hub

    repository = hub.add("alice/model", {"a": b""}, private=True)
    destination = choose_destination("alice/model", is_public=False)
    send = huggingface_hub.HfApi.create_commit

    def late(self, *args, **kwargs):
        repository.commit({"a": b"", "theirs": b"1"})
        return send(self, *args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    with pytest.raises(HubError, match="replied 412, 'A commit has happened since'"):
        upload(export, destination, "m")
    assert repository.files == {"a": b"", "theirs": b"1"}
