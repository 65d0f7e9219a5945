#!/usr/bin/env bash
# Runs a real kubeadm 1.37 control-plane node on this machine: kubelet and containerd, which run etcd, kube-apiserver,
# kube-controller-manager and kube-scheduler as static pods, in a separate network and mount namespace.
# Inside the node all paths are the usual ones (/etc/kubernetes, /var/lib/kubelet, /var/lib/etcd).
#
#   node.sh up NAME IP [CA_DIR]    start a node; with CA_DIR, move the three CA keys there, and copy the CA certificates,
#                                  before the control plane is made: external-CA mode
#   node.sh join NAME IP OTHER     start another control-plane node, also an etcd member, in the cluster of node OTHER;
#                                  the keys in OTHER's CA_DIR sign its certificates
#   node.sh host NAME IP           start a machine before kubeadm: container runtime, network, and a service that starts
#                                  the kubelet as systemd does (systemctl.sh, which kubeadm finds)
#   node.sh worker NAME IP OTHER [FORM]
#                                  start a worker in node OTHER's cluster, with `kubeadm join`. FORM is its identity:
#                                    reference  a kubelet.conf that refers to a pre-signed .pem (the default)
#                                    data       a kubelet.conf that contains the pre-signed certificate
#                                    token      a bootstrap token; a signer has to sign within 5 minutes
#   node.sh etcd_host NAME IP CA_DIR NAME=IP...
#                                  start a host with etcd only, as in kubeadm's "Set up a High Availability etcd
#                                  Cluster"; NAME=IP lists all of them. CA_DIR has etcd's CA, or gets a new one
#   node.sh exec NAME CMD...       run CMD as on the node
#   node.sh down NAME              stop the node and remove all of it, even if it never came up or does not exist
#
# Environment:
#   KUBE_BIN_DIR      the kit's programs (binaries.sh), default /opt/k8s
#   KUBE_NODE_DIR     the nodes' files, default /var/lib/kube-nodes; for errors see NAME/*.log
#   KUBEADM_CLUSTER   more lines for kubeadm's ClusterConfiguration (certificateValidityPeriod: 1h, …)
#   KUBEADM_KUBELET   more lines for the cluster's KubeletConfiguration (serverTLSBootstrap: true, …)
#   KUBELET_MINUTES   lifetime of a worker's pre-signed certificate, default 525600 (a year)
#
# Run it as root. Addresses are from 198.18.77.0/24 (a range for benchmarks, RFC 2544) on a bridge that exists only on this
# machine; .1 is the bridge. Nodes may start and stop at the same time: each has its own name and address.
# The container images stay in KUBE_NODE_DIR for the next node; `down` removes everything else.
# A host with cgroup v1 is enough. While a node is up, leave the host's own (empty) /etc/kubernetes, /var/lib/kubelet
# and the like in place: they are mount points, and removing one also detaches it in the node.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../../scripts/need.sh"

bin=${KUBE_BIN_DIR:-/opt/k8s}
base=${KUBE_NODE_DIR:-/var/lib/kube-nodes}
bridge=kube-nodes
made=/run/kube-nodes.made # mount points that did not exist before
watches=/proc/sys/fs/inotify/max_user_instances watches_before=/run/kube-nodes.watches
# All directories that kubeadm, kubelet and containerd write to; on the host they stay empty.
mount_points=(/etc/kubernetes /var/lib/kubelet /var/lib/etcd /var/log/pods /var/log/containers
  /run/containerd /run/nri /etc/cni /usr/libexec/kubernetes)
export PATH="$bin:$PATH"

usage() { sed -n '/^#   node.sh/,/^#$/s/^# \{0,3\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

enter() { PATH="$node/bin:$PATH" nsenter -t "$(cat "$node/pid")" -m -n -- "$@"; }

# daemon PROGRAM ARG...: starts it on the node, in a separate session, so that Ctrl-C at the terminal does not reach it.
daemon() { setsid nsenter -t "$(cat "$node/pid")" -m -n -- "$@" >"$node/$1.log" 2>&1 </dev/null & }

# within SECONDS WHAT COMMAND...: waits until the command succeeds, while the process that was started last lives.
within() {
  local seconds=$1 what=$2 end; shift 2
  end=$((SECONDS + seconds))
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $end ] || ! kill -0 $! 2>/dev/null; then
      die "$name: wanted $what within $seconds s" "see $node/*.log; node.sh down $name removes it"
    fi
    sleep 0.2
  done
}

phase() {
  enter kubeadm init phase "$@" --config /etc/kubernetes/kubeadm.yaml >>"$node/kubeadm.log" 2>&1 && return
  tail -n 3 "$node/kubeadm.log" >&2
  die "$name: kubeadm init phase $* failed" "see $node/kubeadm.log"
}

# locked COMMAND...: runs it for one node at a time, because nodes share its files.
locked() { (flock 9; "$@") 9>/run/kube-nodes.lock; }

# --- the images that a container runtime would pull from a registry ---

make_pause() {
  cat >"$images/pause.c" <<'C'
#include <signal.h>
#include <unistd.h>
static void stop(int signal) { _exit(0); }
int main(void) { signal(SIGTERM, stop); for (;;) pause(); }
C
  gcc -static -o "$images/pause" "$images/pause.c"
}

image_programs() {
  case $1 in
    kube-apiserver | kube-controller-manager | kube-scheduler) echo "$bin/$1" ;;
    etcd) echo "$bin/etcd $bin/etcdctl" ;;
    pause) echo "$images/pause" ;;
  esac
}

make_images() {
  [ ! -e "$images/done" ] || [ -n "$(find "$bin" -newer "$images/done" -type f -print -quit)" ] || return 0
  mkdir -p "$images"
  make_pause
  local reference program files
  while read -r reference; do
    program=${reference##*/}; program=${program%%:*}
    read -r -a files <<<"$(image_programs "$program")"
    [ ${#files[@]} = 0 ] && continue
    [ "$program" != pause ] || echo "$reference" >"$images/pause.reference"
    /usr/bin/env python3 "$here/docker_archive.py" "$images/$program.tar" "$reference" "${files[@]}"
  done < <(kubeadm config images list --kubernetes-version "$version" 2>/dev/null)
  unpack_images
  touch "$images/done"
}

# Makes a container runtime's directory with all images, for nodes to copy: importing and unpacking takes 4 s of CPU time.
unpack_images() { # call it in `locked`, whose process gets the trap
  local state=$images/run runtime archive
  rm -rf "$images/containerd" "$state"
  mkdir -p "$state"
  write_containerd_config "$images/containerd" "$state" >"$images/containerd.toml"
  # With a separate /run, because containerd leaves directories there.
  # shellcheck disable=SC2016  # expanded inside
  unshare --mount --propagation private -- bash -ec 'mount -t tmpfs none /run; exec containerd -c "$1"' - "$images/containerd.toml" \
    >"$images/containerd.log" 2>&1 </dev/null 9>&- &
  runtime=$!
  # shellcheck disable=SC2064  # expanded now: this process
  trap "kill -9 $runtime 2>/dev/null || true" EXIT
  within 120 "a container runtime for its images" ctr -a "$state/containerd.sock" version
  for archive in "$images"/*.tar; do
    ctr -a "$state/containerd.sock" -n k8s.io images import "$archive" >>"$images/import.log" 2>&1 ||
      die "$name: no image from $archive" "see $images/import.log"
  done
  kill $runtime
  wait $runtime || true
  trap - EXIT
  rm -rf "$state"
}

# Links layers and blobs, which never change, and copies everything else.
copy_images() { # copy_images CONTAINERD
  local file
  cp -a --link "$images/containerd" "$1"
  while read -r file; do
    cp -a --remove-destination "$images/containerd/$file" "$1/$file"
  done < <(cd "$1" && find . -type f -not -path '*/blobs/*' -not -path '*/snapshots/*')
}

write_containerd_config() { # write_containerd_config ROOT STATE; by default containerd collects statistics every second
  containerd config default | sed -E \
    -e "s#sandbox = '.*pause.*'#sandbox = '$(cat "$images/pause.reference")'#" \
    -e 's#restrict_oom_score_adj = false#restrict_oom_score_adj = true#' -e "s#'/opt/cni/bin'#'/etc/cni/bin'#;s#use_internal_loopback = false#use_internal_loopback = true#" \
    -e "s#stats_collect_period = ''#stats_collect_period = '1h'#" \
    -e "s#^root = .*#root = '$1'#" -e "s#^state = .*#state = '$2'#" \
    -e "s#'/run/containerd/containerd.sock#'$2/containerd.sock#g"
}

# --- the machine that kubeadm finds ---

cgroup_roots() { # prints each controller's directory (cgroup v1), or the single one (v2)
  local directory
  for directory in /sys/fs/cgroup /sys/fs/cgroup/*; do
    [ ! -L "$directory" ] && [ -e "$directory/cgroup.procs" ] && [ "$(stat -f -c %T "$directory")" != tmpfs ] && echo "$directory"
    [ "$directory" != /sys/fs/cgroup ] || [ "$(stat -f -c %T "$directory")" != cgroup2fs ] || return 0
  done
}

make_mount_points() {
  local point
  for point in "${mount_points[@]}"; do [ -d "$point" ] || { mkdir -p "$point"; echo "$point" >>"$made"; }; done
}

make_room() { # a node's processes need 20 inotify instances, and root's limit on a machine is 128
  [ "$(cat $watches)" -lt 1024 ] || return 0
  cat $watches >$watches_before
  echo 1024 >$watches
}

make_network() { # make_network IP; stores the address in the link, so that no second node takes it
  if ! ip link show $bridge >/dev/null 2>&1; then
    ip link add $bridge type bridge
    ip addr add 198.18.77.1/24 dev $bridge
    ip link set $bridge up
  fi
  ! grep -qx " *alias $1" <<<"$(ip link show master $bridge)" || die "$name: wanted a free address, found another node at $1"
  ip netns add "$name"
  ip link add "v-$name" type veth peer name eth0 netns "$name"
  ip link set "v-$name" master $bridge alias "$1" up
  ip -n "$name" addr add "$1/24" dev eth0
  ip -n "$name" link set eth0 up
  ip -n "$name" link set lo up
  ip -n "$name" route add default via 198.18.77.1
}

make_namespaces() { # starts a process that holds the mount namespace, and makes all mounts in it
  local point
  for point in "${mount_points[@]}"; do mkdir -p "$node/root$point"; done
  # etcd and containerd wait for each write, for seconds on a machine with a busy disk: so keep their files in memory.
  mkdir "$node/memory"
  mount -t tmpfs -o mode=700 memory "$node/memory"
  mkdir -m 700 "$node/memory/etcd" "$node/memory/grpc.v1.cri"
  mount --bind "$node/memory/etcd" "$node/root/var/lib/etcd"
  # nsenter, because `ip netns exec` would mount a new /sys without cgroups over the old one
  # shellcheck disable=SC2016  # expanded inside
  setsid nsenter --net="/run/netns/$name" unshare --mount --propagation private -- bash -ec '
    node=$1; shift
    for point; do mount --bind "$node/root$point" "$point"; done
    mount --make-rshared /var/lib/kubelet  # the kubelet shares volume mounts with its pods
    echo $$ >"$node/pid.part"
    mv "$node/pid.part" "$node/pid"
    exec sleep infinity
  ' - "$node" "${mount_points[@]}" >"$node/namespaces.log" 2>&1 </dev/null &
  within 180 "its namespaces" test -e "$node/pid"
}

start_containerd() {
  local socket=$node/run/containerd.sock waiting
  mkdir -p "$node/run"
  copy_images "$node/containerd"
  for waiting in metadata.v1.bolt/meta.db snapshotter.v1.overlayfs/metadata.db grpc.v1.cri; do # databases, and states of pods
    [ ! -e "$node/containerd/io.containerd.$waiting" ] || mv "$node/containerd/io.containerd.$waiting" "$node/memory/"
    ln -s "$node/memory/${waiting##*/}" "$node/containerd/io.containerd.$waiting"
  done
  write_containerd_config "$node/containerd" "$node/run" >"$node/containerd.toml"
  daemon containerd -c "$node/containerd.toml"
  within 120 "its container runtime" ctr -a "$socket" version
  # for `crictl -c /etc/kubernetes/crictl.yaml`; crictl's default timeout is 2 s
  printf '%s\n' "runtime-endpoint: unix://$socket" "timeout: 120" >"$kubernetes/crictl.yaml"
}

make_host() { # make_host IP: makes the node before kubeadm
  local root ip=$1
  [[ ! -e "$node" && ! -e "/run/netns/$name" ]] || die "$name: wanted a new name, found a node of that name" "node.sh down $name"
  locked make_images
  mkdir -p "$node"
  # Each node has its own cgroup root, because a kubelet removes unknown cgroups from its root.
  for root in $(cgroup_roots); do mkdir -p "$root/$name"; done
  locked make_network "$ip"
  locked make_room
  locked make_mount_points
  make_namespaces
  start_containerd
}

# --- kubeadm ---

kubelet_here() { # settings that every kubelet needs on a shared machine
  cat <<YAML
cgroupDriver: cgroupfs
cgroupRoot: /$name
failCgroupV1: false
failSwapOn: false
fileCheckFrequency: 20s
evictionHard: {imagefs.available: "1%", nodefs.available: "1%", memory.available: 50Mi}
YAML
}

write_config() { # write_config IP ENDPOINT
  cat >"$kubernetes/kubeadm.yaml" <<YAML
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: $1}
nodeRegistration: {name: $name, criSocket: "unix://$node/run/containerd.sock"}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: $version
controlPlaneEndpoint: $2:6443
${KUBEADM_CLUSTER:-}
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
$(kubelet_here)
${KUBEADM_KUBELET:-}
YAML
}

kubectl_as() { # kubectl_as KUBECONFIG ARG...: runs kubectl on the node as admin or super-admin
  local kubeconfig=$1; shift
  enter kubectl --kubeconfig "/etc/kubernetes/$kubeconfig.conf" "$@"
}

start_kubelet() { # start_kubelet IP
  daemon kubelet --config=/var/lib/kubelet/config.yaml --kubeconfig=/etc/kubernetes/kubelet.conf \
    --hostname-override="$name" --node-ip="$1"
  local pki=/etc/kubernetes/pki # curl, because this asks often, and each kubectl takes 0.1 s of CPU time
  within 300 "an API server that is ready" enter curl --silent --fail --max-time 10 --cacert $pki/ca.crt \
    --cert $pki/apiserver-kubelet-client.crt --key $pki/apiserver-kubelet-client.key "https://$1:6443/readyz"
}

move_ca_keys() { # move_ca_keys CA_DIR
  local ca
  echo "$1" >"$node/ca_dir"
  mkdir -p "$1/etcd"
  for ca in ca front-proxy-ca etcd/ca; do
    cp -p "$kubernetes/pki/$ca.crt" "$1/$ca.crt"
    mv "$kubernetes/pki/$ca.key" "$1/$ca.key"
  done
}

bind_admins() { # `get`, because a write may succeed although its answer was lost
  kubectl_as super-admin create clusterrolebinding kubeadm:cluster-admins \
    --clusterrole=cluster-admin --group=kubeadm:cluster-admins ||
    kubectl_as super-admin get clusterrolebinding kubeadm:cluster-admins
}

up() { # up IP [CA_DIR]
  local ip=${1:-} ca_dir=${2:-}
  [ -n "$ip" ] || usage
  make_host "$ip"
  write_config "$ip" "$ip"
  phase certs all
  phase kubeconfig all
  [ -z "$ca_dir" ] || move_ca_keys "$(realpath -m "$ca_dir")"
  phase kubelet-start
  phase control-plane all
  phase etcd local
  start_kubelet "$ip"
  # the next steps of `kubeadm init`: rights of its groups and users, and its configuration in the cluster
  within 120 "the rights of admin.conf" bind_admins
  phase upload-config all
  within 300 "a Node object" kubectl_as admin get node "$name"
  phase mark-control-plane
  phase bootstrap-token
  echo "$name is up at https://$ip:6443"
}

etcd_member() { # etcd_member IP FIRST; fails until the member that was added before is healthy
  local pki=/etc/kubernetes/pki/etcd
  enter etcdctl --command-timeout=100s --endpoints "https://$2:2379" --cacert $pki/ca.crt --cert $pki/healthcheck-client.crt \
    --key $pki/healthcheck-client.key member add "$name" --peer-urls="https://$1:2380" >"$node/member.log" 2>&1
}

add_etcd_member() { # add_etcd_member IP FIRST: adds this node to the etcd cluster of FIRST
  local members
  within 120 "a new etcd member" etcd_member "$1" "$2"
  members=$(sed -n 's/^ETCD_INITIAL_CLUSTER="\(.*\)"/\1/p' "$node/member.log")
  sed -i -E "s#--initial-cluster=.*#--initial-cluster=$members\n    - --initial-cluster-state=existing#" \
    "$kubernetes/manifests/etcd.yaml"
}

join() { # join IP OTHER
  local ip=${1:-} other=${2:-} first ca_dir ca
  [ $# = 2 ] || usage
  other=$base/$other
  [ -e "$other/pid" ] || die "$name: wanted a node to join, found none in $other"
  first=$(sed -n 's/.*advertiseAddress: \(.*\)}.*/\1/p' "$other/root/etc/kubernetes/kubeadm.yaml")
  make_host "$ip"
  write_config "$ip" "$first"
  ca_dir=$other/root/etc/kubernetes/pki
  [ ! -e "$other/ca_dir" ] || ca_dir=$(cat "$other/ca_dir")
  mkdir -p "$kubernetes/pki/etcd"
  for ca in ca front-proxy-ca etcd/ca; do cp -p "$ca_dir/$ca".{crt,key} "$kubernetes/pki/$(dirname "$ca")/"; done
  cp -p "$other"/root/etc/kubernetes/pki/sa.{key,pub} "$kubernetes/pki/"
  phase certs all
  phase kubeconfig all
  if [ -e "$other/ca_dir" ]; then
    cp "$other/ca_dir" "$node/ca_dir"
    rm "$kubernetes"/pki/{ca,front-proxy-ca,etcd/ca}.key
  fi
  phase kubelet-start
  phase control-plane all
  phase etcd local
  add_etcd_member "$ip" "$first"
  start_kubelet "$ip"
  within 300 "a Node object" kubectl_as admin get node "$name"
  phase mark-control-plane
  echo "$name is up at https://$ip:6443"
}

# --- hosts with etcd only ---

write_etcd_config() { # write_etcd_config IP NAME=IP...
  local ip=$1 cluster; shift
  cluster=$(printf '%s:2380,' "${@/=/=https:\/\/}")
  cat >"$kubernetes/kubeadm.yaml" <<YAML
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: $ip}
nodeRegistration: {name: $name, criSocket: "unix://$node/run/containerd.sock"}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: $version
etcd:
  local:
    serverCertSANs: ["$ip"]
    peerCertSANs: ["$ip"]
    extraArgs:
    - {name: initial-cluster, value: "${cluster%,}"}
    - {name: initial-cluster-state, value: new}
    - {name: name, value: $name}
    - {name: listen-peer-urls, value: "https://$ip:2380"}
    - {name: listen-client-urls, value: "https://$ip:2379"}
    - {name: advertise-client-urls, value: "https://$ip:2379"}
    - {name: initial-advertise-peer-urls, value: "https://$ip:2380"}
${KUBEADM_CLUSTER:-}
YAML
}

write_stand_alone_kubelet() { # not at kubeadm's path, and without a kubeconfig
  cat >"$node/root/var/lib/kubelet/stand-alone.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
address: 127.0.0.1
containerRuntimeEndpoint: "unix://$node/run/containerd.sock"
staticPodPath: /etc/kubernetes/manifests
$(kubelet_here)
crashLoopBackOff: {maxContainerRestartPeriod: 1s}
YAML
}

etcd_host() { # etcd_host IP CA_DIR NAME=IP...
  local ip=${1:-} ca_dir=${2:-} one
  [ $# -ge 3 ] || usage
  make_host "$ip"
  write_etcd_config "$ip" "${@:3}"
  mkdir -p "$kubernetes/pki/etcd" "$ca_dir/etcd"
  [ ! -e "$ca_dir/etcd/ca.key" ] || cp -p "$ca_dir"/etcd/ca.{crt,key} "$kubernetes/pki/etcd/"
  for one in etcd-ca etcd-server etcd-peer etcd-healthcheck-client apiserver-etcd-client; do phase certs "$one"; done
  cp -p "$kubernetes"/pki/etcd/ca.{crt,key} "$ca_dir/etcd/"
  rm "$kubernetes/pki/etcd/ca.key"
  phase etcd local
  write_stand_alone_kubelet
  daemon kubelet --config=/var/lib/kubelet/stand-alone.yaml --hostname-override="$name" --node-ip="$ip"
  within 300 "a member of etcd" enter bash -c "exec 3<>/dev/tcp/$ip/2380" # port 2379 answers only when enough members are up
  echo "$name is an etcd host at $ip"
}

# --- workers ---

host() { # host IP
  [ -n "${1:-}" ] || usage
  make_host "$1"
  mkdir -p "$node/bin"
  cp "$here/systemctl.sh" "$node/bin/systemctl"
  setsid nsenter -t "$(cat "$node/pid")" -m -n -- "$node/bin/systemctl" keep >"$node/service.log" 2>&1 </dev/null &
}

sign_kubelet() { # sign_kubelet CA_DIR: makes made/kubelet.crt and .key for this node
  local made=$node/made
  mkdir -p "$made"
  openssl ecparam -name prime256v1 -genkey -noout -out "$made/kubelet.key" 2>>"$node/openssl.log"
  # `openssl ca`, because the shortest lifetime of `x509 -req` is a day
  printf '%s\n' '[ca]' 'default_ca = d' '[d]' "new_certs_dir = $made" "database = $made/index" "rand_serial = yes" \
    'default_md = sha256' 'policy = p' 'x509_extensions = e' '[p]' 'organizationName = supplied' 'commonName = supplied' \
    '[e]' 'basicConstraints = critical,CA:FALSE' 'keyUsage = critical,digitalSignature' 'extendedKeyUsage = clientAuth' \
    'authorityKeyIdentifier = keyid' >"$made/ca.cnf"
  : >"$made/index"
  openssl req -new -key "$made/kubelet.key" -subj "/O=system:nodes/CN=system:node:$name" -out "$made/kubelet.csr"
  openssl ca -batch -notext -config "$made/ca.cnf" -cert "$1/ca.crt" -keyfile "$1/ca.key" -in "$made/kubelet.csr" \
    -startdate "$(date -u -d '-1 minute' +%Y%m%d%H%M%SZ)" \
    -enddate "$(date -u -d "+${KUBELET_MINUTES:-525600} minutes" +%Y%m%d%H%M%SZ)" \
    -out "$made/kubelet.crt" >>"$node/openssl.log" 2>&1 || die "$name: openssl did not sign its kubelet's certificate" "see $node/openssl.log"
}

write_kubelet_conf() { # write_kubelet_conf SERVER CA_CRT data|reference
  local made=$node/made pki=/var/lib/kubelet/pki there user pem
  if [ "$3" = data ]; then
    user="client-certificate-data: $(base64 -w0 "$made/kubelet.crt"), client-key-data: $(base64 -w0 "$made/kubelet.key")"
  else
    there=$node/root$pki pem=kubelet-client-$(date +%Y-%m-%d-%H-%M-%S).pem
    mkdir -p "$there"
    (umask 077 && cat "$made/kubelet.crt" "$made/kubelet.key" >"$there/$pem")
    ln -s "$pki/$pem" "$there/kubelet-client-current.pem"
    user="client-certificate: $pki/kubelet-client-current.pem, client-key: $pki/kubelet-client-current.pem"
  fi
  (umask 077 && cat >"$kubernetes/kubelet.conf") <<YAML
apiVersion: v1
kind: Config
clusters:
- name: kubernetes
  cluster: {server: "$1", certificate-authority-data: $(base64 -w0 "$2")}
contexts:
- name: system:node:$name@kubernetes
  context: {cluster: kubernetes, user: "system:node:$name"}
current-context: system:node:$name@kubernetes
users:
- name: system:node:$name
  user: {$user}
YAML
}

write_join() { # write_join IP DISCOVERY; with a patch, because the cluster's configuration has the first node's cgroup
  mkdir -p "$node/patches"
  echo "{cgroupRoot: /$name}" >"$node/patches/kubeletconfiguration+merge.yaml"
  cat >"$kubernetes/join.yaml" <<YAML
apiVersion: kubeadm.k8s.io/v1beta4
kind: JoinConfiguration
discovery: {$2}
nodeRegistration:
  name: $name
  criSocket: "unix://$node/run/containerd.sock"
  kubeletExtraArgs: [{name: node-ip, value: $1}]
patches: {directory: $node/patches}
YAML
}

worker() { # worker IP OTHER [FORM]
  local ip=${1:-} other=${2:-} form=${3:-reference} first ca_dir token
  if [ $# -lt 2 ] || ! [[ $form =~ ^(reference|data|token)$ ]]; then usage; fi
  other=$base/$other
  [ -e "$other/pid" ] || die "$name: wanted a node to join, found none in $other"
  first=$(sed -n 's/.*advertiseAddress: \(.*\)}.*/\1/p' "$other/root/etc/kubernetes/kubeadm.yaml")
  host "$ip"
  if [ "$form" = token ]; then
    token=$(PATH="$bin:$PATH" nsenter -t "$(cat "$other/pid")" -m -n -- kubeadm token create 2>>"$node/kubeadm.log")
    write_join "$ip" "bootstrapToken: {token: $token, apiServerEndpoint: '$first:6443', unsafeSkipCAVerification: true}"
  else
    ca_dir=$other/root/etc/kubernetes/pki
    [ ! -e "$other/ca_dir" ] || ca_dir=$(cat "$other/ca_dir")
    sign_kubelet "$ca_dir"
    write_kubelet_conf "https://$first:6443" "$ca_dir/ca.crt" "$form"
    write_join "$ip" "file: {kubeConfigPath: /etc/kubernetes/kubelet.conf}"
  fi
  # Ignore all preflight errors: one file exists on purpose, and this machine is no full node.
  enter kubeadm join --config /etc/kubernetes/join.yaml --ignore-preflight-errors=all >>"$node/kubeadm.log" 2>&1 || {
    tail -n 3 "$node/kubeadm.log" >&2
    die "$name: kubeadm join failed" "see $node/kubeadm.log and $node/kubelet.log"
  }
  [ "$form" = token ] || rm -rf "$node/made"
  echo "$name is a worker at $ip"
}

# --- stopping a node ---

pids() { # prints all processes of the node: in its network namespace, and in its cgroups
  ip netns pids "$name" 2>/dev/null || true
  local root
  for root in $(cgroup_roots); do
    [ ! -d "$root/$name" ] || find "$root/$name" -name cgroup.procs -exec cat {} + 2>/dev/null || true
  done
}

kill_all() {
  local pid tries
  # Repeat until no process is left: a remaining one may start another (kubelet a pod, containerd a shim).
  for tries in $(seq 1800); do
    mapfile -t found < <(pids | sort -un)
    [ ${#found[@]} -gt 0 ] || return 0
    for pid in "${found[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    sleep 0.1
  done
  die "$name: wanted no process left after $tries kills, found ${found[*]}"
}

remove_cgroups() {
  local root tries
  for root in $(cgroup_roots); do
    for tries in $(seq 1800); do
      [ -d "$root/$name" ] || break
      find "$root/$name" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.1
    done
    [ ! -d "$root/$name" ] || die "$name: wanted no cgroup left after $tries tries, found $root/$name"
  done
}

remove_network() {
  # Remove the link first. After its peer's namespace the kernel would remove it at any time, even right before `link del`.
  ! ip link show "v-$name" >/dev/null 2>&1 || ip link del "v-$name"
  ! ip netns list | grep -qE "^$name( |\$)" || ip netns del "$name"
}

# The last node of the machine, in any KUBE_NODE_DIR, removes the shared files.
remove_shared() {
  local point
  [ -z "$(ip -oneline link show master $bridge 2>/dev/null)" ] || return 0
  ! ip link show $bridge >/dev/null 2>&1 || ip link del $bridge
  [ ! -e $watches_before ] || { cat $watches_before >$watches; rm $watches_before; }
  [ -e "$made" ] || return 0
  while read -r point; do rmdir --ignore-fail-on-non-empty "$point" 2>/dev/null || true; done < <(sort -u "$made")
  rm "$made"
}

down() {
  kill_all
  remove_network
  # In the host's namespace a node has two mounts in memory. Unmount all: through one made by hand, rm -rf would delete
  # other files.
  awk -v node="$node/" 'index($2, node) == 1 { print $2 }' /proc/mounts | sort -r | while read -r point; do umount -l "$point"; done
  remove_cgroups
  rm -rf "$node"
  locked remove_shared
}

main() {
  [ $# -ge 2 ] || usage
  local verb=$1
  name=$2
  shift 2
  [[ $name =~ ^[a-z][a-z0-9-]{0,12}$ ]] || die "wanted a name of 1 to 13 lower-case letters, digits and hyphens (a network link is named after it), found $name"
  node=$base/$name
  kubernetes=$node/root/etc/kubernetes
  export KUBECACHEDIR=$node/kubectl-cache
  [ "$(id -u)" = 0 ] || die "wanted root, to make namespaces, found uid $(id -u)"
  case $verb in
    up | join | host | worker | etcd_host)
      [ -x "$bin/kubeadm" ] || die "wanted the kit's programs, found no $bin/kubeadm" "run tests/kit/binaries.sh"
      need runc=runc curl=curl ip=iproute2 gcc=gcc nsenter=util-linux python3=python3 openssl=openssl
      [ -e /usr/include/stdio.h ] || install_packages libc6-dev
      version=$(kubeadm version -o short)
      images=$base/images-$version-$(sha256sum <"$here/docker_archive.py" | head -c 8)
      "$verb" "$@"
      ;;
    exec) [ $# -gt 0 ] || usage; [ -e "$node/pid" ] || die "wanted a node that is up, found no $node"; enter "$@" ;;
    down) need ip=iproute2; down ;;
    *) usage ;;
  esac
}

main "$@"
