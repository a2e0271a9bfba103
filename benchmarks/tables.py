"""docs/benchmarks.md, and the tables in docs/training.md and docs/measure.md, from docs/results/*.json.

No measured figure in them is typed by hand.

python -m benchmarks.tables
"""

import argparse
import json
from statistics import median
from typing import Any

from benchmarks.common import RESULTS, filled

ARGUMENTS = {"search_efficiency": " compare", "rank_agreement": " RUN"}
MEMORY = ("driver_memory_mib", "memory_of_all_processes_mib")
PAGE, TRAINING, MEASURE = (RESULTS.parent / name for name in ("benchmarks.md", "training.md", "measure.md"))


def page() -> str:
    """The whole of docs/benchmarks.md; a benchmark without results is left out, some have them for each device."""
    parts = ["# Measured", "Written by `python -m benchmarks.tables` from `docs/results/`."]
    for name, section in (
        ("search_efficiency", search_efficiency),
        ("simulate_scale", simulate_scale),
        ("orchestration", orchestration),
        ("sampling_throughput", sampling_throughput),
        ("rank_agreement", rank_agreement),
        ("pool_or_ray_data", pool_or_ray_data),
        ("soak", soak),
    ):
        for path in sorted(RESULTS.glob(f"{name}*.json")):
            result = json.loads(path.read_text())
            parts.append(section(result))
            where = f"{result['machine']}, commit {result['commit']}. {result.get('note', '')}"
            parts.append(f"`python -m benchmarks.{name}{ARGUMENTS.get(name, '')}`, {where}".strip())
    return "\n\n".join(parts) + "\n"


def training(document: str) -> str:
    """docs/training.md with the figures of train_throughput, of each device there are some of."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("train_throughput_*.json"))]
    return filled(document, "train_throughput", "\n\n".join(train_throughput(result) for result in results))


def measure(document: str) -> str:
    """docs/measure.md with the coverage that calibration found, in per cent of the simulated intervals."""
    regimes = json.loads((RESULTS / "calibration.json").read_text())["regimes"]
    rows = [[name, *(f"{share:.1%}" for share in found["coverage"].values())] for name, found in regimes.items()]
    of = ("checkpoints", "configurations", "configurations whose seeds spread unlike")
    return filled(document, "calibration", _table(["", *(f"held, {what}" for what in of)], rows))


def train_throughput(result: dict[str, Any]) -> str:
    names = {
        "ours": "this loop (EMA, gradient clipping)",
        "tutorial": "tutorial (neither)",
        "diffusers recipe": "diffusers' recipe (EMA, gradient clipping)",
    }
    device = "cpu" if result["device"] == "cpu" else "cuda"
    where = result["machine"] if device == "cpu" else result["device"]
    ours = result["round_seconds"]["ours"]
    memory = "peak MiB of its own process" if device == "cpu" else "peak MiB on the GPU"
    rows = []
    for name, speed in result["images_per_second"].items():
        ratio = ""
        if name != "ours":
            each = [theirs / mine for theirs, mine in zip(result["round_seconds"][name], ours, strict=True)]
            ratio = f"{result['speed_ratio_to'][name]:.2f}x ({min(each):.2f}–{max(each):.2f})"
        rows.append([names[name], f"{speed:.1f}", ratio, f"{result['peak_memory_mib'][name]:,.0f}"])
    agreement = result["agreement"]
    first = f"U-Net {result['parameters'] / 1e6:.1f}M, 32x32, batch {result['batch_size']}, {where}"
    return "\n\n".join(
        [
            _table(
                [first, "images/s", f"this loop's speed over its, median of {len(ours)} turns (range)", memory], rows
            ),
            f"Their losses over {agreement['steps']} steps on the same batches differ by at most "
            f"{agreement['largest_relative_difference']:.0e} of their value "
            f"([figures](results/train_throughput_{device}.json), commit {result['commit']}, seed {result['seed']}).",
        ]
    )


def search_efficiency(result: dict[str, Any]) -> str:
    pool, at = result["pool"], result["equal_cost_full_trainings"]
    rows = []
    for name, method in result["methods"].items():
        cells = [
            _interval(method["full_trainings_until_quality"], 1),
            _interval(method["cost_ratio_to_random"], 2),
            f"{method['reached']:.1%}",
            _interval(method["chosen_frechet_at_equal_cost"], 1),
        ]
        rows.append([name, *cells])
    correlations = result["rank_correlation_with_quality"]
    ratio, limit = result["methods"]["this search"]["cost_ratio_to_random"], result["limits"]["cost_ratio_to_random"]
    above = ratio["value"] - limit
    verdict = f"was missed, by {above:.2f} ({above / limit:.0%})" if above > 0 else "was met"
    told = [[f"epoch {epoch}", *(f"{value:+.2f}" for value in row.values())] for epoch, row in correlations.items()]
    return "\n\n".join(
        [
            "## What a search costs until it has a good model",
            f"{sum(pool.values())} trainings of the digits data were recorded ({pool['random']} configurations drawn "
            f"at random, {pool['known']} known points, {pool['failing']} more that fail the screen) and "
            f"{result['repeats']} searches by each method replayed from them, each on a random part of the pool: the "
            "real searchers and schedulers suggest, the nearest recorded configuration answers. Cost is CPU time "
            f"({result['cpu_seconds']['full']:.1f} s a full training) until a full training has a Fréchet distance, on "
            f"noise that no rung has seen, of at most {result['target_frechet']:.1f}: what one random configuration in "
            f"twenty has. Chosen: what each method itself holds for its best at the cost of {at} full trainings. "
            "In brackets 95 % bootstrap intervals over the repeats, which do not cover that there is one pool, one "
            "data set and one seed a training. `without` leaves one part of this search out; the last rows are it with "
            "other settings of `early_stopping` than the default two rungs, of which the best third goes on.",
            _table(["method", "full trainings' cost", "ratio to random", "reached", "Fréchet chosen"], rows),
            f"The aim was at most {limit:g} of random search's cost. At {_interval(ratio, 2)} it {verdict}.",
            "Rank correlation with the quality at the end, of configurations that pass the screen:",
            _table(["measured at", "validation loss", "grid loss", "Fréchet of 128 images"], told),
        ]
    )


def simulate_scale(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{cell['workers']:,}",
            f"{cell['trials']:,}",
            f"{cell['busy']:.1%}",
            f"{cell['driver_share']:.1%}",
            f"{cell['driver_ms_an_event']:.0f}",
            f"{cell['suggestion_ms_by_tenth_of_the_search'][0]:.0f} → "
            f"{cell['suggestion_ms_by_tenth_of_the_search'][-1]:.0f}",
            f"{cell['suggestion_share_of_driver']:.0%}",
            f"{cell['memory_mib']:.0f}",
        ]
        for cell in result["cells"]
    ]
    return "\n\n".join(
        [
            "## One driver and many workers",
            "The project's searcher, scheduler, trials table and the line that it prints for each trial, on a "
            "simulated clock "
            f"(`benchmarks/replay.py`): trials of {result['full_seconds'] / 60:.0f} minutes in full, most of them "
            f"stopped early, {result['gap_seconds']:g} s from a trial's start to its first step. The driver's CPU "
            "seconds are real and count on that clock. Waits for the disk (about three syncs a trial) are not in it, "
            "and neither are Tune's own work in the driver, a terminal's live table and the gauges for Prometheus (the "
            "last two about 6% of a core at 5,000 trials): a real driver is busier than its share here. Busy and the "
            "driver's share are until the last trial was begun.",
            _table(
                ["workers", "trials", "workers busy", "driver busy", "ms an event", "ms a suggestion, first → last "
                 "tenth", "suggestions' share", "peak MiB above the rows before"],
                rows,
            ),
        ]
    )  # fmt: skip


def orchestration(result: dict[str, Any]) -> str:
    names = {
        "train": "`runner: train`",
        "reuse": "`runner: reuse`",
        "reuse-asha": "`runner: reuse`, with early stopping",
        "plain": "two plain processes (the limit)",
    }
    rows, limits = [], result["limits"]
    for name, run in result["runners"].items():
        fewer = f", {run['trials']} trials" if run.get("trials", result["trials"]) != result["trials"] else ""
        rows.append([names[name] + fewer, f"{run['training_seconds_a_trial']:.1f}", f"{run['seconds']:.0f}"])
        if name != "plain":
            rows[-1] += [
                f"{run['busy']:.0%}",
                f"{run['median_gap_seconds']:.2f} ({run['largest_gap_seconds']:.2f})",
                f"{run['first_step_seconds']:.0f}",
                "–" if run["driver_cpu_seconds"] is None else f"{run['driver_cpu_seconds'] / run['trials']:.2f}",
                " / ".join("–" if run[of] is None else f"{run[of]:.0f}" for of in MEMORY),
            ]
        else:
            rows[-1] += ["100%", "–", "–", "–", "–"]
    return "\n\n".join(
        [
            "## The cluster's time",
            f"A search of {result['trials']} trials of the digits demo on two cores, two at once. Busy: seconds of "
            "training and scoring over the cores' seconds from the first trial's first step to the last one's end. "
            "Gap: from a trial's end to the next one's first step on the same core.",
            _table(
                ["runner", "s a training", "s in all", "busy", "gap, s: median (largest)", "s from the command to the "
                 "first step", "driver CPU s a trial", "MiB: driver / all processes"],
                rows,
            ),
            f"The aims for `runner: reuse`: busy {limits['busy']:.0%} or more, a median gap of at most "
            f"{limits['median_gap_seconds']:g} s, the first step within {limits['first_step_seconds']:g} s. "
            f"Missed: {', '.join(aims_missed(result)) or 'nothing'}.",
        ]
    )  # fmt: skip


def aims_missed(result: dict[str, Any]) -> list[str]:
    """What `runner: reuse` missed of orchestration's aims, each with its figure."""
    limits, reuse = result["limits"], result["runners"].get("reuse")
    if reuse is None:
        return []
    busy, gap, first = (reuse[name] for name in ("busy", "median_gap_seconds", "first_step_seconds"))
    judged = (
        (f"busy {busy:.1%}", busy < limits["busy"]),
        (f"gap {gap:.2f} s", gap > limits["median_gap_seconds"]),
        (f"first step {first:.1f} s", first > limits["first_step_seconds"]),
    )
    return [words for words, is_missed in judged if is_missed]


def sampling_throughput(result: dict[str, Any]) -> str:
    names = {
        "ours": "this sampler",
        "ours in bf16": "this sampler, the model in bf16",
        "keeps every step": "a loop that keeps every step",
    }
    memory = result["peak_memory_mib_by_steps"]
    rows = []
    for name, speed in result["images_per_second"].items():
        ratio = result["ours_is_faster_by"].get(name)
        faster = ratio and f"{ratio['median']:.2f}x ({ratio['range'][0]:.2f}–{ratio['range'][1]:.2f})"
        cells = [f"{speed:.1f}", faster or ""]
        rows.append([names.get(name, name), *cells, *(f"{peak:.1f}" for peak in memory[name].values())])
    return "\n\n".join(
        [
            f"## Drawing images ({result['device']})",
            f"{result['images']} images of 32x32 by ancestral sampling with one U-Net, in turn by this sampler, by "
            "diffusers' DDPMPipeline and by a loop that keeps every step; medians (ranges) of "
            f"{result['rounds']} turns of {result['steps_timed']} steps. Their pixels differ by at most "
            f"{result['largest_difference_from_DDPMPipeline']} of 255. Memory is the peak above the loaded model and "
            "one short sampling, by the number of steps.",
            _table(
                ["", "images/s", "this sampler's speed over its", *(f"MiB, {steps} steps" for steps in memory["ours"])],
                rows,
            ),
        ]
    )


def rank_agreement(result: dict[str, Any]) -> str:
    full, rows = result["full"], []
    for row in result["agreement"]:
        taus = [f"{row[of]['tau']:.2f} ({row[of]['ci'][0]:.2f}–{row[of]['ci'][1]:.2f})" for of in ("score", "frechet")]
        rows.append([f"{row['steps']}", f"{row['images']:,}", *taus])
    return "\n\n".join(
        [
            "## How well fewer steps and fewer images rank",
            f"{result['trials']} trials of a finished run, judged by the {result['extractor']}: Kendall's tau between "
            f"their ranking at each setting and that at {full['steps']} {result['sampler']['name'].upper()} steps and "
            f"{full['images']:,} images. In brackets 95 % percentile bootstrap intervals over the trials.",
            _table(["steps", "images", "by the score", "by the Fréchet distance"], rows),
        ]
    )


def soak(result: dict[str, Any]) -> str:
    names = {
        "ray::RayTrainWorker": "workers of trainings",
        "ray::ImplicitFunc": "trials' own processes",
        "driver": "drivers with their whole Ray, each resumed",
    }
    killed = ", ".join(f"{result['kills'].get(kind, 0)} {name}" for kind, name in names.items())
    states = ", ".join(f"{count} {state}" for state, count in result["trials"].items())
    memory, missed = result["driver_mib"], result["missed"]
    return "\n\n".join(
        [
            "## Something dies every twenty seconds",
            f"{result['minutes']:g} minutes of a search of short trials, two at once on two cores, of which something "
            f"was killed every 20 s: {killed}. The search's end: {result['ended']}. Trials: {states}; "
            f"broken: {len(result['broken_trials'])}; epochs trained twice: {result['epochs_trained_twice']}; "
            f"checkpoints kept of a trial: {result['most_checkpoints_kept_of_a_trial']} at most; processes left: "
            f"{len(result['processes_left'])}. A trial that was killed more often than it may be started again (three "
            f"times) is failed. The driver's memory, MiB: {memory['largest']:.0f} at most, {memory['grown']:+.0f} over "
            f"{memory['over_trials']} trials. Missed: {', '.join(missed) or 'nothing'}.",
        ]
    )


def pool_or_ray_data(result: dict[str, Any]) -> str:
    names = {"pool": "the stage's pool of actors", "ray_data": "Ray Data's map_batches"}
    rows = []
    for name, seconds in result["seconds"].items():
        rows.append([names[name], f"{median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"])
    return "\n\n".join(
        [
            "## A pool of actors or Ray Data",
            f"{result['images']:,} images of digits in {result['shards']} shards, drawn and scored by "
            f"{result['workers']} actors of one CPU each, {result['sampler_steps']} steps, in turn by both, "
            "actors' start included; the same files to the bit.",
            _table(["", f"seconds: median of {len(result['seconds']['pool'])} (range)"], rows),
        ]
    )


def _interval(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page())
    TRAINING.write_text(training(TRAINING.read_text()))
    MEASURE.write_text(measure(MEASURE.read_text()))
    print(f"written: {PAGE}, {TRAINING}, {MEASURE}")


if __name__ == "__main__":
    main()
