"""The first tables, and triggers that refuse to change an answer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_POSTGRESQL = """
create function bla_answer_stays() returns trigger as
$$ begin raise exception 'an answer is never changed'; end $$ language plpgsql;
create trigger bla_answer_stays before update on answers for each row execute function bla_answer_stays();
"""
_SQLITE = """
create trigger bla_answer_stays before update on answers
begin select raise(abort, 'an answer is never changed'); end;
"""


def upgrade() -> None:
    op.create_table(
        "study",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("plan", sa.String(64), nullable=False),
        sa.Column("texts", sa.String(64), nullable=False),
        sa.Column("simulated", sa.Boolean, nullable=False),
        sa.Column("joined", sa.Integer, nullable=False),
        sa.CheckConstraint("id = 1", name="one_study"),
    )
    op.create_table(
        "participants",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer, nullable=False, unique=True),
        sa.Column("name", sa.String(32), nullable=False, unique=True),
        sa.Column("token_sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("trials", sa.Integer, nullable=False),
        sa.Column("started_ms", sa.BigInteger, nullable=False),
        sa.Column("finished_ms", sa.BigInteger),
        sa.Column("withdrawn_ms", sa.BigInteger),
    )
    op.create_table(
        "trials",
        sa.Column("participant", sa.Integer, sa.ForeignKey("participants.id"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("trial", sa.Text, nullable=False),
    )
    op.create_table(
        "answers",
        sa.Column("participant", sa.Integer, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("choice", sa.Text, nullable=False),
        sa.Column("milliseconds", sa.Integer, nullable=False),
        sa.Column("clock", sa.String(8), nullable=False),
        sa.Column("shown_ms", sa.BigInteger, nullable=False),
        sa.Column("answered_ms", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["participant", "position"], ["trials.participant", "trials.position"]),
    )
    op.execute(_POSTGRESQL if op.get_bind().dialect.name == "postgresql" else _SQLITE)
