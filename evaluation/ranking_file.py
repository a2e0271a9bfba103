"""What ranking.json says, but for the trials' parameters: from the shards of all candidates."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation import scores
from evaluation.config import FinalStageConfig
from evaluation.extractors import Extraction
from evaluation.ranking import Distance, RankedTrial, TrialSamples, rank
from evaluation.reference import Reference
from evaluation.shards import Candidate, extraction_of, identity
from trainer.storage import Storage


def ranking(
    run: Storage, candidates: Sequence[Candidate], config: FinalStageConfig, reference: Reference, notes: dict[str, str]
) -> dict[str, Any]:
    """Ranks what `draw` drew: the content of ranking.json but for the trials' parameters.

    notes: trial → reason, for trials that have no images. The real images are held-out ones; where they are fewer
    than `config.images`, `at_real_n` has every trial's scores, precision and recall at their number, for a fair
    comparison. Fréchet distances are to all `train_images`, KID, precision and recall (k = 3) to `real_images` of
    them. `steps` are those that were taken, fewer than the sampler's where a schedule has no more; `score_pool` is the
    score without splits; `dropped` images are left over by whole splits, and only by the score.
    """
    drawn = {c.trial: extraction_of(run, c, config, reference) for c in candidates if c.trial not in notes}
    steps = {c.trial: min(config.sampler.steps, identity(run, c)[1]) for c in candidates if c.trial in drawn}
    confirms = {c.trial: c.confirms for c in candidates}
    samples = [TrialSamples(t, judged.probabilities, judged.features, None, confirms[t]) for t, judged in drawn.items()]
    samples += [TrialSamples(trial, reason=reason, confirms=confirms.get(trial)) for trial, reason in notes.items()]
    train = reference.train_features
    distances: dict[str, Distance] = {
        "frechet_held_out": lambda features: scores.frechet_influence(features, reference.held_out_statistics),
        "kid": lambda features: scores.kid_influence(features, train),
    }
    ranked = rank(samples, reference.train, config.split_size, distances=distances)
    real_n = min(config.images, len(reference.held_out.features))

    def at(judged: Extraction, n: int) -> dict[str, Any]:
        score = scores.inception_score(judged.probabilities[:n], config.split_size)
        return {
            "n": n,
            "dropped": score.dropped,
            "score": score.mean,
            "score_pool": scores.inception_score(judged.probabilities[:n], n).mean,
            "frechet": scores.frechet_distance(judged.features[:n], reference.train),
        }

    def with_neighbours(judged: Extraction, n: int) -> dict[str, Any]:
        if min(n, len(train)) <= scores.NEIGHBOURS:
            return at(judged, n) | {"precision": None, "recall": None}
        return at(judged, n) | scores.precision_recall(judged.features[:n], train)._asdict()

    def real_row(judged: Extraction) -> dict[str, Any]:
        return with_neighbours(judged, real_n) | {"kid": scores.kid_influence(judged.features[:real_n], train)[0]}

    def row(trial: RankedTrial) -> dict[str, Any]:
        """A confirmed row's numbers are means over its seeds; `trainings` has each, the first one too."""
        judged = [drawn[name] for name in trial.mean_of]

        def mean_at(n: int) -> dict[str, Any] | None:
            return _mean([with_neighbours(one, n) for one in judged])

        whole = mean_at(config.images)
        own = [name for name, of in confirms.items() if trial.trial in (name, of)]
        lost = {"n": 0, "score": None, "frechet": None}
        return trial.to_dict() | {
            "steps": max((steps[name] for name in trial.mean_of), default=None),
            "at_real_n": whole if real_n == config.images else mean_at(real_n),
            "trainings": [
                (at(drawn[name], config.images) if name in drawn else lost) | {"trial": name, "reason": notes.get(name)}
                for name in own
            ],
            **{name: whole and whole[name] for name in ("score_pool", "precision", "recall")},
        }

    n = min(config.split_size, config.images)
    return {
        "extractor": reference.extractor.name,
        "reference": reference.key,
        "score_name": reference.extractor.score_name,
        "held_out_accuracy": reference.accuracy,
        "images": config.images,
        "split_size": n,
        "dropped": config.images % n,
        "train_images": reference.train.n,
        "real_images": len(train),
        "sampler": config.sampler.model_dump(),
        "steps": max(steps.values(), default=config.sampler.steps),
        "seed": config.sampler.seed,
        "weights": config.weights,
        "top": config.top,
        "real": real_row(reference.held_out),
        "noise": real_row(reference.noise),
        "trials": [row(trial) for trial in ranked],
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of every number; None where a row has none."""
    if not rows:
        return None
    return {
        name: None if rows[0][name] is None else type(rows[0][name])(np.mean([r[name] for r in rows]))
        for name in rows[0]
    }
