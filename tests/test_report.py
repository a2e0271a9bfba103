"""The report: self-contained, honest about ties and about what is missing, and safe for any text."""

import re
from functools import cache
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from evaluation import analysis, report, report_figures, report_tables, report_words
from evaluation.events import Events
from search import config_file

CONFIG = config_file.load("digits", ["seed=7", "trials=6", "train.epochs=90", "train.schedule.steps=100"]).model_dump(
    mode="json"
)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page, and fails where tags do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)
        assert self.stack == []
        self.text = re.sub(r"\s+", " ", " ".join(self.said))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.said.append(data)


def row(trial: str, state: str = "completed", **changes: Any) -> dict[str, Any]:
    epoch = {"completed": 90, "stopped": 10, "running": 40}.get(state, 0)
    rungs = [{"epoch": e, "frechet": 100 / e, "score": 9.0, "grid_loss": 0.1} for e in (10, 30, 90) if e <= epoch]
    base = {"source": "suggested", "family": "cosine", "start": 0.0, "end": 1.0, "tau": 1.0, "learning_rate": 2e-4}
    base |= {"dropout": 0.1, "seed": 7, "reason": None, "checkpoint": None, "worker_seconds": 20.0 * epoch}
    return {"trial": trial, "state": state, "epoch": epoch, "rungs": rungs} | base | changes


def entry(rank: int | None, trial: str, **changes: Any) -> dict[str, Any]:
    scored: dict[str, Any] = {
        "score": {"mean": 9.5, "std": None, "ci": [9.4, 9.6]},
        "frechet": {"value": 5.0, "ci": [4.8, 5.2]},
        "at_real_n": {"n": 360, "score": 9.21, "frechet": 7.9},
        "p_best": 0.83,
    }
    params = {"family": "cosine", "start": 0.0, "end": 1.0, "tau": 1.0, "learning_rate": 2e-4, "dropout": 0.1}
    known = {"rank": rank, "trial": trial, "tied_with": [], "confirmed": False, "reason": None} | params
    return known | (dict.fromkeys(scored) if rank is None else scored) | changes


def ranking(*trials: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "extractor": "classifier of digits",
        "score_name": "classifier score",
        "held_out_accuracy": 0.989,
        "images": 10_000,
        "split_size": 5_000,
        "sampler": {"name": "ddim", "steps": 50, "eta": 0.0, "variance": "fixed_small", "block_size": 100, "seed": 0},
        "steps": 50,
        "seed": 0,
        "real": {"n": 360, "score": 9.77, "frechet": 1.25},
        "noise": {"n": 360, "score": 2.44, "frechet": 225.0},
        "trials": list(trials),
    } | changes


def render(rows: list[dict[str, Any]], ranked: dict[str, Any] | None = None, **given: Any) -> str:
    defaults = {"samples": {}, "lost": {}, "real_samples": None, "events": {}}
    defaults |= {"commands": ["ddpm-search run"], "versions": {"torch": "2"}}
    return report.render("digits", given.pop("config", CONFIG), rows, ranked, **(defaults | given))


ROWS = [
    row("t0", source="known"),
    row("t1"),
    row("t2", "stopped", reason="frechet 10 at epoch 10 was 3 of 3 so far"),
    row("t3", "screened", start=0.5, end=0.5, reason="schedule.start < schedule.end must hold"),
    row("t4", "failed", reason="the loss is nan at step 3"),
    row("t5", "running"),
]
IMAGES = np.zeros((40, 8, 8, 1), np.uint8)
GRID = np.zeros((80, 80, 3), np.uint8)


@cache
def full() -> str:
    ranked = ranking(
        entry(1, "t1", tied_with=["t0"]), entry(2, "t0", tied_with=["t1"]), entry(None, "t4", reason="it diverged")
    )
    scalars = {"train/loss": [(1, 0.9), (2, 0.4)], "train/learning_rate": [(1, 2e-4), (2, 1e-4)]}
    events = {"t1": Events(scalars, GRID, [(0.0, 7200.0)]), "t0": Events({}, GRID, [(0.0, 3600.0)])}
    return render(ROWS, ranked, samples={"t1": IMAGES, "t0": IMAGES}, real_samples=IMAGES, events=events)


def test_page_is_one_well_formed_file_that_asks_for_nothing_else():
    page = Page(full())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    addresses = [value or "" for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    addresses += re.findall(r"url\(([^)]*)\)", full())
    assert addresses
    # xlink:href="#…" and url(#…) are references within the page's own SVG
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {attrs["href"] for tag, attrs in page.tags if tag == "a"} <= {f"#{anchor}" for anchor in anchors}
    assert "@import" not in full()


@pytest.mark.slow
def test_same_run_gives_the_same_page_to_the_byte():
    assert full() == full.__wrapped__()


def test_verdict_says_the_winner_its_interval_ties_and_the_ceiling():
    text = Page(full()).text
    assert "t1, cosine(0, 1, tau 1) with learning rate 0.0002 and dropout 0.1 has the highest classifier score" in text
    assert "95% confidence interval 9.40 to 9.60 ) from 10,000 images" in text
    assert "probability 0.83; it is tied with t0" in text
    assert "360 real images, held out from training, score 9.77; as many images of the winner score 9.21" in text
    assert "trained models only" in text


def test_intervals_say_whether_they_are_of_a_configuration_each_by_itself():
    first, second, failed = entry(1, "t1", confirmed=True), entry(2, "t0"), entry(None, "t4", reason="it diverged")
    page = Page(render([], ranking(first, second, failed))).text
    assert "it is tied with no other" in page
    assert "The intervals of t1 include the spread between training seeds: they speak of the configuration." in page
    assert "Those of the others speak of the trained models only" in page
    every = Page(render([], ranking(first, second | {"confirmed": True}, failed))).text
    assert "The intervals include the spread between training seeds: they speak of the configurations." in every


def test_real_images_stand_in_the_column_of_their_own_number():
    def cells(html: str) -> list[str]:
        line = re.search(r'<tr class="reference">(.*?)</tr>', html)
        assert line
        return re.findall(r"<td[^>]*>(.*?)</td>", line[1])

    assert cells(full())[2:] == ["", "", "", "", "9.77", "1.25"]
    same = ranking(entry(1, "t1"), images=360)
    assert cells(render([], same))[2:] == ["9.77", "1.25", "", ""]


def test_every_trial_is_listed_with_its_state_and_reason():
    text = Page(full()).text
    for trial in ROWS:
        assert trial["trial"] in text
        assert report_words.STATES.get(trial["state"], trial["state"]) in text
        assert trial["reason"] is None or trial["reason"].replace("frechet", "Fréchet distance") in text
    assert "frechet" not in text.split("Do it again")[0]  # one name for one thing
    assert "it diverged" in text


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[], ROWS, [row("t0", "screened", start=1.0, end=1.0, reason="law")]])
@pytest.mark.parametrize("ranked", [None, ranking(entry(None, "t0", reason="it diverged"))])
def test_what_is_missing_is_said_in_a_sentence(rows: list[dict[str, Any]], ranked: dict[str, Any] | None):
    text = Page(render(rows, ranked)).text
    assert ("There is no ranking yet" if ranked is None else "There is no winner") in text
    assert "final stage has drawn no images yet" in text
    assert "Too few trials to say" in text
    assert ("No trial has begun yet" in text) == (not rows or rows[0]["state"] == "screened")


@pytest.mark.slow
def test_a_ranked_trial_alone_and_a_data_set_without_labels_have_a_report():
    rows = [row("t1", rungs=[{"epoch": 10, "frechet": None, "score": None, "grid_loss": 0.1}])]
    text = Page(render(rows, ranking(entry(1, "t1"), held_out_accuracy=None))).text
    assert "No other trial was ranked" in text
    assert "Grid loss, which decides" in text
    assert "Fréchet distance, which decides" not in text
    assert "Stopped early successive halving on the grid loss of held-out images after epoch 10 and 30" in text
    unranked = Page(render(rows)).text
    assert "no ranking: nothing could judge the images" in unranked
    assert "So far t1, cosine(0, 1, tau 1) is best by the grid loss: 0.1 at epoch 10" in unranked


@pytest.mark.slow
def test_that_nothing_can_judge_images_is_not_said_before_any_rung():
    asked = CONFIG | {"early_stopping": CONFIG["early_stopping"] | {"metric": "grid_loss"}}
    assert "nothing could judge" not in Page(render([row("t1", "running", rungs=[])], config=asked)).text


@pytest.mark.slow
def test_trials_that_the_budget_ended_are_not_among_those_that_stopping_early_saved():
    spent = {"epoch": 10, "worker_seconds": 100.0}
    cut = row("t1", "stopped", reason=f"{analysis.SHARE_SPENT}hours is spent", **spent)
    text = Page(render([cut])).text
    assert "No trial was stopped early, so nothing was saved. 1 trial more ended unfinished, by the budget" in text
    text = Page(render([cut, row("t2", "stopped", reason="weak", **spent)])).text
    assert "1 trial of 2 stopped early: in full they would have taken about 13.3 minutes more" in text
    assert "1 trial more ended unfinished, by the budget or since not resumed: that saved nothing" in text


@pytest.mark.slow
def test_no_text_can_become_markup():
    evil = '"><script>alert(1)</script>&'
    rows = [row(evil, family=evil, source=evil, reason=evil), row("t2", "stopped", reason=evil)]
    scored = entry(1, evil, family=evil, tied_with=[evil], reason=evil)
    ranked = ranking(scored, entry(2, "t2"), extractor=evil, score_name=evil, sampler={"name": evil, "steps": evil})
    config = CONFIG | {"name": evil, "train": CONFIG["train"] | {"data": {"name": evil}}}  # type: ignore[operator]
    given = {"samples": {evil: IMAGES}, "commands": [evil], "versions": {evil: evil}, "config": config}
    html = render(rows, ranked, events={evil: Events({"train/loss": [(1, 0.5)]}, GRID)}, **given)
    assert "script" not in {tag for tag, _ in Page(html).tags}
    assert "<script" not in html
    assert Page(html).text.count("alert(1)") > 10


@pytest.mark.slow
def test_cost_says_what_was_spent_saved_and_idle():
    text = Page(full()).text
    # 1800 + 1800 + 200 + 800 seconds over 230 epochs, and t2 left 80: 1600 s more
    assert "took 1.28 hours of workers' time. 1 trial of 4 stopped early" in text
    assert "about 26.7 minutes more, so stopping saved 26% of the training" in text
    # two at once for two hours, of which 4600 seconds were training
    assert "ran for 2 hours with at most 2 trials at once; workers were idle for 68%" in text


@pytest.mark.slow
@pytest.mark.parametrize(("source", "searched"), [("known", False), ("suggested", True)])
def test_nothing_is_said_to_be_searched_where_known_points_were_tried_alone(source, searched):
    asked = CONFIG | {"trials": len(CONFIG["known_points"])}
    text = Page(render([row("t1", source=source)], config=asked)).text
    assert ("Searched linear (" in text) == searched
    assert ("Searched nothing: the known points alone" in text) != searched


@pytest.mark.slow
def test_confirmations_are_counted_by_themselves():
    assert "from new seeds took" not in Page(render(ROWS)).text
    assert (
        "Training the best again from new seeds took 2 hours more." in Page(render(ROWS, confirming_seconds=7200)).text
    )


def test_best_and_known_points_are_shown_as_they_drew_at_their_last_rung():
    page = Page(full())
    assert "t1 cosine(0, 1, tau 1) the best, completed at epoch 90, Fréchet distance 1.111" in page.text
    assert "t0 cosine(0, 1, tau 1) known point, completed at epoch 90" in page.text
    assert "all with the same noise and sampler (DDIM, 25 steps, eta 1, seed 0)" in page.text


@pytest.mark.slow
def test_without_a_ranking_the_best_is_who_did_best_at_the_last_rung_that_any_came_to():
    rows = [row("t0", rungs=[{"epoch": 90, "frechet": 2.0, "score": 9.0, "grid_loss": 0.1}]), row("t1")]
    text = Page(render(rows, events={trial: Events(samples=GRID) for trial in ("t0", "t1")})).text
    assert "t1 cosine(0, 1, tau 1) the best" in text
    assert "t0 cosine(0, 1, tau 1) known" not in text


@pytest.mark.slow
def test_every_schedule_that_can_be_drawn_has_a_strip_of_noised_images():
    rows = [*ROWS, row("t6", "screened", family="linear", start=1e-4, end=1e-3, source="known", reason="prior KL")]
    text = Page(render(rows, real_samples=IMAGES)).text
    assert "linear(0.0001, 0.001) t6, screened out" in text
    assert "cosine(0, 1, tau 1) t0" in text  # once: the other trials have the same schedule
    assert "cosine(0.5, 0.5" not in text.split("One image, noised")[1].split("How the trials learned")[0]


@pytest.mark.slow
def test_an_interrupted_search_says_so_and_a_finished_one_does_not():
    assert "not at its end: 4 of 6 trials ended" in Page(full()).text
    assert "resume" in Page(full()).text
    spent = Page(render([], ended="the search's share of budget.hours, 1.7 of 2, was spent")).text
    assert "The search ended: the search's share of budget.hours, 1.7 of 2, was spent." in spent
    assert "not at its end" not in spent
    assert "not at its end" not in Page(render([row(f"t{i}", rungs=[]) for i in range(6)])).text


def test_a_reused_trial_names_the_one_that_was_trained():
    rows = [
        row("t0", rungs=[]),
        row("t1", "reused", reason="the same as t0: alpha_bar differs by 0.004 at most", same_as="t0"),
    ]
    text = Page(render(rows, real_samples=IMAGES)).text
    assert "reused the same as t0: alpha_bar differs by 0.004 at most" in text
    assert "2 configurations on digits: 1 completed, 1 reused" in text


def test_settings_beyond_the_schedule_are_shown():
    rows = [row("t0", rungs=[], settings={"batch_size": 32, "schedule.steps": 50})]
    assert "dropout 0.1, batch_size 32, schedule.steps 50" in Page(render(rows, real_samples=IMAGES)).text


def test_a_confirmed_row_says_of_how_many_trainings():
    first = entry(1, "t1", confirmed=True, mean_of=["a", "b", "c"], best_training="b")
    assert "confirmed: the mean of 3 new trainings" in Page(render([], ranking(first, entry(2, "t0")))).text


def trainings(trial: str, *scores: float | None) -> list[dict[str, Any]]:
    names = [trial, *(f"{trial}-seed{i}" for i in range(1, len(scores)))]
    return [
        {"trial": name, "score": score, "reason": None if score else "the <loss> is nan"}
        for name, score in zip(names, scores, strict=True)
    ]


@pytest.mark.slow
def test_images_of_a_confirmed_row_are_said_to_be_its_best_training_s_and_a_failed_one_is_named():
    own = {
        "mean_of": ["t1-seed1", "t1-seed2"],
        "best_training": "t1-seed2",
        "trainings": trainings("t1", 9.4, 9.5, 9.6, None),
    }
    ranked = ranking(entry(1, "t1", confirmed=True, **own), entry(2, "t0"))
    text = Page(render(ROWS, ranked, samples={"t1": IMAGES, "t0": IMAGES})).text
    assert "score 9.50 images of t1-seed2, its best of 3" in text
    assert text.count("its best of") == 1
    assert "confirmed: the mean of 2 new trainings (1 of 3 failed: the <loss> is nan)" in text
    lost = entry(1, "t1", trainings=trainings("t1", 9.4, None, 9.5, None))
    assert "not confirmed: 2 of 3 new trainings failed: the <loss> is nan" in Page(render([], ranking(lost))).text


def test_precision_and_recall_are_compared_at_one_number_of_images():
    same = {"n": 360, "score": 9.21, "frechet": 7.9, "precision": 0.8, "recall": 0.71}
    own = {"kid": {"value": 0.0012, "ci": [0.001, 0.0014]}, "precision": 0.79, "recall": 0.95, "at_real_n": same}
    real = {"n": 360, "score": 9.77, "frechet": 1.25, "kid": 0.0001, "precision": 0.9, "recall": 0.88}
    text = Page(render([], ranking(entry(1, "t1", **own), real=real))).text
    assert "Precision, recall 360 images" in text
    assert "1.20 1.00 to 1.40" in text
    assert "0.10 360 images" in text  # the real ones', in a column of 10,000
    assert "0.80, 0.71" in text
    assert "0.90, 0.88" in text
    assert "0.95" not in text

    own = own | {"kid": {"value": 1.55282, "ci": [1.11, 1.99]}}  # a classifier's
    text = Page(render([], ranking(entry(1, "t1", **own), real=real))).text
    assert "1.55 1.11 to 1.99" in text
    assert "KID × 1000" not in text


def test_every_number_has_its_count_of_images_and_a_score_its_spread_and_its_one_pool_beside_it():
    score = {"mean": 9.5, "std": 0.04, "ci": [9.4, 9.6]}
    own = {"score": score, "score_pool": 9.58, "kid": {"value": 0.0012, "ci": [0.001, 0.0014]}}
    ranked = ranking(entry(1, "t1", **own), entry(2, "t0"), train_images=50_000, real_images=10_000)
    page = Page(render([], ranked))
    assert "9.50 9.40 to 9.60 ± 0.04 between splits one pool 9.58" in page.text
    assert page.text.count("one pool") == 1  # t0 has one split, whose score is the pool's
    assert "KID × 1000 10,000 images, 95% CI" in page.text
    assert (
        "Fréchet distances are to all 50,000 training images; KID, precision and recall to 10,000 of them." in page.text
    )
    assert "DDIM, 50 steps, eta 0, seed 0" in page.text
    assert "the mean over splits of 5,000 images" in page.text
    assert "Fréchet distances are to all" not in Page(render([], ranking(entry(1, "t1")))).text


@pytest.mark.parametrize(("steps", "said"), [((100, 100), "DDIM, 100 steps, eta"), ((100, 50), "50 or 100 steps")])
def test_steps_are_those_that_trials_took_where_their_schedules_have_fewer(steps, said):
    trials = [entry(rank, f"t{rank}", steps=taken) for rank, taken in enumerate(steps, 1)]
    ranked = ranking(*trials, entry(None, "t4", reason="it diverged", steps=None))
    ranked["sampler"]["steps"] = 1000
    assert said in report_tables.ranking_table(ranked)


def test_a_schedule_that_is_read_as_beta_is_called_so():
    as_beta = {"settings": {"schedule.space": "beta"}}
    text = Page(render([row("t1", **as_beta)], ranking(entry(1, "t1", **as_beta)), samples={"t1": IMAGES})).text
    assert "cosine(0, 1, tau 1) as beta" in text
    assert text.count("cosine(0, 1, tau 1)") == text.count("cosine(0, 1, tau 1) as beta")


def test_what_is_left_over_by_whole_splits_is_said_wherever_a_score_is():
    real = {"n": 7000, "dropped": 2000, "score": 9.77, "frechet": 1.25}
    ranked = ranking(entry(1, "t1"), images=8000, dropped=3000, real=real)
    text = Page(render([], ranked)).text
    assert "from 5,000 images (3,000 left over)" in text
    assert "5,000 real images (2,000 left over), held out from training, score 9.77" in text
    assert "Fréchet distances of all 7,000 to the training images" in text
    assert "Classifier score 5,000 images (3,000 left over), 95% CI" in text
    assert "Classifier score 5,000 images (2,000 left over)" in text
    assert "Fréchet distance 8,000 images, 95% CI" in text
    assert "left over" not in Page(full()).text


def test_the_lead_over_the_next_is_shown_where_it_is_known():
    first = entry(1, "t1", to_next={"score": 0.123, "ci": [-0.05, 0.3]})
    text = Page(render([], ranking(first, entry(2, "t0", to_next=None)))).text
    assert "Ahead of the next 95% CI" in text
    assert "0.12 -0.05 to 0.30" in text
    assert "Ahead of the next" not in Page(full()).text


@pytest.mark.slow
def test_importance_is_shown_where_there_are_trials_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(analysis, "SHUFFLES", 1)  # 19 take seconds
    rng = np.random.default_rng(0)
    rows = []
    for i in range(analysis.MIN_TRIALS):
        rate = float(10 ** rng.uniform(-3, -2))
        rung = {"epoch": 10, "frechet": 1e4 * rate, "score": 5.0, "grid_loss": 0.1}
        dropout = float(rng.uniform(0, 0.2))
        rows.append(row(f"t{i}", "stopped", learning_rate=rate, dropout=dropout, rungs=[rung]))
    text = Page(report_tables.importance(rows, CONFIG["space"], "frechet", 10)).text
    assert f"All families, {analysis.MIN_TRIALS} trials" in text
    assert f"cosine, {analysis.MIN_TRIALS} trials" in text
    assert "left out: linear (0), polynomial (0), sigmoid (0)" in text
    assert re.search(r"Beyond chance learning rate \d+% \d+%", text)
    alone = CONFIG["space"] | {"families": {"cosine": CONFIG["space"]["families"]["cosine"]}}
    text = Page(report_tables.importance(rows, alone | {"learning_rate": None, "dropout": None}, "frechet", 10)).text
    assert "Too few trials" not in text  # they are enough, but nothing varied
    assert "left out" not in text
    assert "%" not in text


@pytest.mark.parametrize("state", ["stopped", "completed"])
def test_every_family_that_is_drawn_against_cost_has_a_name_in_the_legend(state):
    rows = [row("t0"), row("t1", state, family="linear"), row("t2", "stopped")]
    drawn = report_figures.cost_plots(rows, "frechet")
    assert [drawn.count(f">{family}</text>") for family in ("cosine", "linear")] == [2, 2]  # a panel a measure
