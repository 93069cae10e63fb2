"""report.html of one run: a single file that opens anywhere, also without a network and without script."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlora.display import Cell, format_bytes
from peerlora.runs.answers import answers_html
from peerlora.runs.client_spread import spread_lines
from peerlora.runs.client_table import client_rows, describe_outcome
from peerlora.runs.events import LISTED_CLIENTS, Event, RoundDone, RunFinished, RunStarted, Warned
from peerlora.runs.further_scores import describe_best, table_rows
from peerlora.runs.metrics import evaluations, find_start, last_contact, select_events, summarise, worst_of
from peerlora.runs.page import picture_html, table_html, write_page
from peerlora.runs.pictures import (
    epsilon_picture,
    graph_picture,
    labels_picture,
    metric_curves,
    relayed_pictures,
    virtual_seconds,
)
from peerlora.runs.policy_pictures import environment_rows, policy_pictures
from peerlora.runs.privacy_summary import describe_privacy
from peerlora.runs.scores_by_name import HEAD, by_name_rows
from peerlora.runs.store import read_events, resume_command
from peerlora.runs.write_failures import describe_write_failures

if TYPE_CHECKING:
    from peerlora.runs.figures import Picture

MANY_CLIENTS = 100  # in the table of clients
MANY_CONTACTS = 60  # clients in the table of last contacts
MANY_CHANGES = 100  # of neighbours, the last ones, that are listed


class ReportWriter:
    """An event sink that draws the report of a run folder when the run is finished."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, event: Event) -> None:
        """Draw it at ``RunFinished``."""
        if isinstance(event, RunFinished):
            with describe_write_failures(self.folder, lambda: f"draw the report: {resume_command(self.folder)}"):
                write_report(self.folder)


def write_report(folder: Path | str) -> Path:
    """Write report.html into a run folder, also while the run goes on or after it stopped half way.

    Raises RunError when it is not a run folder.
    """
    folder = Path(folder)
    events = read_events(folder)
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    start = find_start(events)
    title = f"{start.method}, {_subject(start)}" if start else "A run that has not started"
    body = [_lead(start, events), _warnings(start, events)]
    if start:
        body += ["<h2>Results</h2>", *(f"<p>{escape(text)}</p>" for text in describe_outcome(start, events))]
        body += [*map(picture_html, _pictures(start, events)), _clients(start, events), _headline(start, events)]
        if rows := by_name_rows(events):
            body += ["<h2>Label by label</h2>", table_html(rows, HEAD)]
        body += [answers_html(events), _neighbours(events) if start.held else _contacts(start, events)]
        body += ["<h2>How it was run</h2>", _setting(start)]
    body.append(f"<details><summary>The resolved config</summary><pre>{escape(config)}</pre></details>")
    return write_page(folder / "report.html", title, body)


def _lead(start: RunStarted | None, events: Sequence[Event]) -> str:
    if start is None:
        return '<p class="lead">The run was stopped before it wrote its first event.</p>'
    finished, done = select_events(events, RunFinished), len(select_events(events, RoundDone))
    state = "finished" if finished else f"not finished: {done} of {start.rounds} rounds so far"
    when = f"started {start.time}" + (f", ended {finished[-1].time}" if finished else "")
    return f'<p class="lead">{escape(f"{done} rounds, seed {start.seed}; {state}; {when}.")}</p>'


def _warnings(start: RunStarted | None, events: Sequence[Event]) -> str:
    messages = [*(start.warnings if start else []), *(event.message for event in select_events(events, Warned))]
    items = "".join(f"<li>{escape(message)}</li>" for message in dict.fromkeys(messages))
    return f'<h2>Warnings</h2><ul class="warnings">{items}</ul>' if items else ""


def _headline(start: RunStarted, events: Sequence[Event]) -> str:
    """The main results as a small table."""
    facts = summarise(events)
    scores, distance, seconds = facts["scores"], facts["consensus"], facts["seconds"]
    last = evaluations(events)[-1:]
    on = f" after round {last[0].round}, on {last[0].rows:,} rows" if last else ""
    rows: list[tuple[str, Cell]] = [
        (f"{start.metric}, mean over clients' own models{on}", scores["own_mean"]),
        (f"{start.metric}, worst client", worst_of(facts)),
        (f"{start.metric}, averaged model", scores["averaged"]),
        *_relayed_rows(start.metric, facts),
        *table_rows(start.metric, facts),
        ("consensus distance of A", distance["A"]),
        ("consensus distance of B", distance["B"]),
        ("consensus distance of the product B·A", distance["product"]),
        ("cross-term", distance["cross_term"]),
        ("sent by all clients together", format_bytes(facts["bytes_sent"])),
    ]
    if "secure_sums" in facts:
        rows.append(("secure sums given up", facts["secure_sums"]["given_up"]))
    if facts["virtual_seconds"] is not None:
        rows.append(("virtual seconds", facts["virtual_seconds"]))
    rows += [(f"seconds: {phase}", value) for phase, value in seconds.items()]
    better = "higher" if start.higher_is_better else "lower"
    notes = [f"{start.metric}: {better} is better.", *describe_best(facts), *describe_privacy(facts.get("privacy"))]
    listed = table_html(rows) + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f"<h2>All numbers</h2>{listed}"


def _clients(start: RunStarted, events: Sequence[Event]) -> str:
    """Every client's own results, the worst first."""
    head, rows = client_rows(start, events)
    if len(rows) < 2:
        return ""
    shown = f"<h2>Clients</h2>{table_html(rows[:MANY_CLIENTS], head)}"
    return shown + (f'<p class="note">The {MANY_CLIENTS} worst of {len(rows)}.</p>' if len(rows) > MANY_CLIENTS else "")


def _relayed_rows(metric: str, facts: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """The results of the relayed models; none where nothing is relayed."""
    scores = facts["scores"]
    if "relayed_mean" not in scores:
        return []
    cut = scores["relayed_cut"]
    return [
        (f"{metric}, mean over clients' relayed models", scores["relayed_mean"]),
        (f"{metric}, worst relayed model", scores["relayed_worst"]),
        ("share of the averaged updates' squared norm that ranks cut off", cut if cut is None else float(f"{cut:.3g}")),
        ("deployed", facts["deployed"]),
    ]


def _subject(start: RunStarted) -> str:
    if not start.held:
        return f"{start.clients} clients"
    (me,) = start.held
    return f"{start.names.get(str(me), 'a peer')}, client {me} of {start.clients}"


def _neighbours(events: Sequence[Event]) -> str:
    """A real peer's neighbours: rounds exchanged, reasons for missed ones, and the latest changes."""
    from peerlora.runs.peer_summary import left_out, neighbours

    known, skipped = neighbours(events), left_out(events)
    rows = [
        (f"{each.site} (client {each.client})", each.met, sum(each.missed.values()), _reasons(each.missed))
        + (each.half_used,)
        for each in known
    ]
    head = ("neighbour", "rounds met", "missed", "because", "used by one end only")
    changes = sorted(((each.site, change) for each in known for change in each.changes), key=lambda pair: pair[1].time)
    lines = "".join(
        f"<li>{escape(f'{change.time}, round {change.round}: {site} {change.kind} {change.detail}')}</li>"
        for site, change in changes[-MANY_CHANGES:]
    )
    lead = "This peer knows its neighbourhood only: consensus distances are those of who met, before they mixed."
    if skipped:
        lead += f" It had fallen behind and left out {skipped} rounds."
    listed = f"<details><summary>What happened to them</summary><ul>{lines}</ul></details>" if changes else ""
    return f"<h2>Neighbours</h2><p>{escape(lead)}</p>{table_html(rows, head)}{listed}"


def _reasons(missed: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(missed.items()))


def _contacts(start: RunStarted, events: Sequence[Event]) -> str:
    """The round of every client's last exchange; for many clients, the oldest ones."""
    if (last := last_contact(events, start.clients)) is None:
        return '<p class="note">The links of each round were not written down.</p>'
    oldest = sorted(enumerate(last), key=lambda item: -1 if item[1] is None else item[1])[:MANY_CONTACTS]
    cells = [f"<td>{client}: {'never' if round is None else round}</td>" for client, round in sorted(oldest)]
    lines = "".join(f"<tr>{''.join(cells[at : at + 10])}</tr>" for at in range(0, len(cells), 10))
    some = f"the {MANY_CONTACTS} clients that waited longest" if start.clients > MANY_CONTACTS else "every client"
    table = f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'
    return f"<h2>Last contact</h2><p>Client: round of its last exchange with anybody, for {some}.</p>{table}"


def describe_speed_paths(paths: Mapping[str, str | None]) -> list[str]:
    """Describe each speed path in words: on, or why not."""
    return [f"{name}: {'on' if reason is None else f'off, {reason}'}" for name, reason in paths.items()]


def describe_clock(clock: Mapping[str, Any]) -> str:
    """Describe a clock in one line."""
    speeds, links = clock["speed"], [each for each in clock["bandwidth"] if each is not None]
    words = [f"{clock['step']:g} s per local step", f"speeds {min(speeds):.3g} to {max(speeds):.3g}"]
    uplinks = f"{format_bytes(min(links))}/s to {format_bytes(max(links))}/s" if links else "unlimited"
    words.append(f"uplinks {uplinks}")
    words.append(f"delay {clock['delay']:g} s")
    words += [f"deadline {clock['deadline']:g} s"] if clock["deadline"] else []
    words += [f"{len(clock['away'])} absences"] if clock["away"] else []
    words += [f"trace {clock['trace']}"] if clock["trace"] else []
    return ", ".join(words)


def _setting(start: RunStarted) -> str:
    """Settings and versions of the run."""
    shape = ", ".join(f"{key} {value}" for key, value in start.topology.items() if isinstance(value, str | int | float))
    rows: list[tuple[str, Cell]] = [
        ("method", start.method),
        ("clients", start.clients),
        ("rounds planned", start.rounds),
        ("topology", shape),
        *environment_rows(start),
        *([("virtual clock", describe_clock(start.clock))] if start.clock else []),
        ("scalars per adapter", start.parameters),
        ("seed", str(start.seed)),
        ("CPU threads", start.threads),
        ("speed paths", "; ".join(describe_speed_paths(start.paths))),
        *(("note", note) for note in start.notes),
        ("versions", ", ".join(f"{name} {version}" for name, version in start.versions.items())),
    ]
    return table_html(rows)


def _pictures(start: RunStarted, events: Sequence[Event]) -> list["Picture"]:
    """All figures for which there is anything to draw."""
    import numpy as np

    from peerlora.runs import figures

    done = select_events(events, RoundDone)
    rounds = [each.round + 1 for each in done]
    curves, found = metric_curves(events), [labels_picture(start), graph_picture(start, events)]
    if done:
        listed = len(start.held) or start.clients
        if listed <= LISTED_CLIENTS:
            curves_of_loss = figures.Curves(rounds, np.array([each.loss for each in done], float))
            loss = figures.clients_figure("loss", "Training loss", curves_of_loss)
        else:
            loss = figures.lines_figure("loss", "Training loss over all clients", spread_lines("loss", done), "loss")
        series = ("consensus_A", "consensus_B", "consensus_product", "cross_term", "local_cross_term")
        lines = {name.replace("_", " "): (rounds, [getattr(each, name) for each in done]) for name in series}
        sent = {"bytes": (rounds, [each.bytes_sent for each in done])}
        found[:0] = [
            loss,
            figures.log_figure("consensus", "How far the clients are apart", lines),
        ]
        rates = {each.round + 1: each.measures["learning_rate"] for each in done if "learning_rate" in each.measures}
        if rates:
            lines = {"learning rate": (list(rates), list(rates.values()))}
            found.append(figures.lines_figure("rate", "Learning rate", lines, "rate"))
        if any(sent["bytes"][1]):
            found.append(figures.bytes_figure("bytes", "Bytes sent", sent))
    if curves:
        title = f"{start.metric} of every client's own model and of the averaged model"
        found.insert(0, figures.clients_figure("metric", title, curves))
        timed = metric_curves(events, virtual_seconds)
        if timed and start.clock:
            by_time = f"{title}, by virtual seconds"
            found.insert(1, figures.clients_figure("metric-time", by_time, timed, "virtual seconds"))
        found[1:1] = [epsilon_picture(start, events), *relayed_pictures(start, events)]
    return [picture for picture in [*found, *policy_pictures(events)] if picture]
