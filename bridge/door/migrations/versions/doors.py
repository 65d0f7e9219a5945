"""The first form; a new database is made as a whole (`bridge.door.store`), and begins with the newest one."""

revision = "doors"
down_revision = None


def upgrade() -> None:
    """Leave the tables as they are."""
