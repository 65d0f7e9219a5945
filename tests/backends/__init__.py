"""Each backend against its real server."""
