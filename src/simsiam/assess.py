"""Evaluate a run's encoder against baselines that need no training: raw pixels and the untrained encoder."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simsiam import evaluate
from simsiam.compute import Compute, draw, enough_memory, generator, pick_device, set_threads
from simsiam.config import UserError, as_path, as_seed, coerce, counted
from simsiam.console import Listener
from simsiam.data.cache import Cache, build_cache
from simsiam.data.sources import open_images
from simsiam.data.views import ViewSettings, plain_pixels, random_view
from simsiam.embeddings import digests, origin, write_embedding
from simsiam.encoders import Encoder
from simsiam.evaluate import Features
from simsiam.evaluate.linear import sgd_probe
from simsiam.features import BN_IMAGES, Preprocessing, embed_rows, pixel_rows, untrained
from simsiam.finetune import check_share, finetune
from simsiam.kernels import Images
from simsiam.runs import ENCODER, EVALUATION, SUMMARY, atomic, keep, read_json, read_kept, write_json
from simsiam.weights import compute_of, failure, read_encoder

Rows = NDArray[np.int64]

_SHOWN = 2_000


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An encoder to evaluate, the images and what is needed to run it."""

    encoder: Encoder
    before: Encoder | None
    """The same encoder, untrained; None: no baselines."""
    prepare: Preprocessing
    cache: Cache
    compute: Compute
    listener: Listener

    def embed(self, network: Callable[[Tensor], Tensor], rows: Rows) -> Tensor:
        """Embed the images of `rows` with `network`: float32 [N,D]."""
        return embed_rows(network, self.prepare, self.cache, rows, self.compute, self.listener.embedding)


def features_by_kind(subject: Subject, train: Rows, test: Rows) -> dict[str, Callable[[], Features]]:
    """Functions that make features of the same images: "trained" and, as baselines, "untrained" and raw "pixels"."""
    cache = subject.cache

    def features(embed: Callable[[Rows], Tensor]) -> Features:
        labels, rows = None if cache.labels is None else torch.from_numpy(cache.labels), embed(train)
        return Features(
            rows,
            None if labels is None else labels[train],
            embed(test) if len(test) else rows.new_zeros(0, rows.shape[1]),
            None if labels is None else labels[test],
            len(cache.classes or ()),
        )

    ways: dict[str, Callable[[Rows], Tensor]] = {"trained": partial(subject.embed, subject.encoder)}
    if subject.before is not None:
        ways["untrained"] = partial(subject.embed, subject.before)
        ways["pixels"] = partial(pixel_rows, subject.prepare, cache)
    return {kind: partial(features, embed) for kind, embed in ways.items()}


def evaluate_run(
    run: str | Path,
    data: str | Path | None = None,
    *,
    names: str | Sequence[str] | None = None,
    sgd: bool = False,
    share: float | None = None,
    baselines: bool = True,
    device: str = "auto",
    seed: int = 0,
    k: int | None = None,
    workers: int | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Evaluate a run and, on its own data, write `evaluation.json` into its folder, keeping other evaluations of the
    same images there.

    Args:
        data: labelled images; None: those the run was trained on. If these were moved, pass their new location. Without
            a test split, the images that training holds out are the test set.
        names: names of one or more evaluations; None: all.
        baselines: False skips raw pixels and the untrained encoder.
        k: number of neighbours for kNN; None: 200, or 20 if classes have fewer than 1,000 images.
        sgd: also run the paper's linear protocol, as "linear_sgd": LARS, 90 epochs of random crops and flips.
        share: also fine-tune the whole network on this share of the labels, in (0, 1], from the trained and from the
            untrained weights, as "finetune"; None: do not.
    Returns {"knn": {"trained", "untrained", "pixels", settings...}, "linear", "fewshot", "collapse", ...}, with None
    for evaluations that lack labels, and "file", None if it was not written. Raises UserError if `run` has no encoder.
    """
    run = as_path(run)
    if share is not None:
        check_share(share)
    listener = listener or Listener()
    set_threads()
    names = [names] if isinstance(names, str) else names or evaluate.names()
    for name in names:
        evaluate.get(name)
    k, seed = coerce(k, int | None, "k"), as_seed(seed)
    if k is not None and k < 1:
        raise UserError(f"k is {k}: it must be at least 1.")
    if k is not None and "knn" not in names:
        warnings.warn(f"-k {k} is for knn, which is not among {', '.join(names)}: ignored.", stacklevel=2)
        k = None
    encoder, prepare, meta = read_encoder(run)
    if failed := failure(run, meta):
        warnings.warn(failed, stacklevel=2)
    compute = compute_of(run, encoder, prepare, pick_device(device))
    compute.place(encoder)
    name = meta["data"] if data is None else str(data)
    try:
        images = open_images(name)
    except UserError as error:
        if data is not None:
            raise
        again = f"simsiam evaluate {shlex.quote(str(run))} DATA"
        raise UserError(f"{error} If it was moved, give its new path: {again}") from None
    same = images.fingerprint == meta.get("fingerprint")
    own = data is None or same
    if own and not same and meta.get("fingerprint"):  # imported runs have no fingerprint
        listener.say(f"The images of {name} have changed since training: results for the old images are not used.")
    try:
        cache = build_cache(images, prepare.short_side, workers=workers, progress=listener.decoding)
        train, test = cache.split()
        if len(train) < 2:
            raise UserError(f"{name} has {counted(len(train), 'usable image')}: an evaluation needs at least 2.")
        _check_labels(cache, test)
        before = None
        if baselines:
            before = untrained(encoder.spec, meta["seed"], prepare, cache, draw(train, BN_IMAGES), compute)
        known = cache.labelled(train)  # of STL10, a twentieth
        train = known if len(known) > 1 else train
        subject = Subject(
            encoder=encoder, before=before, prepare=prepare, cache=cache, compute=compute, listener=listener
        )
        kinds = features_by_kind(subject, train, test)
        settings = {} if k is None else {"knn": {"k": k}}
        compared = evaluate.compare(names, kinds, seed=seed, settings=settings)
        result: dict[str, Any] = {"run": str(run), "data": name, "fingerprint": images.fingerprint, **compared}
        collapse = compared.get("collapse")
        if collapse is not None:
            result["collapse"] = _collapse(run, same, collapse)

        def save() -> bool:
            kept = read_kept(run / EVALUATION)  # now: another process may have written meanwhile
            of = kept.get("fingerprint", meta.get("fingerprint", images.fingerprint))
            before = kept if of == images.fingerprint else {}
            return own and keep(lambda: write_json(run / EVALUATION, {**before, **result}))

        kept = save()  # the rest is slow and may run out of memory
        others = f"The other evaluations are in {run / EVALUATION}" if kept else "Leave it out"
        too_much = f"needs more memory than {compute.device} has. {others}; another --device may have more."
        if sgd:
            with enough_memory(f"--sgd {too_much}"):
                result["linear_sgd"] = _sgd(subject, train, test, seed)
        if share is not None:
            with enough_memory(f"--finetune {too_much}"):
                result["finetune"] = _finetuned(subject, train, test, share, seed)
        if kept and (sgd or share is not None):
            kept = save()
        return {**result, "file": str(run / EVALUATION) if kept else None}
    finally:
        listener.close()


def _check_labels(cache: Cache, test: Rows) -> None:
    """Warn of test labels that make accuracies misleading: some unknown, or all the same."""
    if cache.labels is None or cache.classes is None:
        return
    labels = cache.labels[test]
    known = np.unique(labels[labels >= 0])
    unknown = int((labels < 0).sum())
    if unknown and len(known):
        warnings.warn(
            f"{unknown:,} of {counted(len(test), 'test image')} are left out of the accuracies: they have no label, or one "
            "that no training image has.",
            stacklevel=3,
        )
    if len(known) == 1 and len(labels) > 1:
        warnings.warn(
            f"All labelled test images are of the class {cache.classes[known[0]]}: accuracies on one class mean nothing.",
            stacklevel=3,
        )


def _collapse(run: Path, same: bool, features: dict[str, Any]) -> dict[str, Any]:
    """The features' figures and, if the run's summary covers the same images, its figures and verdict on z, which is
    what training judges."""
    plain = {key: value["trained"] if isinstance(value, dict) else value for key, value in features.items()}
    found = {key: plain[key] for key in ("std", "effective_rank", "most_rank", "verdict", "dim", "rows")}
    shown = ("std", "effective_rank")
    found["baselines"] = {
        kind: {key: features[key][kind] for key in shown} for kind in features["std"] if kind != "trained"
    }
    summary = read_kept(run / SUMMARY) if same else {}
    if summary.get("verdict") is not None:  # None for imported runs
        found |= {"std_features": found["std"], "effective_rank_features": found["effective_rank"]}
        found |= {key: summary.get(key) for key in ("std", "effective_rank", "most_rank", "verdict", "dim")}
    return found


def _sgd(subject: Subject, train: Rows, test: Rows, seed: int) -> dict[str, Any] | None:
    labels, classes = subject.cache.labels, subject.cache.classes
    judged = evaluate.labelled_rows(labels, train, test)
    if labels is None or classes is None or judged is None:
        return None
    views = subject.prepare.crops((0.08, 1.0))  # as in the released code's linear training

    def epoch(number: int) -> Tensor:
        draws = generator(subject.compute.device, seed, number)

        def crop(x: Images, sizes: Tensor) -> Tensor:
            return random_view(x, views, draws, sizes)

        subject.listener.embedding(number, 90)
        return embed_rows(subject.encoder, crop, subject.cache, train, subject.compute)

    train_labels, test_labels = (torch.from_numpy(labels[rows]) for rows in (train, judged))
    features = subject.embed(subject.encoder, judged)
    result = sgd_probe(epoch, train_labels, features, test_labels, len(classes), seed=seed)
    subject.listener.close()
    return {"trained": result.pop("value"), "untrained": None, "pixels": None, **result}


def _finetuned(subject: Subject, train: Rows, test: Rows, share: float, seed: int) -> dict[str, Any] | None:
    networks = {"trained": subject.encoder} | ({} if subject.before is None else {"untrained": subject.before})
    found: dict[str, dict[str, Any]] = {}
    for number, (kind, network) in enumerate(networks.items()):

        def done(part: float, number: int = number) -> None:
            subject.listener.finetuning((number + part) / len(networks))

        inputs = subject.prepare, subject.cache, train, test, subject.compute
        scores = finetune(network, *inputs, share=share, seed=seed, done=done)
        if scores is None:
            return None
        found[kind] = scores
    values = {kind: scores.pop("value") for kind, scores in found.items()}
    rates = {kind: scores.pop("lr") for kind, scores in found.items()}
    return {"untrained": None, "pixels": None, **values, "lr": rates, **found["trained"]}


def keep_samples(run: Path, subject: Subject, views: ViewSettings, train: Rows, shown: Rows) -> None:
    """Write `samples/` for the report: a few images with views as the network saw them, and up to 2,000 of the `shown`
    images with their embeddings after and before training. The encoder must already be in the run folder."""
    folder, cache = run / "samples", subject.cache
    folder.mkdir(exist_ok=True)
    images, sizes = cache.packed(draw(train, 8))
    draws = generator(torch.device("cpu"), 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (views.mean, views.std))
    seen = [plain_pixels(images, views.size, 1.0, sizes)]
    for view in views.each()[:2]:  # the second may be smaller and is enlarged
        drawn = F.interpolate(random_view(images, view, draws, sizes), views.size)
        seen.append((drawn * std + mean) * 255)
    _save(folder / "views.npy", np.stack([_pictures(view) for view in seen], 1))

    some = draw(shown, _SHOWN)
    assert subject.before is not None
    vectors, untrained_vectors = (subject.embed(network, some).numpy() for network in (subject.encoder, subject.before))
    about = read_json(run / f"{ENCODER}.json")
    made = origin(run, about, about["data"], cache)
    write_embedding(folder / "embedding", vectors, cache, some, made, digests(cache, some))
    _save(folder / "untrained.npy", untrained_vectors)
    side = min(96, max(subject.prepare.size, 32))
    chunks = (cache.packed(some[start : start + 64]) for start in range(0, len(some), 64))
    small = [_pictures(plain_pixels(images, side, 1.0, sizes)) for images, sizes in chunks]
    _save(folder / "embedding" / "thumbnails.npy", np.concatenate(small))


def _save(path: Path, values: NDArray[Any]) -> None:
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


def _pictures(pixels: Tensor) -> NDArray[np.uint8]:
    """float [B,3,h,w] in 0..255 -> uint8 [B,h,w,3]."""
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
