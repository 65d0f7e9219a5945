"""Several doors on one database: which doors there are, who signs a request, and when the database was restored."""

import sqlalchemy as sa
from alembic import op

revision = "doors"
down_revision = "enrolments"

_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add the tables and the column."""
    op.create_table(
        "doors",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("host", sa.String(253), nullable=False),
        sa.Column("seen", _MOMENT, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
    )
    op.create_table(
        "restores",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("restored", _MOMENT, nullable=False),
        sa.Column("by", sa.String(253), nullable=False),
    )
    op.add_column("requests", sa.Column("signer", sa.String(64)))
