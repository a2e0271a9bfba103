"""Configurations: what is shipped, what is refused, and how the refusal is put."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from search import config_file
from search.config import SearchConfig, UserError
from search.config_file import CONFIGS, load
from search.space_config import KNOWN_POINTS, Range
from trainer import schedules

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    config = load(path.stem)
    assert config.name == path.stem
    assert load(str(path)) == config
    for point in config.known_points:
        schedules.check(point.family, point.start, point.end, point.tau, config.train.schedule.steps)
    assert all(1 <= epoch < config.train.epochs for epoch in config.rung_epochs())


def test_digits_is_shipped():
    assert "digits" in [path.stem for path in SHIPPED]


def test_a_config_written_out_is_read_back_the_same():
    config = load("digits", ["train.learning_rate=3e-4", "space.dropout=0.1"])
    assert SearchConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochz=7", ["unknown key 'train.epochz'", "7", "spelling"]),
        ("train.epochs=ten", ["train.epochs", "integer", "'ten'"]),
        ("train.epochs=0", ["train.epochs", "greater than or equal to 1", "got 0"]),
        ("train.epochs.x=1", ["'epochs'", "no further settings"]),
        ("train=3", ["train", "dictionary", "got 3"]),
        (
            "train.schedule={family: sigmoid, start: 3, end: 3}",
            ["start < ", "start=3.0, end=3.0", "use start=0, end=3"],
        ),
        ("known_points+={family: sigmoid, start: 3, end: 3}", ["known_points.6", "start=3.0", "use start=0, end=3"]),
        ("space.families={sigmoid: {start: 3, end: 3}}", ["start=3.0, end=3.0", "use start=0, end=3"]),
        ("space.families={linear: {start: 1e-4, end: 0.02, tau: 2}}", ["linear.tau", "left out", "got 2"]),
        ("space.families={}", ["space.families", "at least 1"]),
        ("space.families={quadratic: {start: 0, end: 1}}", ["space.families.quadratic", "'linear', 'polynomial'"]),
        ("space.dropout={low: 1, high: 0}", ["space.dropout: low < high", "low=1.0, high=0.0", "single number"]),
        ("space.learning_rate={low: 0, high: 1, log: true}", ["space.learning_rate: log needs low > 0", "low=0.0"]),
        ("space.families.cosine.start.low=9", ["space.families.cosine.start", "low < high", "low=9.0, high=0.3"]),
        ("space.train={epochs: [1, 2]}", ["space.train.epochs cannot be searched", "batch_size, model"]),
        ("space.train={batch_size: [8, 8]}", ["space.train.batch_size", "different values", "[8, 8]"]),
        ("space.train={batch_size: 8}", ["space.train.batch_size: must be a list", "got 8"]),
        ("space.train={batch_size: [0]}", ["space.train.batch_size: batch_size", "greater than or equal to 1", "0"]),
        ("space.train={model.chanels: [[8]]}", ["model.chanels", "unknown key", "[8]"]),
        ("space.train={model.channels: [[16, 32]]}", ["model.channels", "one entry a level", "2 and 3"]),
        (
            "known_points+={family: cosine, start: 0, end: 1, train: {seed: 3}}",
            ["known_points.6.train.seed", "cannot be searched"],
        ),
        ("budget.hours=0", ["budget.hours", "greater than 0", "got 0"]),
        ("budget.reserve=1", ["budget.reserve", "less than 1", "got 1"]),
        ("space.dropout={low: 0}", ["space.dropout.high", "required"]),
        ("space.dropout=abc", ["space.dropout: must be a number, or a range {low: …, high: …", "got 'abc'"]),
        ("early_stopping.rungs=[0.5, 1.0]", ["early_stopping.rungs", "between 0 and 1", "[0.5, 1.0]"]),
        ("early_stopping.rungs=[0.5, 0.25]", ["early_stopping.rungs", "rising", "[0.5, 0.25]"]),
        ("early_stopping.reduction=1", ["early_stopping.reduction", "greater than 1", "got 1"]),
        ("early_stopping.metric=fid", ["early_stopping.metric", "'frechet'", "got 'fid'"]),
        ("train.workers=2", ["runner: reuse", "train.workers is 2", "use runner: train"]),
        ("train.learning_rate=.nan", ["train.learning_rate", "finite", "got nan"]),
        ("train.epochs=true", ["train: epochs must be a number, but got True"]),
        ("space.dropout=yes", ["space: dropout must be a number, but got True"]),
        ("space.dropout=1.5", ["space.dropout", "less than 1", "got 1.5"]),
        ("space.learning_rate={low: -1, high: 1}", ["space.learning_rate", "greater than 0", "got -1"]),
        ("space.families.cosine.tau=-1", ["tau > 0", "tau=-1"]),
        ("space.families.linear.end={low: 2, high: 3}", ["linear", "end=3.0"]),
        ("seed=4294967296", ["seed", "less than 4294967296", "got 4294967296"]),
        ("train.schedule.steps=100000000000", ["train.schedule.steps", "less than or equal to 1000000"]),
        ("trials_per_gpu=0", ["trials_per_gpu: must be a number of trials, at least 1, or auto, but got 0"]),
        ("train.speed.bf16=maybe", ["train.speed.bf16: must be auto, true or false, but got 'maybe'"]),
        ("epochs", ["--set", "a.b=value", "'epochs'"]),
        ("=1", ["--set", "a.b=value", "'=1'"]),
        ("train..epochs=1", ["--set", "a.b=value", "'train..epochs=1'"]),
        ("train.epochs=[1", ["--set train.epochs=[1", "not valid YAML"]),
        ("known_points+={family:linear}", ["space after a colon", "family: linear"]),
        ("known_points=[{family:linear}]", ["space after a colon", "family: linear"]),
        ("early_stopping+=3", ["'early_stopping'", "no list", "use early_stopping=…"]),
    ],
)
def test_a_refusal_says_what_which_value_and_what_to_do(override, parts):
    with pytest.raises(UserError) as refused:
        load("digits", [override])
    message = str(refused.value)
    assert [part for part in parts if part not in message] == [], message
    assert "float" not in message.replace("float32", "")  # no inner names of pydantic's
    assert "function-after" not in message


def test_an_override_sets_what_the_yaml_leaves_out():
    config = load("digits", ["train.data.train_fraction=0.5", "space.dropout=0.2", "trials=3"])
    assert (config.train.data.train_fraction, config.space.dropout, config.trials) == (0.5, 0.2, 3)
    assert config.train.batch_size == load("digits").train.batch_size


def test_a_number_that_yaml_1_1_reads_as_text_is_a_number():
    config = load("digits", ["train.learning_rate=1e-4", "space.learning_rate={low: 1e-5, high: 1e-3, log: true}"])
    assert config.train.learning_rate == 1e-4
    assert config.space.learning_rate == Range(low=1e-5, high=1e-3, log=True)


def test_appending_adds_to_the_default_list():
    config = load("cifar10", ["known_points+={family: cosine, start: 0.1, end: 1}", "early_stopping.rungs+=0.5"])
    assert config.known_points[:-1] == KNOWN_POINTS
    assert config.known_points[-1].start == 0.1
    assert config.early_stopping.rungs == (1 / 9, 1 / 3, 0.5)
    twice = load("digits", ["known_points=[]", *2 * ["known_points+={family: cosine, start: 0.1, end: 1}"]])
    assert len(twice.known_points) == 2


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/tmp/x", ".hidden", "-x", "a b", "a\n", "", "x" * 65])
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(UserError, match="name"):
        config_file.parse({"name": name}, "here")


@pytest.mark.parametrize("name", ["nothing", "no/such.yaml", "~nobody-here/x.yaml", "x" * 5000, "digits.yml", "."])
def test_a_missing_file_names_the_shipped_configs(name):
    with pytest.raises(UserError, match=r"shipped name: .*digits"):
        load(name)


@pytest.mark.parametrize("text", ["- 1", "a: [", "just text", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load(str(file))


def test_a_file_is_named_by_its_stem_and_an_empty_one_is_all_defaults(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("")
    assert load(str(file)) == SearchConfig(name="mine")


def test_rungs_are_epochs_strictly_below_the_last():
    def rungs(epochs: int) -> list[int]:
        return load("digits", [f"train.epochs={epochs}"]).rung_epochs()

    assert rungs(90) == [10, 30]
    assert rungs(3) == [1]  # 1/9 and 1/3 meet there
    assert rungs(1) == []


@pytest.mark.parametrize(
    "wrong",
    ["space.train.lr_decay=[{low: 0.5}]", "space.train={model.foo.bar: [1]}", "space.train={model.channels.x: [1]}"],
)
def test_a_setting_that_no_training_has_is_refused_by_its_name(wrong):
    with pytest.raises(UserError, match=r"space\.train\..* is no setting of a training that takes"):
        load("digits", [wrong])


def test_a_configuration_is_read_from_an_address(tmp_path):
    """As of a run in an object store, which its report says how to do again."""
    (tmp_path / "mine.yaml").write_text("trials: 3\n")
    config = load(f"file://{tmp_path}/mine.yaml")
    assert (config.name, config.trials) == ("mine", 3)
    for wrong, said in (("none.yaml", "no configuration at"), ("", "no configuration that can be read")):
        with pytest.raises(UserError, match=said):
            load(f"file://{tmp_path}/{wrong}")
    with pytest.raises(UserError, match="ftp://x/y is no configuration that can be read"):
        load("ftp://x/y")


def test_what_yaml_merges_is_laid_under_a_mapping_s_own_keys(tmp_path):
    points = "known_points:\n  - &a {family: cosine, start: 0, end: 1}\n  - {<<: *a, start: 0.1, tau: 2.0}\n"
    (tmp_path / "merged.yaml").write_text(points)
    first, second = load(str(tmp_path / "merged.yaml")).known_points
    assert (first.start, second.family, second.start, second.end, second.tau) == (0, "cosine", 0.1, 1, 2)


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text("train: {epochs: 3}\ntrials: 2\ntrain: {batch_size: 8}\n")
    with pytest.raises(UserError, match="'train' is given twice"):
        load(str(tmp_path / "twice.yaml"))


def test_of_a_family_s_ranges_some_corner_must_be_a_schedule():
    config = load("digits", ["space.families.cosine.start.low=-0.5"])  # others of its schedules are screened
    assert config.space.families["cosine"].start.low == -0.5


ROOT = Path(__file__).parents[1]
COMMANDS = [
    shlex.split(line, comments=True)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for line in re.findall(r"^    (ddpm-search (?:run|train) .*)$", page.read_text().replace("\\\n", ""), re.M)
]


def test_every_command_of_the_documents_has_settings_that_are_taken():
    assert len(COMMANDS) >= 5
    for words in COMMANDS:
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        load(words[2], [re.sub(r"\$\(python .*\)", "0.37", override) for override in overrides])  # what it prints


def test_the_documents_yaml_of_a_space_and_a_budget_is_taken(tmp_path):
    page = (ROOT / "docs" / "search.md").read_text()
    blocks = [
        block for block in re.findall(r"(?:^    .*\n)+", page, re.M) if re.match("    (space|trials|final):", block)
    ]
    assert len(blocks) == 3
    (tmp_path / "mine.yaml").write_text(textwrap.dedent("".join(blocks)))
    read = load(str(tmp_path / "mine.yaml"))
    assert set(read.space.families) == {"cosine", "sigmoid", "linear"}
    assert read.budget.worker_hours == 40
    assert (read.final.confirm.top, read.final.confirm.seeds) == (2, 3)
