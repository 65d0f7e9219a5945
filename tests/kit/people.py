"""People who decide at a door: a security team's CA, its certificates, and a door whose policy asks them."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bridge.pki.certificates import pem
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.est import Tls
from tests.kit.issuing import Signer
from tests.kit.pki import Pki
from tests.kit.serving import CA_BRIDGE, Answer, ServeProgram, add_door, insist

#: Two who decide; each certificate waits for one of them.
APPROVALS = (
    POLICY.replace("[allow]", '[allow]\napproval = "required"') + '\n[approvals]\napprovers = ["alice", "bob"]\n'
)


@dataclass(frozen=True, kw_only=True)
class Team:
    """The security team, and the door that it decides at; the door is not started."""

    desk: Desk
    door: ServeProgram
    tls: Tls
    signer: Signer

    def agent(self, name: str, **differences: Any) -> dict[str, Path]:
        """Certificate and key of a person, or of one who is not quite one."""
        return self.tls.agent(name, **{"signer": self.signer, **differences})

    def ask(self, agent: Mapping[str, Path] | None, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """
        An exchange with a person's certificate, again while the door has no time for it.

        A body that is no bytes goes out as JSON.
        """
        return insist(lambda: self._ask(agent, method, path, body, **headers))

    def _ask(self, agent: Mapping[str, Path] | None, method: str, path: str, body: Any, **headers: str) -> Answer:
        context = ssl.create_default_context(cafile=str(self.door.ca))
        if agent is not None:
            context.load_cert_chain(agent["client_cert"], agent["client_key"])
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content_Type": "application/json", **headers}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with closing(
            http.client.HTTPSConnection(self.door.address, self.door.port, context=context, timeout=180)
        ) as client:
            client.request(method, path, body, named)
            answer = client.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(status=answer.status, headers=found, body=answer.read())

    def settings(self, agent: Mapping[str, Path]) -> Path:
        """A settings file for the person's own machine."""
        path = agent["client_cert"].with_suffix(".toml")
        lines = [f'url = "{self.door.url}"', f'ca_file = "{self.door.ca}"']
        lines += [f'certificate = "{agent["client_cert"]}"', f'key = "{agent["client_key"]}"']
        path.write_text("\n".join(["[approver]", *lines, ""]))
        return path

    def run(self, agent: Mapping[str, Path], *words: str) -> subprocess.CompletedProcess[str]:
        """`ca-bridge approvals …` of a person."""
        command = [CA_BRIDGE, "approvals", *words, "--config", str(self.settings(agent))]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)


def make_team(
    directory: Path,
    pki: Pki,
    policy: str = APPROVALS,
    *,
    authorities: Sequence[str] | None = None,
    address: str = "127.0.0.1",
) -> Team:
    """A door that lets people decide, and their CA."""
    more = {} if authorities is None else {"authorities": list(authorities)}
    desk = make_desk(directory / "desk", pki, policy=policy, **more)
    begin = datetime.now(UTC) - timedelta(days=1)
    signer = Signer.make("security-team", begin=begin, end=begin + timedelta(days=3))
    anchors = directory / "people.crt"
    anchors.write_bytes(pem(signer.certificate))
    door = add_door(desk.config, desk.directory, f'approvers_ca = "{anchors}"', address)
    tls = Tls(signer=signer, directory=directory, ca=door.ca, server_cert=door.certificate, server_key=door.key)
    return Team(desk=desk, door=door, tls=tls, signer=signer)
