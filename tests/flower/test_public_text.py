"""What another machine learns of an error: its type, but no path, no file name and no data."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmomentum import errors
from fedmomentum.errors import (
    AdapterError,
    ConfigError,
    DamagedObject,
    DataError,
    FedMomentumError,
    FormatError,
    HubError,
    LostRoundError,
    MissingObject,
    ModelError,
    PayloadError,
    PrivacyError,
    QuorumError,
    SecureSumError,
    public_text,
)

OURS = [
    FedMomentumError,
    ConfigError,
    AdapterError,
    ModelError,
    FormatError,
    HubError,
    MissingObject,
    DamagedObject,
    PayloadError,
    QuorumError,
    SecureSumError,
    PrivacyError,
]
# what a path can be made of, but for blanks, brackets and quotes, at which a message can be taken
# to continue
parts = st.text(
    st.characters(
        codec="utf-8", exclude_categories=["Z", "C"], exclude_characters="/\\'\"(),;:=[]"
    ),
    min_size=1,
    max_size=12,
)
roots = st.sampled_from(["/", "./", "../", "~/", "C:\\", "\\\\share\\", "data/"])
# names of files may have blanks and commas in them
words = st.text("abcdefghijklmnopqrstuvwxyz .,;:=()[]'\"0123456789", max_size=30)


@st.composite
def paths(draw):
    names = draw(st.lists(parts, min_size=1, max_size=4))
    return draw(roots) + draw(st.sampled_from("/\\")).join(names)


@given(
    error=st.sampled_from(OURS),
    path=paths(),
    before=words,
    after=words,
    quote=st.sampled_from(["", "'", '"', " "]),
)
def test_no_path_and_no_part_of_one_leaves(error, path, before, after, quote):
    """Wherever in a message it stands; what is before it, and after the next quote, bracket or colon, is kept."""
    text = public_text(error(f"{before} {quote}{path}{quote} {after}"))
    remainder = re.search(r"['\"()\[\]:].*", f"{quote.strip()} {after}")
    assert (
        text == f"{error.__name__}: {before} {quote}[path]{remainder.group() if remainder else ''}"
    )


@given(words, words, paths())
def test_errors_of_data_and_of_other_libraries_show_only_their_type(before, secret, path):
    message = f"{before} {path}: {secret}"
    assert public_text(DataError(message)) == "DataError (its own log says more)"
    others = (
        ValueError(message),
        OSError(2, message, path),
        KeyError(secret),
        UnicodeDecodeError("x", b"x", 0, 1, secret),
    )
    for error in others:
        assert public_text(error) == f"{type(error).__name__} (its own log says more)"


def test_subclasses_of_data_errors_and_errors_of_libraries_show_only_their_type():
    class OwnDataError(DataError):
        pass

    class Misleading(Exception):
        def __str__(self):
            raise AssertionError("nobody may ask")

    assert public_text(OwnDataError("secret")) == "OwnDataError (its own log says more)"
    assert public_text(Misleading()) == "Misleading (its own log says more)"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("cannot read /srv/base: no such file", "cannot read [path]: no such file"),
        ("model.name='/srv/base' is no folder", "model.name='[path]' is no folder"),
        ("(C:\\data\\north.csv)", "([path])"),
        ("cannot read /data/Doe, Jane.jsonl: no such file", "cannot read [path]: no such file"),
        ("module model.layers.0.self_attn.q_proj has rank 4; wanted 8", None),
        ("base differs: 5f1a..., wanted 77ab... (3 of 4)", None),
    ],
)
def test_what_helps_to_fix_it_is_shown(message, shown):
    assert public_text(ModelError(message)) == f"ModelError: {shown or message}"


def test_every_error_class_of_the_package_is_covered_here():
    found = {
        e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, FedMomentumError)
    }
    assert found == {*OURS, DataError, LostRoundError}
    lost = LostRoundError("cannot read /srv/base: no such file", {"north": "gone"})
    assert public_text(lost) == "LostRoundError: cannot read [path]: no such file"
