"""Figures of benchmark files, what changed between two folders of them, and a page that shows them.

A figure is a number whose key ends with a unit. In a list of entries, the texts and sizes of each
(its case, batch, length) say which one it is.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parents[1] / "benchmarks" / "peers.json"
HIGHER = (
    "tok_s",
    "per_s",
    "per_second",
    "per_step",
    "requests_s",
    "acceptance",
    "ratios",
    "fraction",
)
"""Endings of keys whose numbers had better be high."""
LOWER = ("ms", "us", "us_per_token", "ms_median", "ms_max", "milliseconds")
"""... or low. Seconds until an engine is ready are none: they depend on what is on disk."""
_WHICH = frozenset(
    {
        "batch",
        "concurrency",
        "context",
        "input_len",
        "len",
        "length",
        "output_len",
        "streams",
        "texts",
    }
)
_NO_FIGURES = frozenset({"crossover", "ceilings", "versions", "settings", "steps"})


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        value: it.
        sign: 1 if it had better be high, -1 if low.
    """

    value: float
    sign: int


@dataclass(frozen=True)
class Change:
    """A figure in two runs.

    Attributes:
        name: of the part and the figure.
        before, after: its values.
        gain: share of it that was won; negative if it was lost.
    """

    name: str
    before: float
    after: float
    gain: float


@dataclass(frozen=True)
class Results:
    """A folder's figures, by part and name.

    Attributes:
        folder: where they are.
        date: of the newest.
        device: what they were measured on; of a CPU, which one.
        parts: the figures of each part.
    """

    folder: Path
    date: str
    device: str
    parts: Mapping[str, Mapping[str, Figure]]

    @property
    def figures(self) -> dict[str, Figure]:
        """All of them."""
        return {
            f"{part}: {name}": figure
            for part, figures in self.parts.items()
            for name, figure in figures.items()
        }


def read(folder: Path) -> Results:
    """Read the JSON files of a folder.

    Raises:
        ValueError: there are none, or they are not of one kind of device.
    """
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    files = {name: result for name, result in files.items() if isinstance(result, Mapping)}
    if not files:
        raise ValueError(f"{folder} has no figures")
    devices = {_device(result) for result in files.values()} - {""}
    if len(devices) > 1:
        raise ValueError(f"{folder} has figures of {', '.join(sorted(devices))}")
    dates = [str(result.get("date", ""))[:10] for result in files.values()]
    parts = {name: dict(figures_of(result)) for name, result in files.items()}
    return Results(folder, max(dates), next(iter(devices), "unknown"), parts)


def _device(result: Mapping[str, Any]) -> str:
    """What a part was measured on, by any of the keys that say it; "" if there is none."""
    devices = result.get("devices")
    first = devices[0] if isinstance(devices, list) and devices else ""
    kind = first.get("kind", "") if isinstance(first, Mapping) else first
    device = str(result.get("device") or result.get("cpu") or kind)
    host = result.get("host")
    if device == "cpu" and isinstance(host, Mapping):  # JAX calls all of them that
        return f"{host['processor']}, {host['cores']} cores"
    return device


def figures_of(result: Any, name: str = "", sign: int = 0) -> Iterator[tuple[str, Figure]]:
    """Yield the figures in a JSON value, by name; `sign` is that of the key it stands under."""
    if isinstance(result, bool):
        return
    if isinstance(result, int | float):
        if sign:
            yield name, Figure(float(result), sign)
    elif isinstance(result, Mapping):
        for key, value in result.items():
            if key not in _NO_FIGURES:
                yield from figures_of(value, f"{name} {key}".strip(), _sign(key) or sign)
    elif isinstance(result, list):
        for entry in result:
            if isinstance(entry, Mapping):
                which = ", ".join(
                    value if isinstance(value, str) else f"{key} {value}"
                    for key, value in entry.items()
                    if isinstance(value, str) or key in _WHICH
                )
                yield from figures_of(entry, f"{name} [{which}]".strip(), sign)


def show(value: float) -> str:
    """Return a number for readers: four digits, or more before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _sign(key: str) -> int:
    if key.endswith(HIGHER):
        return 1
    return -1 if any(key == end or key.endswith(f"_{end}") for end in LOWER) else 0


def compare(before: Results, after: Results) -> list[Change]:
    """Return what became of the figures that both have, the greatest loss first.

    Raises:
        ValueError: they were measured on different devices.
    """
    if before.device != after.device:
        raise ValueError(
            f"{before.folder} is of {before.device}, {after.folder} of {after.device}: "
            "figures of different devices cannot be compared"
        )
    old, new = before.figures, after.figures
    changes = []
    for name in old.keys() & new.keys():
        a, b = old[name].value, new[name].value
        if a > 0 and b > 0:
            gain = b / a - 1 if new[name].sign > 0 else a / b - 1
            changes.append(Change(name, a, b, gain))
    return sorted(changes, key=lambda change: (change.gain, change.name))


def write(folder: Path, earlier: Sequence[Path] = ()) -> Path:
    """Write `report.html` into a folder of figures, and return its path.

    Args:
        folder: of figures.
        earlier: folders of earlier runs, to be shown beside it.

    Raises:
        ValueError: see `read`.
    """
    runs = [*(read(path) for path in earlier), read(folder)]
    runs.sort(key=lambda run: run.date)
    now = read(folder)
    peers = [peer for peer in json.loads(PEERS.read_text()) if peer["device"] == now.device]
    title = f"arctic_jax on {now.device}, {now.date}"
    body = [f"<h1>{html.escape(title)}</h1>", _peers_table(now, peers)]
    for part, figures in now.parts.items():
        body += [f"<h2>{html.escape(part)}</h2>", _plot(part, figures, runs)]
        body.append(_table(part, figures, runs))
    path = folder / "report.html"
    path.write_text(_PAGE.format(title=html.escape(title), body="\n".join(body)), "utf-8")
    return path


def _peers_table(now: Results, peers: Sequence[Mapping[str, Any]]) -> str:
    """Ours beside what others were measured to do, and beside what the hardware allows."""
    rows = []
    for peer in peers:
        figure = now.parts.get(peer["part"], {}).get(peer["figure"])
        if figure is None:
            continue
        ahead = peer["value"] / figure.value if figure.sign < 0 else figure.value / peer["value"]
        limit, share = peer.get("limit"), ""
        if limit is not None:
            share = f"{limit / figure.value if figure.sign < 0 else figure.value / limit:.0%}"
        cells = (peer["part"], peer["figure"], show(figure.value), show(peer["value"]))
        limited = "" if limit is None else show(limit)
        rows.append((*cells, peer["peer"], f"{ahead:.2f}", limited, share))
    if not rows:
        return ""
    head = ("part", "figure", "ours", "peer", "who", "times as good", "limit", "of the limit")
    bars = {
        f"{row[0]}: {row[1]}": [float(row[5]), float(row[7].rstrip("%") or "nan") / 100]
        for row in rows
    }
    plot = _bars(bars, ["times as good as the peer", "share of what the hardware allows"])
    return f"<h2>Beside others</h2>{plot}{_html_table(head, rows)}"


def _table(part: str, figures: Mapping[str, Figure], runs: Sequence[Results]) -> str:
    rows = []
    for name in figures:
        values = [run.parts.get(part, {}).get(name) for run in runs]
        rows.append((name, *("" if v is None else show(v.value) for v in values)))
    return _html_table(("figure", *(run.date for run in runs)), rows)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{lines}</tbody></table>"


def _plot(part: str, figures: Mapping[str, Figure], runs: Sequence[Results]) -> str:
    """A part's figures in every run, relative to the newest; those of a single run as they are."""
    if len(runs) < 2:
        return _plot_values(figures)
    found = [run.parts.get(part, {}) for run in runs]
    bars = {
        name: [run[name].value / figure.value if name in run else 0.0 for run in found]
        for name, figure in figures.items()
        if figure.value > 0
    }
    return _bars(bars, [run.date for run in runs], "relative to the newest run")


def _plot_values(figures: Mapping[str, Figure]) -> str:
    """A picture for each quantity that was measured in several cases."""
    pictures: dict[str, dict[str, list[float]]] = {}
    for name, figure in figures.items():
        case = re.search(r" \[(.*)\]", name)
        before, _, last = name.rpartition(" ")
        if case is not None:
            what, which = name.replace(case[0], ""), case[1]
        elif before and _sign(before.rpartition(" ")[2]):  # the unit of all that it names
            what, which = before, last
        else:
            continue
        pictures.setdefault(what, {})[which] = [figure.value]
    several = {what: bars for what, bars in pictures.items() if len(bars) > 1}
    return "".join(_bars(bars, [what], what, line=False) for what, bars in several.items())


def _bars(
    bars: Mapping[str, Sequence[float]], labels: Sequence[str], what: str = "", line: bool = True
) -> str:
    """Draw bars, beside a line at 1, as SVG: a group for each name, a colour for each label."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return "<p>Without matplotlib there are no plots.</p>"
    if not bars:
        return ""
    width = 0.8 / len(labels)
    canvas = Canvas(figsize=(9, 0.25 * len(bars) * len(labels) + 1), layout="constrained")
    axes = canvas.subplots()
    for i, label in enumerate(labels):
        places = [place + i * width for place in range(len(bars))]
        axes.barh(places, [values[i] for values in bars.values()], width, label=label)
    axes.set_yticks([place + 0.4 - width / 2 for place in range(len(bars))], list(bars), fontsize=7)
    axes.invert_yaxis()
    if line:
        axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(what)
    if len(labels) > 1:
        axes.legend(fontsize=7)
    file = io.StringIO()
    canvas.savefig(file, format="svg")
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .15rem .7rem; border-bottom: 1px solid #ddd; text-align: left }}
td {{ font-variant-numeric: tabular-nums }}
svg {{ max-width: 100%; height: auto }}
</style></head><body>
{body}
</body></html>
"""
