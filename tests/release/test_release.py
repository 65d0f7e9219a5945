"""A release: packages that install and go without a network, a bill of materials, and a signature that counts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.kit import releases
from tests.kit.trees import Tree

VERIFY = ("ssh-keygen", "-Y", "verify", "-I", "release@ca-bridge", "-n", "ca-bridge-release")


def the(released: Path, ending: str) -> Path:
    """The released file of a kind."""
    (found,) = (released / "dist").glob(f"ca-bridge*{ending}")
    return found


def changed_program(tree: Tree) -> set[str]:
    """What a package has added, without the package managers' own records."""
    own = ("/root/", "/tmp/", "/var/lib/dpkg/", "/var/lib/rpm", "/var/log/", "/var/cache/", "/usr/lib/sysimage/")
    return {path for path in tree.changed() if not path.startswith(own)}


@pytest.mark.first_use("1")
def test_the_debian_package_installs_and_goes(tree: Tree, released: Path) -> None:
    """dpkg installs and removes it without a network; not over the offline file's installation, and not in the middle of a renewal."""
    tree.put("/root/ca-bridge.deb", the(released, ".deb").read_bytes())
    tree.run("dpkg -i /root/ca-bridge.deb && ca-bridge --version && cd / && ca-bridge settings init")
    there = tree.run("cd /usr/lib/systemd/system; ls ca-bridge*").stdout.split()
    assert there == sorted(
        unit.name for kind in ("systemd", "desk") for unit in (releases.ROOT / "config" / kind).glob("ca-bridge*")
    )
    assert "WantedBy=timers.target" in tree.run("cat /lib/systemd/system/ca-bridge.timer").stdout
    assert "ExecStart=/usr/bin/ca-bridge renew" in tree.run("ca-bridge setup systemd").stdout
    assert tree.run("dpkg --verify ca-bridge").stdout == ""
    assert tree.run("ca-bridge help trouble").stdout.startswith("# When something is wrong")

    tree.run("mkdir -m 700 /var/lib/ca-bridge; echo {} >/var/lib/ca-bridge/journal.json")
    refused = tree.run("dpkg --remove ca-bridge", check=False)
    assert (refused.returncode, "run ca-bridge recover first" in refused.stderr) == (1, True)
    tree.run("mkdir -p -m 700 /srv/state /etc/ca-bridge; mv /var/lib/ca-bridge/journal.json /srv/state/")
    tree.put("/etc/ca-bridge/config.toml", b'[node]\nstate_dir = "/srv/state"\n')
    refused = tree.run("dpkg --remove ca-bridge", check=False)
    assert (refused.returncode, "/srv/state: wanted no interrupted renewal" in refused.stderr) == (1, True)
    tree.run("ca-bridge --version; rm -r /srv/state")
    purged = tree.run("dpkg --purge ca-bridge")
    assert "/etc/ca-bridge is kept" in purged.stderr
    assert changed_program(tree) <= {"/etc/ca-bridge/config.toml"}

    tree.run("mkdir -p /opt/ca-bridge/current/bin; ln -s /opt/ca-bridge/current/bin/ca-bridge /usr/bin/ca-bridge")
    refused = tree.run("dpkg -i /root/ca-bridge.deb", check=False)
    assert (refused.returncode, "run /opt/ca-bridge/uninstall" in refused.stderr) == (1, True)


def test_a_package_s_upgrade_waits_for_a_run_and_restarts_services(bookworm: Tree, released: Path) -> None:
    """A run at work would lose its modules in the middle; services that run get the new ones, and end with the package."""
    bookworm.put("/root/ca-bridge.deb", the(released, ".deb").read_bytes())
    bookworm.run("dpkg -i /root/ca-bridge.deb; mkdir -p -m 700 /var/lib/ca-bridge /srv/state /etc/ca-bridge")
    bookworm.put("/etc/ca-bridge/config.toml", b'[node]\nstate_dir = "/srv/state"\n')
    bookworm.put("/usr/bin/systemctl", b'#!/bin/sh\necho "$@" >>/root/asked\n', 0o755)
    bookworm.run("mkdir -p /run/systemd/system")
    for state in ("/var/lib/ca-bridge", "/srv/state"):
        for action in ("-i /root/ca-bridge.deb", "--remove ca-bridge"):
            refused = bookworm.run(f"flock {state}/lock dpkg {action}", check=False)
            assert (refused.returncode, f"{state}: wanted no run at work" in refused.stderr) == (1, True), refused
            bookworm.run("ca-bridge --version")
    bookworm.run("rm -f /root/asked; dpkg -i /root/ca-bridge.deb")
    assert "try-restart ca-bridge-gateway*.service ca-bridge-serve*.service" in bookworm.run("cat /root/asked").stdout
    bookworm.run("rm -f /root/asked; dpkg --remove ca-bridge")
    assert re.search(r"^stop .*ca-bridge-serve\*\.service$", bookworm.run("cat /root/asked").stdout, re.MULTILINE)


@pytest.mark.first_use("1")
def test_the_rpm_installs_and_goes(bookworm: Tree, released: Path) -> None:
    """rpm installs and removes it with its scripts; on this Debian its dependencies are read here, and not resolved by rpm."""
    rpm = the(released, ".rpm")
    needs = subprocess.check_output(["rpm", "-qp", "--requires", str(rpm)], text=True)
    assert "(/usr/bin/python3.13 or /usr/bin/python3.12 or /usr/bin/python3.11)" in needs
    assert "libc.so.6(GLIBC_2.28)(64bit)" in needs
    install, erase = f"rpm --root $ROOT --nodeps -i {rpm}", "rpm --root $ROOT --nodeps -e ca-bridge"
    bookworm.run("mkdir -p /opt/ca-bridge/current/bin; ln -s /opt/ca-bridge/current/bin/ca-bridge /usr/bin/ca-bridge")
    assert "run /opt/ca-bridge/uninstall" in bookworm.host(install, check=False).stderr
    bookworm.run("rm -r /opt/ca-bridge /usr/bin/ca-bridge")

    bookworm.host(install)
    assert "12 renewed" in bookworm.run("cd / && ca-bridge demo").stdout
    assert bookworm.run("ca-bridge help trouble").stdout.startswith("# When something is wrong")
    assert bookworm.host("rpm --root $ROOT --verify --nodeps ca-bridge").stdout == ""
    bookworm.run("mkdir -m 700 /var/lib/ca-bridge; echo {} >/var/lib/ca-bridge/journal.json")
    assert "run ca-bridge recover first" in bookworm.host(erase, check=False).stderr
    for at_work in (erase, f"rpm --root $ROOT --nodeps -U --replacepkgs {rpm}"):
        refused = bookworm.host(f"flock $ROOT/var/lib/ca-bridge/lock {at_work}", check=False)
        assert "/var/lib/ca-bridge: wanted no run at work" in refused.stderr
    bookworm.run(
        "mkdir -p -m 700 /srv/state /etc/ca-bridge; mv /var/lib/ca-bridge/journal.json /srv/state/; rm -r /var/lib/ca-bridge"
    )
    bookworm.put("/etc/ca-bridge/config.toml", b'[node]\nstate_dir = "/srv/state"\n')
    assert "/srv/state: wanted no interrupted renewal" in bookworm.host(erase, check=False).stderr
    bookworm.run("ca-bridge --version; rm -r /srv/state /etc/ca-bridge")
    bookworm.host(erase)
    assert changed_program(bookworm) == set()


def test_lintian_has_nothing_to_say(released: Path) -> None:
    """lintian reports no error and no warning, and no exception is unused."""
    command = ["lintian", "--allow-root", "--display-info", "--fail-on", "error,warning", "--tag-display-limit", "0"]
    done = subprocess.run([*command, str(the(released, ".deb"))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith(("E:", "W:")) or "unused-override" in line]


def locked() -> dict[str, tuple[str, set[str]]]:
    """Version and digests of all that is locked, but for Windows."""
    found: dict[str, tuple[str, set[str]]] = {}
    name = ""
    for line in (releases.ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if begins := re.match(r"([\w.-]+)==([^\s;]+)", line):
            name = "" if "win32" in line else begins[1]
            found |= {name: (begins[2], set())} if name else {}
        elif name and (digest := re.search(r"sha256:([0-9a-f]{64})", line)):
            found[name][1].add(digest[1])
    return found


def bill(released: Path) -> dict[str, Any]:
    """The bill of materials."""
    loaded: dict[str, Any] = json.loads(the(released, ".cdx.json").read_text(encoding="utf-8"))
    return loaded


def test_the_bill_is_cyclonedx_and_has_all_that_is_locked(released: Path) -> None:
    """CycloneDX's own schema takes the bill, and refuses one with a word too many; versions and digests are the lock's."""
    from cyclonedx.schema import SchemaVersion  # takes a second, which is each worker's that collects this file
    from cyclonedx.validation.json import JsonStrictValidator

    check = JsonStrictValidator(SchemaVersion.V1_6)
    text = the(released, ".cdx.json").read_text(encoding="utf-8")
    assert check.validate_str(text) is None
    assert check.validate_str(text.replace('"bomFormat"', '"bomformat"')) is not None

    wanted = locked()
    assert len(wanted) > 10
    components = bill(released)["components"]
    assert {one["name"]: one["version"] for one in components} == {name: lock[0] for name, lock in wanted.items()}
    for one in components:
        digests = {reference["hashes"][0]["content"] for reference in one["externalReferences"]}
        assert digests <= wanted[one["name"]][1]
        assert one["licenses"], one["name"]
    depends = {one["ref"]: one["dependsOn"] for one in bill(released)["dependencies"]}
    (own,) = [ref for ref in depends if "kubeadm-ca-bridge" in ref]
    reached, todo = set(), [own]
    while todo:
        reached.add(ref := todo.pop())
        todo += [one for one in depends[ref] if one not in reached]
    assert reached == set(depends)  # something depends on each of them


def verified(directory: Path, signers: Path) -> bool:
    """As CONTRIBUTING.md has it."""
    sums = directory / "SHA256SUMS"
    by_key = [*VERIFY, "-f", str(signers), "-s", f"{sums}.sig"]
    signed = subprocess.run(by_key, input=sums.read_bytes(), capture_output=True, check=False)
    files = subprocess.run(
        ["sha256sum", "--check", "--quiet", sums.name], cwd=directory, capture_output=True, check=False
    )
    return signed.returncode == files.returncode == 0


def test_a_signature_counts_only_for_these_bytes_and_this_key(released: Path, tmp_path: Path) -> None:
    """A changed byte in a file, changed sums, another key, and a key that is for something else are refused."""
    dist, signers = tmp_path / "dist", released / "signers"
    shutil.copytree(released / "dist", dist)
    assert verified(dist, signers)

    data = bytearray(the(released, ".run").read_bytes())
    data[-1] ^= 1
    (dist / the(released, ".run").name).write_bytes(data)
    assert not verified(dist, signers)
    sums = subprocess.check_output(["sh", "-c", "sha256sum ca-bridge*"], cwd=dist)
    (dist / "SHA256SUMS").write_bytes(sums)
    assert not verified(dist, signers)

    releases.make_signer(tmp_path / "other", tmp_path / "others")
    assert not verified(released / "dist", tmp_path / "others")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(signers.read_text().replace("ca-bridge-release", "git"))
    assert not verified(released / "dist", elsewhere)


def test_the_page_s_commands_find_an_unsigned_file(released: Path, tmp_path: Path) -> None:
    """Beside good files with a good signature, under the name of a later version; the release's own file passes."""
    dist = tmp_path / "dist"
    shutil.copytree(released / "dist", dist)
    shutil.copy(released / "signers", dist / "allowed_signers")
    page = (releases.ROOT / "docs/install.md").read_text()
    script = page.partition("## Verify a release")[2].partition("```sh\n")[2].partition("```")[0]
    (own,) = [path.name for path in dist.glob("*.run")]
    planted = "ca-bridge-9.9.9-linux-x86_64.run"
    (dist / planted).write_text("#!/bin/sh\n")
    for name, is_good in ((own, True), (planted, False)):
        commands, count = re.subn(r"^file=\S+", f"file={name}", script, flags=re.MULTILINE)
        assert count == 1
        ended = subprocess.run(["sh", "-e", "-c", commands], cwd=dist, capture_output=True, text=True, check=False)
        assert (ended.returncode == 0, f"{name}: OK" in ended.stdout) == (is_good, is_good), ended.stderr


@pytest.mark.parametrize("case", ["no key", "unknown key", "changed"])
def test_nothing_is_built_that_could_not_be_signed(case: str, tmp_path: Path) -> None:
    """No release is built without a key, with a key that the project does not name, or of a tree that is no commit."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(releases.ROOT), str(clone)], check=True)
    shutil.copy(releases.ROOT / "scripts/release", clone / "scripts/release")
    releases.make_signer(tmp_path / "key", tmp_path / "signers")
    arguments = {
        "no key": [],
        "unknown key": ["--key", str(tmp_path / "key")],
        "changed": ["--key", str(tmp_path / "key"), "--signers", str(tmp_path / "signers")],
    }[case]
    (clone / "new").touch()
    wanted = {
        "no key": "wanted --key",
        "unknown key": "wanted the public half",
        "changed": "wanted a tree without changes",
    }
    done = subprocess.run(["scripts/release", *arguments], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert wanted[case] in done.stderr
    assert not (clone / "dist").exists()
