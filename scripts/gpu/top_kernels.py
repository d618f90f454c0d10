"""Print where the time of a profile goes: kernels by their total time on the GPU.

    python scripts/gpu/top_kernels.py FOLDER

FOLDER is what `benchmarks/offline.py --profile` wrote.
"""

import collections
import gzip
import json
import sys
from pathlib import Path


def main() -> None:
    for path in sorted(Path(sys.argv[1]).rglob("*.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = {
            (e["pid"], e.get("tid")): e["args"]["name"]
            for e in events
            if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name")
        }
        gpu = {pid for (pid, _), name in names.items() if "GPU" in name}
        total: collections.Counter[str] = collections.Counter()
        count: collections.Counter[str] = collections.Counter()
        for e in events:
            stream = names.get((e.get("pid"), e.get("tid")), "")
            if e.get("ph") == "X" and e.get("pid") in gpu and "Stream" in stream:
                total[e["name"][:90]] += e["dur"]
                count[e["name"][:90]] += 1
        print(f"{path.name}: {sum(total.values()) / 1e3:.1f} ms on the GPU")
        for name, micros in total.most_common(25):
            print(
                f"{micros / 1e3:9.2f} ms {count[name]:6d} x {micros / count[name]:8.1f} us  {name}"
            )


if __name__ == "__main__":
    main()
