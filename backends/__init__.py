"""The CAs that ca-bridge can ask, one module each; found by entry point, never imported by `bridge`."""
