"""Plots of what the benchmarks found; needs the `plot` extra (matplotlib)."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

_COLOURS = {"v1": "#0072b2", "v2": "#d55e00", "msg": "#009e73"}
_BYTES = {"v1": "8 bytes", "v2": "16 bytes", "msg": "32 bytes"}
_STYLE: Any = {"font.size": 10, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False}
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "0.2")
Row = dict[str, Any]


def read_cost(facts: dict[str, Any], path: str) -> None:
    """Draw what `userfault bench read` measured: the lab's counts, or without them the native times."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.9), dpi=160, layout="constrained")
        if "lab" in facts:
            _lab(figure, facts["lab"])
        else:
            _native(figure, facts)
        figure.savefig(path)


def _lab(figure: Figure, lab: dict[str, Any]) -> None:
    kernel, user, fault = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 0.7))
    wires = list(dict.fromkeys(row["api"] for row in lab["read"]))
    batches = sorted({row["batch"] for row in lab["read"]})

    for i, wire in enumerate(wires):
        rows = _of(lab["read"], wire)
        shift = (i - (len(wires) - 1) / 2) * 0.27
        places = [batches.index(row["batch"]) + shift for row in rows]
        heights = [row["kernel"] for row in rows]
        kernel.bar(places, heights, 0.25, color=_COLOURS[wire], label=f"{wire}, {_BYTES[wire]}")
    kernel.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    kernel.set(
        title="Kernel: a C loop over read(2)", xlabel="records a read()", ylabel="instructions a record"
    )
    kernel.legend(frameon=False, loc="upper right")

    for wire in wires:
        rows = _of(lab["read"], wire)
        places = [row["batch"] for row in rows]
        struct = [(row["struct"] - row["c"]) / row["batch"] for row in rows]
        user.plot(places, struct, "s--", color=_COLOURS[wire], ms=4)
        user.plot(places, [row["user"] for row in rows], "o-", color=_COLOURS[wire], ms=4)
    _logarithmic(user, batches)
    user.set(title="User side: above the C loop", xlabel="records a read()", ylabel="instructions a record")
    # One line hides the others that it lies on.
    last = [row["user"] for row in _of(lab["read"], wires[-1])]
    alike = [
        wire for wire in wires if np.allclose([row["user"] for row in _of(lab["read"], wire)], last, 0.05)
    ]
    if len(alike) > 1:
        middle = (user.get_xlim()[0] * 1.4, user.get_ylim()[0] * 1.6)
        user.annotate(f"{', '.join(alike)}:\nthe same", middle, color="0.3")
    _styles(user, "userfault", "os.read + struct")

    for i, wire in enumerate(wires):
        row = next(
            row for row in _of(lab["served"], wire) if row["source"] == "zero" and row["touchers"] == 1
        )
        bar = fault.bar(i, row["fault"], 0.7, color=_COLOURS[wire])
        fault.bar_label(bar, fmt="{:,.0f}", fontsize=8.5)
    fault.set_xticks(range(len(wires)), wires)
    fault.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    fault.set(title="A fault, touch to touch", ylabel="instructions", xlabel="one page a fault")
    figure.suptitle(
        f"Linux {lab['kernel'].split('-')[0]} with RFC v1 and v2: guest instructions under QEMU -icount",
        fontsize=11,
    )


def _native(figure: Figure, facts: dict[str, Any]) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"crowd": "userfaultfd, 1,024 or more faults pending", "pipe": "a pipe: every format"}
    for ax, (source, title) in zip(axes, titles.items(), strict=True):
        rows = [row for row in facts["native"] if row["source"] == source]
        for wire in dict.fromkeys(row["api"] for row in rows):
            places = [row["batch"] for row in _of(rows, wire)]
            for name, style in (("struct", "s--"), ("ours", "o-"), ("c", "^:")):
                times = [row[f"{name}_ns"] / row["batch"] for row in _of(rows, wire)]
                ax.plot(places, times, style, color=_COLOURS[wire], ms=4)
            ax.plot([], [], color=_COLOURS[wire], label=f"{wire}, {_BYTES[wire]}")
        _logarithmic(ax, facts["batches"])
        ax.set(title=title, xlabel="records a read()")
        if rows:
            ax.legend(frameon=False, loc="lower left")
        else:
            ax.text(0.5, 0.5, "not spoken here", transform=ax.transAxes, ha="center")
    axes[0].set_ylabel("ns a record")
    # The second legend of an axes replaces the first, unless that is an artist of its own.
    if (first := axes[0].get_legend()) is not None:
        axes[0].add_artist(first)
    _styles(axes[0], "userfault", "os.read + struct", "C loop", loc="lower right")
    figure.suptitle(
        f"Linux {facts['kernel']}, {facts['processor']}: the best of {facts['rounds']} rounds", fontsize=11
    )


def _of(rows: list[Row], wire: str) -> list[Row]:
    return sorted((row for row in rows if row["api"] == wire), key=lambda row: row.get("batch", 0))


def _logarithmic(ax: Axes, batches: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(batches, [f"{batch:,}" for batch in batches])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.grid(axis="y", alpha=0.3)


def _styles(ax: Axes, *names: str, loc: Any = "best") -> None:
    """A legend of line styles, for every colour."""
    styles = zip(("-", "--", ":"), ("o", "s", "^"), names, strict=False)
    handles = [
        Line2D([], [], color="0.3", ls=ls, marker=marker, ms=4, label=name) for ls, marker, name in styles
    ]
    ax.legend(handles=handles, frameon=False, loc=loc)


def serve_cost(facts: dict[str, Any], path: str) -> None:
    """Draw what `userfault bench serve` measured: nanoseconds a page, by number of threads."""
    import matplotlib as mpl

    panels = {
        ("random", "memory"): "Random pages, from memory",
        ("random", "file"): "Random pages, from a file",
        ("pending", "memory"): "Random pages, many threads",
        ("sequential", "memory"): "In order, from memory",
        ("sequential", "file"): "In order, from a file",
    }
    drawn = [row for row in facts["serve"] if (row["workload"], row["backing"]) in panels]
    names = list(dict.fromkeys(row["contender"] for row in drawn))
    colours = dict(zip(names, _PALETTE, strict=False))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 7), dpi=160, layout="constrained")
        axes = list(figure.subplots(2, 3).flat)
        for ax, ((workload, backing), title) in zip(axes, panels.items(), strict=False):
            rows = [row for row in drawn if (row["workload"], row["backing"]) == (workload, backing)]
            if not rows:  # mode "inline" measures less
                ax.axis("off")
                continue
            for name in names:
                mine = [row for row in rows if row["contender"] == name]
                touchers = [row["touchers"] for row in mine]
                ax.plot(touchers, [row["median"] for row in mine], "o-", color=colours[name], ms=4)
            _logarithmic(ax, sorted({row["touchers"] for row in rows}))
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.set(title=title, xlabel="touching threads", ylabel="ns a page")
        filled = [row for row in facts["serve"] if row["workload"] == "fill"]
        if filled:
            _fill(axes[-1], filled)
        else:
            axes[-1].axis("off")
        lines = [Line2D([], [], color=colours[name], marker="o", ms=4, label=name) for name in names]
        figure.legend(handles=lines, frameon=False, loc="outside lower center", ncols=4)
        figure.suptitle(
            f"Linux {facts['kernel']}, {facts['processor']}: the median of {facts['rounds']} rounds",
            fontsize=11,
        )
        figure.savefig(path)


def _fill(ax: Axes, rows: list[Row]) -> None:
    bars = ax.barh([row["contender"] for row in rows], [row["median"] for row in rows], 0.7, color="0.6")
    ax.bar_label(bars, fmt="{:,.0f}", fontsize=8.5)
    ax.invert_yaxis()
    ax.set(title="A whole region", xlabel="ns a page")


_ARRAY_TITLES = {
    "scan": "A file: {}",
    "gather": "A file: {}",
    "threads": "A file: {}",
    "limit": "A tenth in memory: {}",
    "inflate": "zlib: {}",
}
# Opening stands in the table.
_STORES_TITLES = {
    "gather": "zarr, {}",
    "scan": "zarr, {}",
    "window": "{}",
    "fault": "{}",
}
_OURS, _LINES = ("lazy", "limited"), ("#d55e00", "#009e73")


def array_cost(facts: dict[str, Any], path: str) -> None:
    """Draw what `userfault bench array` measured: a panel for each comparison, and the goals as lines."""
    # How much is in memory stands in the table: it is compared with no rival.
    rows = [row for row in facts["array"] if not row["case"].startswith("resident")]
    _comparisons(facts, rows, _ARRAY_TITLES, path)


def stores_cost(facts: dict[str, Any], path: str) -> None:
    """Draw what `userfault bench stores` measured, likewise."""
    rows = [row for row in facts["stores"]["rows"] if row["workload"] in _STORES_TITLES]
    _comparisons(facts, rows, _STORES_TITLES, path)


def _comparisons(facts: dict[str, Any], rows: list[Row], titles: dict[str, str], path: str) -> None:
    """A panel for each comparison, titled by its workload."""
    import matplotlib as mpl

    panels = list(dict.fromkeys((row["workload"], row["case"]) for row in rows))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13, 5.6), dpi=160, layout="constrained")
        axes = list(figure.subplots(2, -(-len(panels) // 2), squeeze=False).flat)
        for ax, (workload, case) in zip(axes, panels, strict=False):
            mine = [row for row in rows if (row["workload"], row["case"]) == (workload, case)]
            _contenders(ax, mine)
            ax.set_title(titles[workload].format(case))
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        lines = [Line2D([], [], color=colour, ls="--") for colour in _LINES]
        names = ["a goal, missed", "a goal, met"]
        figure.legend(lines, names, frameon=False, loc="outside lower center", ncols=2)
        figure.suptitle(
            f"Linux {facts['kernel']}, {facts['processor']}: the median of {facts['rounds']} rounds",
            fontsize=11,
        )
        figure.savefig(path)


def _contenders(ax: Axes, rows: list[Row]) -> None:
    """A bar for each contender, and across it the line that it should not pass."""
    medians = [row["median"] for row in rows]
    colours = [_PALETTE[0] if row["contender"].startswith(_OURS) else "0.65" for row in rows]
    ax.barh([row["contender"] for row in rows], medians, 0.7, color=colours)
    if max(medians) > 20 * min(medians):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.margins(x=0.3)
    for i, row in enumerate(rows):
        # Beyond the longest bar, where no line is in the way.
        text = f"{row['median']:,.0f}" if row["median"] >= 100 else f"{row['median']:.2g}"
        ax.text(1.02, i, text, transform=ax.get_yaxis_transform(), ha="right", va="center")
        for goal in row["figures"]:
            if goal["goal"]:
                ax.vlines(goal["at"], i - 0.45, i + 0.45, color=_LINES[goal["met"]], ls="--", zorder=3)
    ax.invert_yaxis()
    ax.set_xlabel(rows[0]["unit"].replace("us/", "µs a "))
