"""The report: self-contained, honest about ties and about what is missing, and safe for any text."""

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from evaluation import report, report_figures

CONFIG = {
    "name": "digits",
    "seed": 7,
    "train": {"epochs": 90, "data": {"name": "digits"}, "schedule": {"steps": 100, "space": "alpha_bar"}},
    "early_stopping": {"metric": "auto"},
}
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
        "sampler": {"name": "ddim", "steps": 50},
        "steps": 50,
        "seed": 0,
        "real": {"n": 360, "score": 9.77, "frechet": 1.25},
        "noise": {"n": 360, "score": 2.44, "frechet": 225.0},
        "trials": list(trials),
    } | changes


def render(rows: list[dict[str, Any]], ranked: dict[str, Any] | None = None, **given: Any) -> str:
    defaults = {"samples": {}, "real_samples": None, "curves": {}}
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


@cache
def full() -> str:
    ranked = ranking(
        entry(1, "t1", tied_with=["t0"]), entry(2, "t0", tied_with=["t1"]), entry(None, "t4", reason="it diverged")
    )
    curves = {"t1": {"train/loss": [(1, 0.9), (2, 0.4)], "train/learning_rate": [(1, 2e-4), (2, 1e-4)]}}
    return render(ROWS, ranked, samples={"t1": IMAGES, "t0": IMAGES}, real_samples=IMAGES, curves=curves)


def test_page_is_one_well_formed_file_that_asks_for_nothing_else():
    page = Page(full())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    addresses = [value or "" for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    addresses += re.findall(r"url\(([^)]*)\)", full())
    assert addresses
    # xlink:href="#…" and url(#…) are references within the page's own SVG
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert "@import" not in full()


def test_same_run_gives_the_same_page_to_the_byte():
    assert full() == full.__wrapped__()


def test_verdict_says_the_winner_its_interval_ties_and_the_ceiling():
    text = Page(full()).text
    assert "t1, cosine(0, 1, tau 1) with learning rate 0.0002 and dropout 0.1 has the highest classifier score" in text
    assert "95% confidence interval 9.40 to 9.60 ) from 10,000 images" in text
    assert "probability 0.83; it cannot be told apart from t0" in text
    assert "360 real held-out images score 9.77, as many of the winner's 9.21" in text
    assert "trained models only" in text


def test_a_confirmed_winner_speaks_of_the_configuration():
    page = Page(render(ROWS, ranking(entry(1, "t1", confirmed=True), entry(2, "t0")))).text
    assert "they speak of the configuration" in page
    assert "can be told apart from every other" in page


def test_real_images_stand_in_the_column_of_their_own_number():
    def cells(html: str) -> list[str]:
        line = re.search(r'<tr class="reference">(.*?)</tr>', html)
        assert line
        return re.findall(r"<td[^>]*>(.*?)</td>", line[1])

    assert cells(full())[2:] == ["", "", "", "", "9.77", "1.25"]
    same = ranking(entry(1, "t1"), images=360)
    assert cells(render(ROWS, same))[2:] == ["9.77", "1.25", "", ""]


def test_every_trial_is_listed_with_its_state_and_reason():
    text = Page(full()).text
    for trial in ROWS:
        assert trial["trial"] in text
        assert trial["state"] in text
        assert trial["reason"] is None or trial["reason"] in text
    assert "it diverged" in text


def test_savings_are_the_epochs_left_of_stopped_trials_at_the_mean_cost_of_an_epoch():
    rows = [row("a"), row("b", "stopped", worker_seconds=400.0), row("c", "screened"), row("d", "failed")]
    # 1800 + 400 seconds over 90 + 10 epochs are 22 an epoch, and b left 80
    assert report.savings(rows, epochs=90) == (2200.0, 80 * 22.0)
    assert "saved 44%" in Page(render(rows)).text
    assert report.savings([], epochs=90) == (0.0, 0.0)


@pytest.mark.parametrize("rows", [[], ROWS, [row("t0", "screened", start=1.0, end=1.0, reason="law")]])
@pytest.mark.parametrize("ranked", [None, ranking(entry(None, "t0", reason="it diverged"))])
def test_what_is_missing_is_said_in_a_sentence(rows: list[dict[str, Any]], ranked: dict[str, Any] | None):
    text = Page(render(rows, ranked)).text
    assert ("There is no ranking yet" if ranked is None else "There is no winner") in text
    assert "No images have been drawn yet" in text
    assert ("No trial has begun yet" in text) == (not rows or rows[0]["state"] == "screened")


def test_a_ranked_trial_alone_and_a_data_set_without_labels_have_a_report():
    rows = [row("t1", rungs=[{"epoch": 10, "frechet": None, "score": None, "grid_loss": 0.1}])]
    text = Page(render(rows, ranking(entry(1, "t1"), held_out_accuracy=None))).text
    assert "No other trial was ranked" in text
    assert "grid loss (lower is better)" in text


def test_no_text_can_become_markup():
    evil = '"><script>alert(1)</script>&'
    rows = [row(evil, family=evil, source=evil, reason=evil), row("t2", "stopped", reason=evil)]
    scored = entry(1, evil, family=evil, tied_with=[evil], reason=evil)
    ranked = ranking(scored, entry(2, "t2"), extractor=evil, score_name=evil, sampler={evil: evil})
    config = CONFIG | {"name": evil, "train": CONFIG["train"] | {"data": {"name": evil}}}  # type: ignore[operator]
    given = {"samples": {evil: IMAGES}, "commands": [evil], "versions": {evil: evil}, "config": config}
    html = render(rows, ranked, curves={evil: {"train/loss": [(1, 0.5)]}}, **given)
    assert "script" not in {tag for tag, _ in Page(html).tags}
    assert "<script" not in html
    assert Page(html).text.count("alert(1)") > 10


def test_a_resumed_trials_epochs_are_read_once_with_their_latest_value(tmp_path: Path):
    assert report_figures.read_curves(tmp_path) == {}
    assert report_figures.read_curves(tmp_path / "nowhere") == {}
    with SummaryWriter(str(tmp_path), purge_step=1) as writer:
        for epoch in range(1, 6):
            writer.add_scalar("train/loss", 1 / epoch, epoch)
            if epoch == 5:
                writer.add_scalar("rung/frechet", 50.0, epoch)
    with SummaryWriter(str(tmp_path), purge_step=4) as writer:  # as EventLog does: the checkpoint was of epoch 3
        for epoch in range(4, 8):
            writer.add_scalar("train/loss", 10 + epoch, epoch)
    with SummaryWriter(str(tmp_path)) as writer:  # a restart that was not logged as one
        writer.add_scalar("train/loss", 20.0, 7)
    curves = report_figures.read_curves(tmp_path)
    epochs, losses = zip(*curves["train/loss"], strict=True)
    assert epochs == (1, 2, 3, 4, 5, 6, 7)
    assert losses == pytest.approx([1, 1 / 2, 1 / 3, 14, 15, 16, 20])  # events are float32
    assert curves.get("rung/frechet", []) == []


def test_long_curves_are_read_whole(tmp_path: Path):
    with SummaryWriter(str(tmp_path)) as writer:
        for epoch in range(1, 1301):  # more than the accumulator keeps by default
            writer.add_scalar("train/loss", float(epoch), epoch)
    assert report_figures.read_curves(tmp_path)["train/loss"] == [(epoch, float(epoch)) for epoch in range(1, 1301)]


def test_further_settings_and_reused_trials_are_shown():
    varied = row("t1", settings={"batch_size": 32, "model.channels": [16, "<b>"]})
    text = Page(render([varied, row("t2", "reused", reason="the same as t1")])).text
    assert "learning rate 0.0002, dropout 0.1, batch_size 32, model.channels [16, '<b>']" in text
    assert "reused the same as t1" in text
