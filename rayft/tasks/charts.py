"""Pictures of scores, as PNG: what a task leaves in the run's folder beside its numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

NAMED = 40  # labels whose names still fit beside the rows; more have their numbers alone


def confusion_matrix(truth: Sequence[str], given: Sequence[str]) -> bytes:
    """Rows are the true labels, columns the predicted ones; the colour is the share of a true label's rows."""
    from sklearn.metrics import confusion_matrix as count

    names = sorted({*truth, *given})
    counts = count(truth, given, labels=names)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = min(16.0, 2.5 + 0.45 * len(names))
    figure, axes = _figure(side + 1, side)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true label's rows")
    places = range(len(names))
    if len(names) <= NAMED:
        axes.set_xticks(places, names, rotation=60, ha="right")
        axes.set_yticks(places, names)
    if len(names) <= NAMED // 2:
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    axes.set(xlabel="predicted", ylabel="true")
    return _png(figure)


def roc(truth: Sequence[bool] | np.ndarray, score: Sequence[float] | np.ndarray) -> bytes:
    """The share of the true that is accepted over that of the false, as the score from which on that is done falls."""
    from sklearn.metrics import roc_auc_score, roc_curve

    accepted, right, _ = roc_curve(truth, score)
    figure, axes = _figure(5, 4.5)
    axes.plot(accepted, right, drawstyle="steps-post", label=f"area {roc_auc_score(truth, score):.3f}")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
    axes.plot([0, 1], [1, 0], color="grey", linewidth=0.5, label="equal errors")
    axes.set(xlabel="share of the false accepted", ylabel="share of the true accepted", aspect="equal")
    axes.legend(loc="lower right")
    return _png(figure)


def grid(pictures: Sequence[tuple[str, bytes]]) -> bytes:
    """Pictures (as PNG) with what each is called below it, four in a row."""
    import textwrap

    from matplotlib.figure import Figure
    from PIL import Image

    across = min(4, len(pictures))
    rows = -(-len(pictures) // across)
    figure = Figure(figsize=(2.5 * across, 2.9 * rows), layout="constrained")
    places = figure.subplots(rows, across, squeeze=False).ravel()
    for axes in places[len(pictures) :]:
        axes.set_axis_off()
    for axes, (name, picture) in zip(places, pictures, strict=False):
        axes.imshow(np.asarray(Image.open(io.BytesIO(picture))))
        below = textwrap.fill(textwrap.shorten(name, 72, placeholder="…"), 36)
        axes.set(xticks=[], yticks=[], xlabel=below)
        axes.xaxis.label.set_fontsize(8)
        axes.spines[:].set_visible(False)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: nothing is kept open, and no screen is looked for

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
