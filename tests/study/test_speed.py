"""The speed table: how works are timed and lines made, and every row at micro sizes."""
import argparse
import gc
import importlib.util
import json
import subprocess
import time
import weakref

from study import __main__ as command, speed
from study.measure import (interleaved, random_batch, ratios, sadam, training_bytes,
                           training_steps, with_adapters)


def test_works_are_timed_in_turn_both_ways_and_the_first_round_does_not_count():
    order = []
    found = interleaved(3, a=lambda: order.append("a"),
                        b=lambda: (order.append("b"), time.sleep(0.02)))
    assert "".join(order) == "abbaabba"
    assert all(len(seconds) == 3 for seconds in found.values())
    assert min(found["b"]) >= 0.02
    assert ratios({"a": [1, 2], "b": [3, 8]}, "b", "a") == [3, 4]


def test_a_line_has_the_median_and_the_range():
    assert speed.line_of("work", "reference", "{:.1f} x", [1, 2, 9]) == {
        "": "work", "reference": "reference", "median": "2.0 x", "range": "1.0 x to 9.0 x (n 3)"}


def test_training_holds_what_is_counted_by_hand():
    """One layer of width 32 and rank 2: weights with their adapters and starts, a gradient, two
    moments and in the end two bases and gates for each of the four layers."""
    config = speed.REHEARSAL.tiny
    (model, spectral), (x, y) = with_adapters(config, 2), random_batch(config, 2)
    optimizer = sadam(model, spectral)
    training_steps(model, [optimizer], lambda step: (x, y), 1)()
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)]  # (d_out, d_in) of the four layers
    adapters = sum(2 * (d_in + d_out) for d_out, d_in in shapes)
    frozen = (257 + 128) * 32 + sum(d_out * d_in + d_out for d_out, d_in in shapes) + 6 * 32
    bases = sum(d_in * d_in + d_in for _, d_in in shapes)
    assert training_bytes(model, optimizer) == 4 * (frozen + 5 * adapters + bases)


def test_an_optimizer_is_freed_when_it_is_deleted():
    """Else the memory row would count the one before, too."""
    config = speed.REHEARSAL.tiny
    model, spectral = with_adapters(config, 2)
    optimizer = sadam(model, spectral)
    training_steps(model, [optimizer], lambda step: random_batch(config, 2), 1)()
    freed = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert freed() is None
    finally:
        gc.enable()


def rehearse(tmp_path, *rows):
    """What `speed` writes about these rows at micro sizes."""
    command.main(["speed", "--rehearse", "--only", *rows, "--out", str(tmp_path),
                  "--json", str(tmp_path / "speed.json")])
    return json.loads((tmp_path / "speed.json").read_text())


def test_every_row_runs(tmp_path, capfd):
    """The main job has a test of its own; references only where they are installed."""
    rows = [row for row in speed.ROWS if row != "main-job"]
    written, printed = rehearse(tmp_path, *rows), capfd.readouterr().out
    for row in rows:
        for what, reference, *_ in speed.ROWS[row][1]:
            assert f"| {what}" in printed and reference in printed
    measured = written["measured"]
    assert set(measured) == set(rows)
    for row in "sadam", "memory", "moments":
        assert all(values for values in measured[row])
    assert measured["memory"][1][0] > measured["memory"][2][0] > 0  # bases in float32, in bfloat16
    assert measured["sampling"][0][0] > 0 and measured["adapt"][0][0] > 0


def test_references_that_are_not_there_are_named(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    written, printed = rehearse(tmp_path, "adapt", "sampling", "eigen"), capfd.readouterr().out
    for reason in "needs transformers and peft", "needs transformers", "needs scipy":
        assert f"skipped: {reason} |" in printed
    lines = [line for line in written["lines"] if line["median"].startswith("skipped: needs")]
    assert len(lines) == 4 + 2 + 2


def test_calibrations_share_of_the_main_job_by_hand(monkeypatch):
    """It starts at 30 s and ends at 40 s, of what the whole process takes."""
    output = "".join(f"== {stage} ({s} s) ==\n"
                     for stage, s in (("a", 0), ("b", 30), ("c", 40), ("d", 90)))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: argparse.Namespace(stdout=output))
    monkeypatch.setattr(speed, "seconds_of", lambda work: work() or 100)
    assert speed.time_main_job(speed.REHEARSAL) == ([100], [10])
