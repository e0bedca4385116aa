"""Rosters: made from what sites gave each other, and a node that its roster does not know takes no part."""

import pytest
from typer.testing import CliRunner

from fedmomentum.cli.main import app
from fedmomentum.config.toml import from_dict
from fedmomentum.errors import ConfigError
from fedmomentum.flower.keys import admit_node, load_private_key, make_node_key
from fedmomentum.flower.parties import (
    JOURNAL,
    make_roster,
    node_identity,
    node_party,
    server_roster,
    spoken_fingerprint,
)
from fedmomentum.secure_sum.roster import Roster
from tests.flower.network import make_keys

SITES = ("north", "south", "west")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sites")
    for site in SITES:
        make_node_key(site, folder)
    make_roster([folder / f"{site}.pub" for site in SITES], folder / "roster.pub")
    return folder


def public(folder):
    return [folder / f"{site}.pub" for site in SITES]


def secure(*, client_fraction=1.0, **settings):
    settings = {key.replace("_", "-"): value for key, value in settings.items()}
    return from_dict(
        {
            "privacy": {"secure-aggregation": True} | settings,
            "federation": {"client-fraction": client_fraction},
        }
    )


def test_all_sites_make_the_same_file_and_the_server_has_the_same_keys(folder, tmp_path):
    new_roster = make_roster(list(reversed(public(folder))), tmp_path / "other.pub")
    assert (tmp_path / "other.pub").read_bytes() == (folder / "roster.pub").read_bytes()
    keys = make_keys(tmp_path)
    for file in public(folder):
        admit_node(file, keys)
    assert server_roster(keys).fingerprint() == new_roster.fingerprint()
    # as `cat *.pub` makes it
    (tmp_path / "cat.pub").write_bytes(b"".join(f.read_bytes() for f in public(folder)))
    assert Roster.read(tmp_path / "cat.pub").fingerprint() == new_roster.fingerprint()
    assert spoken_fingerprint(new_roster).replace(" ", "") == new_roster.fingerprint()


def test_a_node_signs_with_the_key_that_the_roster_has(folder):
    privacy = secure(roster=str(folder / "roster.pub"))
    identity = node_identity(privacy, "north", folder / "north.key")
    assert identity.key.public_key() == load_private_key(folder / "north.key").public_key()
    assert set(identity.roster.keys) == set(SITES) and not identity.trusts_server
    assert node_identity(from_dict({}), "north", folder / "north.key") is None
    party = node_party(privacy, "north", folder / "north.key", folder / "store")
    assert party.journal.file == folder / "store" / JOURNAL


@pytest.mark.parametrize(
    ("settings", "name", "key", "message"),
    [
        ({}, "north", "north.key", "privacy.roster is missing: .* fedmomentum keys roster"),
        ({"roster": "none.pub"}, "north", "north.key", "there is no roster"),
        ({"roster": "north.pub"}, "north", "north.key", "has 1 parties, and a secure sum needs"),
        ({"roster": "roster.pub"}, "north", "south.key", "does not have north with the public"),
        ({"roster": "roster.pub"}, "east", "north.key", "does not have east with the public key"),
    ],
)
def test_a_node_without_a_roster_of_its_own_takes_no_part(folder, settings, name, key, message):
    if "roster" in settings:
        settings = {"roster": str(folder / settings["roster"])}
    with pytest.raises(ConfigError, match=message):
        node_identity(secure(**settings), name, folder / key)


def test_a_node_takes_part_in_sums_of_enough_of_its_roster(folder, tmp_path):
    many = tmp_path / "many"
    names = [f"site{index}" for index in range(10)]
    for name in names:
        make_node_key(name, many)
    make_roster([many / f"{name}.pub" for name in names], many / "roster.pub")

    def least(**settings):
        config = secure(roster=str(many / "roster.pub"), **settings)
        return node_identity(config, "site0", many / "site0.key").least_threshold

    assert least() == 7 and least(client_fraction=0.5) == 4
    assert least(trusts_server=True) == 6 and least(threshold=10) == 10


def test_names_and_keys_are_unique(folder, tmp_path):
    north, south, west = public(folder)
    with pytest.raises(ConfigError, match="north is in .*north.pub already"):
        make_roster([north, south, west, north], None)
    fields = north.read_text().split()
    (tmp_path / "twin.pub").write_text(f"{fields[0]} {fields[1]} twin\n")
    with pytest.raises(ConfigError, match="twin has the key of north, in .*north.pub"):
        make_roster([north, south, tmp_path / "twin.pub"], None)
    with pytest.raises(ConfigError, match="3 to 100 parties; these are 2"):
        make_roster([north, south], None)
    with pytest.raises(ConfigError, match="roster.pub exists already"):
        make_roster(public(folder), folder / "roster.pub")


def test_the_command_prints_what_people_compare(folder, tmp_path):
    arguments = ["keys", "roster", *map(str, public(folder)), "--out", str(tmp_path / "r.pub")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Parties: north, south, west" in result.output
    fingerprint = spoken_fingerprint(Roster.read(tmp_path / "r.pub"))
    assert f"Fingerprint: {fingerprint}" in result.output
    # of an existing file, to read it to someone
    second_call = CliRunner().invoke(app, ["keys", "roster", str(tmp_path / "r.pub")])
    assert fingerprint in second_call.output and "The roster is in" not in second_call.output
