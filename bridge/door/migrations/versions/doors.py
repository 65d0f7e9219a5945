"""The first schema; `bridge.door.store` makes a new database with the newest schema at once."""

revision = "doors"
down_revision = None


def upgrade() -> None:
    """Leave the tables as they are."""
