"""The CA desk: our offline registration authority, which signs by a policy (the gateway reads the policy, too)."""
