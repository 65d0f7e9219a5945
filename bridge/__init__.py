"""
ca-bridge: renews a kubeadm control plane's certificates through a CA that lives elsewhere.

The map: each package imports only packages above it in this list; `tests/test_walls.py` has the table.

- `contract`, `errors`, `secret`, `specs`, `words`: the doors, which are the public and stable modules; so are `entry` and
  `testing`, which may import every package
- `pki`: certificates, CSRs, bundles and the checks on them; no I/O, no clock
- `system`: files, processes, HTTPS, waiting, messages on standard error
- `settings`: the settings file
- `node`: this machine's certificates, kubeconfigs, manifests and processes, read only
- `state`: the audit log, backups, open requests and other records, and the replacement of files
- `ca`: requests to CAs through their backends
- `users`: kubeconfigs for people and machines, signed through the same backends
- `desk`: the CA desk, which signs request bundles by a policy
- `cluster`: the client for the cluster's Kubernetes API, kubeadm's ConfigMaps, leases
- `control_plane`: checks components and restarts them
- `renewal`: the main job: renews certificates, online and by air gap
- `rotation`: replaces a CA while the cluster runs
- `monitoring`: metrics, and the results of the last runs
- `diagnosis`: the checks of `doctor`: would the next renewal, and a restart, succeed?
- `gateway`: signs requests to the cluster's certificates API
- `door`: `serve`, one door for all nodes: takes their requests over HTTPS, with the desk's functions
- `bootstrap`: day 0: everything that a new node needs before kubeadm adds it
- `cli`: the commands, and everything that they print

Backends are not part of `bridge`, which finds them by entry point.
A backend imports the doors and the few other modules that the table names.
"""
