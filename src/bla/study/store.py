"""What is stored of a study, in SQLite or PostgreSQL: an answer is written once, and never changed.

Everything that a request must do is one transaction: what was acknowledged is on the disk, and what comes twice (a
double click, a replay after a lost connection) finds the first and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine, Row, make_url

from bla.files import real
from bla.study.errors import StudyError
from bla.study.keys import hashed
from bla.study.plan import Plan
from bla.study.responses import Collected, Participant, Response
from bla.study.schedule import Trial, trials_of

metadata = sa.MetaData()

studies = sa.Table(
    "study",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("plan", sa.String(64), nullable=False),
    sa.Column("texts", sa.String(64), nullable=False),
    sa.Column("simulated", sa.Boolean, nullable=False),
    sa.Column("joined", sa.Integer, nullable=False),
    sa.CheckConstraint("id = 1", name="one_study"),
)
participants = sa.Table(
    "participants",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False, unique=True),
    sa.Column("name", sa.String(32), nullable=False, unique=True),
    sa.Column("token_sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("trials", sa.Integer, nullable=False),
    sa.Column("started_ms", sa.BigInteger, nullable=False),
    sa.Column("finished_ms", sa.BigInteger),
    sa.Column("withdrawn_ms", sa.BigInteger),
)
trials = sa.Table(
    "trials",
    metadata,
    sa.Column("participant", sa.Integer, sa.ForeignKey("participants.id"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("trial", sa.Text, nullable=False),
)
answers = sa.Table(
    "answers",
    metadata,
    sa.Column("participant", sa.Integer, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("choice", sa.Text, nullable=False),
    sa.Column("milliseconds", sa.Integer, nullable=False),
    sa.Column("clock", sa.String(8), nullable=False),
    sa.Column("shown_ms", sa.BigInteger, nullable=False),
    sa.Column("answered_ms", sa.BigInteger, nullable=False),
    sa.ForeignKeyConstraint(["participant", "position"], ["trials.participant", "trials.position"]),
)

_done = sa.select(sa.func.count(answers.c.position))

HOUR_MS = 3600 * 1000
SPARE_BYTES = 50 * 2**20
"""The free disk below which a study is not healthy."""
LONGEST_MS = 7 * 24 * 3600 * 1000  # a response time is cut off here


@dataclass(frozen=True)
class Person:
    """Where a participant stands, and the token that says who it is."""

    id: int
    token: str
    name: str
    trials: int
    done: int
    withdrawn: bool
    next: Trial | None = None  # the first trial without an answer; None: all are answered

    @property
    def finished(self) -> bool:
        return self.done >= self.trials


class Store:
    """A study's answers behind a database's URL, until it is closed."""

    def __init__(self, url: str | sa.URL) -> None:
        self.url = _parsed(url)
        self._writing: threading.Lock | None = None
        try:
            self._engine = engine_of(self.url)
            if self._engine.dialect.name == "sqlite":
                # SQLite lets one write at a time and makes the others poll; in one process they can queue instead.
                self._writing = threading.Lock()
            with self._engine.connect() as connection:
                connection.execute(sa.text("select 1"))
        except (sa.exc.SQLAlchemyError, ModuleNotFoundError) as error:
            problem = " ".join(str(error).split("\n(Background")[0].split())[:300]
            raise StudyError(f"expected a database at {self.place}, got: {problem}") from error

    @classmethod
    def of(
        cls, study: Path, url: str | None = None, *, rehearsal: bool = False, new: bool = True, replace: bool = False
    ) -> Store:
        """The store at a URL, or in the study's folder, where a rehearsal has a separate one.

        `new` allows to make a file, `replace` removes the one that is there.
        """
        path = study / ("rehearsal.db" if rehearsal else "study.db")
        if url is None and not new and not path.exists():
            verb = "rehearse" if rehearsal else "serve"
            raise StudyError(f"expected the answers of a study in {path}, got no such file: {verb} it first")
        if url is None and replace:
            for old in study.glob(f"{path.name}*"):
                old.unlink()
        return cls(url or sa.URL.create("sqlite", database=str(real(path))))

    @property
    def place(self) -> str:
        """The database's URL for messages, without its password."""
        return self.url.render_as_string(hide_password=True)

    @property
    def file(self) -> Path | None:
        """The database's file, if it is one."""
        name = self.url.database if self.url.get_backend_name() == "sqlite" else None
        return Path(name) if name and name != ":memory:" else None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, plan: Plan, texts: str, *, simulated: bool = False) -> None:
        """Make the tables if need be, and write down under which plan and texts answers are collected, for good."""
        migrate(self._engine)
        values = {"id": 1, "plan": plan.digest(), "texts": texts, "simulated": simulated, "joined": 0}
        insert = (postgresql if self._engine.dialect.name == "postgresql" else sqlite).insert
        with self._write() as connection:
            connection.execute(insert(studies).values(values).on_conflict_do_nothing())
            row = connection.execute(sa.select(studies)).one()
            self._check(row, plan, simulated=simulated)
            if row.joined and row.texts != texts:
                remedy = "put the old texts.toml back, or begin a new study"
                raise StudyError(f"expected the texts that the first participants read, got changed ones: {remedy}")
            connection.execute(sa.update(studies).values(texts=texts))

    def _check(self, row: Row[Any], plan: Plan, *, simulated: bool) -> None:
        if row.plan != plan.digest():
            raise StudyError(
                f"expected the plan under which this study began (digest {row.plan[:12]}), got another "
                f"({plan.digest()[:12]}): put the old plan.json back, or make a new study"
            )
        if bool(row.simulated) != simulated:
            expected, got = ("simulated", "real") if simulated else ("real", "simulated")
            raise StudyError(f"expected a store of {expected} answers, got one of {got} ones: a rehearsal has its own")

    def join(self, plan: Plan, token: str) -> Person | None:
        """A new participant, or the one who joined with this token before; None if all places are taken.

        A place is free again after a withdrawal, an hour without a first answer, or a day without a further one.
        """
        with self._write() as connection:
            if (known := self._person(connection, token)) is not None:
                return known
            counted = sa.update(studies).values(joined=studies.c.joined + 1).returning(studies.c.joined)
            joined: int = connection.execute(counted).scalar_one()
            taken: int = connection.execute(_taken(now_ms(), sa.func.count(participants.c.id))).scalar_one()
            if plan.places is not None and taken >= plan.places:
                connection.execute(sa.update(studies).values(joined=joined - 1))
                return None
            planned = trials_of(plan, joined - 1)
            name = uuid4().hex[:16]
            values = {"number": joined - 1, "name": name, "token_sha256": hashed(token)}
            values |= {"trials": len(planned), "started_ms": now_ms()}
            key = connection.execute(sa.insert(participants).values(values).returning(participants.c.id)).scalar_one()
            texts = [json.dumps(vars(trial), ensure_ascii=False) for trial in planned]
            rows = [{"participant": key, "position": at, "trial": text} for at, text in enumerate(texts, 1)]
            connection.execute(sa.insert(trials), rows)
            return Person(key, token, name, len(planned), 0, withdrawn=False)

    def holding(self, people: Sequence[int]) -> list[int]:
        """Which of these participants hold a place and have not finished."""
        held = _taken(now_ms(), participants.c.id).where(participants.c.finished_ms.is_(None))
        with self._read() as connection:
            return list(connection.scalars(held.where(participants.c.id.in_(people))))

    def person(self, token: str) -> Person | None:
        with self._read() as connection:
            return self._person(connection, token)

    def trial(self, person: Person, position: int) -> Trial | None:
        if position == person.done + 1:
            return person.next
        of_person = sa.select(trials.c.trial).where(trials.c.participant == person.id, trials.c.position == position)
        text = self._asked(of_person)
        return None if text is None else _loaded(text)

    def answer(
        self, person: Person, position: int, choice: str, *, milliseconds: int, clock: str, shown_ms: int
    ) -> Literal["stored", "kept", "early"]:
        """Write an answer. One that is there already is kept; one to a trial that was not shown yet is refused.

        So is one that comes while the person withdraws. Holding the participant's row, each waits for the other.
        """
        with self._write() as connection:
            if _lock(connection, person.id):
                return "early"
            done: int = connection.execute(_done.where(answers.c.participant == person.id)).scalar_one()
            if position <= done:
                return "kept"
            if position > done + 1 or position > person.trials:
                return "early"
            now = now_ms()
            values = {"participant": person.id, "position": position, "choice": choice, "clock": clock}
            values |= {"milliseconds": min(milliseconds, LONGEST_MS), "shown_ms": shown_ms, "answered_ms": now}
            connection.execute(sa.insert(answers).values(values))
            if position == person.trials:
                ended = sa.update(participants).where(participants.c.id == person.id).values(finished_ms=now)
                connection.execute(ended)
            return "stored"

    def answered(self, person: Person, position: int) -> str | None:
        given = sa.select(answers.c.choice).where(answers.c.participant == person.id, answers.c.position == position)
        return self._asked(given)

    def withdraw(self, person: Person) -> None:
        """Delete a person's answers; the record of the participation stays."""
        with self._write() as connection:
            _lock(connection, person.id)
            connection.execute(sa.delete(answers).where(answers.c.participant == person.id))
            still = sa.update(participants).where(participants.c.id == person.id, participants.c.withdrawn_ms.is_(None))
            connection.execute(still.values(withdrawn_ms=now_ms(), finished_ms=None))

    def counts(self) -> dict[str, int]:
        """How many began, finished and withdrew, and how many answers there are."""
        with self._read() as connection:
            columns = (participants.c.id, participants.c.finished_ms, participants.c.withdrawn_ms)
            counts = sa.select(*map(sa.func.count, columns), _done.scalar_subquery())
            found = connection.execute(counts).one()
        return dict(zip(("began", "finished", "withdrawn", "answers"), found, strict=True))

    def collected(self, plan: Plan) -> Collected:
        """Everything, as it is exported."""
        try:
            with self._read(whole=True) as connection:
                row = connection.execute(sa.select(studies)).one_or_none()
                people = connection.execute(sa.select(participants).order_by(participants.c.number)).all()
                given = connection.execute(
                    sa.select(participants.c.name, trials.c.trial, answers)
                    .select_from(participants.join(trials).join(answers))
                    .order_by(participants.c.number, answers.c.position)
                ).all()
        except sa.exc.DatabaseError as error:
            raise StudyError(f"expected the answers of a study, got none in {self.place}: serve it first") from error
        if row is None:
            raise StudyError(f"expected the answers of a study, got an empty store in {self.place}: serve it first")
        simulated = bool(row.simulated)
        self._check(row, plan, simulated=simulated)
        return Collected(
            plan=row.plan,
            simulated=simulated,
            participants=tuple(_participant(entry, simulated) for entry in people),
            responses=tuple(_response(entry, plan, simulated) for entry in given),
        )

    def check(self, seconds: float = 2.0) -> None:
        """A StudyError if no answer can be stored now: the lock is held for so long, or the database cannot write."""
        if self._writing is not None:
            if not self._writing.acquire(timeout=seconds):
                raise StudyError(f"expected a store that can be written within {seconds:g} s, got one that is locked")
            self._writing.release()
        if self.file is not None and (free := shutil.disk_usage(self.file.parent).free) < SPARE_BYTES:
            raise StudyError(f"expected {SPARE_BYTES // 2**20} MiB of free disk, got {free // 2**20}")
        try:
            with self._engine.connect().execution_options(writes=True) as connection:
                if self.file is not None:  # wait less for a lock, here alone
                    connection.connection.execute(f"pragma busy_timeout={int(1000 * seconds)}").close()
                try:
                    with connection.begin() as transaction:
                        connection.execute(sa.update(studies).values(joined=studies.c.joined))
                        transaction.rollback()
                finally:
                    if self.file is not None:
                        connection.connection.execute("pragma busy_timeout=30000").close()
        except sa.exc.SQLAlchemyError as error:
            raise StudyError(f"expected a store that can be written, got {type(error).__name__}") from error

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _write(self) -> Iterator[Connection]:
        alone = self._writing or contextlib.nullcontext()
        with alone, self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def _read(self, *, whole: bool = False) -> Iterator[Connection]:
        """To ask; `whole`: several questions about one moment."""
        with self._engine.connect() as connection:
            if self._engine.dialect.name == "postgresql":  # one question needs no transaction around it
                connection.execution_options(isolation_level="REPEATABLE READ" if whole else "AUTOCOMMIT")
            yield connection

    def _asked(self, statement: sa.Select[Any]) -> str | None:
        with self._read() as connection:
            found: str | None = connection.execute(statement).scalar_one_or_none()
            return found

    @staticmethod
    def _person(connection: Connection, token: str) -> Person | None:
        done = _done.where(answers.c.participant == participants.c.id).correlate(participants).scalar_subquery()
        own = sa.select(trials.c.trial).where(trials.c.participant == participants.c.id).correlate(participants)
        ahead = own.where(trials.c.position == done + 1).scalar_subquery()
        columns = (participants, done.label("done"), ahead.label("ahead"))
        # One query: on PostgreSQL each takes a round trip.
        row = connection.execute(sa.select(*columns).where(participants.c.token_sha256 == hashed(token))).one_or_none()
        if row is None:
            return None
        next_trial = None if row.ahead is None else _loaded(row.ahead)
        return Person(row.id, token, row.name, row.trials, row.done, row.withdrawn_ms is not None, next_trial)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def migrate(engine: Engine) -> None:
    """Bring the tables to this version's form."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", "bla.study:migrations")
    config.set_main_option("path_separator", "os")
    try:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(sa.text("select pg_advisory_xact_lock(2105148244)"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise StudyError(f"expected a store that this version of bla can read, got: {error}") from error


def _parsed(url: str | sa.URL) -> sa.URL:
    try:
        return make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # it may hold a password, which no message repeats
        raise StudyError("expected a database's URL, as sqlite:///study.db, got another text") from None


def engine_of(url: str | sa.URL) -> Engine:
    """SQLAlchemy's engine for a database's URL, with the settings that the store relies on."""
    parsed = _parsed(url)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise StudyError(f"expected SQLite or PostgreSQL, got {parsed.get_backend_name()}")
    if parsed.get_backend_name() == "postgresql":
        return sa.create_engine(parsed, pool_size=16, max_overflow=24, pool_pre_ping=True)
    engine = sa.create_engine(parsed, connect_args={"check_same_thread": False}, pool_size=16, max_overflow=24)

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # BEGIN is ours to say
        for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"pragma {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def _began(connection: Connection) -> None:
        # A transaction that will write takes the lock at once: two that read first could both wait for the other.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN DEFERRED")

    return engine


def _taken(now: int, what: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """Of those who have a place."""
    last = sa.select(sa.func.max(answers.c.answered_ms)).where(answers.c.participant == participants.c.id)
    seen = last.correlate(participants).scalar_subquery()
    busy = sa.or_(
        participants.c.finished_ms.is_not(None), participants.c.started_ms > now - HOUR_MS, seen > now - 24 * HOUR_MS
    )
    return sa.select(what).where(participants.c.withdrawn_ms.is_(None), busy)


def _lock(connection: Connection, person: int) -> bool:
    """Hold a participant's row until the transaction ends; whether the participant has withdrawn."""
    row = sa.select(participants.c.withdrawn_ms).where(participants.c.id == person).with_for_update()
    return connection.execute(row).scalar_one() is not None


def _loaded(text: str) -> Trial:
    values = json.loads(text)
    return Trial(**values | {"options": tuple(values["options"])})


def _participant(row: Row[Any], simulated: bool) -> Participant:
    times = {"started_at": row.started_ms, "finished_at": row.finished_ms, "withdrawn_at": row.withdrawn_ms}
    said: dict[str, Any] = {name: _moment(time) for name, time in times.items() if time is not None}
    return Participant(participant=row.name, number=row.number, trials=row.trials, simulated=simulated, **said)


def _response(row: Row[Any], plan: Plan, simulated: bool) -> Response:
    who = {"participant": row.name, "position": row.position, "task": plan.task, "simulated": simulated}
    times = {"milliseconds": row.milliseconds, "clock": row.clock, "shown_at": _moment(row.shown_ms)}
    return _loaded(row.trial).answered(row.choice, **who, **times, answered_at=_moment(row.answered_ms))


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
