"""What runs and triggers leave for those who watch over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynams_stream import Store, schema
from dynams_stream.errors import StoreBusyError, UsageError
from pipeline.checkpoints import Checkpoint
from pipeline.run_records import Ending, TriggerRecord, last_run, record_failure, recorded_run, trigger
from pipeline.stopping import Terminated

FIRST, SECOND = Checkpoint("/ckpt/1.pt", "1", 1000.25), Checkpoint("/ckpt/2.pt", "2", 2000.5)


def end(store: Store, checkpoint: Checkpoint | None, how: Ending | BaseException) -> tuple[str, int, str | None]:
    """A run that ends like that; then what is recorded: ending, failures in a row, checkpoint that was dealt with."""
    try:
        with recorded_run(store, "{epoch}.pt") as record:
            record.checkpoint = checkpoint
            if isinstance(how, BaseException):
                raise how
            record.ended(how)
    except BaseException as error:
        if error is not how:
            raise
    ran = last_run(store)
    assert ran is not None
    assert ran.epoch_from == "{epoch}.pt"
    assert ran.dealt_with_modified == {None: None, FIRST.url: 1000.25, SECOND.url: 2000.5}[ran.dealt_with]
    return ran.ending, ran.failures, ran.dealt_with


def test_failures_are_counted_until_a_good_run_and_what_was_dealt_with_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert end(store, FIRST, RuntimeError("a")) == ("failed", 1, None)
    assert end(store, FIRST, "published") == ("published", 0, FIRST.url)
    assert end(store, SECOND, RuntimeError("b")) == ("failed", 1, FIRST.url)
    assert end(store, SECOND, UsageError("the model")) == ("failed", 2, FIRST.url)  # wrong usage is told, too
    assert end(store, SECOND, Terminated()) == ("stopped", 2, FIRST.url)
    assert end(store, SECOND, StoreBusyError("c")) == ("stopped", 2, FIRST.url)  # of the run before
    record_failure(store, SECOND.url, "lasted too long")
    ran = last_run(store)
    assert ran is not None
    assert (ran.ending, ran.failures, ran.checkpoint, ran.error) == ("failed", 3, SECOND.url, "lasted too long")
    assert end(store, None, "not due") == ("not due", 0, FIRST.url)  # an empty folder
    assert end(store, SECOND, "not due") == ("not due", 0, SECOND.url)


def test_a_record_that_cannot_be_read_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    record_failure(store, FIRST.url, "a")
    place = Path(store.path(schema.LAST_RUN_FILE))
    place.write_text("{ not JSON")
    assert end(store, FIRST, "published") == ("published", 0, FIRST.url)
    place.unlink()
    place.mkdir()
    with recorded_run(store) as record:
        record.ended("published", round=1)
    record_failure(store, FIRST.url, "b")
    assert sum("last_run.json cannot be read: " in text for text in caplog.messages) == 3


def test_a_trigger_that_has_ended_gives_no_more_signs_of_life(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = TriggerRecord(store, "every 30m", "ckpt")
    record.seen(None)
    assert trigger(store).ended is None  # type: ignore[union-attr]
    record.ended()
    said = trigger(store)
    record.seen(None)  # a thread that was at it
    assert trigger(store) == said
    assert said is not None
    assert said.ended is not None
