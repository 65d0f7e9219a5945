"""
Whether everything is ready for the next renewal, and what runs would survive a restart: `ca-bridge doctor`.

Each check is a function that yields findings; nothing here prints, writes or spends a signature.
"""
