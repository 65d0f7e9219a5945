"""
The CA desk: our offline registration authority, which signs request bundles by a policy.

What a policy says is read here for the gateway, too, since both obey one file.
"""
