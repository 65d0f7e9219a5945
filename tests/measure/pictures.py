"""
The pictures of the pages, as SVG for light and dark screens: `python -m tests.measure.pictures` writes them into `docs/`.

What the program knows is drawn from the program: the certificates and their CAs come from `bridge.specs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from bridge.specs import AUTHORITIES, SPECS

DOCS = Path(__file__).parents[2] / "docs"

_STYLE = """\
  <style>
    text { font: 14px system-ui, "DejaVu Sans", sans-serif; fill: #1f2328 }
    .small { font-size: 12px; fill: #59636e }
    .place { fill: #f6f8fa; stroke: #d1d9e0 }
    .step { fill: #ffffff; stroke: #0969da; stroke-width: 1.5 }
    .ca { stroke: #8250df }
    .good { stroke: #1a7f37 }
    .bad { stroke: #cf222e }
    .wait { stroke: #9a6700 }
    .line { fill: none; stroke: #59636e; stroke-width: 1.5 }
    .border { fill: none; stroke: #cf222e; stroke-dasharray: 6 4 }
    .back { fill: none; stroke: #cf222e; stroke-width: 1.5; stroke-dasharray: 5 4 }
    .head { fill: #59636e }
    .headback { fill: #cf222e }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 }
      .small { fill: #9198a1 }
      .place { fill: #151b23; stroke: #3d444d }
      .step { fill: #0d1117; stroke: #4493f8 }
      .ca { stroke: #ab7df8 }
      .good { stroke: #3fb950 }
      .bad, .border, .back { stroke: #f85149 }
      .headback { fill: #f85149 }
      .wait { stroke: #d29922 }
      .line { stroke: #9198a1 }
      .head { fill: #9198a1 }
    }
  </style>
  <defs>
    <marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">\
<path class="head" d="M0 0 8 4 0 8z"/></marker>
    <marker id="arrowback" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">\
<path class="headback" d="M0 0 8 4 0 8z"/></marker>
  </defs>
"""


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A picture with its title for those who don't see it."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">\n'
    )
    return (
        f'{head}  <title id="title">{escape(title)}</title>\n{_STYLE}'
        + "".join(f"  {one}\n" for one in parts)
        + "</svg>\n"
    )


def text(x: float, y: float, words: str, *, small: bool = False, middle: bool = True) -> str:
    """One line."""
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text{" class=" + chr(34) + "small" + chr(34) if small else ""} x="{x:g}" y="{y:g}"{anchor}>{escape(words)}</text>'


def box(x: float, y: float, width: float, words: str, under: str = "", kind: str = "") -> str:
    """A step, 46 high, with a second line in small letters."""
    frame = f'<rect class="{f"step {kind}".strip()}" x="{x:g}" y="{y:g}" width="{width:g}" height="46" rx="6"/>'
    middle = x + width / 2
    lines = (
        [text(middle, y + 20, words), text(middle, y + 37, under, small=True)]
        if under
        else [text(middle, y + 28, words)]
    )
    return "".join([frame, *lines])


def place(x: float, y: float, width: float, height: float, words: str) -> str:
    """Where steps happen, named at its lower left."""
    frame = f'<rect class="place" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>'
    return frame + text(x + 12, y + height - 10, words, small=True, middle=False)


def arrow(path: str, words: str = "", x: float = 0, y: float = 0) -> str:
    """A line with a head, and words beside it."""
    line = f'<path class="line" d="{path}" marker-end="url(#arrow)"/>'
    return line + (text(x, y, words, small=True) if words else "")


def border(path: str, words: str, x: float, y: float) -> str:
    """Where trust ends."""
    return f'<path class="border" d="{path}"/>' + text(x, y, words, small=True)


def back(path: str, words: str, x: float, y: float) -> str:
    """A way back, with words beside it."""
    line = f'<path class="back" d="{path}" marker-end="url(#arrowback)"/>'
    return line + text(x, y, words, small=True, middle=False)


def flow() -> str:
    """A renewal from new keys to certificates in use, and the ways back."""
    parts = [
        place(10, 126, 840, 150, "the node: private keys never leave it"),
        place(130, 10, 350, 92, "the company's CA"),
        text(325, 92, "by network, or by a courier", small=True, middle=False),
        box(200, 22, 220, "signs each request", "Vault, cfssl, openssl, CMP, EST …", "ca"),
        box(30, 148, 160, "new keys, CSRs", "as the live certificates"),
        box(235, 148, 160, "verify each answer", "by the node's ca.crt"),
        box(440, 148, 160, "install in one step", "survives kill -9"),
        box(645, 148, 180, "restart, then look", "handshakes, requests", "good"),
        arrow("M110 148 V45 H198"),
        arrow("M315 68 V146"),
        *(arrow(f"M{x} 171 H{x + 43}") for x in (395, 600)),
        back("M735 194 V226 H520 V197", "doesn't work: the old files come back", 526, 244),
        back("M315 194 V226 H360", "refused", 367, 230),
    ]
    title = "How ca-bridge renews: keys and requests on the node, signatures at the company's CA, verified, installed, in use"
    return svg(860, 286, title, parts)


def certificates() -> str:
    """Which CA signs which certificate, and who reads it."""
    parts, height = [], 0
    for column, authority in enumerate(AUTHORITIES.values()):
        x = 10 + column * 290
        parts.append(box(x, 10, 270, authority.name, authority.certificate_file, "ca"))
        for row, spec in enumerate(spec for spec in SPECS.values() if spec.authority is authority):
            y = 80 + row * 56
            usages = ", ".join(sorted(eku.label for eku in spec.ekus))
            reader = spec.component.value if spec.component else "administrators, kubeadm"
            parts += [box(x + 20, y, 250, spec.name, f"{usages} · {reader}"), arrow(f"M{x + 8} 56 V{y + 23} H{x + 18}")]
            height = max(height, y + 60)
    return svg(870, height, "The certificates of a kubeadm node, by the CA that signs them", parts)


def air_gap() -> str:
    """Requests and answers as files: who does what, in order."""
    actors = {"node": 110, "courier": 390, "CA desk": 610, "CA": 800}
    parts = [box(x - 80, 10, 160, name, kind="ca" if name == "CA" else "") for name, x in actors.items()]
    parts += [f'<path class="line" d="M{x} 56 V370"/>' for x in actors.values()]
    messages = (
        ("node", "node", "export or renew: keys stay, exit code 4"),
        ("node", "courier", "request bundle with proofs by the old keys"),
        ("courier", "CA desk", "inbox"),
        ("CA desk", "CA desk", "verify proofs, apply the policy"),
        ("CA desk", "CA", "CSRs"),
        ("CA", "CA desk", "certificates"),
        ("CA desk", "courier", "answer bundle, no key in it"),
        ("courier", "node", "inbox"),
        ("node", "node", "import or renew: verify, install, exit code 0"),
    )
    for number, (sender, receiver, words) in enumerate(messages):
        y, start, end = 85 + number * 32, actors[sender], actors[receiver]
        if start == end:
            parts.append(text(start + 10, y + 5, words, small=True, middle=False))
        else:
            parts.append(arrow(f"M{start} {y} H{end + (-2 if end > start else 2)}", words, (start + end) / 2, y - 6))
    return svg(890, 380, "The air gap: bundles go from the node to the CA desk and back", parts)


def exit_codes() -> str:
    """A run from its start to each exit code."""
    steps = (
        ("read settings", "2", "the settings can't be used", "bad"),
        ("take the lock", "9", "another run holds it", "wait"),
        ("what is due?", "0", "nothing", "good"),
        ("window, pause", "4", "the run waits for its window", "wait"),
        ("ask the CA", "6", "the CA can't be reached", "wait"),
        ("its answer", "4", "later", "wait"),
        ("verify", "5", "refused, or not what was asked for", "bad"),
        ("install", "1", "failed: nothing is replaced", "bad"),
        ("restart, prove", "7", "a component is not on it yet", "bad"),
        ("roll back", "8", "rolled back: the old files are in use", "bad"),
    )
    parts = []
    for number, (step, code, why, kind) in enumerate(steps):
        y = 10 + number * 60
        parts += [box(20, y, 180, step), arrow(f"M200 {y + 23} H268"), box(270, y, 60, code, kind=kind)]
        parts.append(text(345, y + 28, why, small=True, middle=False))
        if number + 1 < len(steps):
            parts.append(arrow(f"M110 {y + 46} V{y + 58}"))
    y = 10 + 8 * 60
    parts += [
        arrow(f"M20 {y + 23} H8 V{10 + len(steps) * 60 + 23} H18"),
        box(20, 10 + len(steps) * 60, 180, "all in use"),
    ]
    parts += [arrow(f"M200 {10 + len(steps) * 60 + 23} H268"), box(270, 10 + len(steps) * 60, 60, "0", kind="good")]
    return svg(640, 20 + len(steps) * 60 + 56, "A run of ca-bridge renew, by the exit code with which it ends", parts)


def gateway() -> str:
    """What goes through the gateway, and where trust ends."""
    parts = [
        place(10, 10, 250, 250, "nodes, users: CSR objects, not trusted"),
        box(30, 30, 210, "kubelet", "its own identity"),
        box(30, 96, 210, "new node", "a bootstrap token"),
        box(30, 162, 210, "user", "an identity of the API"),
        place(330, 10, 180, 250, "the cluster"),
        box(345, 96, 150, "API server", "says who asks"),
        place(580, 10, 280, 250, "the security team's"),
        box(600, 30, 240, "gateway", "policy, inventory, audit log", "good"),
        box(600, 162, 240, "CA", "Vault, openssl, EST …", "ca"),
        border("M295 10 V260", "identity is proven here", 295, 280),
        border("M520 10 V260", "names are judged here", 520, 280),
        arrow("M240 53 H300 V110 H343"),
        arrow("M240 119 H343"),
        arrow("M240 185 H300 V130 H343"),
        arrow("M495 119 H560 V64 H598", "watch", 546, 135),
        arrow("M600 45 H470 V94", "certificate", 560, 38),
        arrow("M640 76 V160", "CSR", 622, 122),
        arrow("M700 160 V78", "certificate, verified", 770, 122),
    ]
    return svg(870, 295, "The gateway: a CertificateSigningRequest object from the kubelet to the CA and back", parts)


def day_zero() -> str:
    """A new cluster whose CA keys never were on a node."""
    first = (
        "bootstrap init",
        "keys and CSRs",
        "CA or desk",
        "signs",
        "put in place",
        "one step",
        "kubeadm init",
        "finds all files",
    )
    further = (
        "bootstrap share",
        "what nodes share",
        "bootstrap join",
        "keys and CSRs",
        "CA or desk",
        "signs",
        "kubeadm join",
        "finds all files",
    )
    parts = [place(10, 10, 850, 100, "the first control-plane node"), place(10, 140, 850, 100, "each further node")]
    for row, steps in enumerate((first, further)):
        for number in range(4):
            x, y = 30 + number * 210, 28 + row * 130
            words, under = steps[2 * number : 2 * number + 2]
            parts.append(box(x, y, 180, words, under, "ca" if words.startswith("CA") else ""))
            if number:
                parts.append(arrow(f"M{x - 30} {y + 23} H{x - 2}"))
    parts.append(arrow("M750 110 V122 H120 V156", "CA certificates, sa.key: through a pipe", 435, 134))
    return svg(870, 250, "Day 0: certificates of a new cluster, its CA keys elsewhere", parts)


def rolling_restart() -> str:
    """Three nodes take turns."""
    parts = [text(175 + 115 * column, 20, f"turn {column + 1}", small=True) for column in range(6)]
    for row, node in enumerate(("cp-1", "cp-2", "cp-3")):
        y, x = 35 + row * 66, 122 + 230 * row
        parts += [place(10, y - 6, 810, 58, ""), text(55, y + 28, node)]
        parts.append(box(x, y, 108, "takes lease", "others healthy?", "wait"))
        parts.append(box(x + 115, y, 108, "restarts", "proves, lets go", "good"))
        if row:
            parts.append(arrow(f"M{x - 61} {y - 20} V{y + 23} H{x - 2}"))
    return svg(830, 245, "A rolling restart: the lease lets one node restart at a time", parts)


PICTURES = {
    "flow.svg": flow,
    "certificates.svg": certificates,
    "air-gap.svg": air_gap,
    "exit-codes.svg": exit_codes,
    "gateway.svg": gateway,
    "day-0.svg": day_zero,
    "rolling-restart.svg": rolling_restart,
}


def main() -> None:
    """Write them."""
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
