"""Whether everything is ready for the next renewal: `ca-bridge doctor`; each check yields findings."""
