"""Files of a comparison for a paper: the table in LaTeX, figures as PDF and SVG."""

import re

import pytest

from peerlora.config.loading import load_config
from peerlora.experiments.figures import comparison_figures
from peerlora.experiments.latex import escape_latex
from peerlora.experiments.paper_figures import SIZE, draw_chart, file_name, write_figures
from peerlora.experiments.results import write_results
from peerlora.experiments.statistics import Outcome
from peerlora.runs.chart import Chart, Line
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.figures import Picture


def outcome(method, seed):
    start = RunStarted("", method, 2, 2, "accuracy", True, seed, 1, {}, {}, {"kind": "ring"}, 5, [])
    numbers = [0.1, 0.1, 0.5, 0.25, 0, 0.5]
    happened = [start, Evaluated(0, 10, [0.25, 0.5], 0.5, [1.0, 1.0], 1.0, 0.1, False)]
    for t in range(2):
        happened.append(RoundDone(t, [1.0, 1.0], *numbers, [[0, 1]], 1, 50, 100, 1, 1, 0))
        happened.append(Evaluated(t + 1, 10, [0.5 + seed / 8, 0.75], 0.5, [1.0, 1.0], 1.0, 0.1, t == 1))
    return Outcome.of_events(
        f"{method}_50%", {"method": f"{method}_50%"}, seed, 0.01, f"cells/{method}-{seed}", happened
    )


@pytest.fixture
def outcomes():
    return [outcome(method, seed) for method in ("a&b", "c") for seed in (0, 1, 2)]


def test_the_table_is_a_tabular_of_booktabs(outcomes, tmp_path):
    configs = dict.fromkeys((each.setting for each in outcomes), load_config({}))
    write_results(tmp_path, outcomes, [], {"method": "c_50%"}, "base: {}\n", configs, None)
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    columns = re.fullmatch(r"\\begin\{tabular\}\{(lr+)\}", body[0]).group(1)
    assert body[1] == r"\toprule" and body[3] == r"\midrule" and body[-2:] == [r"\bottomrule", r"\end{tabular}"]
    rows = [body[2], *body[4:-2]]
    assert len(rows) == 3 and all(row.endswith(r" \\") and row.count(" & ") == len(columns) - 1 for row in rows)
    assert any(row.startswith(r"a\&b\_50\% & ") for row in rows) and r"$\pm$" in text
    assert text.isascii() or not [line for line in body if not line.isascii()]
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"accuracy-of-the-mean-client-by-round.pdf", "accuracy-of-the-mean-client-by-round.svg"} <= figures


def test_what_means_something_in_latex_is_escaped():
    assert escape_latex("a_b & 50% {x} #1 \\ ~ ^ $") == (
        r"a\_b \& 50\% \{x\} \#1 \textbackslash{} \textasciitilde{} \textasciicircum{} \$"
    )
    assert escape_latex("0.5 ± 0.1 ≈\n†") == r"0.5 $\pm$ 0.1 $\approx$ \textdagger{}"


def test_figures_are_as_wide_as_a_column_and_differ_without_colour(outcomes, tmp_path, drawn):
    pictures = comparison_figures(outcomes, "method")
    figure = draw_chart(pictures[0].chart)
    assert tuple(figure.get_size_inches()) == SIZE
    named = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == ["a&b_50%", "c_50%"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in named}) == 2
    written = write_figures(tmp_path, pictures[:1])
    assert [path.read_bytes()[:4] for path in written] == [b"%PDF", b"<?xm"]
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_figures(tmp_path, pictures[:1])] == before
    assert '"238.1' in written[1].read_text() or '"237.6' in written[1].read_text()  # points: 3.3 inches


def test_a_picture_without_numbers_is_no_file(tmp_path):
    assert write_figures(tmp_path, [Picture("t", "<svg/>", [])]) == [] and not (tmp_path / "figures").exists()


def test_titles_become_names_of_files():
    assert file_name("accuracy of B·A, p 0.1 / x") == "accuracy-of-b-a-p-0-1-x" and file_name("利益") == "figure"


def test_a_chart_has_one_axis_for_all_of_its_lines():
    chart = Chart(
        [Line("a", "#000000", "thick", [1, 2], [0.5, float("nan")]), Line("b", "#000000", "dashed", [2, 3], [1, 2])]
    )
    found = chart.as_json()
    assert found["x"] == [1, 2, 3]
    assert [each["y"] for each in found["series"]] == [[0.5, None, None], [None, 1, 2]]
