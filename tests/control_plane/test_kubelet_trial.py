"""The real kubelet says which configuration it would start with, and starts with none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bridge.control_plane import kubelet_serving
from tests.kit import programs
from tests.kit.loopback import alone

CONFIG = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
"""


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """Tests beside these see no kubelet."""
    with alone():
        yield


def refusal(*arguments: str, more: str = "") -> str:
    """What the kit's kubelet says to a configuration, as if it ran with these arguments."""
    return kubelet_serving.refusal(programs.require("kubelet"), arguments, f"{CONFIG}{more}".encode())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("", ""),
        ("serverTLSBootstrap: true\n", ""),
        ("imageGCHighThresholdPercent: 200\n", "imageGCHighThresholdPercent"),
        ("serverTLSBootstrap: maybe\n", "cannot unmarshal string into Go struct field"),
        ("featureGates: {RotateKubeletServerCertificate: false, Nothing: true}\n", "Nothing"),
        ("staticPodURL: [\n", "yaml"),
    ],
)
def test_its_own_validation_decides(more: str, words: str) -> None:
    """Its words are the answer; a valid configuration has none."""
    kubeadms = ("--config=/var/lib/kubelet/config.yaml", "--kubeconfig=/etc/kubernetes/kubelet.conf")
    found = refusal(*kubeadms, more=more)
    assert words in found
    assert bool(found) is bool(words)


@pytest.mark.parametrize("arguments", [("--config", "/x"), ("--config=/x", "--v=2", "--lock-file=/run/lock")])
def test_arguments_are_the_running_ones(arguments: Sequence[str]) -> None:
    """Only the configuration is another file; a flag that the program does not know is refused, too."""
    assert refusal(*arguments) == ""
    assert "unknown flag: --none" in refusal(*arguments, "--none")


def test_a_program_that_is_gone(tmp_path: Path) -> None:
    """It can't be asked, which is no consent."""
    assert kubelet_serving.refusal(tmp_path / "none", ("--config=/x",), CONFIG.encode())
