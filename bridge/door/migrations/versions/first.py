"""The first form: requests, decisions, certificates, enrolments."""

import sqlalchemy as sa
from alembic import op

revision = "first"
down_revision = None

_DIGEST, _NAME, _TEXT = sa.String(64), sa.String(253), sa.String(2000)
_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "requests",
        sa.Column("id", sa.String(64), primary_key=True),
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
    )
    op.create_table(
        "decisions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("request", sa.String(64), sa.ForeignKey("requests.id"), nullable=False, index=True),
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
        sa.Column("request", sa.String(64), sa.ForeignKey("requests.id"), nullable=False, index=True),
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
        sa.Column("request", sa.String(64), sa.ForeignKey("requests.id")),
    )
