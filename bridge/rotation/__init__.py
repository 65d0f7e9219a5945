"""The replacement of a CA while the cluster runs: trust both, issue from the new one, trust the new one alone."""
