"""Flags and mounts of a component as kubeadm itself renders them, in a manifest and in its configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bridge.node import kubeadm_config, manifests
from bridge.node.manifest_flags import Mount, arguments, edited, with_arguments
from bridge.node.manifests import path_of
from bridge.node.yamltree import YamlError
from bridge.specs import Component
from tests.kit.pki import KubeadmPki, kubeadm_pki

PAIR = {"--tls-cert-file": "/etc/kubernetes/pki/scheduler/server.crt", "--v": "4"}
MOUNT = Mount("serving-certificate", "/etc/kubernetes/pki/scheduler")
BOTH = (Component.CONTROLLER_MANAGER, Component.SCHEDULER)


def rendered(pki: KubeadmPki) -> dict[Component, bytes]:
    for component in BOTH:
        pki.run_kubeadm("init", "phase", "control-plane", component.value.removeprefix("kube-"))
    return {component: path_of(component, pki.kubeconfig_dir).read_bytes() for component in BOTH}


@pytest.mark.kube
def test_manifest_and_configuration_are_edited_to_what_kubeadm_makes_of_each_other(tmp_path: Path) -> None:
    """The edited manifest is byte by byte what kubeadm renders of the edited configuration; and back again."""
    pki = kubeadm_pki(tmp_path / "node")
    plain = rendered(pki)
    config = pki.config_file.read_bytes()
    changes = {flag.removeprefix("--"): value for flag, value in PAIR.items()}
    others = [one for one in kubeadm_config.parse(config).documents if one["kind"] != "ClusterConfiguration"]
    before = cluster = kubeadm_config.parse(config).cluster
    for component in BOTH:
        cluster = with_arguments(cluster, component, changes, MOUNT if component is Component.SCHEDULER else None)
        assert arguments(cluster, component) == changes
    back = cluster
    for component in BOTH:
        back = with_arguments(back, component, dict.fromkeys(changes), unmount=MOUNT.name)
    assert {key: value for key, value in back.items() if value} == before
    pki.config_file.write_text("---\n".join(yaml.safe_dump(one) for one in (*others, cluster)))
    by_kubeadm = rendered(pki)
    for component in BOTH:
        ours = edited(plain[component], component, PAIR, MOUNT)
        assert ours.decode() == by_kubeadm[component].decode()
        assert edited(ours, component, dict.fromkeys(PAIR), unmount=MOUNT.name) == plain[component]


SCHEDULER = b"""\
# ours
apiVersion: v1
kind: Pod
metadata: {name: kube-scheduler}
spec:
  containers:
  - name: side
    command: [side]
  - name: kube-scheduler
    command:
    - kube-scheduler
    - --kubeconfig
    - /etc/kubernetes/scheduler.conf  # a value of its own line
    - "--tls-cert-file=/old"
    - --use-this=1
    volumeMounts:
      - name: kubeconfig
        mountPath: /etc/kubernetes/scheduler.conf
  volumes:
    - name: kubeconfig
      hostPath: {path: /etc/kubernetes/scheduler.conf}
    - name: last
      hostPath:
        path: /last
"""


def test_the_rest_of_the_text_stays() -> None:
    """Comments, quotes, other containers and values on lines of their own; a path with odd characters is quoted."""
    flags = {"--tls-cert-file": "/a b: #", "--tls-private-key-file": "/k", "--kubeconfig": None}
    done = edited(SCHEDULER, Component.SCHEDULER, flags, Mount("more", "/x"))
    assert manifests.parse(Component.SCHEDULER, done).flags == {
        "--tls-cert-file": "/a b: #",
        "--tls-private-key-file": "/k",
        "--use-this": "1",
    }
    gone = {b"    - --kubeconfig", b"    - /etc/kubernetes/scheduler.conf  # a value of its own line"}
    assert set(SCHEDULER.splitlines()) - set(done.splitlines()) == gone | {b'    - "--tls-cert-file=/old"'}
    pod = yaml.safe_load(done)["spec"]
    assert pod["volumes"][-1] == {"name": "more", "hostPath": {"path": "/x", "type": "DirectoryOrCreate"}}
    assert pod["containers"][1]["volumeMounts"][-1] == {"name": "more", "mountPath": "/x", "readOnly": True}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"    command:\n    - kube-scheduler\n", b"    command: [kube-scheduler]\n    args:\n"),
        (b"    - --use-this=1\n", b"    - >-\n      --use-this=1\n"),
        (b"    - --use-this=1\n", b"    - &a --use-this=1\n"),
        (b"    - --use-this=1", b"    - --use-this=1\n    - *b"),
        (b"    volumeMounts:\n      - name: kubeconfig\n        mountPath: /etc/kubernetes/scheduler.conf\n", b""),
        (b"    - name: last\n      hostPath:\n        path: /last\n", b"    - {name: last}\n"),
    ],
)
def test_another_form_is_refused_or_edited_rightly(old: bytes, new: bytes) -> None:
    """An editor of text must not guess: it ends with the flags that were wanted, or with an error."""
    assert old in SCHEDULER
    data = SCHEDULER.replace(old, new)
    try:
        done = edited(data, Component.SCHEDULER, {"--z": "1"}, Mount("more", "/x"))
    except YamlError:
        return
    assert manifests.parse(Component.SCHEDULER, done).flags["--z"] == "1"
    assert yaml.safe_load(done)["spec"]["volumes"][-1]["name"] == "more"


def test_arguments_of_the_older_form_are_a_mapping() -> None:
    """v1beta3 has `extraArgs` as a mapping, v1beta4 as a list; an odd one counts as none."""
    old = {"apiVersion": "kubeadm.k8s.io/v1beta3", "scheduler": {"extraArgs": {"v": "2"}}}
    done = with_arguments(old, Component.SCHEDULER, {"a": "b", "v": None})
    assert done["scheduler"] == {"extraArgs": {"a": "b"}}
    assert old["scheduler"] == {"extraArgs": {"v": "2"}}
    new = with_arguments({"apiVersion": "kubeadm.k8s.io/v1beta4"}, Component.SCHEDULER, {"a": "b"})
    assert new["scheduler"] == {"extraArgs": [{"name": "a", "value": "b"}]}
    assert arguments({"scheduler": {"extraArgs": "x"}}, Component.SCHEDULER) == {}
    assert arguments({"scheduler": []}, Component.SCHEDULER) == {}
