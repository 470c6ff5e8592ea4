"""Small copies of the checkpoints of a run, for tutorial.ipynb: the EMA weights alone, in half
precision.

    make demo
    python tests/make_tutorial_checkpoints.py runs/demo     # writes assets/tutorial/*.pt
    jupyter execute --inplace tutorial.ipynb

They are read by maskrl.load_checkpoint and sample.py like any other; only --resume needs the
originals.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import maskrl

LIMIT = 1_700_000  # bytes


def half(weight):
    return weight.half() if weight.is_floating_point() else weight


def shrink(source, target) -> int:
    """Write a small copy of the checkpoint `source` to `target`; returns its size in bytes."""
    content = maskrl.read_checkpoint(source)
    weights = {name: half(weight) for name, weight in content["model_ema"].items()}
    content |= {"settings": asdict(content["settings"]), "training": None}
    content |= {"model": weights, "model_ema": weights}  # in the file the two share their memory
    maskrl.write_file(target, content)
    maskrl.load_checkpoint(target, content["kind"])
    return target.stat().st_size


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder with teacher.pt, student.pt and policy.pt")
    parser.add_argument("--out", type=Path, default=Path("assets/tutorial"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in maskrl.KINDS:
        target = args.out / f"{kind}.pt"
        size = shrink(args.run / f"{kind}.pt", target)
        print(f"{target}: {size:,} bytes")
        if size > LIMIT:
            raise maskrl.InputError(
                f"{target} is larger than {LIMIT:,} bytes; a smaller --width makes it smaller"
            )


if __name__ == "__main__":
    maskrl.run(main)
