"""Average two policies that were tuned from the same base: weights on the line between them.

    python data/average_policies.py LEFT RIGHT SHARE OUT      # SHARE of RIGHT, 0 to 1

Between two tunings of one base lies a curve of compromises (rewarded soups, arXiv 2306.04488). Where one alone has a
pace head, it is kept.
"""

import sys
from pathlib import Path

import speedrl_lab as lab
from speedrl_lab.average import mix


def main(left: str, right: str, share: str, out: str) -> None:
    if Path(out).exists():
        sys.exit(f"{out} exists; choose another name")
    mixed, other = lab.load_generator(policy=left), lab.load_generator(policy=right)
    mix(mixed, other, float(share))
    mixed.save_policy(out, origin=f"data/average_policies.py {Path(left).name} {Path(right).name} {share}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
