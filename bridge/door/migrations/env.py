"""Alembic runs this file: a newer form is applied over the connection that `bridge.door.store` has."""

from alembic import context

from bridge.door.store import METADATA

if hasattr(context, "config"):  # not where it is only imported
    context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
    with context.begin_transaction():
        context.run_migrations()
