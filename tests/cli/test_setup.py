"""`setup --next` prints for a next CA what `setup` would print if its keys were the authority's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.cli.setup import files_for, for_next_cas
from bridge.errors import SettingsError
from bridge.settings.load import parse
from bridge.settings.tables import Settings
from tests.kit.pki import Pki, handmade_pki


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return handmade_pki(tmp_path / "node")


def texts(settings: Settings, kind: str) -> list[str]:
    return [one.text for one in files_for(settings, kind, "ca", None)]


@pytest.mark.parametrize(
    ("kind", "key", "old", "new"),
    [
        ("vault", "mount", "pki-1", "pki-2"),
        ("cfssl", "url", "https://cfssl.example.com:8881", "https://cfssl.example.com:8882"),
        ("openssl", "dir", "/srv/ca/1", "/srv/ca/2"),
        ("cmp", "path", ".well-known/cmp/p/old-{usage}", ".well-known/cmp/p/new-{usage}"),
        ("est", "label", "old/{usage}", "new/{usage}"),
    ],
)
def test_each_backends_administrator_gets_what_the_next_ca_needs(
    pki: Pki, kind: str, key: str, old: str, new: str
) -> None:
    """Names of mounts, directories, labels and paths are the next one's; without the option they are those of now."""
    node = f'[node]\npki_dir = "{pki.pki_dir}"\nkubeconfig_dir = "{pki.kubeconfig_dir}"\n'
    table = f'[backend.corp]\ntype = "{kind}"\n[authority.ca]\nbackend = "corp"\n{key} = '
    both = parse(f'{node}{table}"{old}"\n[authority.ca.next]\nanchor = "/next.crt"\n{key} = "{new}"\n')
    alone = parse(f'{node}{table}"{new}"\n')
    assert texts(for_next_cas(both), kind) == texts(alone, kind)
    assert texts(both, kind) != texts(alone, kind)


def test_without_a_next_ca_the_option_is_a_mistake() -> None:
    """It names the table that is not there."""
    with pytest.raises(SettingsError, match="a table `next` with `anchor"):
        for_next_cas(parse(""))
