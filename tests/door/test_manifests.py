"""`config/serve/kubernetes/` against a real API server, and the door where a pod finds the cluster that it serves."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.ca import registry
from bridge.desk import policy
from bridge.door.signing import POD_CA, OwnClusterError, assert_elsewhere
from bridge.errors import Exit
from bridge.pki.certificates import load_pem_certificates
from bridge.settings.load import parse
from bridge.specs import AUTHORITIES
from tests.kit import kube_api
from tests.kit.kube_api import ApiServer
from tests.kit.pki import handmade_pki

SHIPPED = Path(__file__).resolve().parents[2] / "config/serve/kubernetes"
NAMESPACE = "ca-bridge-door"
_USER = 65532


def documents() -> dict[str, dict[str, Any]]:
    """All that is shipped, by kind."""
    files = sorted(SHIPPED.glob("*.yaml"))
    return {one["kind"]: one for path in files for one in yaml.safe_load_all(path.read_text()) if one}


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    """The door's, as the StatefulSet has it made."""
    found: dict[str, Any] = documents()["StatefulSet"]["spec"]["template"]["spec"]
    return found


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server with the namespace and the account, which make all else possible."""
    with kube_api.serving(tmp_path_factory.mktemp("door")) as server:
        server.kubectl("apply", "-f", str(SHIPPED / "00-namespace.yaml"))
        yield server


@pytest.mark.kube("etcd", "kube-apiserver", "kubectl")
def test_a_cluster_takes_them(api: ApiServer, pod: dict[str, Any]) -> None:
    """A cluster takes them without a warning, and the pod where `restricted` is enforced; one that may be root is refused."""
    taken = api.kubectl("apply", "--dry-run=server", "-f", str(SHIPPED))
    assert taken.stderr == ""
    assert len(taken.stdout.splitlines()) == len(documents())

    as_root = copy.deepcopy(pod)
    as_root["securityContext"]["runAsNonRoot"] = False
    runs = [
        api.kubectl("create", "--dry-run=server", "-f", "-", text=json.dumps(document), check=False)
        for document in map(_pod, (pod, as_root))
    ]
    assert [run.returncode for run in runs] == [0, 1], runs[0].stderr
    assert "violates PodSecurity" in runs[1].stderr


def _pod(spec: dict[str, Any]) -> dict[str, Any]:
    """One whose volume of the StatefulSet is a claim."""
    claim = {"name": "state", "persistentVolumeClaim": {"claimName": "state-ca-bridge-door-0"}}
    whole = spec | {"volumes": [*spec["volumes"], claim]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": NAMESPACE}, "spec": whole}


def test_the_pod_has_no_privilege(pod: dict[str, Any]) -> None:
    """No root, no token, nothing to write to but its own volumes, no capability, no escalation."""
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, _USER)
    assert pod["automountServiceAccountToken"] is False
    assert "serviceAccountToken" not in json.dumps(pod["volumes"])
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "privileged": False,
            "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip


def test_its_settings_are_whole_but_for_their_places(pod: dict[str, Any]) -> None:
    """They name all three CAs, only files that the pod's volumes bring, and a state directory that stays."""
    data = documents()["ConfigMap"]["data"]
    settings = parse(data["config.toml"])
    assert set(registry.configured(settings, settings.authorities)) == set(AUTHORITIES)
    assert policy.parse(data["desk-policy.toml"]).allow.nodes == ("cp-*",)
    [config, here, _] = pod["volumes"]
    brought = {
        item["path"]
        for one in config["projected"]["sources"]
        for kind in one.values()
        for item in kind.get("items", [])
    }
    active = "\n".join(line for line in data["config.toml"].splitlines() if not line.strip().startswith("#"))
    assert brought == {"tls/tls.crt", "tls/tls.key", "files/role-id", "files/secret-id", "files/vault-ca.crt"}
    assert all(f'"/etc/ca-bridge/{path}"' in active for path in brought)
    [door] = pod["containers"]
    mounts = {one["name"]: one for one in door["volumeMounts"]}
    assert mounts["state"]["mountPath"] == str(settings.node.state_dir)
    # by this the door knows the cluster in which it is
    [source] = here["projected"]["sources"]
    assert source["configMap"] == {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    assert f"{mounts['here']['mountPath']}/ca.crt" == str(POD_CA)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which gives a directory to another user")
def test_the_state_is_its_users_alone(pod: dict[str, Any]) -> None:
    """The init container makes a directory on a volume that the group can write to, and keeps the group out of it."""
    [first] = pod["initContainers"]
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # where the other user gets to
        volume, state = Path(place) / "volume", Path(place) / "volume/state"
        volume.mkdir()
        os.chown(volume, 0, _USER)
        for directory, mode in ((Path(place), 0o755), (volume, 0o2775)):
            directory.chmod(mode)
        command = [word.replace("/volume", str(volume)) for word in first["command"]]
        for others in (0, 0o070):  # the second time as a driver leaves it that gives the volume's files to the group
            subprocess.run(command, check=True, user=_USER, group=_USER, extra_groups=[], cwd="/")
            found = state.stat()
            assert (found.st_uid, found.st_mode & 0o777) == (_USER, 0o700)
            state.chmod(0o700 | others)


def test_a_pod_of_the_cluster_that_it_serves_is_refused(tmp_path: Path) -> None:
    """The CA certificate that each pod gets shows it; in another cluster, and without one, the door begins."""
    ours, others = (handmade_pki(tmp_path / name) for name in ("ours", "others"))
    settings = parse(f'[node]\npki_dir = "{tmp_path}"\n')
    certificates = {"ca": load_pem_certificates(ours.ca_pem("ca")[0])}
    ca = tmp_path / "pod.crt"
    assert_elsewhere(settings, certificates.__getitem__, ca)
    ca.write_bytes(others.ca_pem("ca")[0])
    assert_elsewhere(settings, certificates.__getitem__, ca)
    ca.write_bytes(ours.ca_pem("ca")[0])
    with pytest.raises(OwnClusterError, match="this door runs inside the cluster it signs for") as refused:
        assert_elsewhere(settings, certificates.__getitem__, ca)
    assert refused.value.exit_code == Exit.REFUSED
