"""The units at work, in bare Debians that their own systemd has booted, with a node's files and an `openssl ca`."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509

from backends.openssl.index import LOCK_NAME
from bridge.node import sample_pki
from bridge.pki.certificates import san_entries
from bridge.specs import AUTHORITIES
from tests.kit import cmp, est, gateways, kube_api, openbao, releases
from tests.kit.cas import Bridge, add_cfssl, add_openssl, add_vault, live_certificates
from tests.kit.est import Tls
from tests.kit.issuing import SERVER
from tests.kit.pki import ADDRESS, NODE, handmade_pki
from tests.kit.trees import TIMER, Booted, Tree

ROOT = Path(__file__).resolve().parents[2]
SERVICE = "ca-bridge.service"
STAMP = "/var/lib/systemd/timers/stamp-ca-bridge.timer"
PASSPHRASE = "carried by systemd"
SETTINGS = """\
[backend.desk]
type = "openssl"
passphrase_credential = "ca-passphrase"

[authority.ca]
backend = "desk"
dir = "/srv/ca/ca"

[authority.etcd-ca]
backend = "desk"
dir = "/srv/ca/etcd-ca"

[authority.front-proxy-ca]
backend = "desk"
dir = "/srv/ca/front-proxy-ca"
"""
#: As docs/run-nightly.md has it: the secret, and where this CA's database is.
DROP_IN = """\
[Service]
LoadCredential=ca-passphrase:/etc/ca-bridge/ca-passphrase
ReadWritePaths=/srv/ca
"""
#: All that the unit does not name is read-only, or not there; a restart command such as this one still works.
READ_ONLY = """\
[Service]
ExecStartPre=/bin/sh -c '! touch /usr/touched && ! touch /etc/touched && ! touch /var/touched && ! touch /root/touched'
ExecStartPre=/bin/sh -c 'touch /tmp/touched && ! ls /dev/kmsg'
ExecStartPre=systemctl restart systemd-tmpfiles-clean.service
"""
#: The program, killed by itself when the first file is to be replaced: however fast the machine is, it is in the middle.
CUT_OFF = b"""import os, pathlib, runpy, signal, sys
journal = pathlib.Path("/var/lib/ca-bridge/journal.json")
def cut_off(event, _):
    if event == "os.rename" and journal.exists():
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(cut_off)
os.environ["CREDENTIALS_DIRECTORY"] = "/etc/ca-bridge"
sys.argv = ["start.py", "ca-bridge", "renew", "all"]
runpy.run_path("/opt/ca-bridge/current/lib/start.py", run_name="__main__")
"""
#: A site's own CA: `$1` is its directory, whose owner alone can sign with it.
SITE_CA = """\
#!/bin/sh
%s
case $CERTMONGER_OPERATION in SUBMIT) ;; FETCH-ROOTS) cat "$1/$CA_BRIDGE_AUTHORITY/ca.crt"; exit 0 ;; *) exit 6 ;; esac
[ -O "$1/passphrase" ] || exit 4
work=$(mktemp -d) && cd "$work" || exit 3
printf '%%s\\n' "$CERTMONGER_CSR" >csr
printf 'basicConstraints=critical,CA:FALSE\\nkeyUsage=critical,digitalSignature,keyEncipherment\\n' >extensions
printf 'extendedKeyUsage=%%s\\n' "$CA_BRIDGE_EKUS" >>extensions
ca=$1/$CA_BRIDGE_AUTHORITY
openssl x509 -req -in csr -CA $ca/ca.crt -CAkey $ca/ca.key -passin "file:$1/passphrase" -days "$CA_BRIDGE_DAYS" \\
  -copy_extensions copy -extfile extensions -set_serial "0x$(openssl rand -hex 16)" || exit 2
cat $ca/ca.crt
"""
AT_ONCE = "[Timer]\nRandomizedDelaySec=0\nAccuracySec=1s\n"


def make_node(tree: Tree, directory: Path, *, left: timedelta) -> None:
    """A control plane's files whose certificates have so much left, the CA's directories, and settings."""
    now = datetime.now(UTC)
    made = now - timedelta(days=365) + left
    cas = sample_pki.make(directory / "kubernetes", now=made, not_after=now + left)
    for name, ca in cas.items():
        sample_pki.create_openssl_directory(directory / "ca" / name, ca.certificate_pem, ca.key_pem, PASSPHRASE)
    tree.put_directory(directory / "kubernetes", "/etc/kubernetes")
    tree.put_directory(directory / "ca", "/srv/ca")
    tree.run("chmod 755 /etc/kubernetes /srv/ca")
    tree.put("/etc/ca-bridge/config.toml", SETTINGS.encode())
    tree.put("/etc/ca-bridge/ca-passphrase", PASSPHRASE.encode(), 0o600)
    tree.put(f"/etc/systemd/system/{SERVICE}.d/site.conf", DROP_IN.encode())


def end_of(machine: Booted | Tree, name: str = "apiserver") -> datetime:
    """When a certificate ends."""
    pem = machine.run(f"cat /etc/kubernetes/pki/{name}.crt").stdout.encode()
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def properties(machine: Booted, unit: str, *names: str) -> list[str]:
    """What systemd knows of a unit."""
    shown = machine.run(f"systemctl show {unit} {' '.join(f'-p {name}' for name in names)}").stdout
    found = dict(line.split("=", 1) for line in shown.splitlines())
    return [found[name] for name in names]


def test_the_timer_catches_up_and_renews_with_a_credential(installed: Tree, tmp_path: Path) -> None:
    """After nights in which the machine was off; what the unit does not name is read-only; the next run is at night."""
    make_node(installed, tmp_path / "node", left=timedelta(days=20))
    installed.put(f"/etc/systemd/system/{SERVICE}.d/try.conf", READ_ONLY.encode())
    installed.put(TIMER, AT_ONCE.encode())
    installed.run(f"mkdir -p {Path(STAMP).parent}; touch -d '3 days ago' {STAMP}")
    assert end_of(installed) < datetime.now(UTC) + timedelta(days=21)
    with installed.booted() as machine:
        machine.wait(f"[ $(systemctl show {SERVICE} -p ExecMainExitTimestampMonotonic --value) != 0 ]")
        machine.wait(
            f"! systemctl is-active --quiet {SERVICE} && ! systemctl show {SERVICE} -p SubState | grep -q stop"
        )
        assert properties(machine, SERVICE, "Result", "ExecMainStatus") == ["success", "0"], machine.journal()
        assert end_of(machine) > datetime.now(UTC) + timedelta(days=300)
        assert "12 renewed" in machine.journal()
        assert PASSPHRASE not in machine.journal()
        assert re.search(r" 03:[1-4]\d:\d\d UTC", properties(machine, "ca-bridge.timer", "NextElapseUSecRealtime")[0])
        # The twins: the same words outside the unit, and the secret where it was not loaded.
        machine.run("touch /usr/touched /etc/touched /var/touched /root/touched")
        bare = machine.run("ca-bridge renew all", check=False)
        assert bare.returncode != 0
        assert "there is no $CREDENTIALS_DIRECTORY" in bare.stderr


@pytest.mark.parametrize("installed", ["bookworm"], indirect=True)
def test_a_renewal_that_was_cut_off_is_finished_at_boot(installed: Tree, tmp_path: Path) -> None:
    """Before the kubelet starts; without the unit the kubelet meets what was left. Nothing left, nothing runs."""
    make_node(installed, tmp_path / "node", left=timedelta(days=20))
    looks = "ls /var/lib/ca-bridge >/var/seen; /bin/true"
    kubelet = f"[Service]\nType=oneshot\nExecStart=/bin/sh -c '{looks}'\n[Install]\nWantedBy=multi-user.target\n"
    installed.put("/etc/systemd/system/kubelet.service", kubelet.encode())
    installed.put("/root/cut-off.py", CUT_OFF)
    installed.run("mkdir -m 700 /var/lib/ca-bridge; systemctl disable -q ca-bridge.timer; systemctl enable -q kubelet")
    cut_off = installed.run("python3 -I -S /root/cut-off.py; echo $?; ls /var/lib/ca-bridge")
    assert cut_off.stdout.split()[0] == "137", cut_off
    assert "journal.json" in cut_off.stdout.split()
    without = installed.copy(tmp_path / "without")
    without.run("systemctl disable -q ca-bridge-recover.service")
    with without.booted() as machine:
        assert "journal.json" in machine.run("cat /var/seen").stdout

    again = installed.copy(tmp_path / "again")
    with again.booted() as machine:
        assert "journal.json" not in machine.run("cat /var/seen").stdout
        assert properties(machine, "ca-bridge-recover", "Result", "ConditionResult") == ["success", "yes"]
        names = ("apiserver", "apiserver-kubelet-client", "front-proxy-client", "etcd/server", "etcd/peer")
        assert all(end_of(machine, name) > datetime.now(UTC) + timedelta(days=300) for name in names)
        for name in names:
            keys = f"openssl pkey -in /etc/kubernetes/pki/{name}.key -pubout"
            certificates = f"openssl x509 -in /etc/kubernetes/pki/{name}.crt -noout -pubkey"
            assert machine.run(keys).stdout == machine.run(certificates).stdout
    with again.booted() as machine:
        assert properties(machine, "ca-bridge-recover", "ConditionResult") == ["no"]


@pytest.mark.attack("N3")
@pytest.mark.parametrize("installed", ["bookworm"], indirect=True)
def test_a_program_of_another_user_signs_and_is_killed_at_its_limit(installed: Tree, tmp_path: Path) -> None:
    """Root in the unit may become its user, and may end what that user's program has started."""
    make_node(installed, tmp_path / "node", left=timedelta(days=20))
    installed.run("echo helper:x:991:991::/:/bin/false >>/etc/passwd; echo helper:x:991: >>/etc/group")
    installed.put("/srv/ca/passphrase", PASSPHRASE.encode(), 0o600)
    installed.run("chown -R helper:helper /srv/ca")
    authorities = "".join(f'[authority.{name}]\nbackend = "site"\n' for name in ("ca", "etcd-ca", "front-proxy-ca"))
    program = "/usr/local/libexec/site-ca"
    table = f'[backend.site]\ntype = "exec"\ncommand = ["{program}", "/srv/ca"]\nuser = "helper"\n'
    limits = 'timeout = "3m"\nretry_for = "1s"\n'
    installed.put("/etc/ca-bridge/config.toml", f"{table}{limits}{authorities}".encode())
    with installed.booted() as machine:
        hangs = SITE_CA % "sleep 12345 & sleep 12345"
        machine.run(f"mkdir -p /usr/local/libexec; cat >{program}; chmod 755 {program}", stdin=hangs.encode())
        machine.run("sed -i 's/3m/2s/' /etc/ca-bridge/config.toml")
        machine.run(f"systemctl start {SERVICE}", check=False)
        assert properties(machine, SERVICE, "Result", "ExecMainStatus") == ["exit-code", "6"], machine.journal()
        assert "was still running after 2 s, and was killed" in machine.journal()
        assert "goes on" not in machine.journal()
        assert machine.run("grep -la '1234[5]' /proc/[0-9]*/cmdline", check=False).stdout == ""
        assert end_of(machine) < datetime.now(UTC) + timedelta(days=21)
        machine.run(f"cat >{program}", stdin=(SITE_CA % "").encode())
        machine.run("sed -i 's/2s/3m/' /etc/ca-bridge/config.toml")
        machine.run(f"systemctl start {SERVICE}", check=False)
        assert properties(machine, SERVICE, "Result", "ExecMainStatus") == ["success", "0"], machine.journal()
        assert end_of(machine) > datetime.now(UTC) + timedelta(days=300)


#: A certificate of each CA, and its file.
PATHS = {"apiserver": "apiserver.crt", "etcd-server": "etcd/server.crt", "front-proxy-client": "front-proxy-client.crt"}


def with_cfssl_and_exchange(bridge: Bridge, stack: ExitStack, _: Booted) -> None:
    """A `cfssl serve` with mutual TLS, and an outbox that a courier empties."""
    stack.enter_context(add_cfssl(bridge, "front-proxy-ca"))
    for name in ("out", "in"):
        (bridge.directory / name).mkdir()
    exchange = {"type": "exchange", "outbox": f"{bridge.directory}/out", "inbox": f"{bridge.directory}/in"}
    bridge.add("backend.door", exchange)
    bridge.add("authority.etcd-ca", {"backend": "door"})


def with_vault_est_and_cmp(bridge: Bridge, stack: ExitStack, _: Booted) -> None:
    """OpenBao, `estserver` with a client certificate, and a CMP registration authority with a shared secret."""
    add_vault(bridge, stack.enter_context(openbao.dev_server()), "ca", "cage")
    tls, servers = est.make_tls(bridge.directory / "tls"), bridge.directory.parent / "servers"
    url = stack.enter_context(est.estserver(servers / "est", bridge.pki.ca_pem("etcd-ca"), tls))
    files = {key: str(path) for key, path in {**tls.agent("agent"), "ca_file": tls.ca}.items()}
    bridge.add(
        "backend.enrol", {"type": "est", "url": url, "label": "{usage}", "timeout": "2m", "retry_for": "1s", **files}
    )
    bridge.add("authority.etcd-ca", {"backend": "enrol"})
    ra = stack.enter_context(cmp.registration_authority(servers / "ra"))
    ra.add_ca("fp", *bridge.pki.ca_pem("front-proxy-ca"), days=365)
    keys = ra.mac() | {"secret_file": bridge.secret("cmp", Path(ra.mac()["secret_file"]).read_text())}
    bridge.add("backend.corp", {"type": "cmp", "url": ra.url("fp"), "timeout": "2m", "wait": "1s", **keys})
    bridge.add("authority.front-proxy-ca", {"backend": "corp"})


def with_cfssl_openssl_and_exec(bridge: Bridge, stack: ExitStack, machine: Booted) -> None:
    """A `cfssl serve`, a directory of `openssl ca`, and a program whose CA is in that directory, too."""
    stack.enter_context(add_cfssl(bridge, "front-proxy-ca"))
    directory = add_openssl(bridge, "ca").parent
    (directory / "etcd-ca").mkdir()
    for name, pem in zip(("ca.crt", "ca.key"), bridge.pki.ca_pem("etcd-ca"), strict=True):
        (directory / "etcd-ca" / name).write_bytes(pem)
    (directory / "passphrase").write_text("none is needed")
    machine.run("cat >/usr/local/bin/site-ca; chmod 755 /usr/local/bin/site-ca", stdin=(SITE_CA % "").encode())
    bridge.add("backend.site", {"type": "exec", "command": ["/usr/local/bin/site-ca", str(directory)]})
    bridge.add("authority.etcd-ca", {"backend": "site"})


UNIT = "ca-bridge-gateway"
GATEWAY = f"""\
[gateway]
listen = "127.0.0.1:9880"
state_dir = "/var/lib/{UNIT}"
kubeconfig = "/run/credentials/{UNIT}.service/kubeconfig"
policy = "/etc/ca-bridge/gateway-policy.toml"
inventory = "/etc/ca-bridge/inventory.toml"
lease_duration = "5s"
"""
POLICY = """\
[allow]
clusters = ["*"]
nodes = ["*"]
max_validity = "400d"
"""
SIGNER = """\
[signer."{signer}"]
[signer."{signer}".grant.itself]
users = ["system:serviceaccount:ca-bridge:ca-bridge-{{node}}"]
[certificate."{name}"]
sans = {sans}
"""
#: As the unit's own comments have it; here it is a whole directory of credentials.
GATEWAYS_DROP_IN = """\
[Service]
LoadCredential=its:/etc/ca-bridge/its
ExecStart=
ExecStart=/usr/bin/ca-bridge gateway --config /etc/ca-bridge/gateway.toml
"""


def put_gateway(machine: Booted, its: Bridge, kubeconfig: Path) -> None:
    """What a gateway's unit reads: secrets come as credentials, and a CA's directory is in the state directory."""
    text, files = its.config.read_text(), {"gateway.conf": (kubeconfig.read_bytes(), "600")}
    for number, path in enumerate(
        sorted({Path(found) for found in re.findall(f'"({its.directory.parent}/[^"]+)"', text)})
    ):
        if path.is_file():
            files[f"its/{number}"] = path.read_bytes(), "600"
            text = text.replace(f'"{path}"', f'"/run/credentials/{UNIT}.service/its_{number}"')
    text = re.sub('pki_dir = ".*"', 'pki_dir = "/etc/ca-bridge/pki"', text)
    text = text.replace(str(its.directory), f"/var/lib/{UNIT}")
    policy = POLICY
    for name, live in live_certificates(its.pki).items():
        if name in PATHS:
            sans = json.dumps([value for _, value in sorted(san_entries(live))])
            policy += SIGNER.format(signer=f"{gateways.DOMAIN}/{name}", name=name, sans=sans)
    inventory = f'[node.{NODE}]\ncontrol_plane = true\naddresses = ["{ADDRESS}"]\n'
    texts = {"gateway.toml": text + GATEWAY, "gateway-policy.toml": policy, "inventory.toml": inventory}
    files |= {name: (text.encode(), "644") for name, text in texts.items()}
    for authority in AUTHORITIES.values():
        files[f"pki/{authority.certificate_file}"] = its.pki.ca_pem(authority.name)[0], "644"
    machine.run(f"rm -rf /etc/ca-bridge/its /var/lib/private/{UNIT}")
    machine.run(f"mkdir -p /etc/ca-bridge/its /etc/ca-bridge/pki/etcd /etc/systemd/system/{UNIT}.service.d")
    for name, (content, mode) in files.items():
        machine.run(f"cat >/etc/ca-bridge/{name}; chmod {mode} /etc/ca-bridge/{name}", stdin=content)
    machine.run(f"cat >/etc/systemd/system/{UNIT}.service.d/site.conf", stdin=GATEWAYS_DROP_IN.encode())
    directories = [path.name for path in its.directory.iterdir() if path.is_dir()]
    if directories:
        machine.run(f"mkdir -p -m 700 /var/lib/private/{UNIT}")
        put_directory(machine, its.directory, f"/var/lib/private/{UNIT}", *directories)


def put_directory(machine: Booted, parent: Path, place: str, *words: str) -> None:
    """Copy a directory into the machine, as tar's words say."""
    command: list[str | Path] = ["tar", "-c", "-C", parent, *words]
    machine.run(f"tar -x -C {place}", stdin=subprocess.run(command, capture_output=True, check=True).stdout)


def with_a_gateway(behind: Servers, bridge: Bridge, stack: ExitStack, machine: Booted) -> None:
    """Another cluster's API server, whose requests the gateway's unit has these CAs sign, one of each kind."""
    servers = bridge.directory.parent / "servers"
    api = stack.enter_context(kube_api.serving(servers / "cluster"))
    gateways.grant_rights(api.cluster)
    its = Bridge(pki=bridge.pki, directory=servers / "gateway")
    behind(its, stack, machine)
    put_gateway(machine, its, api.kubeconfig(gateways.USER))
    who = {"url": api.url, "ca_file": bridge.secret("cluster-ca.crt", api.trust.read_text())}
    token = bridge.secret("token", "none yet")
    limits = {"timeout": "2m", "wait": "5m", "retry_for": "5s"}
    bridge.add("backend.cluster", {"type": "kubernetes", "token_file": token, **limits, **who})
    for authority in AUTHORITIES:
        bridge.add(f"authority.{authority}", {"backend": "cluster", "signer": f"{gateways.DOMAIN}/{{name}}"})
    for authority in AUTHORITIES:
        api.apply(bridge.run("setup", "kubernetes", "--authority", authority).stdout)
    bridge.secret("token", api.bearer("ca-bridge", f"ca-bridge-{NODE}").token)
    machine.run(f"systemctl daemon-reload; systemctl start {UNIT}.service")
    stack.callback(machine.run, f"systemctl stop {UNIT}.service", check=False)


Servers = Callable[[Bridge, ExitStack, Booted], None]
#: The servers, the exit code, the certificates that the unit renews, and those that it has not got yet.
KINDS: Mapping[str, tuple[Servers, str, list[str], list[str]]] = {
    "cfssl-and-exchange": (with_cfssl_and_exchange, "4", ["front-proxy-client"], ["etcd-server"]),
    "vault-est-and-cmp": (with_vault_est_and_cmp, "0", list(PATHS), []),
    "gateway-of-vault-est-and-cmp": (partial(with_a_gateway, with_vault_est_and_cmp), "0", list(PATHS), []),
    "gateway-of-the-others": (partial(with_a_gateway, with_cfssl_openssl_and_exec), "0", list(PATHS), []),
}


@pytest.mark.kube("cfssl", "estserver", "cmp-ra", "kube-apiserver", "etcd", "kubectl")
@pytest.mark.attack("N3")
@pytest.mark.parametrize("installed", ["trixie"], indirect=True)
def test_every_kind_of_ca_is_reached_from_the_cage(installed: Tree, tmp_path: Path) -> None:
    """From the node's unit, and from the gateway's: servers with and without TLS, programs, each kind of credential."""
    installed.run(f"mkdir -p /etc/kubernetes /etc/ca-bridge /etc/systemd/system/{SERVICE}.d; mkdir -m 755 /srv/t")
    with installed.booted() as machine:
        for kind, (servers, code, renewed, waiting) in KINDS.items():
            directory = tmp_path / kind
            # `estserver` signs for 90 days, and a renewal never shortens
            pki = handmade_pki(directory / "node", not_after=datetime.now(UTC) + timedelta(days=60))
            bridge = Bridge(pki=pki, directory=directory / "bridge")
            with machine.network(), ExitStack() as stack:
                servers(bridge, stack, machine)
                run_in(machine, bridge, [*renewed, *waiting])
            assert properties(machine, SERVICE, "ExecMainStatus") == [code], machine.journal()
            before = live_certificates(pki)
            pems = {
                name: machine.run(f"cat /srv/t/{kind}/node/etc/kubernetes/pki/{PATHS[name]}").stdout for name in PATHS
            }
            after = {name: x509.load_pem_x509_certificate(text.encode()) for name, text in pems.items()}
            assert {name for name, one in after.items() if one != before[name]} == set(renewed), machine.journal()
        (request,) = machine.run("ls /srv/t/cfssl-and-exchange/bridge/out").stdout.split()
        assert request.endswith(".json")


def run_in(machine: Booted, bridge: Bridge, names: Collection[str]) -> None:
    """Copy a node with its settings and secrets into the machine, and start the unit for these certificates."""
    directory = bridge.directory.parent
    put_directory(machine, directory.parent, "/srv/t", "--exclude=servers", directory.name)
    machine.run("cat >/etc/ca-bridge/config.toml", stdin=bridge.config.read_bytes())
    machine.run(f"sed -i 's|{directory}|/srv/t/{directory.name}|g' /etc/ca-bridge/config.toml")
    drop_in = f"[Service]\nExecStart=\nExecStart=/usr/bin/ca-bridge renew {' '.join(names)}\nReadWritePaths=/srv/t\n"
    machine.run(f"cat >/etc/systemd/system/{SERVICE}.d/site.conf", stdin=drop_in.encode())
    machine.run(f"systemctl daemon-reload; systemctl start {SERVICE}", check=False)


@pytest.mark.parametrize("installed", ["trixie"], indirect=True)
def test_the_desk_signs_in_its_cage(installed: Tree, tmp_path: Path) -> None:
    """As its own user, without network, by `openssl ca` with a passphrase as a credential, and by a program."""
    make_node(installed, tmp_path / "node", left=timedelta(days=20))
    site = '[backend.site]\ntype = "exec"\ncommand = ["/usr/local/bin/site-ca", "/srv/ca"]\n'
    by_program = SETTINGS.replace('backend = "desk"\ndir = "/srv/ca/etcd-ca"', 'backend = "site"')
    installed.put("/etc/ca-bridge/config.toml", (by_program + site).encode())
    installed.put("/usr/local/bin/site-ca", (SITE_CA % "").encode(), 0o755)
    installed.put("/srv/ca/passphrase", PASSPHRASE.encode(), 0o600)
    installed.run(
        "useradd --system ca 2>/dev/null || { echo ca:x:990:990::/:/bin/false >>/etc/passwd; echo ca:x:990: >>/etc/group; };"
        "mkdir -p /srv/desk/inbox /srv/desk/outbox; chmod 700 /srv/desk/*;"
        "ca-bridge export /srv/desk/inbox/cp.json all --state-dir /var/lib/node; chown -R ca:ca /srv/ca /srv/desk"
    )
    policy = b'[desk]\nca_dir = "/etc/kubernetes/pki"\n'
    policy += b'[allow]\nclusters = ["*"]\nnodes = ["*"]\nmasters = ["super-admin.conf"]\n'
    installed.put("/etc/ca-bridge/desk-policy.toml", policy)
    drop_in = b"[Service]\nLoadCredential=ca-passphrase:/etc/ca-bridge/ca-passphrase\n"
    installed.put("/etc/systemd/system/ca-bridge-desk.service.d/site.conf", drop_in)
    with installed.booted() as machine:
        machine.run("systemctl start ca-bridge-desk.service", check=False)
        assert properties(machine, "ca-bridge-desk", "Result") == ["success"], machine.journal()
        (answer,) = machine.run("ls /srv/desk/outbox").stdout.split()
        assert machine.run(f"stat -c %U /srv/desk/outbox/{answer}").stdout == "ca\n"
        machine.run(f"ca-bridge import /srv/desk/outbox/{answer} --state-dir /var/lib/node")
        for name in ("apiserver", "etcd/server", "front-proxy-client"):
            assert end_of(machine, name) > datetime.now(UTC) + timedelta(days=300)


@pytest.mark.parametrize("installed", ["trixie"], indirect=True)
def test_the_gateway_runs_in_its_cage(installed: Tree, tmp_path: Path) -> None:
    """As a user that exists only while it runs; it waits for an API server that is not there, and ends on SIGTERM."""
    make_node(installed, tmp_path / "node", left=timedelta(days=200))
    gateway = (
        '[gateway]\nstate_dir = "/var/lib/ca-bridge-gateway"\n'
        'kubeconfig = "/run/credentials/ca-bridge-gateway.service/kubeconfig"\n'
    )
    installed.put("/etc/ca-bridge/config.toml", (SETTINGS + gateway).encode())
    share = "/opt/ca-bridge/current/share/kubeadm-ca-bridge/gateway"
    installed.run(
        f"cp {share}/policy.toml /etc/ca-bridge/gateway-policy.toml; cp {share}/inventory.toml /etc/ca-bridge/;"
        "cp /etc/kubernetes/admin.conf /etc/ca-bridge/gateway.conf"
    )
    drop_in = b"[Service]\nLoadCredential=ca-passphrase:/etc/ca-bridge/ca-passphrase\n"
    installed.put("/etc/systemd/system/ca-bridge-gateway.service.d/site.conf", drop_in)
    health = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9880/healthz').status)"
    with installed.booted() as machine:
        machine.run("systemctl start ca-bridge-gateway.service")
        assert machine.wait(f'python3 -c "{health}"') == "200\n"
        (pid,) = properties(machine, "ca-bridge-gateway", "MainPID")
        status = machine.run(f"cat /proc/{pid}/status").stdout
        assert int(re.findall(r"^Uid:\s+(\d+)", status, re.MULTILINE)[0]) > 1000
        assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
        machine.run("systemctl stop ca-bridge-gateway.service")
        assert properties(machine, "ca-bridge-gateway", "Result", "NRestarts") == ["success", "0"], machine.journal()


@pytest.mark.parametrize("installed", ["trixie"], indirect=True)
def test_services_follow_an_upgrade_and_end_with_the_program(installed: Tree, shared: Path) -> None:
    """A gateway that runs is of the version in force, since the next upgrade removes the one before; a stopped one stays so."""
    installed.put(
        "/root/later.run", releases.offline(shared / "release-later", SOURCE_DATE_EPOCH="2000000000").read_bytes()
    )
    stands_in = b"[Service]\nExecStart=\nExecStart=/bin/sleep infinity\nLoadCredential=\n"
    installed.put("/etc/systemd/system/ca-bridge-gateway.service.d/site.conf", stands_in)
    gateway = "ca-bridge-gateway"
    with installed.booted() as machine:
        machine.run("sh /root/later.run install")
        assert properties(machine, gateway, "ActiveState") == ["inactive"]
        machine.run(f"systemctl start {gateway}")
        before = properties(machine, gateway, "MainPID")
        machine.run("sh /root/later.run install")  # it is installed already
        assert properties(machine, gateway, "MainPID") == before
        machine.run("sh /root/ca-bridge.run install")
        after = properties(machine, gateway, "ActiveState", "MainPID")
        assert (after[0], after[1:] != before) == ("active", True)
        machine.run("/opt/ca-bridge/uninstall")
        assert machine.run(f"systemctl is-active {gateway}", check=False).stdout == "inactive\n"


#: The door, and a node on the same machine that asks it for the API server's certificate.
PORT = 9443
DOOR = f'[serve]\nlisten = "127.0.0.1:{PORT}"\n'
ASKS = """\
[node]
pki_dir = "/srv/node/pki"
kubeconfig_dir = "/srv/node"
state_dir = "/var/lib/node"

[backend.door]
type = "door"
url = "https://127.0.0.1:9443"
ca_file = "/srv/door-ca.crt"
wait = "2m"

[authority.ca]
backend = "door"
"""
DOORS_POLICY = '[allow]\nclusters = ["*"]\nnodes = ["*"]\n'
DOORS_DROP_IN = "[Service]\nLoadCredential=ca-passphrase:/etc/ca-bridge/ca-passphrase\nReadWritePaths=/srv/ca\n"
_PATIENCE = 180.0
RENEW_CLIENT = "ca-bridge renew apiserver-kubelet-client --config /etc/ca-bridge/asks.toml"
#: Prints how /healthz is answered, and the serial number of the certificate that the door shows.
LOOK = """\
import http.client, ssl
context = ssl.create_default_context(cafile="/srv/door-ca.crt")
context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the certificate names no key of its CA
client = http.client.HTTPSConnection("127.0.0.1", 9443, context=context, timeout=60)
client.request("GET", "/healthz")
print(int(client.sock.getpeercert()["serialNumber"], 16), client.getresponse().status)
client.close()
"""


def put_door(tree: Tree, directory: Path) -> Tls:
    """Settings, a server certificate, and the packages of `serve`, where `pip install --target` puts them."""
    make_node(tree, directory / "node", left=timedelta(days=20))
    tree.put("/etc/ca-bridge/config.toml", (SETTINGS + DOOR).encode())
    tree.put("/etc/ca-bridge/desk-policy.toml", DOORS_POLICY.encode())
    tree.put("/etc/systemd/system/ca-bridge-serve.service.d/site.conf", DOORS_DROP_IN.encode())
    tree.put("/etc/ca-bridge/asks.toml", ASKS.encode())
    tree.put("/root/look.py", LOOK.encode())
    tls = est.make_tls(directory / "tls")
    tree.put("/srv/door-ca.crt", tls.ca.read_bytes())
    tree.put_directory(releases.serve_packages(directory / "packages"), "/opt/ca-bridge/plugins")
    tree.run(
        "useradd --system ca-bridge 2>/dev/null || { echo ca-bridge:x:990:990::/:/bin/false >>/etc/passwd; echo ca-bridge:x:990: >>/etc/group; };"
        "chown -R ca-bridge:ca-bridge /srv/ca;"
        "cp /opt/ca-bridge/current/share/kubeadm-ca-bridge/serve/ca-bridge-serve.service /etc/systemd/system/"
    )
    return tls


def put_pair(machine: Booted, certificate: Path, key: Path) -> int:
    """The door's own certificate, as `config/serve/own.toml` has it renewed; its serial number."""
    for path, name, mode in ((key, "serve.key", "640"), (certificate, "serve.crt", "644")):
        there = f"/etc/ca-bridge/{name}"
        machine.run(
            f"umask 077; cat >{there}.new; chgrp ca-bridge {there}.new; chmod {mode} {there}.new; mv {there}.new {there}",
            stdin=path.read_bytes(),
        )
    return x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number


def stop_while_it_signs(machine: Booted, unit: str, pid: str) -> None:
    """Have systemd stop the door while its round is at the CA, whose lock is held until the door takes no request."""
    lock, signed = f"/srv/ca/ca/{LOCK_NAME}", "wc -l </srv/ca/ca/index.txt"
    listens = f"grep -q :{PORT:04X}.*:0000.0A /proc/net/tcp"
    hold = f"exec 9>>{lock}; flock 9; {signed} >/root/before; while {listens}; do sleep 0.1; done; {signed} >/root/at-the-end"
    machine.run(f"setsid sh -c '{hold}' </dev/null >/dev/null 2>&1 &")
    machine.wait("[ -s /root/before ]", _PATIENCE)
    machine.run(f"setsid sh -c '{RENEW_CLIENT}; echo $? >/root/code' </dev/null >/dev/null 2>&1 &")
    machine.wait(f"ls -l /proc/{pid}/fd | grep -q {lock}", _PATIENCE)  # it waits for the lock
    machine.run(f"systemctl stop {unit}.service")
    assert (
        machine.run(
            "cmp /root/before /root/at-the-end; expr $(wc -l </srv/ca/ca/index.txt) - $(cat /root/before)"
        ).stdout
        == "1\n"
    )


@pytest.mark.parametrize("installed", ["trixie"], indirect=True)
def test_the_door_runs_in_its_cage(installed: Tree, tmp_path: Path) -> None:
    """
    As its own user it signs and shows a renewed server certificate; it does not run on a node that it serves.

    systemd's stop lets a round that is at the CA end, and the node gets that certificate after the next start.
    """
    unit, tls = "ca-bridge-serve", put_door(installed, tmp_path)
    sans = [x509.IPAddress(ip_address("127.0.0.1"))]
    next_pair = tls.agent("next", ekus=[SERVER], sans=sans)
    with installed.booted() as machine:
        first = put_pair(machine, tls.server_cert, tls.server_key)
        machine.run(f"systemctl start {unit}.service")
        machine.wait(f"systemctl show {unit} -p ExecMainStatus | grep -qx ExecMainStatus=5", _PATIENCE)
        machine.wait(
            f"journalctl -o cat -u {unit} | grep -q 'this door runs inside the cluster it signs for'", _PATIENCE
        )
        machine.run(f"systemctl stop {unit}; systemctl reset-failed {unit}; mv /etc/kubernetes /srv/node")

        machine.run(f"systemctl start {unit}.service")
        machine.wait(f"python3 /root/look.py | grep -qx '{first} 200'", _PATIENCE)
        (pid,) = properties(machine, unit, "MainPID")
        status = machine.run(f"cat /proc/{pid}/status").stdout
        assert int(re.findall(r"^Uid:\s+(\d+)", status, re.MULTILINE)[0]) > 0
        assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
        machine.run("ca-bridge renew apiserver --config /etc/ca-bridge/asks.toml")
        pem = machine.run("cat /srv/node/pki/apiserver.crt").stdout.encode()
        assert x509.load_pem_x509_certificate(pem).not_valid_after_utc > datetime.now(UTC) + timedelta(days=300)
        renewed = put_pair(machine, next_pair["client_cert"], next_pair["client_key"])
        machine.wait(f"python3 /root/look.py | grep -qx '{renewed} 200'", _PATIENCE)
        assert properties(machine, unit, "MainPID", "NRestarts") == [pid, "0"]

        stop_while_it_signs(machine, unit, pid)
        assert properties(machine, unit, "Result", "ExecMainStatus") == ["success", "0"], machine.journal()
        assert PASSPHRASE not in machine.journal()
        machine.run(f"systemctl start {unit}.service")
        machine.wait(f"python3 /root/look.py | grep -qx '{renewed} 200'", _PATIENCE)
        machine.wait("[ -s /root/code ]", _PATIENCE)  # the run that the stop cut off, and that may have gone on asking
        machine.wait(f"grep -qx 0 /root/code || {RENEW_CLIENT}", _PATIENCE)
        pem = machine.run("cat /srv/node/pki/apiserver-kubelet-client.crt").stdout.encode()
        serial = x509.load_pem_x509_certificate(pem).serial_number
        signed = machine.run("cat /srv/ca/ca/index.txt").stdout.splitlines()
        assert len(signed) == int(machine.run("cat /root/before").stdout) + 1
        assert int(signed[-1].split("\t")[3], 16) == serial


def test_machines_beside_each_other_share_no_control_group(bookworm: Tree, tmp_path: Path) -> None:
    """A unit that ends in one takes nothing from the unit that is called alike in the other; neither leaves one behind."""
    other = Tree.new("trixie", tmp_path / "other")
    with bookworm.booted() as one, other.booted() as two:
        groups = [Path(f"/proc/{machine.pid}/cgroup").read_text().partition("0::")[2] for machine in (one, two)]
        for machine in (one, two):
            machine.run("systemd-run --quiet --unit=same sleep 1000")
        one.run("systemctl stop same.service")
        assert properties(two, "same.service", "ActiveState") == ["active"]
        assert groups[0].split("/")[1] != groups[1].split("/")[1]
    names = {group.split("/")[1] for group in groups}
    assert not [path for path in Path("/sys/fs/cgroup").glob("*/*") if path.name in names]


DOCUMENT = ROOT / "docs/run-nightly.md"
START, END = (
    "<!-- figures: `python -m tests.release.test_units` writes them, a test compares them -->",
    "<!-- end of figures -->",
)
SHIPPED = sorted(path for room in ("systemd", "desk", "serve") for path in (ROOT / "config" / room).glob("*.service"))


def exposure(unit: Path) -> float:
    """What `systemd-analyze security` makes of a unit: 0 is a cage, 10 an open door."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert match, done.stderr
    return float(match[1])


def figures() -> str:
    """A table of the shipped services."""
    version = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    rows = [f"| `{unit.name}` | {exposure(unit)} |" for unit in SHIPPED]
    return "\n".join([f"| service | exposure, by systemd {version} |", "| --- | --- |", *rows])


def writable(unit: str) -> list[str]:
    """What a shipped unit may write to."""
    return re.findall(r"^ReadWritePaths=(.*)$", (ROOT / "config/systemd" / unit).read_text(), re.MULTILINE)


def test_recovery_may_write_where_a_renewal_may() -> None:
    """A renewal that was cut off among the kubelet's files is finished at boot, too."""
    assert writable("ca-bridge-recover.service") == writable(SERVICE) != []


def test_no_service_is_exposed(tmp_path: Path) -> None:
    """All are at most 3 (to end a program of another user takes 0.1), and the document has the figures; one without its cage is not."""
    assert len(SHIPPED) == 5
    assert all(exposure(unit) <= 3 for unit in SHIPPED)
    assert figures() in DOCUMENT.read_text(encoding="utf-8")
    bare = tmp_path / SERVICE
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    assert exposure(bare) > 9


def main() -> None:
    """Write the figures into the document."""
    head, rest = DOCUMENT.read_text(encoding="utf-8").split(START)
    DOCUMENT.write_text(f"{head}{START}\n\n{figures()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
