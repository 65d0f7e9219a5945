"""Alembic runs this file to migrate the database over the connection of `bridge.door.store`."""

from alembic import context

from bridge.door.store import METADATA

if hasattr(context, "config"):  # Alembic sets it; a plain import does not
    context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
    with context.begin_transaction():
        context.run_migrations()
