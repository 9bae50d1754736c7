"""The report: its page, its tables and its pictures, of runs that are made up."""

from __future__ import annotations

import base64
import csv
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import (
    ENVIRONMENT,
    failed_run,
    made_run,
    made_sweep,
    many_findings,
    original_run,
    save_predictions,
)

from workflow.configurations import row, summarise
from workflow.cost import load_prices, of_run, priced
from workflow.report import NoSuchRun, Report, common, write
from workflow.report_details import choose
from workflow.results import Finding, Results, Run

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&$\\frac{\x00\u202e"


class Page(HTMLParser):
    """What is on a page: tags with their attributes, text, and the tables' cells by id."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: dict[str, list[list[dict[str, str | None]]]] = {}
        self._open = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._open = str(dict(attrs)["id"])
            self.tables[self._open] = []
        elif tag == "tr":
            self.tables[self._open].append([])
        elif tag in ("td", "th"):
            self.tables[self._open][-1].append({**dict(attrs), "text": ""})

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tables and self.tables[self._open] and self.tables[self._open][-1]:
            cell = self.tables[self._open][-1][-1]
            cell["text"] = f"{cell['text']}{data}"

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._open = "over"
            self.tables["over"] = []

    def images(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "img"]


def report(runs: Sequence[Run], folder: Path, findings: Sequence[Finding] = (), **more: Any) -> str:
    write(Results(tuple(runs), tuple(findings)), str(folder), **more)
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, Report, list[str]]:
    """The report of a sweep with one failure, with predictions, and what was said meanwhile."""
    folder = tmp_path_factory.mktemp("report")
    npz = save_predictions(folder / "predictions.npz")
    made = made_sweep((1, 2, 4), (8, 32, 128), failed=[(2, 32, 2)], predictions=npz)
    results = replace(made, findings=many_findings())
    said: list[str] = []
    return folder, results, write(results, str(folder), "My sweep", said.append), said


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def as_text(value: object) -> str:
    return "" if value is None else str(value)


def test_everything_is_written_and_listed(sweep: tuple[Path, Results, Report, list[str]]) -> None:
    folder, _, made, said = sweep
    written = {str(p) for p in folder.rglob("*") if p.is_file()} - {str(folder / "predictions.npz")}
    assert set(made.paths) == written
    assert {"report.html", "report.md", "results.csv", "configurations.csv"} <= {
        p.name for p in folder.iterdir()
    }
    pictures = {p.stem for p in (folder / "plots").iterdir()}
    assert pictures == {
        *("throughput-world-1", "time-world-1", "throughput-batch-1", "time-batch-1"),
        *("memory-batch-1", "speedup-1", "efficiency-1", "cost-1", "stages", "timeline"),
        "redshift",
    }
    for path in (folder / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert made.findings == 104
    assert len(said) == len(pictures) + 1


def test_the_page_needs_nothing_from_anywhere(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    content = (sweep[0] / "report.html").read_text()
    page = Page(content)
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object", "embed", "form", "base")
        for name, value in attrs.items():
            assert not name.startswith("on")
            assert name != "style"  # which the policy would refuse
            if name in ("src", "href", "srcset", "action"):
                assert str(value).startswith(("data:", "#"))
    assert not re.search(r"https?://|url\(|@import", content)
    assert len(content) < 2_000_000


def test_the_policy_allows_this_style_and_this_script_only(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    import hashlib

    content = (sweep[0] / "report.html").read_text()
    policy = next(a["content"] for t, a in Page(content).tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'; img-src data:;" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_numbers_of_the_tables_are_those_of_the_rows(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    folder, results, _, _ = sweep
    tables = Page((folder / "report.html").read_text()).tables
    head, *lines = tables["runs"]
    assert len(lines) == len(results.runs)
    checked = 0
    for run, cells in zip(priced(results.runs, load_prices())[0], lines, strict=True):
        values = row(run)
        for column, cell in zip(head, cells, strict=True):
            if "data-v" in cell:
                value = values[str(column["data-key"])]
                assert cell["data-v"] == as_text(value), column
                checked += 1
    assert checked > 25 * len(lines)


def test_numbers_of_configurations_are_medians(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    folder, results, _, _ = sweep
    head, *lines = Page((folder / "report.html").read_text()).tables["configurations"]
    keys = [str(column["data-key"]) for column in head]
    found = summarise(results.runs)
    assert len(lines) == len(found) == 9
    for c, cells in zip(found, lines, strict=True):
        line = dict(zip(keys, cells, strict=True))
        for key in ("total_s", "rows_per_s_wall_clock", "rows_per_s_sum_of_ranks", "nmad"):
            assert line[key]["data-v"] == str(c.measures[key].median)
        assert line["speedup"]["data-v"] == as_text(c.speedup)
        assert line["ok"]["data-v"] == str(c.ok)
    failed = next(c for c in lines if c[0]["text"] == "2 ranks, batch 32")
    assert dict(zip(keys, failed, strict=True))["failed"]["data-v"] == "1"


def test_csv_files_hold_every_run_and_every_measure(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    folder, results, _, _ = sweep
    lines = read_csv(folder / "results.csv")
    assert [*lines[0]] == [*row(results.runs[0])]
    for run, line in zip(results.runs, lines, strict=True):
        assert {k: v for k, v in line.items() if k != "cost_usd"} == {
            k: as_text(v) for k, v in row(run).items() if k != "cost_usd"
        }
        cost = of_run(run, load_prices())
        assert line["cost_usd"] == as_text(cost and cost.total_usd)
    for c, line in zip(
        summarise(results.runs), read_csv(folder / "configurations.csv"), strict=True
    ):
        assert line["total_s"] == str(c.measures["total_s"].median)
        assert line["total_s_max"] == str(c.measures["total_s"].max)
        assert line["world_size"] == str(c.world_size)
        assert line["ok"] == str(c.ok)


def test_warnings_come_first_and_the_many_do_not_bury_the_few(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    content = (sweep[0] / "report.html").read_text()
    ids = re.findall(r'<section id="([\w-]+)"', content)
    assert ids[:2] == ["warnings", "headline"]
    assert ids[-3:] == ["failures", "environment", "reading"]
    counts = re.findall(r'<span class="count">([\d,]+) .</span> <strong>(.*?)</strong>', content)
    assert counts == [("2", "kind 1"), ("2", "kind 2"), ("100", "kind 0")]
    assert "and 50 more of this kind" in content


def test_headlines_tell_the_two_rates_apart(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    folder, results, _, _ = sweep
    best = max(summarise(results.runs), key=lambda c: c.measures["rows_per_s_wall_clock"].median)
    cards = re.findall(
        r'<dt>(.*?)</dt><dd class="value">(.*?)</dd>', (folder / "report.html").read_text()
    )
    shown = dict(cards)
    assert shown["Best configuration"] == f"{best.world_size} ranks, batch {best.batch_size}"
    wall, total = (best.measures[f"rows_per_s_{k}"].median for k in ("wall_clock", "sum_of_ranks"))
    assert shown["Wall-clock rate"] == f"{wall:,.0f} rows/s"
    assert shown["Sum of ranks"] == f"{total:,.0f} rows/s"
    assert wall < total


def test_failures_are_told_with_their_errors(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    content = (sweep[0] / "report.html").read_text()
    assert "18 runs of 9 configurations, 1 of them failed or incomplete." in content
    assert "<strong>w2-b32-small-r2</strong> (failed)" in content
    assert content.count("rank 2: MemoryError: no memory left") >= 1
    assert "MemoryError" in (sweep[0] / "report.md").read_text()


def test_every_picture_says_in_words_what_it_shows(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    images = Page((sweep[0] / "report.html").read_text()).images()
    assert len(images) == 11
    for image in images:
        assert len(str(image["alt"])) > 40
        assert image["width"]
        assert image["height"]
    assert any("batch 8: " in str(image["alt"]) for image in images)
    kinds = [str(image["src"]).partition(";")[0] for image in images]
    assert kinds.count("data:image/svg+xml") == 10  # sharp on any screen; the density is a PNG


def test_markdown_names_pictures_that_are_there(
    sweep: tuple[Path, Results, Report, list[str]],
) -> None:
    text = (sweep[0] / "report.md").read_text()
    named = re.findall(r"\]\((plots/.*?\.png)\)", text)
    assert len(named) == 11
    assert all((sweep[0] / name).is_file() for name in named)
    assert "| 2 ranks, batch 32 | 2 | 32 | 1 | 1 |" in text


def test_text_of_strangers_is_shown_and_never_run(tmp_path: Path) -> None:
    strange = {"name": EVIL, "data": EVIL, "engine": EVIL, "place": f"/x/{EVIL}"}
    runs = [
        made_run(1, environment={"cpu": EVIL}, **strange),
        made_run(2, **strange),
        failed_run(2, repeat=2, **strange | {"error": EVIL}),
        made_run(2, data="other"),
    ]
    content = report(runs, tmp_path, [Finding(EVIL, EVIL, EVIL)], title=EVIL)
    page = Page(content)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert all(str(image["src"]).startswith("data:") for image in page.images())
    assert page.text.count("alert('x')") >= 8  # shown as it is, in all these places
    markdown = (tmp_path / "report.md").read_text()
    assert not re.search(r"<(script|img)", markdown)
    for path in tmp_path.glob("plots/*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_svg_of_strangers_names_is_well_formed(tmp_path: Path) -> None:
    runs = [made_run(w, data=data) for w in (1, 2) for data in (EVIL, "\x0ba--b$\\no{$", "漢字 🙂")]
    page = Page(report(runs, tmp_path))
    svg = [str(i["src"]) for i in page.images() if "svg" in str(i["src"])[:20]]
    assert len(svg) > 5
    for source in svg:
        ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))


def test_a_spreadsheet_takes_no_formula_from_strangers(tmp_path: Path) -> None:
    report([made_run(name="=HYPERLINK(1)", metrics={"bias": -0.5})], tmp_path)
    (line,) = read_csv(tmp_path / "results.csv")
    assert line["run"] == "'=HYPERLINK(1)"
    assert line["bias"] == "-0.5"


def test_the_originals_runs_have_plots_of_their_own(tmp_path: Path) -> None:
    runs = [
        original_run(partition, size, repeat, inference_s=20.0 + repeat, total_s=50.0)
        for partition in (25, 100)
        for size in (1.0, 4.0, 12.6)
        for repeat in (1, 2)
    ]
    page = Page(report(runs, tmp_path))
    pictures = {p.stem for p in (tmp_path / "plots").iterdir()}
    assert pictures == {"throughput-data", "time-data", "cost-1", "cost-2", "cost-3"}
    head, *lines = page.tables["published-rates"]
    keys = [str(column["data-key"]) for column in head]
    line = next(
        dict(zip(keys, cells, strict=True))
        for cells in lines
        if cells[0]["text"] == "25MB partitions, 12.6GB"
    )
    of_it = [row(run) for run in runs if (run.partition_mb, run.data_gb) == (25, 12.6)]
    for kind in ("wall_clock", "sum_of_ranks"):
        values = [float(r[f"bits_per_s_{kind}"] or 0) for r in of_it]
        assert float(str(line[f"bits_per_s_{kind}"]["data-v"])) == pytest.approx(sum(values) / 2)
    end_to_end = (of_it[0]["bits"] or 0) / 50  # type: ignore[operator]
    assert float(str(line["bits_per_s_end_to_end"]["data-v"])) == pytest.approx(end_to_end)
    assert "Gbit/s" in next(
        c
        for c in re.findall(r'class="value">(.*?)<', (tmp_path / "report.html").read_text())
        if "bit" in c
    )


def test_published_rates_are_of_runs_that_are_whole_and_timed(tmp_path: Path) -> None:
    timed = {"inference_s": 50.0, "total_s": 60.0}
    runs = [
        original_run(25, 1.0, 1, **timed),
        original_run(25, 1.0, 2),
        original_run(50, 1.0, 1, **timed, status="incomplete"),
        original_run(75, 1.0, 1, **timed),
    ]
    content = report(runs, tmp_path)
    assert '<a href="#published">Published figures</a>' in content
    head, *lines = Page(content).tables["published-rates"]
    keys = [str(column["data-key"]) for column in head]
    shown = [
        dict(zip(keys, (str(cell["text"]).strip() for cell in line), strict=True)) for line in lines
    ]
    assert [line["data"] for line in shown] == [f"{n}MB partitions, 1GB" for n in (25, 50, 75)]
    assert [(line["runs"], line["incomplete"]) for line in shown] == [
        ("2", "0"),
        ("1", "1"),
        ("1", "0"),
    ]
    for key in ("bits_per_s_wall_clock", "bits_per_s_end_to_end"):
        assert [line[key] == "–" for line in shown] == [True, True, False]  # noqa: RUF001
    assert all(float(str(line["bits_per_s_sum_of_ranks"])) > 0 for line in shown)
    assert all(float(str(line["cpu_s"])) > 0 for line in shown)


def test_a_measure_of_some_runs_says_of_how_many(tmp_path: Path) -> None:
    runs = [original_run(repeat=n, total_s=t) for n, t in ((1, 30.0), (2, 31.0), (3, None))]
    page = Page(report(runs, tmp_path))
    head, line = page.tables["configurations"]
    cells = {str(c["data-key"]): str(cell["text"]) for c, cell in zip(head, line, strict=True)}
    assert "30.0 to 31.0, 2 of 3 runs" in cells["total_s"]
    assert "of 3 runs" not in cells["bits_per_s_sum_of_ranks"]


def test_the_originals_times_are_called_what_they_are(tmp_path: Path) -> None:
    timed = report([original_run(inference_s=20.0, total_s=50.0)], tmp_path / "timed")
    assert "20.0 s of it the Map state" in timed
    assert "the seconds of the ranks in the profiler, and not those billed" in timed
    assert "an upper bound" not in timed
    content = report([original_run(status="incomplete"), original_run(100)], tmp_path / "not")
    assert "greatest sum of ranks; no wall-clock rate is known" in content
    assert "Not known: these files have no time for it." in content
    assert "41 of 41 ranks left a record" in content


def test_against_the_data_size_all_lines_are_of_the_same_batch_size(tmp_path: Path) -> None:
    runs = [original_run(25, 1.0), *(original_run(25, 1.0, n, batch=32) for n in (1, 2))]
    runs += [original_run(100, size) for size in (1.0, 4.0)]
    # Of the same data in more partitions there are fewer runs.
    runs += [original_run(100, 4.0, 2), original_run(100, 4.0, 1, world_size=50)]
    alts = [str(image["alt"]) for image in Page(report(runs, tmp_path)).images()]
    (alt,) = [alt for alt in alts if alt.startswith("Throughput against data size")]
    rates = {
        c.batch_size: c.measures["bits_per_s_sum_of_ranks"].median for c in summarise(runs[:3])
    }
    assert f"25 MB partitions: thin, {rates[512] / 1e9:.4g} at 1" in alt
    two = summarise(runs[4:6])[0].measures["bits_per_s_sum_of_ranks"].median
    assert f"to {two / 1e9:.4g} at 4" in alt


def test_what_is_not_known_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    content = report([failed_run()], tmp_path)
    assert not (tmp_path / "plots").exists()
    page = Page(content)
    assert not page.images()
    sentences = re.findall(r'<p class="soft">(No .*?)</p>', content)
    for what in (
        "throughput against world size",
        "speed-up",
        "cost",
        "stage",
        "timeline",
        "redshift",
    ):
        assert any(what in sentence for sentence in sentences), what
    assert "No run has come to its end" in content
    assert "nan" not in page.text.lower().split()


def test_no_runs_but_findings_are_a_report_too(tmp_path: Path) -> None:
    content = report([], tmp_path, many_findings(1, 1))
    assert "0 runs of 0 configurations." in content
    assert "rank 0 is missing" in content


@pytest.mark.parametrize("damage", ["missing", "no zip", "pickled", "other shape", "no finite row"])
def test_predictions_that_cannot_be_read_are_said_so(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "predictions.npz"
    if damage == "no zip":
        path.write_bytes(b"something else")
    elif damage == "pickled":
        np.savez(path, z_spec=np.array([object()]), z_phot=np.array([1.0]))
    elif damage == "other shape":
        np.savez(path, z_spec=np.zeros((2, 2)), z_phot=np.zeros(4))
    elif damage == "no finite row":
        np.savez(path, z_spec=np.zeros(2), z_phot=np.full(2, np.nan))
    content = report([made_run(predictions=str(path))], tmp_path / "report")
    assert "No plot of redshifts: " in content
    assert "cannot be read" in content


def test_the_run_in_detail_is_the_median_of_the_largest_world_or_as_asked(tmp_path: Path) -> None:
    runs = [made_run(4, repeat=r, total_s=t) for r, t in ((1, 9.0), (2, 1.0), (3, 5.0))]
    runs = [made_run(2), *runs, failed_run(8), made_run(8, repeat=9, spans=())]
    chosen = choose(runs)
    assert chosen is not None
    assert (chosen.world_size, chosen.repeat) == (4, 3)
    assert f"Timeline of {chosen.name}" in report(runs, tmp_path)
    assert f"Timeline of {runs[0].name}" in report(runs, tmp_path, run=runs[0].name)
    with pytest.raises(NoSuchRun, match="no run is called w9; there is w2-b32-small-r1, "):
        report(runs, tmp_path, run="w9")


def test_a_thousand_ranks_stay_readable_and_small(tmp_path: Path) -> None:
    runs = [made_run(1000, galaxies=100_000), made_run(1, galaxies=100_000)]
    content = report(runs, tmp_path)
    assert "40 of 1,000 ranks are shown" in content
    assert len(content) < 1_000_000
    page = Page(content)
    (image,) = [i for i in page.images() if "Timeline" in str(i["alt"])]
    assert int(str(image["height"])) < 1500


def test_pictures_of_an_earlier_report_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    report([made_run(1), made_run(2)], tmp_path)
    (tmp_path / "plots" / "mine.png").write_bytes(b"not ours")
    assert (tmp_path / "plots" / "speedup-1.png").exists()
    report([made_run(1)], tmp_path)
    assert not (tmp_path / "plots" / "speedup-1.png").exists()
    assert (tmp_path / "plots" / "mine.png").exists()


def test_several_environments_are_told(tmp_path: Path) -> None:
    content = report([made_run(), made_run(2, environment={**ENVIRONMENT, "cores": 2})], tmp_path)
    assert "2 different environments" in content
    assert content.count("1 of 2 runs") == 2


def test_the_same_numbers_make_the_same_pictures(tmp_path: Path) -> None:
    one, two = (report([made_run(1), made_run(2)], tmp_path / name) for name in "ab")
    assert [i["src"] for i in Page(one).images()] == [i["src"] for i in Page(two).images()]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["/a/b/c", "/a/b/d"], "/a/b"),
        (["s3://x/r/1", "s3://x/r/2"], "s3://x/r"),
        (["/a", "b"], "several places"),
        ([], "several places"),
    ],
)
def test_where_runs_are_from(places: list[str], expected: str) -> None:
    assert common([made_run(place=place) for place in places]) == expected
