"""Print where the time of a profile goes: kernels on the GPU, and what the host did.

    python scripts/gpu/trace_summary.py FOLDER

FOLDER is what `jax.profiler.trace` wrote. A host event's time holds that of the events inside it.
"""

import collections
import gzip
import json
import sys
from pathlib import Path
from typing import Any

MOST = 25


def read_trace(path: Path) -> tuple[list[dict[str, Any]], dict[tuple[int, int], str]]:
    """Return a profile's events, and the names of its processes `(pid, None)` and threads."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {
        (e["pid"], e.get("tid")): e["args"]["name"]
        for e in events
        if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name")
    }
    return events, names


def gpu_kernels(
    events: list[dict[str, Any]], names: dict[tuple[int, int], str]
) -> list[tuple[float, float, str]]:
    """Return start, end (microseconds) and name of what ran on GPUs, in order."""
    gpus = {pid for (pid, _), name in names.items() if "GPU" in name}
    return sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("ph") == "X" and e["pid"] in gpus and "Stream" in names[e["pid"], e["tid"]]
    )


def print_gaps(kernels: list[tuple[float, float, str]]) -> None:
    """Say when the GPU had nothing to do. Of several GPUs: when none had."""
    gaps, end, before = [], kernels[0][0], ""
    for start, stop, name in kernels:
        if start > end:
            gaps.append((start - end, before, name))
        if stop > end:
            end, before = stop, name
    idle, span = sum(gap[0] for gap in gaps), end - kernels[0][0]
    print(f"  idle {idle / 1e3:.2f} ms of {span / 1e3:.2f}; the longest:")
    for micros, name, after in sorted(gaps, reverse=True)[:8]:
        print(f"{micros / 1e3:9.2f} ms  {name} -> {after}")


def main() -> None:
    for path in sorted(Path(sys.argv[1]).rglob("*.trace.json.gz")):
        events, names = read_trace(path)
        gpus = {pid for (pid, _), name in names.items() if "GPU" in name}
        total: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        count: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for e in events:
            thread = names.get((e.get("pid"), e.get("tid")), "")
            if e.get("ph") != "X" or (e["pid"] in gpus and "Stream" not in thread):
                continue
            where = "GPU" if e["pid"] in gpus else f"host, {thread.split('/')[0]}"
            total[where][e["name"][:100]] += e["dur"]
            count[where][e["name"][:100]] += 1
        print(path.parent)
        print_gaps([(start, stop, name[:60]) for start, stop, name in gpu_kernels(events, names)])
        for where, times in sorted(total.items()):
            if where == "GPU":
                print(f"  GPU: {times.total() / 1e3:.2f} ms")
            elif max(times.values()) < 1000:
                continue
            else:
                print(f"  {where}")
            for name, micros in times.most_common(MOST):
                calls = count[where][name]
                print(f"{micros / 1e3:9.2f} ms {calls:6d} x {micros / calls:8.1f} us  {name}")


if __name__ == "__main__":
    main()
