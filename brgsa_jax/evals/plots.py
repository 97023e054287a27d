"""Pictures for notebooks, by matplotlib; the report draws its own (`charts.py`)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from brgsa_jax.evals.gap import Projection


def plot_gap(projections: Mapping[str, Projection] | Projection) -> Any:
    """Draws image and text embeddings in their joint plane, centroids joined by a line.

    Args:
        projections: of `gap.project`, one, or several by title, such as
            `Evaluation.projections` (before and after the bank). Each has its own plane; all have
            one scale, so that distances compare.

    Returns:
        A matplotlib Figure with one panel a projection.

    Raises:
        ValueError: no projection.
    """
    from matplotlib.figure import Figure

    if isinstance(projections, Projection):
        projections = {"": projections}
    if not projections:
        raise ValueError("there is no projection to draw: captions were left out")
    figure = Figure(figsize=(4.2 * len(projections), 4.0), layout="constrained")
    panels = figure.subplots(1, len(projections), squeeze=False)[0]
    middles = {title: (found.image.mean(0) + found.text.mean(0)) / 2
               for title, found in projections.items()}
    reach = 1.05 * max(np.abs(np.concatenate(found[:2]) - middles[title]).max()
                       for title, found in projections.items()) or 1.0
    for panel, (title, found) in zip(panels, projections.items(), strict=True):
        ends = []
        for points, marker, colour, name in ((found.image, "o", "#2f6db5", "volumes"),
                                             (found.text, "D", "#c8702a", "reports")):
            x, y = (points - middles[title]).T
            panel.scatter(x, y, s=9, marker=marker, color=colour, alpha=0.45, linewidths=0,
                          label=name)
            panel.scatter(x.mean(), y.mean(), s=70, marker=marker, color=colour,
                          edgecolors="black", zorder=3)
            ends.append((x.mean(), y.mean()))
        panel.plot(*np.transpose(ends), color="black", linewidth=1.2, zorder=2)
        panel.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal",
                  xlabel=f"component 1 ({found.explained[0]:.0%} of the variance)",
                  ylabel=f"component 2 ({found.explained[1]:.0%})")
        panel.grid(alpha=0.25)
    panels[0].legend(loc="upper left", frameon=False)
    return figure
