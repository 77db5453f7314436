"""One champion, whoever promotes at once and wherever a promoter dies; MLflow's own store below."""

from __future__ import annotations

import itertools
import multiprocessing
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import RegistryError
from pipeline.deploy import champions, patience, promotions
from pipeline.deploy.champions import CHALLENGER, CHAMPION, PREVIOUS, Champions
from pipeline.deploy.patience import Patience, Persistent, UnansweredError
from pipeline.deploy.promotions import (
    LATE_SECONDS,
    NOBODY,
    LostRaceError,
    Record,
    Standing,
    alias_is,
    as_tags,
    fold,
    from_tags,
)
from tests.unit.memory_registry import MemoryRegistry

ASK = Persistent("here", Patience(seconds=5.0, unreached_seconds=5.0, first_wait=0.01))
NUM_VERSIONS = 4


def record(number: int, champion: int, after: int, **more: Any) -> Record:
    return Record(
        number=number, kind=more.pop("kind", "promote"), champion=champion, after=after, **more
    )


@given(
    plan=st.lists(
        st.tuples(st.integers(0, 4), st.booleans(), st.integers(1, 6)), min_size=1, max_size=60
    ),
    shuffle=st.randoms(),
)
def test_the_fold_is_a_compare_and_swap(plan: list[tuple[int, bool, int]], shuffle: Any) -> None:
    """Against the plain thing: one variable with a counter, read and swapped by five promoters."""
    records: list[Record] = []
    seen = dict.fromkeys(range(5), 0)
    counter, champion, won = 0, NOBODY, []
    for promoter, reads, version in plan:
        if reads:
            seen[promoter] = fold(records).last
            continue
        number = len(records) + 1
        records.append(record(number, version, seen[promoter], token=str(number)))
        if seen[promoter] == counter:
            counter, champion = number, version
            won.append(number)
    shuffle.shuffle(records)
    standing = fold(records)
    assert (standing.champion, standing.last) == (champion, counter)
    assert [r.number for r in standing.winners] == won


@given(st.data())
def test_a_deleted_record_does_not_undo_those_after_it(data: Any) -> None:
    """Somebody cleans up in MLflow: whoever won on top of what is gone now has won still."""
    count = data.draw(st.integers(2, 10))
    records = [record(i, i, i - 1) for i in range(1, count + 1)]
    gone = data.draw(st.sets(st.integers(1, count - 1)))
    left = [r for r in records if r.number not in gone]
    assert (fold(left).champion, fold(left).last) == (count, count)


def test_a_mend_is_no_change_of_the_champion() -> None:
    """As when a service looks between a promoter's record and its move of the alias."""
    standing = fold([record(1, 2, 0), record(2, 2, 1, kind="mend")])
    assert [one.kind for one in standing.winners] == ["promote", "mend"]
    assert [one.number for one in standing.changes] == [1]


def test_a_mend_of_what_is_champion_no_more_is_no_record() -> None:
    """Its writer saw 1 as champion, and slept while 2 became it; nobody is behind because of it."""
    records = [record(1, 1, 0, seen=True, done=True), record(2, 2, 1, seen=True, done=True)]
    late = record(3, 1, 2, kind="mend")
    assert fold([*records, late]) == fold(records)
    assert alias_is(fold([*records, late]), 1, now=1000.0) == "moved"


@given(
    kind=st.sampled_from(["promote", "rollback", "adopt", "mend"]),
    numbers=st.tuples(*[st.integers(0, 99)] * 4),
    text=st.text(min_size=1, max_size=30),
    marks=st.tuples(st.booleans(), st.booleans()),
)
def test_a_record_comes_back_from_its_tags(
    kind: Any, numbers: tuple[int, ...], text: str, marks: tuple[bool, bool]
) -> None:
    number, champion, before, after = numbers
    written = Record(
        number=number,
        kind=kind,
        champion=champion,
        before=before,
        after=after,
        token="t",
        by=text,
        at=text,
        reason=text,
        created=1.0,
        seen=any(marks),
        done=marks[1],
    )
    assert from_tags(number, as_tags(written), 1.0) == written
    assert from_tags(number, {"somebody": "else's"}, 1.0) is None


def test_who_moved_an_alias() -> None:
    """Versions 1 and 2 were promoted; the alias is looked at with every mix of marks."""
    first = record(1, 1, 0, seen=True, done=True)
    second = record(2, 2, 1)
    now = 1000.0

    def judged(last: Record, alias: int, now: float = now) -> str:
        return alias_is(fold([first, last]), alias, now=now)

    assert judged(second, 2) == "right"
    assert judged(second, 1) == "behind"  # its promoter was killed, however long ago
    assert judged(second, 3) == judged(second, NOBODY) == "moved"
    complete = replace(second, seen=True, done=True)
    assert judged(complete, 1) == "moved"  # it had been at 2: a person moved it back
    third = record(3, 3, 2, seen=True, done=True)
    slow = replace(second, seen=False, done=False, created=now)
    assert alias_is(fold([first, slow, third]), 2, now=now) == "behind"  # the slow one came through
    later = now + LATE_SECONDS + 1
    assert alias_is(fold([first, slow, third]), 2, now=later) == "moved"
    assert alias_is(Standing(), 4, now=now) == "moved"  # before there was any record
    assert alias_is(Standing(), NOBODY, now=now) == "right"


@pytest.fixture(scope="module")
def mlflow_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from pipeline.runtime.mlflow_tracker import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield connect(tmp_path_factory.mktemp("record"))


@pytest.fixture(scope="module", params=["memory", "sqlite"])
def client(request: pytest.FixtureRequest) -> Any:
    """The twin takes every case; MLflow on sqlite, at some milliseconds a call, some of them."""
    if request.param == "memory":
        return MemoryRegistry()
    return request.getfixturevalue("mlflow_client")


def some(client: Any, calls: range) -> range:
    """All calls of the twin; every seventh of the real thing."""
    return calls if isinstance(client, MemoryRegistry) else calls[::7]


_names = (f"model-{uuid.uuid4().hex[:8]}" for _ in itertools.count())


@pytest.fixture
def name(client: Any) -> str:
    return new_model(client)


def new_model(client: Any) -> str:
    made = next(_names)
    client.create_registered_model(made)
    for _ in range(NUM_VERSIONS):
        client.create_model_version(made, source="metaloom:/nowhere", await_creation_for=0)
    return made


class Interrupted(BaseException):
    """Nothing of ours catches it: as sudden as a kill."""


class Watched:
    """A client that does something at its n-th call, before or after the call has its effect."""

    def __init__(self, client: Any, at: int, act: Callable[[], None], *, after: bool) -> None:
        self._client, self._at, self._act, self._after = client, at, act, after
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            due = self.calls == self._at
            if due and not self._after:
                self._act()
            result = method(*arguments, **named)
            if due and self._after:
                self._act()
            return result

        return call


def num_calls(client: Any, act: Callable[[Any], Any]) -> int:
    watched = Watched(client, 0, lambda: None, after=False)
    act(watched)
    return watched.calls


def promote(client: Any, name: str, version: int) -> Standing:
    champions = Champions(client, name, ASK)
    return champions.change("promote", version, champions.settle(), "a test")


def is_settled(client: Any, name: str) -> tuple[int, int]:
    """The champion by the record, which is where the alias is, and the champion before it."""
    champions = Champions(client, name, ASK)
    standing = champions.settle()
    aliases = champions.aliases()
    assert aliases.get(CHAMPION, NOBODY) == standing.champion
    return standing.champion, aliases.get(PREVIOUS, NOBODY)


@pytest.mark.parametrize("after", [False, True])
def test_a_promoter_killed_at_any_call_is_mended_by_the_next(client: Any, after: bool) -> None:
    """Either nothing came of it, or all of it: the next call sees to that."""

    def die() -> None:
        raise Interrupted

    def prepared() -> str:
        name = new_model(client)
        promote(client, name, 1)
        Champions(client, name, ASK).move(CHALLENGER, 2)
        return name

    total = num_calls(client, lambda watched: promote(watched, prepared(), 2))
    outcomes = []
    for at in some(client, range(1, total + 1)):
        name = prepared()
        with pytest.raises(Interrupted):
            promote(Watched(client, at, die, after=after), name, 2)
        recorded = Champions(client, name, ASK).standing().champion
        champion, previous = is_settled(client, name)
        assert champion == recorded
        assert previous == (1 if champion == 2 else NOBODY)
        aliases = Champions(client, name, ASK).aliases()
        assert (CHALLENGER in aliases) == (champion == 1)
        outcomes.append(champion)
        champions = Champions(client, name, ASK)
        rolled = champions.change(
            "rollback" if champion == 2 else "promote", 3 - champion, champions.settle(), "a test"
        )
        assert is_settled(client, name)[0] == rolled.champion == 3 - champion
    assert outcomes == sorted(outcomes)  # up to some call nothing came of it, from there on all
    assert set(outcomes) == {1, 2}


@pytest.mark.parametrize("after", [False, True])
def test_two_promoters_at_every_interleaving_have_one_winner(client: Any, after: bool) -> None:
    """The second runs from start to end at any call of the first one, which is slow from then."""
    total = num_calls(client, lambda watched: promote(watched, new_model(client), 1))
    lost = 0
    for at in some(client, range(1, total + 1)):
        name = new_model(client)
        champions = Champions(client, name, ASK)
        since = champions.settle()
        told: list[str] = []
        ran: list[int] = []

        def second(
            name: str = name,
            since: Standing = since,
            told: list[str] = told,
            ran: list[int] = ran,
        ) -> None:
            ran.append(2)
            try:
                Champions(client, name, ASK).change("promote", 2, since, "the second")
            except LostRaceError as error:
                told.append(str(error))

        watched = Watched(client, at, second, after=after)
        try:
            Champions(watched, name, ASK).change("promote", 1, since, "the first")
        except LostRaceError as error:
            told.append(str(error))
        if not ran:  # the first one had fewer calls, or that one failed
            second()
        assert len(told) == 1
        winner = is_settled(client, name)[0]
        assert f"version {3 - winner} of {name} was not promoted" in told[0]
        assert f"`metaloom lineage {winner}`" in told[0]
        lost += winner == 2
    assert lost < total
    assert lost or not isinstance(client, MemoryRegistry), "both orders must have been seen"


def test_without_the_comparison_both_of_two_promoters_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: a record counts though it names no last winner."""
    monkeypatch.setattr(promotions, "_follows", lambda record, standing, numbers: True)
    client = MemoryRegistry()
    name = new_model(client)
    champions = Champions(client, name, ASK)
    since = champions.settle()
    for version in (1, 2):  # neither is told of the other
        assert champions.change("promote", version, since, "a test").champion == version


def test_a_slow_promoters_late_move_is_put_back(client: Any, name: str) -> None:
    """Its record won, it slept, another one won after it and was done: its move comes too late."""
    since = Champions(client, name, ASK).settle()

    def sleep_through() -> None:
        promote(client, name, 2)

    class Slow(Watched):
        def __getattr__(self, name: str) -> Any:
            if name != "set_registered_model_alias":
                return getattr(self._client, name)
            return super().__getattr__(name)

    def die_after_the_move() -> None:
        raise Interrupted

    inner = Slow(client, 1, die_after_the_move, after=True)
    with pytest.raises(Interrupted):
        Champions(Slow(inner, 1, sleep_through, after=False), name, ASK).change(
            "promote", 1, since, "slow"
        )
    assert Champions(client, name, ASK).aliases()[CHAMPION] == 1  # where it must not stay
    assert is_settled(client, name) == (2, 1)


def test_a_promoter_that_is_too_late_to_be_expected_leaves_the_alias_alone(
    client: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one mends it; a move that comes now would be taken for a person's."""
    since = Champions(client, name, ASK).settle()
    monkeypatch.setattr(champions, "LATE_SECONDS", -1.0)
    with pytest.raises(UnansweredError, match="promoting took more than.*\n.*mends it"):
        Champions(client, name, ASK).change("promote", 1, since, "slow")
    monkeypatch.undo()
    assert CHAMPION not in Champions(client, name, ASK).aliases()
    assert is_settled(client, name)[0] == 1


@settings(max_examples=200, deadline=None)
@given(plan=st.lists(st.tuples(st.booleans(), st.integers(0, NUM_VERSIONS)), max_size=12))
def test_a_move_by_hand_is_always_followed(plan: list[tuple[bool, int]]) -> None:
    """Whoever moved it last, person or promoter, named the champion; a person may take it away."""
    client = MemoryRegistry()
    name = new_model(client)
    expected = NOBODY
    for by_hand, version in plan:
        if by_hand and version == NOBODY:
            client.delete_registered_model_alias(name, CHAMPION)
        elif by_hand:
            client.set_registered_model_alias(name, CHAMPION, str(version))
        elif version != NOBODY:
            promote(client, name, version)
        else:
            continue
        expected = version
        assert is_settled(client, name)[0] == expected


def test_a_champion_deleted_in_mlflow_is_no_champion(client: Any, name: str) -> None:
    for version in (1, 2, 3):
        promote(client, name, version)
    client.delete_model_version(name, "2")
    client.delete_model_version(name, "3")
    assert is_settled(client, name) == (NOBODY, 1)
    promote(client, name, 4)
    assert is_settled(client, name) == (4, 1)


def test_a_promotion_whose_version_was_deleted_halfway_is_dropped(client: Any, name: str) -> None:
    promote(client, name, 1)
    since = Champions(client, name, ASK).settle()

    def die() -> None:
        raise Interrupted

    class AtTheMove(Watched):
        def __getattr__(self, name: str) -> Any:
            if name != "set_registered_model_alias":
                return getattr(self._client, name)
            return super().__getattr__(name)

    with pytest.raises(Interrupted):
        Champions(AtTheMove(client, 1, die, after=False), name, ASK).change(
            "promote", 2, since, "killed"
        )
    client.delete_model_version(name, "2")
    assert is_settled(client, name)[0] == 1


def test_one_lost_answer_makes_one_record(client: Any, name: str) -> None:
    """Every call has its effect and its answer is lost once: nothing is done twice."""

    def lose() -> None:
        raise ConnectionError("the answer was lost")

    total = num_calls(client, lambda watched: promote(watched, new_model(client), 1))
    for at in some(client, range(1, total + 1)):
        name = new_model(client)
        promote(Watched(client, at, lose, after=True), name, 1)
        champions = Champions(client, name, ASK)
        assert len(champions._records()) == 1
        assert is_settled(client, name) == (1, NOBODY)


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("what", ["tag", "alias"])
def test_of_two_who_write_the_same_at_the_same_moment_none_fails(
    what: str, guarded: bool, mlflow_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promoter and a service that has seen the promotion; MLflow looks first and writes then."""
    from mlflow.store.model_registry.dbmodels.models import (
        SqlModelVersionTag,
        SqlRegisteredModelAlias,
    )
    from sqlalchemy import event
    from sqlalchemy.orm import Session

    if not guarded:
        monkeypatch.setattr(patience, "_is_overtaken", lambda error: False)
    model, overtaken = new_model(mlflow_client), []
    champions = Champions(mlflow_client, model, ASK)

    def write(version: int) -> None:
        if what == "tag":
            champions._set_tag(model, 1, "what", str(version))
        else:
            champions.move("what", version)

    def overtake(session: Any, *_: Any) -> None:
        kinds = (SqlModelVersionTag, SqlRegisteredModelAlias)
        if not overtaken and any(isinstance(one, kinds) for one in session.new):
            overtaken.append(what)
            with ThreadPoolExecutor(1) as thread:  # on a connection of its own
                thread.submit(write, 2).result()

    event.listen(Session, "before_flush", overtake)
    try:
        if guarded:
            write(3)
        else:
            with pytest.raises(Exception, match="UNIQUE constraint failed"):
                write(3)
    finally:
        event.remove(Session, "before_flush", overtake)
    assert overtaken
    tags, aliases = mlflow_client.get_model_version(model, "1").tags, champions.aliases()
    assert int(tags["what"] if what == "tag" else aliases["what"]) == (3 if guarded else 2)


def test_spent_patience_says_what_state_things_are_in(client: Any, name: str) -> None:
    def refuse() -> None:
        raise ConnectionError("refused")

    class Gone(Watched):
        """Gone from its n-th call on."""

        def __getattr__(self, name: str) -> Any:
            call = super().__getattr__(name)

            def refusing(*arguments: Any, **named: Any) -> Any:
                if self.calls >= self._at:
                    refuse()
                return call(*arguments, **named)

            return refusing

    ask = Persistent("here", Patience(0.05, 0.05, first_wait=0.01))
    messages = set()
    for at in some(client, range(1, 12)):
        name = new_model(client)
        since = Champions(client, name, ASK).settle()
        with pytest.raises(UnansweredError, match="does not answer") as caught:
            Champions(Gone(client, at, lambda: None, after=False), name, ask).change(
                "promote", 1, since, "a test"
            )
        message = str(caught.value).splitlines()[-1]
        recorded = Champions(client, name, ASK).standing().champion == 1
        assert recorded or "is not known. Run the same command again" in message
        messages.add(message.partition(" (")[0].partition(" became")[0])
        assert is_settled(client, name)[0] == (1 if recorded else NOBODY)
    assert any("is recorded as champion" in message for message in messages)


def race(uri: str, names: Sequence[str], version: int, barrier: Any, results: Any) -> None:
    """One of two promoters, in a process of its own; in each race both saw the same standing."""
    import mlflow

    client = mlflow.MlflowClient(uri, uri)
    try:
        for name in names:
            champions = Champions(client, name, ASK)
            since = champions.standing()
            barrier.wait(120)
            try:
                champions.change("promote", version, since, "a race")
                results.put((name, version, ""))
            except RegistryError as error:
                results.put((name, version, str(error)))
    except BaseException as error:
        barrier.abort()
        results.put(("broken", version, f"{type(error).__name__}: {error}"))
        raise


def run_races(client: Any, uri: str, count: int) -> list[dict[int, str]]:
    """Races of two processes; what each promoter was told in each, empty for the winner."""
    context = multiprocessing.get_context("spawn")
    names = [new_model(client) for _ in range(count)]
    results, barrier = context.SimpleQueue(), context.Barrier(2)
    racers = [
        context.Process(target=race, args=(uri, names, version, barrier, results))
        for version in (1, 2)
    ]
    for racer in racers:
        racer.start()
    said: dict[str, dict[int, str]] = {name: {} for name in names}
    for _ in range(2 * count):
        name, version, message = results.get()
        assert name != "broken", message
        said[name][version] = message
    for racer in racers:
        racer.join()
    for name, told in said.items():
        won = [version for version, message in told.items() if not message]
        assert len(won) != 1 or is_settled(client, name)[0] == won[0]
        assert len(Champions(client, name, ASK)._records()) == 2, "both must have written"
    return list(said.values())


def is_fair(told: Mapping[int, str]) -> bool:
    """One winner, and a loser that was told who won and where to look."""
    lost = [message for message in told.values() if message]
    (winner,) = [version for version, message in told.items() if not message] or [0]
    return len(lost) == 1 and f"`metaloom lineage {winner}`" in lost[0]


def test_races_of_two_processes_on_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime.mlflow_tracker import connect, tracking_uri

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = connect(tmp_path)
    told = run_races(client, tracking_uri(tmp_path), 8)
    assert len(told) == 8 and all(is_fair(one) for one in told)
