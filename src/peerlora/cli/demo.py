"""``peerlora demo``."""

from peerlora.cli.options import AsJson, Out, Overrides, print_json


def command(words: Overrides = None, out: Out = None, json: AsJson = False) -> None:
    """Ten clients with skewed data fine-tune a small encoder: alone, by gossip, and with all data in one place."""
    from peerlora.cli.progress import Progress, print_demo, stop_on_interrupt
    from peerlora.experiments.demo import demo_config, run_demo

    config = demo_config(words or [])
    with stop_on_interrupt() as stop:
        report = run_demo(config, words or [], out, lambda title: Progress(title), stop)
    print_demo(report)
    if json:
        print_json({"rows": [{"row": row.name, **row.summary} for row in report.rows], "report": str(report.report)})
