"""Alembic migrations, one chain for SQLite and Postgres; `Database.upgrade()` runs them.

A new one: `alembic revision --autogenerate -m "..."`."""
