"""The measurements behind assets/results.md and the tables of README.md and assets/training.md.

    python -m workbench.studies story gsim --seeds 0,1   # measure, into assets/results/NAME.json
    python -m workbench.studies gsim --only "L1 alone"   # only the rows that begin so
    python -m workbench.studies                          # renew these documents

Models, logs and one small JSON per row lie in --out/seed<n>; what exists is not measured again. So
an interrupted study goes on, and seeds can run next to each other in two shells. Models and data
are those of `make demo`, whose seed is 0, and every row is judged as in the report of the scripts.
"""

import argparse
from pathlib import Path

from filelock import FileLock

from workbench.errors import InputError, run_script
from workbench.options import add_device, find_device
from workbench.studies import records
from workbench.studies.lab import Lab
from workbench.studies.tables import STUDIES, render, sentences, table


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m workbench.studies",
        usage="%(prog)s [STUDY...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    add("--seeds", help="comma-separated (default: those of the study, 0 or 0,1,2)")
    add("--out", type=Path, default=Path("runs/study"), help="default: %(default)s")
    add("--only", nargs="+", default=[], metavar="ROW", help="beginnings of row names")
    peer = STUDIES["official"].peer
    add("--peer", type=Path, default=peer, help="the official code of MAR (default: %(default)s)")
    add_device(parser)
    args = parser.parse_args(argv)
    for name in args.studies:
        if name not in STUDIES:
            parser.error(f"there is no study {name}; there are {', '.join(STUDIES)}")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    if not args.studies:
        render()
        return
    device = find_device(args.device, args.threads)
    STUDIES["official"].peer = args.peer
    labs = {}
    for name in args.studies:
        study = STUDIES[name]
        for seed in map(int, (args.seeds or study.seeds).split(",")):
            if seed not in labs:
                labs[seed] = Lab(args.out, seed, device)
            measured = study.measure(labs[seed], tuple(args.only))
            if not measured:
                raise InputError(f"--only {' '.join(args.only)}: no row of {name}")
            with FileLock(args.out / ".merge"):  # other processes merge their seeds, too
                rows = records.save_result(study, seed, measured)
                study.draw(rows, records.ASSETS / f"{name}.png")
        verdict = " ".join(sentences(study.verdict, rows))
        print(f"\n{study.title}\n\n{table(rows, study.columns)}\n\n{verdict}")


if __name__ == "__main__":
    run_script(main)
