#!/bin/sh
# Writes roles and a policy for ca-bridge, made from the certificates in use. Needs an administrator's token (BAO_ADDR and
# BAO_TOKEN, or VAULT_ADDR and VAULT_TOKEN). Vault warns that it does not know allowed_ip_sans_cidr, not_after_bound
# and not_before_bound; with Vault, a role allows any IP address.
set -eu
cli=$(command -v bao || command -v vault) || { echo "error: neither bao nor vault is in PATH" >&2; exit 1; }
# Write everything, even if the reader of the output stops early (`| head`).
trap '' PIPE
say() { echo "$*" 2>/dev/null || :; }

"$cli" write pki-etcd/roles/kubeadm-apiserver-etcd-client - >/dev/null <<'JSON'
{
  "key_type": "any",
  "key_usage": ["DigitalSignature", "KeyEncipherment"],
  "ext_key_usage": [],
  "basic_constraints_valid_for_non_ca": true,
  "allow_any_name": false,
  "allow_bare_domains": true,
  "allow_subdomains": false,
  "allow_glob_domains": false,
  "allow_localhost": false,
  "cn_validations": ["hostname"],
  "use_csr_common_name": true,
  "require_cn": true,
  "generate_lease": false,
  "no_store": false,
  "not_after_bound": "forbid",
  "not_before_bound": "forbid",
  "server_flag": false,
  "client_flag": true,
  "allowed_domains": ["kube-apiserver-etcd-client"],
  "enforce_hostnames": true,
  "allow_wildcard_certificates": false,
  "use_csr_sans": false,
  "allow_ip_sans": false,
  "allowed_ip_sans_cidr": [],
  "allowed_uri_sans": [],
  "ttl": "8760h",
  "max_ttl": "8760h",
  "organization": []
}
JSON
written=$((${written:-0} + 1)); say role pki-etcd/roles/kubeadm-apiserver-etcd-client

"$cli" write pki-etcd/roles/kubeadm-etcd-healthcheck-client - >/dev/null <<'JSON'
{
  "key_type": "any",
  "key_usage": ["DigitalSignature", "KeyEncipherment"],
  "ext_key_usage": [],
  "basic_constraints_valid_for_non_ca": true,
  "allow_any_name": false,
  "allow_bare_domains": true,
  "allow_subdomains": false,
  "allow_glob_domains": false,
  "allow_localhost": false,
  "cn_validations": ["hostname"],
  "use_csr_common_name": true,
  "require_cn": true,
  "generate_lease": false,
  "no_store": false,
  "not_after_bound": "forbid",
  "not_before_bound": "forbid",
  "server_flag": false,
  "client_flag": true,
  "allowed_domains": ["kube-etcd-healthcheck-client"],
  "enforce_hostnames": true,
  "allow_wildcard_certificates": false,
  "use_csr_sans": false,
  "allow_ip_sans": false,
  "allowed_ip_sans_cidr": [],
  "allowed_uri_sans": [],
  "ttl": "8760h",
  "max_ttl": "8760h",
  "organization": []
}
JSON
written=$((${written:-0} + 1)); say role pki-etcd/roles/kubeadm-etcd-healthcheck-client

"$cli" write pki-etcd/roles/kubeadm-cp-1-etcd-peer - >/dev/null <<'JSON'
{
  "key_type": "any",
  "key_usage": ["DigitalSignature", "KeyEncipherment"],
  "ext_key_usage": [],
  "basic_constraints_valid_for_non_ca": true,
  "allow_any_name": false,
  "allow_bare_domains": true,
  "allow_subdomains": false,
  "allow_glob_domains": false,
  "allow_localhost": false,
  "cn_validations": ["hostname"],
  "use_csr_common_name": true,
  "require_cn": true,
  "generate_lease": false,
  "no_store": false,
  "not_after_bound": "forbid",
  "not_before_bound": "forbid",
  "server_flag": true,
  "client_flag": true,
  "allowed_domains": ["cp-1", "localhost"],
  "enforce_hostnames": true,
  "allow_wildcard_certificates": false,
  "use_csr_sans": true,
  "allow_ip_sans": true,
  "allowed_ip_sans_cidr": ["127.0.0.1/32", "192.0.2.10/32", "::1/128"],
  "allowed_uri_sans": [],
  "ttl": "8760h",
  "max_ttl": "8760h",
  "organization": []
}
JSON
written=$((${written:-0} + 1)); say role pki-etcd/roles/kubeadm-cp-1-etcd-peer

"$cli" write pki-etcd/roles/kubeadm-cp-1-etcd-server - >/dev/null <<'JSON'
{
  "key_type": "any",
  "key_usage": ["DigitalSignature", "KeyEncipherment"],
  "ext_key_usage": [],
  "basic_constraints_valid_for_non_ca": true,
  "allow_any_name": false,
  "allow_bare_domains": true,
  "allow_subdomains": false,
  "allow_glob_domains": false,
  "allow_localhost": false,
  "cn_validations": ["hostname"],
  "use_csr_common_name": true,
  "require_cn": true,
  "generate_lease": false,
  "no_store": false,
  "not_after_bound": "forbid",
  "not_before_bound": "forbid",
  "server_flag": true,
  "client_flag": true,
  "allowed_domains": ["cp-1", "localhost"],
  "enforce_hostnames": true,
  "allow_wildcard_certificates": false,
  "use_csr_sans": true,
  "allow_ip_sans": true,
  "allowed_ip_sans_cidr": ["127.0.0.1/32", "192.0.2.10/32", "::1/128"],
  "allowed_uri_sans": [],
  "ttl": "8760h",
  "max_ttl": "8760h",
  "organization": []
}
JSON
written=$((${written:-0} + 1)); say role pki-etcd/roles/kubeadm-cp-1-etcd-server

"$cli" policy write ca-bridge-cp-1_etcd-ca - >/dev/null <<'HCL'
path "pki-etcd/sign/kubeadm-apiserver-etcd-client" {
  capabilities        = ["update"]
  allowed_parameters  = { "csr" = [] "ttl" = [] "exclude_cn_from_sans" = [true] }
  required_parameters = ["csr", "exclude_cn_from_sans"]
}

path "pki-etcd/sign/kubeadm-etcd-healthcheck-client" {
  capabilities        = ["update"]
  allowed_parameters  = { "csr" = [] "ttl" = [] "exclude_cn_from_sans" = [true] }
  required_parameters = ["csr", "exclude_cn_from_sans"]
}

path "pki-etcd/sign/kubeadm-cp-1-etcd-peer" {
  capabilities        = ["update"]
  allowed_parameters  = { "csr" = [] "ttl" = [] "exclude_cn_from_sans" = [true] }
  required_parameters = ["csr", "exclude_cn_from_sans"]
}

path "pki-etcd/sign/kubeadm-cp-1-etcd-server" {
  capabilities        = ["update"]
  allowed_parameters  = { "csr" = [] "ttl" = [] "exclude_cn_from_sans" = [true] }
  required_parameters = ["csr", "exclude_cn_from_sans"]
}

path "pki-etcd/roles/kubeadm-apiserver-etcd-client" {
  capabilities = ["read"]
}

path "pki-etcd/roles/kubeadm-etcd-healthcheck-client" {
  capabilities = ["read"]
}

path "pki-etcd/roles/kubeadm-cp-1-etcd-peer" {
  capabilities = ["read"]
}

path "pki-etcd/roles/kubeadm-cp-1-etcd-server" {
  capabilities = ["read"]
}

# The node may revoke its own token, and ask what the token may do.
path "auth/token/revoke-self" {
  capabilities = ["update"]
}

path "sys/capabilities-self" {
  capabilities = ["update"]
}

# A desk or a door lists all revoked certificates at once. The CRL is public and contains the same.
path "pki-etcd/certs/revoked" {
  capabilities = ["list"]
}

# Only for a desk or a door: after a crash it finds the certificates already signed for it, and requests none twice.
# path "pki-etcd/certs" {
#   capabilities = ["list"]
# }

# Only for `[renewal] revoke = "superseded"`. Can't be limited: the node may then revoke any certificate of the mount.
# path "pki-etcd/revoke" {
#   capabilities = ["update"]
# }
HCL
written=$((${written:-0} + 1)); say policy ca-bridge-cp-1_etcd-ca, for the mount pki-etcd
say "$written written"
