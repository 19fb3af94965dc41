"""The summaries that the commands print when they finish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simsiam.config import counted, show_bytes, show_duration

if TYPE_CHECKING:
    from simsiam.console import Console


def training(console: Console, summary: dict[str, Any]) -> None:
    from simsiam.collapse import TOO_FEW, TOO_SHORT

    knn = summary["knn"]
    console.say("")
    if summary["verdict"] != "healthy" or summary["evidence"].endswith((TOO_SHORT, TOO_FEW)):
        console.say(f"{summary['verdict'].upper()}: {summary['evidence']} {summary['advice'] or ''}".rstrip())
    rows = [
        ["loss", _number(summary["loss"], 3)],
        ["std of z/|z|, times sqrt(d) (1 healthy, 0 collapsed)", _number(summary["std"], 2)],
        ["effective rank of z" + _at_most(summary), _number(summary["effective_rank"])],
        ["verdict", summary["verdict"]],
        ["images/s", _number(summary["images_per_second"], 0)],
        ["epochs", f"{summary['epochs']:g}"],
        ["time", show_duration(summary["seconds"])],
    ]
    console.results("Training", ["", "value"], rows)
    if summary["encoder_step"] != summary["steps"]:
        console.say(f"The encoder that is kept is the last healthy one, from step {summary['encoder_step']:,}.")
    if knn:
        _comparison(
            console,
            f"kNN accuracy in percent (k={knn['k']}, T={knn['T']}, {counted(knn['test'], 'held-out image')})",
            {"kNN": knn},
        )


def evaluation(console: Console, result: dict[str, Any]) -> None:
    named = {name: figures for name, figures in result.items() if isinstance(figures, dict) and "trained" in figures}
    if named:
        _comparison(console, "Accuracy in percent, higher is better", named)
        for name, figures in named.items():
            settings = {key: value for key, value in figures.items() if key not in ("trained", "untrained", "pixels")}
            plain = ", ".join(f"{key} {value}" for key, value in settings.items() if not isinstance(value, dict | list))
            console.say(f"  {name}: {plain}")
    lacking = [name for name, figures in result.items() if figures is None and name != "file"]
    if lacking:
        console.say(f"Too few labels, or none, for {', '.join(lacking)}.")
    collapse = result.get("collapse")
    if collapse and collapse["rows"] < 5:
        console.say(f"Collapse: {counted(collapse['rows'], 'image')}, too few to tell.")
    elif collapse:
        # The run's own figures are of z. On other data there is no z, and features, which ReLU made positive, vary less.
        projected = "std_features" in collapse
        of, scale = ("z/|z|", "1 healthy, 0 collapsed") if projected else ("the features", "0 collapsed")
        console.say(
            f"Collapse: {collapse['verdict']}; std of {of} {_number(collapse['std'], 2)} ({scale}), "
            f"effective rank {_number(collapse['effective_rank'])}{_at_most(collapse)}."
        )


def plan(console: Console, found: dict[str, Any]) -> None:
    def memory(count: int | None) -> str:
        return "unknown" if count is None else show_bytes(count)

    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["shares"].items())
    few = found["largest_batch"] < 64  # the smallest that is tried
    none = "all: there are few images" if few else "none: choose a smaller encoder or size"
    fits = ", ".join(f"{size} ({memory(count)})" for size, count in found["fits"].items())
    lengths = ", ".join(f"{text}: {epochs:,g}" for text, epochs in found["epochs_in"].items())
    rows = [
        [
            "run",
            f"{found['method']}, {found['encoder']}, batch {found['batch_size']}, {found['device']}, {found['precision']}",
        ],
        [
            "decoding, once",
            f"{found['decode_images_per_second']:,.0f} images/s, {show_duration(found['decode_seconds'])}, "
            f"{memory(found['cache_bytes'])} on disk",
        ],
        [
            "training",
            f"{found['images_per_second']:,.0f} images/s, {show_duration(found['seconds_per_epoch'])} per epoch",
        ],
        ["time to finish", f"{counted(found['epochs'], 'epoch')}, {show_duration(found['seconds'])}"],
        ["bottleneck", f"{found['bottleneck']} ({shares})"],
        ["epochs that fit into", lengths],
        ["memory", f"about {memory(found['memory_bytes'])} of {memory(found['memory_available'])}"],
        ["batches that fit", fits or none],
    ]
    console.results(counted(found["images"], "image"), ["", ""], rows)


def duplicates(console: Console, found: dict[str, Any]) -> None:
    groups = found["groups"]
    measured = (
        ""
        if found["recall"] is None
        else (
            f" and a pixel correlation of at least {found['pixel_threshold']:.3f}: "
            f"{100 * found['recall']:.0f} % of altered copies are found"
        )
    )
    console.say(f"Duplicates have an embedding similarity of at least {found['threshold']:.3f}{measured}.")
    if found["recall"] is not None and found["recall"] < 0.5:
        console.say(
            "Warning: most copies would be missed: these images are too plain to compare by their pixels. "
            "--threshold 0.95 compares the embeddings alone."
        )
    console.say(
        f"{found['copies']:,} of {counted(found['images'], 'image')} could be removed as copies of another, in "
        f"{counted(len(groups), 'group')}."
        if groups
        else f"None of {counted(found['images'], 'image')} is a copy of another."
    )
    for group in groups[:10]:
        first, *others = group
        console.say("")
        console.say(f"  {first['id']}")
        for other in others[:5]:
            how = "the same pixels" if other["identical"] else f"{other['score']:.3f}"
            console.say(f"    {other['id']}  {how}")
        if len(others) > 5:
            console.say(f"    ... and {len(others) - 5:,} more")
    if len(groups) > 10:
        console.say("")
        console.say(f"  ... and {len(groups) - 10:,} more groups: --json lists all, `simsiam view` shows them.")


def clusters(console: Console, found: dict[str, Any]) -> None:
    labelled = found["agreement"] is not None
    rows = []
    for each in found["clusters"]:
        classes = list((each["classes"] or {}).items())[:2]
        shares = [", ".join(f"{name} {100 * share:.0f} %" for name, share in classes)] if labelled else []
        rows.append([str(each["cluster"]), f"{each['images']:,}", *shares, next(iter(each["examples"]), "–")])
    columns = ["cluster", "images", *(["classes"] if labelled else []), "nearest to the centre"]
    console.results(f"{found['images']:,} images in {found['count']} clusters", columns, rows)
    if labelled:
        nmi, purity = found["agreement"]["nmi"], found["agreement"]["purity"]
        console.say(
            f"Agreement with the labels: purity {purity:.2f}, normalised mutual information {nmi:.2f} (1 is perfect)."
        )
    console.say("Outliers: " + ", ".join(each["id"] for each in found["odd"][:5]))
    if found["file"] is not None:
        console.say(f"Written  {found['file']}: the cluster of every image")


def check(console: Console, found: dict[str, Any]) -> None:
    from simsiam.data.check import UNLABELLED

    sizes, splits = found["sizes"], found["splits"]
    labels = found["labels"]
    extra, groups = sum(len(group) - 1 for group in found["duplicates"]), found["duplicates_across_splits"]
    across = f" ({groups:,} groups span the training and test splits)" if groups else ""
    split = (
        f"{splits['train']:,} to train on, {splits['test']:,} in the test split"
        if splits["test"]
        else "no test split: training will hold some out"
    )
    rows = [
        ["images", f"{found['images']:,} ({split})"],
        ["on disk", show_bytes(found["bytes"])],
        ["bad files", f"{len(found['bad_files']):,}"],
        ["byte-identical copies", f"{extra:,}{across}"],
        ["modes", _counts(found["modes"])],
        ["formats", _counts(found["formats"])],
    ]
    if sizes:
        rows[2:2] = [
            ["width x height", "  ".join(f"{key} {sizes[key][0]}x{sizes[key][1]}" for key in ("min", "median", "max"))],
            ["short side", "  ".join(f"{key} {value}" for key, value in sizes["short_side"].items())],
        ]
    if labels is None:
        rows.append(["labels", "none found"])
    else:
        known = {name: count for name, count in labels.items() if name != UNLABELLED}
        without = f"; {labels[UNLABELLED]:,} images without" if UNLABELLED in labels else ""
        rows.append(["labels", f"{len(known)}: {_counts(known)}{without}"])
    console.results(found["name"], ["", ""], rows)
    hidden = bad_files(console, found["bad_files"])
    for group in found["duplicates"][:10]:
        console.say(f"Identical: {', '.join(group[:6])}{' ...' if len(group) > 6 else ''}")
    hidden += max(0, len(found["duplicates"]) - 10)
    if hidden:
        console.say(f"... and {hidden:,} more: --json lists all.")


def bad_files(console: Console, found: list[dict[str, str]]) -> int:
    """Print the first of the files that cannot be read; return the number of the others."""
    for bad in found[:20]:
        console.say(f"Bad file: {bad['path']}: {bad['reason']}")
    return max(0, len(found) - 20)


def experiment(console: Console, result: dict[str, Any]) -> None:
    from simsiam.reproduce import figure

    rows = [
        [
            row["name"],
            _number(row["published"]),
            *(figure(row, key) for key in ("linear", "knn")),
            _number(row["std"], 2),
            _number(row["effective_rank"]),
            ", ".join(dict.fromkeys(row["verdicts"])),
        ]
        for row in result["rows"]
    ]
    columns = ["variant", "published", "linear", "kNN", "std", "rank", "verdicts"]
    console.say("")
    console.results(f"{result['title']} ({result['source']}), n = {result['seeds']}", columns, rows)
    console.say(
        "Order of variants published at least 1 point apart: "
        + ", ".join(f"{len(pairs)} pairs {kind}" for kind, pairs in result["pairs"].items())
        + "."
    )


def _at_most(figures: dict[str, Any]) -> str:
    most = figures.get("most_rank") or figures["dim"]
    return f" (at most {most})" if figures["effective_rank"] is not None else ""


def _number(value: Any, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _comparison(console: Console, title: str, results: dict[str, Any]) -> None:
    kinds = ("pixels", "untrained", "trained")
    rows = [[name, *(_number(figures[kind]) for kind in kinds)] for name, figures in results.items()]
    console.results(title, ["", "raw pixels", "untrained encoder", "trained"], rows)


def _counts(counts: dict[str, int]) -> str:
    shown = list(counts.items())[:8]
    rest = len(counts) - len(shown)
    return ", ".join(f"{name} {count:,}" for name, count in shown) + (f", and {rest} more" if rest else "")
