"""The first schema; `bridge.door.store` makes a new database with all tables at once."""

revision = "initial_2"  # with the columns `named` and `key`
down_revision = None


def upgrade() -> None:
    """Leave the tables as they are."""
