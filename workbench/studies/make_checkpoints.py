"""Small copies of a run's checkpoints for tutorial.ipynb: the EMA weights alone, in half precision.

    make demo
    python -m workbench.studies.make_checkpoints runs/demo     # writes assets/tutorial/*.pt

They load like any other checkpoint; only --resume needs the originals."""

import argparse
from pathlib import Path

from workbench.errors import InputError, run_script
from workbench.files import KINDS, load_checkpoint, write_checkpoint

LIMIT = 1_700_000  # bytes


def shrink(source, target) -> int:
    """Write a small copy of the checkpoint `source` to `target`; returns its size in bytes."""
    write_checkpoint(target, load_checkpoint(source).half())
    return Path(target).stat().st_size


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder with teacher.pt, student.pt and policy.pt")
    parser.add_argument("--out", type=Path, default=Path("assets/tutorial"))
    args = parser.parse_args(argv)
    for kind in KINDS:
        target = args.out / f"{kind}.pt"
        size = shrink(args.run / f"{kind}.pt", target)
        print(f"{target}: {size:,} bytes")
        if size > LIMIT:
            raise InputError(f"{target} is larger than {LIMIT:,} bytes: lower --width")


if __name__ == "__main__":
    run_script(main)
