#!/bin/sh
# A network plug-in for the pods of one node (https://www.cni.dev/docs/spec/): each pod has only a link to its node.
set -eu
gateway=169.254.1.1
number() { # the next address of this node: 10.244.77.2 to .251, then from the start again
  exec 9>>/etc/cni/numbers
  flock 9
  echo "$CNI_CONTAINERID" >&9
  echo $(($(wc -l </etc/cni/numbers) % 250 + 1))
}
case $CNI_COMMAND in
ADD)
  cat >/dev/null
  n=$(number)
  inside() { nsenter --net="$CNI_NETNS" ip "$@"; }
  inside link add "$CNI_IFNAME" type veth peer name "pod$n" netns $$ >&2
  inside address add "10.244.77.$n/32" dev "$CNI_IFNAME" >&2
  inside link set "$CNI_IFNAME" up >&2
  inside route add "$gateway" dev "$CNI_IFNAME" >&2
  inside route add default via "$gateway" >&2
  ip address add "$gateway/32" dev "pod$n" >&2
  ip link set "pod$n" up >&2
  ip route add "10.244.77.$n" dev "pod$n" >&2
  printf '{"cniVersion": "1.0.0", "interfaces": [{"name": "%s", "sandbox": "%s"}],' "$CNI_IFNAME" "$CNI_NETNS"
  printf ' "ips": [{"address": "10.244.77.%s/32", "gateway": "%s", "interface": 0}]}\n' "$n" "$gateway"
  ;;
VERSION) printf '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}\n' ;;
*) cat >/dev/null ;; # a link disappears with its pod
esac
