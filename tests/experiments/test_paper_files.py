"""Files of a comparison for a paper: the table in LaTeX, figures as PDF and SVG."""

import re
from dataclasses import replace

import pytest

from peerlora.config.loading import load_config
from peerlora.experiments.figures import comparison_figures
from peerlora.experiments.grid import load_grid
from peerlora.experiments.latex import escape_latex
from peerlora.experiments.paper_figures import SIZE, draw_chart, file_name, write_figures
from peerlora.experiments.results import write_results
from peerlora.experiments.trials import plan_trials
from peerlora.runs.chart import Chart, Line
from peerlora.runs.figures import Picture
from seed_outcomes import outcome


@pytest.fixture
def outcomes():
    return [outcome(method, seed) for method in ("a&b", "c") for seed in (0, 1, 2)]


def chart_of(pictures, title):
    (found,) = (picture for picture in pictures if picture.title.startswith(title))
    return found, {line.label: line for line in found.chart.lines}


def test_seeds_that_ended_after_other_rounds_share_the_rounds_that_all_have(tmp_path):
    """As those of ``train.max_seconds`` do, or the cells of a comparison that goes on."""
    outcomes = [outcome("a", seed, rounds, planned=9) for seed, rounds in ((0, 3), (1, 5), (2, 7))]
    picture, lines = chart_of(comparison_figures(outcomes, "method"), "accuracy of the mean client by round")
    assert lines["a_50%"].x.tolist() == [0, 1, 2, 5]  # the last ones are one point, at their mean
    assert lines["a_50%"].y.tolist() == pytest.approx([0.375, 0.6875, 0.6875, 0.6875])
    assert "Seeds ended after different rounds" in picture.note
    _, lines = chart_of(comparison_figures(outcomes, "method"), "accuracy of the mean client by bytes")
    assert lines["a_50%"].x.tolist() == [0, 100, 200, 500]
    _, lines = chart_of(comparison_figures(outcomes, "method"), "Cross-term")
    assert list(lines["a_50%"].x) == [1, 2, 3]
    configs = dict.fromkeys((each.setting for each in outcomes), load_config({}))
    write_results(tmp_path, outcomes, [], {"method": "a_50%"}, "base: {}\n", configs, None)


def test_ends_on_all_rows_are_a_point_of_their_own_wherever_the_seeds_ended():
    outcomes = [outcome("a", seed, rounds, planned=9, rows=99) for seed, rounds in ((0, 3), (1, 5))]
    picture, lines = chart_of(comparison_figures(outcomes, "method"), "accuracy of the mean client by round")
    assert lines["a_50%"].x.tolist() == [0, 1, 2] and lines["a_50%, all rows"].x.tolist() == [4]
    assert "Diamonds" in picture.note and "different rounds" in picture.note


def test_a_seed_that_has_not_ended_shares_no_end_and_one_without_a_score_counts_for_nothing():
    whole, part = outcome("a", 0, 3), outcome("a", 1, 3)
    part = replace(part, events=part.events[:-2])
    bare = replace(part, seed=2, events=part.events[:1])
    for cells in ([whole, part, bare], [bare, part, whole]):
        picture, lines = chart_of(comparison_figures(cells, "method"), "accuracy of the mean client by round")
        assert lines["a_50%"].x.tolist() == [0, 1, 2] and picture.note == ""
    assert not any("accuracy" in picture.title for picture in comparison_figures([bare], "method"))


def test_the_band_of_seeds_is_in_the_numbers_and_in_the_figure_for_a_paper(outcomes):
    picture, lines = chart_of(comparison_figures(outcomes, "method"), "accuracy of the mean client by round")
    assert lines["c_50%, lowest seed"].y.tolist() == [0.375, 0.625, 0.625]
    assert lines["c_50%, highest seed"].y.tolist() == [0.375, 0.75, 0.75]
    assert len(draw_chart(picture.chart).axes[0].collections) == 2  # one band for each method
    _, lines = chart_of(comparison_figures(outcomes[::3], "method"), "accuracy of the mean client by round")
    assert not any("seed" in label for label in lines)


def test_a_figure_by_p_has_its_numbers_and_is_a_file(tmp_path):
    cells = [replace(outcome("a", seed), labels={"graph": f"p={p}"}, p=p) for p in (0.1, 0.5) for seed in (0, 2)]
    picture, lines = chart_of(comparison_figures(cells, None), "accuracy of the mean client by p")
    assert {label: list(line.y) for label, line in lines.items()} == {
        "mean client, lowest seed": [0.625, 0.625],
        "mean client, highest seed": [0.75, 0.75],
        "mean client": [0.6875, 0.6875],
    }
    assert picture.chart.as_json()["logx"] and picture.chart.as_json()["x"] == [0.1, 0.5]
    axes = draw_chart(picture.chart).axes[0]
    assert axes.get_xscale() == "log" and axes.get_xticks().tolist() == [0.1, 0.5]
    assert {path.name for path in write_figures(tmp_path, [picture])} == {
        "accuracy-of-the-mean-client-by-p-last-evaluation.pdf",
        "accuracy-of-the-mean-client-by-p-last-evaluation.svg",
    }


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


def test_a_row_of_latex_may_begin_with_a_bracket_or_a_star(outcomes, tmp_path):
    renamed = {"a&b_50%": "[0.1] | x", "c_50%": "*"}
    names = [renamed[each.setting] for each in outcomes]
    outcomes = [
        replace(each, setting=name, labels={"method": name}) for each, name in zip(outcomes, names, strict=True)
    ]
    configs = dict.fromkeys((each.setting for each in outcomes), load_config({}))
    write_results(tmp_path, outcomes, [], {"method": "*"}, "base: {}\n", configs, None)
    rows = [line for line in (tmp_path / "table.tex").read_text(encoding="utf-8").splitlines() if line.endswith("\\\\")]
    assert sorted(row.split(" & ")[0] for row in rows) == ["method", "{}*", "{}[0.1] \\textbar{} x"]


def test_a_figure_that_fails_costs_nothing_else(outcomes, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no such glyph")

    monkeypatch.setattr("peerlora.experiments.paper_figures.draw_chart", fail)
    configs = dict.fromkeys((each.setting for each in outcomes), load_config({}))
    with pytest.raises(ValueError, match="no such glyph"):
        write_results(tmp_path, outcomes, [], {"method": "c_50%"}, "base: {}\n", configs, None)
    there = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "results.parquet", "table.csv", "table.md", "table.tex"} <= there


ODD = ["_under", "$x$ and $y", r"\$5$", r"$\frac{", "50% & #1", "^~{}", "a\nb"]


def test_names_are_shown_in_figures_as_they_are(tmp_path, drawn):
    import matplotlib

    chart = Chart([Line(name, "#000000", "thick", [1, 2], [1, 2]) for name in ODD], "$rounds$", "_y_")
    with matplotlib.rc_context({"text.usetex": True}):  # of a user's own style
        written = write_figures(tmp_path, [Picture("t", "<svg/>", [], chart=chart)])
    assert [path.read_bytes()[:4] for path in written] == [b"%PDF", b"<?xm"]
    axes = draw_chart(chart).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ODD
    texts = [*axes.get_legend().get_texts(), axes.xaxis.label, axes.yaxis.label]
    assert not any(text.get_parse_math() for text in texts)


def test_figures_whose_titles_make_the_same_name_are_all_kept(tmp_path):
    chart = Chart([Line("a", "#000000", "thick", [1, 2], [1, 2])])
    titles = ["score, p 0.1", "score, p 0_1", "score, p 0 1 1", "利益"]
    written = write_figures(tmp_path, [Picture(title, "<svg/>", [], chart=chart) for title in titles])
    names = [path.stem for path in written[::2]]
    assert names == ["score-p-0-1-2", "score-p-0-1-3", "score-p-0-1-1", "figure"] and len(set(written)) == 8


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


def test_rows_of_a_grid_whose_names_collide_have_folders_of_their_own():
    levels = {
        label: {"train": {"lr": rate}} for label, rate in (("a b", 0.1), ("a/b", 0.2), ("a-b-1", 0.3), ("c", 0.4))
    }
    grid = load_grid({"axes": {"odd": levels}, "seeds": [0]})
    folders = [trial.folder for trial in plan_trials(grid).trials]
    assert folders == [f"cells/{name}__seed-0" for name in ("a-b-2", "a-b-3", "a-b-1", "c")]
    del levels["a-b-1"]
    folders = [trial.folder for trial in plan_trials(load_grid({"axes": {"odd": levels}, "seeds": [0]})).trials]
    assert folders == [f"cells/{name}__seed-0" for name in ("a-b-1", "a-b-2", "c")]


def test_a_chart_has_one_axis_for_all_of_its_lines():
    chart = Chart(
        [Line("a", "#000000", "thick", [1, 2], [0.5, float("nan")]), Line("b", "#000000", "dashed", [2, 3], [1, 2])]
    )
    found = chart.as_json()
    assert found["x"] == [1, 2, 3]
    assert [each["y"] for each in found["series"]] == [[0.5, None, None], [None, 1, 2]]
