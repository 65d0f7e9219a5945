"""The first form: requests, decisions, certificates, enrolments, doors, and when the database was restored."""

import sqlalchemy as sa
from alembic import op

revision = "doors"
down_revision = None

_DIGEST, _ID, _NAME, _TEXT = sa.String(64), sa.String(64), sa.String(253), sa.String(2000)
_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "requests",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("digest", _DIGEST, nullable=False, unique=True),
        sa.Column("node", _NAME, nullable=False),
        sa.Column("cluster", _NAME, nullable=False),
        sa.Column("peer", sa.String(64), nullable=False),
        sa.Column("received", _MOMENT, nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("begun", _MOMENT),
        sa.Column("note", _TEXT, nullable=False),
        sa.Column("answered", _MOMENT),
        sa.Column("bundle", sa.LargeBinary, nullable=False),
        sa.Column("answer", sa.LargeBinary),
        sa.Column("signer", _ID),
    )
    op.create_table(
        "decisions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("request", _ID, sa.ForeignKey("requests.id"), nullable=False, index=True),
        sa.Column("approver", _NAME, nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("reason", _TEXT, nullable=False),
        sa.Column("signature", sa.LargeBinary),
        sa.Column("decided", _MOMENT, nullable=False),
        sa.UniqueConstraint("request", "approver"),
    )
    op.create_table(
        "certificates",
        sa.Column("fingerprint", _DIGEST, primary_key=True),
        sa.Column("request", _ID, sa.ForeignKey("requests.id"), nullable=False, index=True),
        sa.Column("csr", _DIGEST, nullable=False, index=True),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("authority", sa.String(64), nullable=False),
        sa.Column("node", _NAME, nullable=False, index=True),
        sa.Column("cluster", _NAME, nullable=False),
        sa.Column("serial", sa.String(64), nullable=False),
        sa.Column("begins", _MOMENT, nullable=False),
        sa.Column("ends", _MOMENT, nullable=False, index=True),
        sa.Column("chain", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "enrolments",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("node", _NAME, nullable=False, index=True),
        sa.Column("cluster", _NAME, nullable=False),
        sa.Column("secret_hash", _DIGEST, nullable=False, unique=True),
        sa.Column("created", _MOMENT, nullable=False),
        sa.Column("created_by", _NAME, nullable=False),
        sa.Column("ends", _MOMENT, nullable=False),
        sa.Column("used", _MOMENT),
        sa.Column("request", _ID, sa.ForeignKey("requests.id")),
        sa.Column("certificates", _TEXT, nullable=False, server_default=""),
        sa.Column("withdrawn", _MOMENT),
    )
    op.create_table(
        "doors",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("host", _NAME, nullable=False),
        sa.Column("seen", _MOMENT, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
    )
    op.create_table(
        "restores",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("restored", _MOMENT, nullable=False),
        sa.Column("by", _NAME, nullable=False),
    )
