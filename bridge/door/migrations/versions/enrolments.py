"""Enrolments for some certificates alone, and withdrawn ones."""

import sqlalchemy as sa
from alembic import op

revision = "enrolments"
down_revision = "first"


def upgrade() -> None:
    """Add the columns; an enrolment of before is for all certificates that the policy allows."""
    op.add_column("enrolments", sa.Column("certificates", sa.String(2000), nullable=False, server_default=""))
    op.add_column("enrolments", sa.Column("withdrawn", sa.DateTime(timezone=True)))
