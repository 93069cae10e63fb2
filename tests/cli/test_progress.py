"""What the live table and the table at the end show."""

from peerlora.cli.progress import Progress, print_summary
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.metrics import summarise


def events(metric, higher):
    start = RunStarted("", "dec-lora", 2, 4, metric, higher, 0, 1, {}, {}, {}, 5, [])
    done = RoundDone(0, [1.0, 3.0], *[0.0] * 6, [[0, 1]], 1, 10, 20, *[0.0] * 3)
    return [start, done, Evaluated(1, 20, [1.0, 3.0], 2.0, [1.0, 3.0], 2.0, 0.1, True)]


def test_the_worst_client_is_the_one_with_the_largest_loss(capsys):
    for metric, higher, worst in (("loss", False, "3.000"), ("accuracy", True, "1.000"), ("error", False, "3.000")):
        shown = Progress()
        start, done, score = events(metric, higher)
        for event in (start, score, done):
            shown(event)
        assert shown._facts(done)["worst"] == worst and shown._facts(done)["mean client"] == "2.000"
        print_summary([("run", summarise(events(metric, higher)) | {"run": "here"})])
        row = next(line for line in capsys.readouterr().out.splitlines() if "│ run" in line)
        assert row.split("│")[3].strip() == worst, metric
