"""EST requests: the requester, and the hash that identifies a repeated request."""

import sqlalchemy as sa
from alembic import op

revision = "est"
down_revision = "doors"


def upgrade() -> None:
    """Add two columns, which our own requests leave empty."""
    op.add_column("requests", sa.Column("origin", sa.LargeBinary))
    op.add_column("requests", sa.Column("again", sa.String(64)))
    op.create_index("ix_requests_again", "requests", ["again"], unique=True)
