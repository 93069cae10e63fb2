"""What the report, the table at the end and the progress line say of relayed models."""

from dataclasses import replace

import pytest

from peerlora.cli.progress import Progress, print_summary
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.metrics import rows, summarise
from peerlora.runs.report import metric_curves, write_report
from peerlora.runs.store import RunStore

NAN = float("nan")


@pytest.fixture
def relayed(run):
    """The events of a run of 3 clients that relay, the last of which attacks."""
    found = []
    for event in run():
        if isinstance(event, RunStarted):
            event = replace(event, deploys="relayed")
        if isinstance(event, RoundDone):
            told = {"relayed_age_mean": event.round / 2, "relayed_age_max": float(event.round), "relayed_bytes": 100.0}
            event = replace(event, measures=told)
        if isinstance(event, Evaluated):
            scores = [0.625 + event.round / 100, 0.75, NAN]
            event = replace(event, relayed=scores, relayed_loss=[0.1, 0.2, NAN], relayed_cut=0.0123456)
        found.append(event)
    return found


def written(folder, events):
    with RunStore.create(folder, "clients: 3\n", {}) as store:
        for event in events:
            store.emit(event)
    return write_report(folder).read_text()


def test_the_report_has_their_numbers_and_figures(drawn, tmp_path, run, relayed):
    page, plain = written(tmp_path / "relayed", relayed), written(tmp_path / "plain", run())
    assert "mean over clients&#x27; relayed models" in page and "0.7075" in page
    assert "worst relayed model" in page and "0.665" in page and "0.0123" in page
    assert "relayed model and of the averaged model</figcaption>" in page
    assert "Age of the entries that clients hold</figcaption>" in page
    assert page.count("<figure") == plain.count("<figure") + 2 and "relayed" not in plain


def test_curves_of_relayed_models_are_those_of_the_events(run, relayed):
    curves = metric_curves(relayed, of="relayed")
    assert curves.rounds == [0] and curves.clients[0, 0] == 0.625
    assert curves.end.clients[0, 0] == 0.665, "the last evaluation is on other rows"
    assert metric_curves(run(), of="relayed") is None


def test_the_summary_leaves_attackers_out(run, relayed):
    told = summarise(relayed)
    assert told["scores"]["relayed_mean"] == pytest.approx((0.665 + 0.75) / 2)
    assert told["scores"]["relayed_worst"] == 0.665 and told["deployed"] == "relayed"
    lower = summarise([replace(relayed[0], higher_is_better=False), *relayed[1:]])
    assert lower["scores"]["relayed_worst"] == 0.75
    assert "relayed_mean" not in summarise(run())["scores"] and "deployed" not in summarise(run())


def test_the_long_table_has_a_row_per_client(run, relayed):
    found = [(client, value) for client, round, metric, value in rows(relayed) if (metric, round) == ("relayed", 4)]
    assert found[:2] == [(0, 0.665), (1, 0.75)] and len(found) == 3
    assert not any("relayed" in metric for _, _, metric, _ in rows(run()))


def test_the_table_at_the_end_has_two_more_columns_where_a_run_relays(capsys, run, relayed):
    print_summary([("relays", summarise(relayed) | {"run": "here"}), ("plain", summarise(run()) | {"run": "there"})])
    shown = capsys.readouterr().out
    relays, plain = (
        next(line for line in shown.splitlines() if f"│ {name}" in line).split("│") for name in ("relays", "plain")
    )
    assert [cell.strip() for cell in relays[5:7]] == ["0.708", "0.665"]
    assert [cell.strip() for cell in plain[5:7]] == ["-", "-"]
    assert "relays: the relayed models are deployed" in shown
    print_summary([("plain", summarise(run()) | {"run": "there"})])
    assert "relayed" not in capsys.readouterr().out


def test_the_progress_line_shows_mean_and_worst(run, relayed):
    for events, wanted in ((relayed, "0.688/0.625"), (run(), None)):
        shown = Progress()
        for event in events[:2]:
            shown(event)
        assert shown._facts(events[2]).get("relayed mean/worst") == wanted
