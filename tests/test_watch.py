"""What a person sees: order, counts, and tables of which nothing is cut."""

import io
import time

import pytest
from rich.console import Console

from evaluation.report_words import label
from search import cli, tables, watch
from search.records import Records
from trainer.storage import Storage


def rendered(renderable, width: int, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def rows(row, rung):
    """As wide as they come: a long schedule, three-figure epochs, every state."""
    long = dict(family="polynomial", start=0.0, end=1.0, tau=0.6033070716181017)
    wide = dict(family="sigmoid", start=-0.6655, end=3.61, tau=1.449)
    return [
        row("t0000-linear", state="stopped", epoch=11, rungs=[rung(11, 55.16, 4.15, 0.21)],
            reason="frechet 55.16 at epoch 11 was 4 of 5 so far"),
        row("t0001-polynomial", state="completed", epoch=100, rungs=[rung(33, 20.0), rung(100, 9.278, 8.181, 0.1453)],
            worker_seconds=12345.6, **long),
        row("t0002-sigmoid", state="running", epoch=33, rungs=[rung(33, 1234.5, 6.0, 0.17)], **wide),
        row("t0003-cosine", state="completed", epoch=100, rungs=[rung(100, 4.437, 8.834, 0.1405)]),
        row("t0004-cosine", state="running"),
        row("t0005-linear", state="screened", reason="prior KL must be below 0.01 bits per dimension, but is 0.62"),
        row("t0006-sigmoid", state="failed", epoch=33, rungs=[rung(33, 1.0, 9.9, 0.1)], reason="the loss is nan"),
        row("t0007-cosine", state="completed", epoch=100, rungs=[rung(100, None, None, 0.3)]),
    ]  # fmt: skip


def keys(rows) -> list[str]:
    return [row.trial[:5] for row in rows]


def test_the_best_come_first_by_how_far_they_came_and_then_by_value(rows):
    by_distance = ["t0003", "t0001", "t0007", "t0002", "t0000", "t0004", "t0006", "t0005"]
    assert keys(tables.in_order(rows, "frechet")) == by_distance
    assert keys(tables.in_order(rows[::-1], "frechet")) == by_distance
    assert keys(tables.in_order(rows, "grid_loss"))[:3] == ["t0003", "t0001", "t0007"]
    assert keys(tables.in_order(rows, "score"))[:3] == ["t0003", "t0001", "t0007"]  # a higher score is better


@pytest.mark.parametrize("metric", ["frechet", "score", "grid_loss"])
@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_of_the_trials_nothing_is_cut(rows, metric, width):
    text = rendered(tables.trials_table(rows, metric, 100), width)
    assert "…" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for row in rows:
        (line,) = (line for line in lines if line.startswith(row.trial))
        for part in (label(vars(row)), f"{row.epoch}/100", row.state):
            assert part in line
        value = row.rungs[-1][metric] if row.rungs else None
        assert (f"{value:.4g}" if value is not None else "–") in line


def test_a_narrow_table_has_no_reasons_and_a_wide_one_has_every_column(rows):
    narrow, wide = (rendered(tables.trials_table(rows, "frechet", 100), width) for width in (80, 160))
    assert len(narrow.splitlines()) == len(rows) + 1
    assert "was 4 of 5 so far" not in narrow
    header = wide.splitlines()[0].split()
    assert " ".join(header) == "trial schedule lr dropout epoch Fréchet score worker-seconds state reason"
    joined = " ".join(wide.split())
    assert "the loss is nan" in joined
    assert "frechet 55.16 at epoch 11 was 4 of 5 so far" in joined


def test_further_settings_have_a_column_where_there_are_any(rows, row):
    varied = [*rows, row("t0008-linear", settings={"batch_size": 32, "model.channels": [16, 32]})]
    text = rendered(tables.trials_table(varied, "frechet", 100), 200)
    assert "batch_size 32, model.channels [16, 32]" in text
    assert "settings" not in rendered(tables.trials_table(rows, "frechet", 100), 200)


def test_two_readings_of_one_schedule_never_look_alike(tmp_path, row):
    rows = [row("t0000-cosine"), row("t0001-cosine", settings={"schedule.space": "beta"})]
    scored = dict(rank=None, score=None, reason=None)
    ranking = dict(score_name="score", images=9, trials=[vars(own) | scored for own in rows],
                   real=dict(score=9.0, frechet=0.1, n=9), noise=dict(score=1.0, frechet=9.0, n=9))  # fmt: skip
    view = watch.SearchView(plain(), table_of(tmp_path, rows), "frechet", 100, trials=2)
    view.said = {own.trial: "waiting" for own in rows}
    for trial in ("t0000-cosine", "t0001-cosine"):
        view.records.update(trial, state="completed")
    view.changed()
    for text in (
        rendered(tables.trials_table(rows, "frechet", 100), 160),
        rendered(tables.ranking_table(ranking), 160),
        rendered(view, 160),
        view.console.file.getvalue(),  # type: ignore[attr-defined]
    ):
        (line,) = (line for line in text.splitlines() if "cosine(0, 1, tau 1) as beta" in line)
        assert "t0001-cosine" in line


def test_the_live_table_says_how_many_more_there_are(rows):
    lines = rendered(tables.trials_table(rows, "frechet", 100, limit=3), 80).splitlines()
    assert [line[:5] for line in lines[1:4]] == ["t0003", "t0001", "t0007"]
    assert lines[4].strip() == "+ 5 more"


def table_of(tmp_path, rows) -> Records:
    return Records(Storage(tmp_path / "run"), {row.trial: row for row in rows})


def plain() -> Console:
    return Console(file=io.StringIO(), width=160, highlight=False)


def test_the_summary_counts_states_and_tells_the_time_to_go(tmp_path, rows):
    records = table_of(tmp_path, rows)
    view = watch.SearchView(plain(), records, "frechet", 100, trials=10)
    start = "5 of 10 trials done (2 running, 3 completed, 1 stopped, 1 screened, 1 failed), "
    view.began = time.monotonic() - 3700
    assert view.summary() == start + "1 h 01 min gone"  # nothing trained in this sitting: no rate to tell from
    # 33 epochs in 3,700 s. To come: 82.2 epochs a trial (the mean of 100, 100, 100, 11 and one in full) for the one
    # that has not reported and three not begun, 16.2 of the one at epoch 66: 345 epochs.
    records.update("t0002-sigmoid", epoch=66)
    view.began = time.monotonic() - 3700
    assert view.summary() == start + "1 h 01 min gone, about 10 h 44 min to go"
    records.update("t0004-cosine", state="stopped")
    for key in ("a", "b", "c", "d"):
        records.add(rows[0].__class__(**{**rows[3].__dict__, "trial": key}))
    assert "to go" not in view.summary()


def test_without_a_terminal_there_is_a_line_a_finished_trial_and_no_more(tmp_path, rows):
    records, console = table_of(tmp_path, rows), plain()
    view = watch.SearchView(console, records, "frechet", 100, trials=10)
    with view.shown():
        view.changed()
        records.update("t0002-sigmoid", state="stopped", reason="too far off")
        view.changed()
        view.changed()
        records.update("t0004-cosine", state="completed")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.splitlines() == [
        "t0002-sigmoid  sigmoid(-0.665, 3.61, tau 1.45)  stopped: too far off",
        "t0004-cosine  cosine(0, 1, tau 1)  completed",
    ]
    assert "\x1b" not in text


def test_in_a_terminal_the_view_is_live_and_fits(tmp_path, rows):
    view = watch.SearchView(plain(), table_of(tmp_path, rows), "frechet", 100, trials=10)
    text = rendered(view, 80, terminal=True)
    assert "…" not in text
    assert "5 of 10 trials done" in text


def test_progress_is_one_line_without_a_terminal():
    console = plain()
    with watch.progress_bar(console, "Drawing 64 images") as progress:
        progress(1, 2)
        progress(2, 2)
    assert console.file.getvalue() == "Drawing 64 images\n"  # type: ignore[attr-defined]


@pytest.fixture
def ranking():
    def entry(rank, trial, **more):
        plain = dict(
            rank=rank, trial=trial, family="polynomial", start=0.0, end=1.0, tau=0.603, learning_rate=2e-3, dropout=0.1,
            score=None, frechet=None, p_best=None, tied_with=[], confirmed=False, reason=None,
        )  # fmt: skip
        return plain | more

    return dict(
        score_name="Inception Score", images=10_000, real=dict(score=9.89, frechet=0.28, n=359),
        noise=dict(score=1.627, frechet=157.87, n=10_000),
        trials=[
            entry(1, "t0001-polynomial", score=dict(mean=8.8912, std=0.1, ci=[8.743, 9.04]),
                  frechet=dict(value=1234.25, ci=[1200.5, 1300.5]), p_best=0.86,
                  to_next=dict(score=0.1212, ci=[-0.0789, 0.3213]),
                  tied_with=["t0002-sigmoid", "t0003-cosine", "t0004-cosine"]),
            entry(2, "t0002-sigmoid", score=dict(mean=8.77, std=0.1, ci=[8.6, 8.94]),
                  frechet=dict(value=4.3, ci=[3.37, 5.22]), p_best=0.006),
            entry(None, "t0005-cosine", reason="its checkpoint is damaged"),
        ],
    )  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_of_the_ranking_nothing_is_cut(ranking, width):
    text = rendered(tables.ranking_table(ranking), width)
    lines = text.splitlines()
    assert "…" not in text
    assert max(map(len, lines)) <= width
    for row, values in zip(ranking["trials"], (["1", "8.891", "1234.25"], ["2", "8.770", "4.30"], ["–"]), strict=True):
        (line,) = (line for line in lines if row["trial"] in line.split()[:2])
        assert line.split()[: 1 if row["rank"] else 0] == ([str(row["rank"])] if row["rank"] else [])
        assert [value for value in values if value not in line.split()] == []
        assert label(row) in line
    real = next(line for line in lines if "real, held out" in line)
    assert "9.890" in real
    assert "N 359" in real
    noise = next(line for line in lines if "Gaussian noise" in line)
    assert "157.87" in noise
    assert "N " not in noise  # the ranking's own N needs no word
    assert lines.index(real) < lines.index(noise)


def test_a_wide_ranking_shows_intervals_ties_and_why_a_trial_has_no_score(ranking):
    text = rendered(tables.ranking_table(ranking), 220)
    (first,) = (line for line in text.splitlines() if "t0001-polynomial" in line)
    values = ("8.743–9.040", "1200.50–1300.50", "0.86", "2.0e-03", "0.121 ±0.200")
    for part in (*values, "t0002-sigmoid, t0003-cosine, t0004-cosine"):
        assert part in first
    assert "< 0.01" in text  # as the report says it
    assert "its checkpoint is damaged" in text


def test_precision_and_recall_are_compared_at_the_number_of_real_images(ranking):
    ranking["trials"][0] |= {"precision": 0.61, "recall": 0.95, "at_real_n": {"precision": 0.62, "recall": 0.81}}
    ranking |= {"split_size": 1000, "extractor": "inception", "sampler": {"name": "ddpm"}}
    text = rendered(tables.ranking_table(ranking), 220)
    assert "0.62 / 0.81" in text
    assert "0.95" not in text
    assert "precision and recall at 359" in tables.ranking_notes(ranking)


def test_a_progress_bar_shows_in_a_terminal_before_anything_is_known():
    console = Console(force_terminal=True, file=io.StringIO(), width=100)
    with watch.progress_bar(console, "Drawing") as progress:
        progress(1, 4)
    assert "1/4" in console.file.getvalue()


def test_reasons_of_trials_that_are_not_ranked_are_told_whatever_the_width(row):
    told = [text.plain for text in tables.reasons([row("t0001-linear", state="screened", reason="prior KL is 0.6")])]
    assert told == ["t0001-linear screened: prior KL is 0.6"]


def test_a_reason_that_looks_like_markup_is_shown_as_it_is(tmp_path, row):
    reason = "[/__w/gloo/pair.cc:547] Connection closed by peer [old]"
    console = Console(file=io.StringIO(), width=160, highlight=False, markup=cli.console._markup)
    records = table_of(tmp_path, [row("t0000-linear")])
    view = watch.SearchView(console, records, "frechet", 100, trials=1)
    records.update("t0000-linear", state="failed", reason=reason)
    view.changed()
    assert reason in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("confirmed", "said"),
    [
        (0, "The intervals speak of the trained models only"),
        (1, "Those of the others speak of the trained models only"),
        (2, "they speak of the configurations."),
    ],
)
def test_the_notes_say_of_what_the_intervals_speak(ranking, confirmed, said):
    for row in ranking["trials"][:confirmed]:
        row["confirmed"] = True
    ranking |= {"split_size": 1000, "extractor": "inception", "sampler": {"name": "ddpm"}}
    assert said in tables.ranking_notes(ranking)
