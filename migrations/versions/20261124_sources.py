"""Uploaded weights, and which jobs need them or another job's network."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "20261124_sources"
down_revision: str | None = "20261124_first"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "weights",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tensors", sa.JSON(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_weights")),
    )
    op.create_index("weights_newest", "weights", ["tenant_id", "id"])
    op.create_table(
        "job_sources",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("source_id", sa.String(length=64), nullable=False),
        sa.CheckConstraint("kind IN ('job', 'weights')", name=op.f("ck_job_sources_kind")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_sources_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "kind", "source_id", name=op.f("pk_job_sources")),
    )
    op.create_index("job_sources_source", "job_sources", ["kind", "source_id"])
