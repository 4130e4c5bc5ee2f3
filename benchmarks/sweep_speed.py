"""Two trials of about a minute each, one after another and both at once, one thread a trial.

    python benchmarks/sweep_speed.py                  # processes of this machine
    python benchmarks/sweep_speed.py --backend ray    # tasks of a Ray that is started for it, or of the one there is

Prints seconds of the clock and their ratio. Run it on a machine with two idle cores: it takes about four minutes.
"""

import argparse
import sys
import time
from datetime import UTC, datetime

from speedrl_lab import sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("local", "ray"), default="local")
    parser.add_argument("--iterations", type=int, default=24, help="of each trial's training")
    options = parser.parse_args()
    knobs = {"preset": ["sweep"], "iterations": [options.iterations], "seed": [0, 1]}
    name, seconds = f"sweep_speed/{datetime.now(UTC):%Y%m%dT%H%M%SZ}", []
    for workers in (1, 2):
        began = time.perf_counter()
        table = sweep.run("03", knobs, f"{name}-{workers}", workers, options.backend, cpus=1)
        seconds.append(time.perf_counter() - began)
        if (table.status != "done").any():
            sys.exit("a trial failed: nothing to compare")
        each = ", ".join(f"{value:.0f}" for value in table.seconds)
        print(f"{workers} at a time: {seconds[-1]:.0f} s (trials {each})")
    print(f"ratio {seconds[0] / seconds[1]:.2f}")


if __name__ == "__main__":
    main()
