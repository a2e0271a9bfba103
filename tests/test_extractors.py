import dataclasses
import hashlib
import http.server
import io
import json
import pickle
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fidelity import calculate_metrics

from evaluation import inception as inception_v3
from evaluation.classifier import Classifier, cached_classifier
from evaluation.inception import Inception, inception_path
from evaluation.scores import frechet_distance, inception_score
from evaluation.train_classifier import train_classifier
from trainer.storage import Storage


def split_digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four fifths to learn from and one to hold out, stratified: images, labels, held-out images, held-out labels."""
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    parts = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed)
    return parts[0], parts[2], parts[1], parts[3]


def of_digits(seed: int = 0) -> Classifier:
    images, *others = split_digits(seed)
    return train_classifier([images], *others, seed=seed)


def quick(seed: int = 0, **settings: object) -> Classifier:
    """A classifier that has seen little: for laws that hold however well it has learned."""
    images, labels, held_out, truth = split_digits(0)
    return train_classifier([images[:256]], labels[:256], held_out, truth, seed, epochs=1, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def digits_classifier() -> Classifier:
    return of_digits()


@pytest.fixture(scope="module")
def untrained() -> Classifier:
    return quick()


def same_weights(a: Classifier, b: Classifier) -> bool:
    theirs = b.net.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.net.state_dict().items())


# The classifier


@pytest.mark.slow
def test_digits_classifier_knows_held_out_digits(digits_classifier):
    _, _, held_out, truth = split_digits(0)
    judged = digits_classifier.extract(held_out)
    assert digits_classifier.accuracy >= 0.985
    assert digits_classifier.accuracy == np.mean(judged.probabilities.argmax(axis=1) == truth)
    assert digits_classifier.held_out == len(truth) == 360
    # What the ranking rests on: real images score high, and noise is far from them.
    noise = np.random.default_rng(0).integers(0, 256, held_out.shape, dtype=np.uint8)
    assert inception_score(judged.probabilities, 360).mean > 9.3
    train = digits_classifier.extract(split_digits(0)[0]).features
    assert frechet_distance(judged.features, train) < 0.1 * frechet_distance(
        digits_classifier.extract(noise).features, train
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_digits_classifier_knows_held_out_digits_of_every_split(seed):
    assert of_digits(seed).accuracy >= 0.985


@pytest.mark.slow
def test_extraction_has_the_promised_shapes(digits_classifier):
    judged = digits_classifier.extract(split_digits(0)[2][:5])
    assert judged.probabilities.shape == (5, 10)
    assert judged.probabilities.dtype == np.float64
    assert judged.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-14)
    assert judged.features.shape == (5, 64)
    assert judged.features.dtype == np.float32
    assert (digits_classifier.name, digits_classifier.score_name) == ("classifier", "classifier score")


@pytest.mark.slow
def test_extraction_does_not_depend_on_the_batch_size(digits_classifier):
    images = split_digits(0)[2]
    whole, pieces = digits_classifier.extract(images, 360), digits_classifier.extract(torch.as_tensor(images), 7)
    np.testing.assert_allclose(pieces.probabilities, whole.probabilities, atol=1e-6)
    np.testing.assert_allclose(pieces.features, whole.features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("side", "most"), [(8, 500), (64, 500), (128, 125), (256, 31), (4096, 1)])
def test_large_images_are_judged_fewer_at_once(untrained, monkeypatch, side, most):
    """Two GiB at once whatever their size, and not 33."""
    asked = []

    def noted(images, batch_size, *_):
        asked.append(batch_size)

    monkeypatch.setattr("evaluation.classifier.extract_with", noted)
    dataclasses.replace(untrained, image_size=side).extract(np.broadcast_to(np.uint8(0), (2, side, side, 1)))
    assert asked == [most]


def test_training_depends_on_the_seed_and_leaves_the_callers_random_numbers(untrained):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = quick()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same_weights(again, untrained)
    assert not same_weights(quick(seed=1), untrained)


def test_extraction_draws_no_random_numbers_and_changes_no_weight(untrained):
    before, weights = torch.random.get_rng_state(), quick()
    untrained.extract(split_digits(0)[2])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same_weights(untrained, weights)


@pytest.mark.slow
def test_classifier_fits_colour_images_of_32_pixels():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), np.arange(24) % 3
    classifier = train_classifier([images], labels, images, labels, epochs=2, horizontal_flip=True)
    judged = classifier.extract(images)
    assert judged.probabilities.shape == (24, 3)
    assert judged.features.shape == (24, 64)


class LargestMade(TorchDispatchMode):
    """The most images that any new tensor (N, H, W, C) or (N, C, H, W) held: views of what was there are not new."""

    images = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.ndim == 4 and made.untyped_storage().data_ptr() not in given:
            self.images = max(self.images, len(made))
        return made


class OnDisk(np.ndarray):
    """Images larger than memory: no NumPy function may touch them as a whole."""

    def __array_function__(self, func, types, args, kwargs):
        raise MemoryError(func)


@pytest.mark.slow
def test_a_classifier_learns_from_parts_that_are_never_joined_what_it_learns_from_the_whole():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (320, 8, 8, 3), dtype=np.uint8), np.arange(320) % 3
    parts = [images[:200].view(OnDisk), images[200:].view(OnDisk)]
    with LargestMade() as largest:
        apart = train_classifier(parts, labels, images[:9], labels[:9], epochs=2)
    assert largest.images == 64, "more than a batch was held at once"
    assert same_weights(apart, train_classifier([images], labels, images[:9], labels[:9], epochs=2))
    # An oracle for the sums over values: PyTorch's own over all pixels.
    pixels = torch.as_tensor(images).double() / 255
    torch.testing.assert_close(apart.net.mean.flatten(), pixels.mean(dim=(0, 1, 2)).float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(apart.net.std.flatten(), pixels.std(dim=(0, 1, 2)).float(), rtol=1e-7, atol=0)


def test_images_and_labels_of_another_form_are_refused(untrained):
    images, labels, held_out, truth = split_digits(0)
    with pytest.raises(ValueError, match="uint8"):
        untrained.extract(images / 255)
    with pytest.raises(ValueError, match="1 channels, but got 3"):
        untrained.extract(np.repeat(images[:2], 3, axis=3))
    with pytest.raises(ValueError, match="8 pixels on their short side, but got 32"):
        untrained.extract(np.repeat(np.repeat(images[:2], 4, axis=1), 4, axis=2))
    with pytest.raises(ValueError, match=r"every class 0\.\.9"):
        train_classifier([images[labels != 4]], labels[labels != 4], held_out, truth)
    with pytest.raises(ValueError, match="1437 integers"):
        train_classifier([images], labels[:-1], held_out, truth)


# The classifier on disk


def test_loaded_classifier_equals_the_saved_one(untrained, tmp_path):
    untrained.save(Storage(tmp_path))
    loaded = Classifier.load(Storage(tmp_path))
    assert same_weights(loaded, untrained)
    assert {k: v for k, v in vars(loaded).items() if k != "net"} == {
        k: v for k, v in vars(untrained).items() if k != "net"
    }
    images = split_digits(0)[2]
    assert np.array_equal(loaded.extract(images).probabilities, untrained.extract(images).probabilities)


def test_damaged_classifier_is_refused_and_made_again(untrained, tmp_path):
    cached_classifier(tmp_path, "key", lambda: untrained)
    (folder,) = tmp_path.iterdir()
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        Classifier.load(Storage(folder))
    assert same_weights(cached_classifier(tmp_path, "key", lambda: untrained), untrained)
    assert same_weights(Classifier.load(Storage(folder)), untrained)
    meta = json.loads((folder / "classifier.json").read_text())
    for name in meta:
        (folder / "classifier.json").write_text(json.dumps({key: value for key, value in meta.items() if key != name}))
        with pytest.raises(ValueError, match="no readable classifier"):
            Classifier.load(Storage(folder))
    for content in ("[]", "7", json.dumps(meta | {"classes": 3}), json.dumps(meta | {"more": 1}), "\xff"):
        (folder / "classifier.json").write_text(content)
        with pytest.raises(ValueError, match="no readable classifier"):
            Classifier.load(Storage(folder))


def test_cached_classifier_is_made_once_a_key(untrained, tmp_path):
    made: list[str] = []

    def make() -> Classifier:
        made.append("x")
        return untrained

    for key in ("a", "a", "b"):
        assert same_weights(cached_classifier(tmp_path / "new" / "folder", key, make), untrained)
    assert len(made) == 2


@pytest.mark.slow
def test_two_that_start_at_once_return_the_same_classifier(tmp_path):
    candidates = [quick(seed=0), quick(seed=1)]
    both_are_making = threading.Barrier(2)
    found: list[Classifier] = []

    def start(own: Classifier) -> None:
        def make() -> Classifier:
            both_are_making.wait(timeout=60)
            return own

        found.append(cached_classifier(tmp_path, "key", make))

    threads = [threading.Thread(target=start, args=(candidate,)) for candidate in candidates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_weights(found[0], found[1])
    assert len(list(tmp_path.iterdir())) == 1  # nothing half-made is left


# Inception


def test_inception_weights_are_checked_before_they_are_loaded(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"not": "tensors"}))
    with pytest.raises(ValueError, match=inception_v3.SHA256):
        Inception(path)


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_inception_weights_can_run_no_code(tmp_path):
    trace, path, content = tmp_path / "trace", tmp_path / "weights.pth", io.BytesIO()
    torch.save({"fc.weight": Harmful(trace)}, content)
    path.write_bytes(content.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        Inception(path, sha256=hashlib.sha256(content.getvalue()).hexdigest())
    assert not trace.exists()


def test_missing_inception_weights_are_named(tmp_path, monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{inception_path()}.*no route to host"):
        Inception()
    assert list(inception_path().parent.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=inception_v3.URL):
        Inception(tmp_path / "mine.pth")


@pytest.fixture
def address(monkeypatch) -> Iterator[list[bytes | None]]:
    """What the address of the weights answers, one content a download; None breaks off half way."""
    answers: list[bytes | None] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = answers.pop(0)
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 500 if content is None else content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(inception_v3, "URL", f"http://127.0.0.1:{server.server_port}/weights.pth")
        yield answers
        server.shutdown()
        thread.join()


def test_a_download_that_breaks_off_or_brings_something_else_is_not_kept_and_the_next_one_is(tmp_path, address):
    weights, path = b"w" * 1000, tmp_path / "new" / "weights.pth"
    address += [None, b"n" * 1000, weights]
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=f"no Inception weights at {path}.*SHA-256.*put the file"):
            inception_v3._download_inception(path, hashlib.sha256(weights).hexdigest())
        assert list(path.parent.iterdir()) == []
    inception_v3._download_inception(path, hashlib.sha256(weights).hexdigest())
    assert path.read_bytes() == weights
    assert [file.name for file in path.parent.iterdir()] == ["weights.pth"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
def test_inception_takes_grey_images_and_repeats_the_channel(random_inception):
    path, digest = random_inception
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    before = torch.random.get_rng_state()
    inception = Inception(path, sha256=digest)
    assert torch.equal(torch.random.get_rng_state(), before)
    judged = inception.extract(images)
    assert judged.features.shape == (1, 2048)
    assert judged.probabilities.shape == (1, 1008)
    colour = inception.to("cpu").extract(np.repeat(images, 3, axis=3))
    np.testing.assert_allclose(judged.features, colour.features, rtol=1e-4, atol=1e-5)
    assert (inception.name, inception.score_name) == ("inception", "Inception Score")


class Images(torch.utils.data.Dataset):
    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.as_tensor(images).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


@pytest.mark.slow
def test_scores_match_torch_fidelity_on_the_same_images_and_weights(random_inception):
    path, digest = random_inception
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (2, 24, 4, 4, 3), dtype=np.uint8).repeat(8, axis=2).repeat(8, axis=3)
    theirs = calculate_metrics(
        input1=Images(smooth[0]),
        input2=Images(smooth[1]),
        isc=True,
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=8,
        isc_splits=2,
        samples_shuffle=False,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(path),
    )
    ours = [Inception(path, sha256=digest).extract(images, batch_size=8) for images in smooth]
    score = inception_score(ours[0].probabilities, 12)
    distance = frechet_distance(ours[0].features, ours[1].features)
    assert score.mean > 1.2
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert score.std == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    # Theirs takes square roots of 2,000 rounding errors here, for 24 images leave the covariances singular; the sum of
    # singular values of the centred features' product is exact. test_scores.py has the agreement where they are not.
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    a, b = (judged.features.astype(np.float64) for judged in ours)
    overlap = np.linalg.svd((a - a.mean(axis=0)) @ (b - b.mean(axis=0)).T, compute_uv=False).sum() / 23
    variance = a.var(axis=0, ddof=1).sum() + b.var(axis=0, ddof=1).sum()
    exact = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + variance - 2 * overlap
    assert distance == pytest.approx(exact, rel=1e-9)
