"""
ca-bridge: renews a kubeadm control plane's certificates through a CA that lives elsewhere.

The map, from the ground up; each floor imports only what is below it (`tests/test_walls.py` keeps the table):

- the doors, public and stable: `contract`, `errors`, `secret`, `specs`, `words`; on top of all floors `entry` and `testing`
- `pki`: certificates, CSRs, bundles and the checks on them; no I/O, no clock
- `system`: files, processes, HTTPS, waiting, what goes to standard error
- `settings`: the settings file
- `node`: what is on this machine
- `state`: what we remember and replace
- `ca`: asking CAs through backends
- `users`: kubeconfigs for people and machines, signed through the same backends
- `desk`: the CA desk, which signs request bundles by a policy
- `cluster`: the cluster's Kubernetes API, and the one client for it
- `control_plane`: looking at components and restarting them
- `renewal`: the main job
- `rotation`: the replacement of a CA while the cluster runs
- `monitoring`: what monitors show, and how the last runs ended
- `diagnosis`: whether the next renewal, and a restart, would succeed (`doctor`)
- `gateway`: signing for the cluster's certificates API
- `door`: one door for all nodes over HTTPS, by the desk's functions (`serve`)
- `bootstrap`: day 0, what a new node needs before kubeadm makes it one
- `cli`: commands, and all that is printed

Backends are no part of it: they are found by entry point, and see the doors and a few mechanisms that the table names.
"""
