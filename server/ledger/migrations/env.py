"""How Alembic runs the ledger's migrations: on the connection that `server.ledger.migrate` hands it."""

from alembic import context

from server.ledger.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
