"""The store, on SQLite and PostgreSQL: written once, found again, nothing lost or doubled by many at once."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from bla.study.errors import StudyError
from bla.study.store import Store, answers, engine_of, metadata, now_ms
from small_study import plan

POSTGRESQL = os.environ.get("BLA_TEST_POSTGRESQL")


def fresh_database(kind: str, folder: Path) -> str:
    """A URL of an empty database."""
    if kind == "sqlite":
        return f"sqlite:///{folder / 'study.db'}"
    if not POSTGRESQL:
        if os.environ.get("CI"):
            pytest.fail("expected BLA_TEST_POSTGRESQL in CI")
        pytest.skip("needs BLA_TEST_POSTGRESQL, the URL of a PostgreSQL server to make databases on")
    name = f"bla_{uuid4().hex}"
    engine = sa.create_engine(POSTGRESQL.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    engine.dispose()
    return POSTGRESQL.rpartition("/")[0] + f"/{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return fresh_database(request.param, tmp_path)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    found = Store(url)
    found.begin(plan(), "t" * 64)
    yield found
    found.close()


def given(store: Store, token: str, position: int, choice: str = "left") -> str:
    person = store.person(token)
    assert person is not None
    return store.answer(person, position, choice, milliseconds=900, clock="browser", shown_ms=now_ms())


def test_an_answer_is_written_once(store: Store) -> None:
    store.join(plan(), "a")
    assert [given(store, "a", 1), given(store, "a", 1, "right"), given(store, "a", 3)] == ["stored", "kept", "early"]
    assert [given(store, "a", position, "right") for position in (2, 3, 4, 5)] == ["stored"] * 3 + ["early"]
    collected = store.collected(plan())
    assert [response.choice for response in collected.responses] == ["left", "right", "right", "right"]
    assert collected.participants[0].finished
    assert store.counts() == {"began": 1, "finished": 1, "withdrawn": 0, "answers": 4}


def test_the_database_itself_refuses_to_change_an_answer(store: Store, url: str) -> None:
    store.join(plan(), "a")
    given(store, "a", 1)
    engine = engine_of(url)
    with pytest.raises(sa.exc.DatabaseError, match="never changed"), engine.begin() as connection:
        connection.execute(sa.text("update answers set choice = 'right'"))
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
        connection.execute(
            sa.insert(answers).values(
                participant=99, position=1, choice="left", milliseconds=1, clock="server", shown_ms=1, answered_ms=1
            )
        )
    engine.dispose()


def test_many_at_once_lose_and_double_nothing(store: Store, url: str) -> None:
    """Two servers on one database, threads in each, every request sent twice."""
    other = Store(url)

    def take_part(number: int) -> list[str]:
        token, seen = f"token{number}", []
        for side in (store, other):
            person = side.join(plan(), token)
            assert person is not None
            seen.append(person.name)
        for position in (1, 2, 3, 4):
            seen += [given((store, other)[(number + turn) % 2], token, position) for turn in range(2)]
        return seen

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(take_part, range(12)))
    assert all(entry[0] == entry[1] and entry[2:] == ["stored", "kept"] * 4 for entry in seen)
    collected = store.collected(plan())
    assert [person.number for person in collected.participants] == list(range(12))
    assert len(collected.responses) == 12 * 4
    other.close()


def test_the_same_answer_from_all_sides_at_once(store: Store) -> None:
    for token in "abcd":
        store.join(plan(), token)
        with ThreadPoolExecutor(8) as pool:
            said = list(pool.map(lambda turn, who=token: given(store, who, 1, ("left", "right")[turn % 2]), range(16)))
        assert sorted(said) == ["kept"] * 15 + ["stored"]


def test_a_killed_process_loses_nothing_that_it_acknowledged(url: str) -> None:
    program = f"""
import sys
from bla.study.store import Store, now_ms
from small_study import plan
store = Store({url!r})
store.begin(plan(count=500), "t" * 64)
store.join(plan(count=500), "a")
for position in range(1, 501):
    person = store.person("a")
    store.answer(person, position, "left", milliseconds=1, clock="server", shown_ms=1)
    print(position, flush=True)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        acknowledged += [int(line) for line in process.stdout.read().split()]
    store = Store(url)
    stored = store.counts()["answers"]
    store.close()
    assert acknowledged == list(range(1, len(acknowledged) + 1))
    assert len(acknowledged) <= stored <= len(acknowledged) + 1


def test_withdrawn_answers_are_deleted(store: Store) -> None:
    person = store.join(plan(), "a")
    assert person is not None
    given(store, "a", 1)
    store.withdraw(person)
    assert store.counts() == {"began": 1, "finished": 0, "withdrawn": 1, "answers": 0}
    # an answer that was on its way meanwhile, its sender still taken for one who takes part
    late = store.answer(person, 1, "left", milliseconds=900, clock="browser", shown_ms=now_ms())
    assert late == "early"
    assert store.counts()["answers"] == 0


def test_the_migrations_make_the_tables_of_the_code(store: Store, url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = engine_of(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_another_plan_is_refused(store: Store, url: str) -> None:
    again = Store(url)
    again.begin(plan(), "t" * 64)
    with pytest.raises(StudyError, match="put the old plan"):
        again.begin(plan(people=21), "t" * 64)
    with pytest.raises(StudyError, match="rehearsal has its own"):
        again.begin(plan(), "t" * 64, simulated=True)
    again.begin(plan(), "u" * 64)  # nobody has read the texts
    again.join(plan(), "a")
    with pytest.raises(StudyError, match="put the old texts"):
        again.begin(plan(), "t" * 64)
    again.close()


def test_a_store_that_cannot_be_is_a_mistake(tmp_path: Path) -> None:
    for url in ("nonsense", "mysql://localhost/x", f"sqlite:///{tmp_path}/no/such/study.db"):
        with pytest.raises(StudyError, match="expected"):
            Store(url)
    empty = Store(f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(StudyError, match="serve it first"):
        empty.collected(plan())
    empty.close()


@pytest.mark.parametrize(
    "name", ["Which is better?", "a#b", "a%20b", "a:b@c", "file:x?mode=memory", "tab\tname", "ünï"]
)
def test_a_studys_answers_stay_in_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with Store.of(folder) as store:
        store.begin(plan(), "texts")
        assert store.file == folder / "study.db"
        store.check()
    assert [path.name for path in folder.iterdir()] == ["study.db"], "closed: its WAL is gone"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hush-hush@nowhere.invalid/x", "mysql://me:hush-hush@here/x", "sqlite://me:hush-hush@here/x",
        "postgresql://me:hush-hush@[", "me:hush-hush@here", "postgresql://me:hush-hush@here:port/x",
    ],
)  # fmt: skip
def test_no_message_repeats_a_password(url: str) -> None:
    with pytest.raises(StudyError) as error:
        Store(url)
    assert "hush-hush" not in str(error.value)


def test_a_store_that_cannot_write_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.of(tmp_path) as store:
        store.begin(plan(), "texts")
        store.check()
        other = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
        with contextlib.closing(other):
            other.execute("begin immediate")
            with pytest.raises(StudyError, match="expected a store that can be written"):
                store.check(0.05)
        store.check()
        with store._writing, pytest.raises(StudyError, match=r"within 0\.05 s, got one that is locked"):
            store.check(0.05)
        monkeypatch.setattr("bla.study.store.SPARE_BYTES", 2**60)
        with pytest.raises(StudyError, match="of free disk"):
            store.check()
