"""Images from any checkpoint: teacher, student or policy.

    python sample.py runs/demo/student.pt
    python sample.py runs/demo/teacher.pt --classes "red circle" "blue square" --n 32 --guidance 2
    python sample.py runs/demo/policy.pt --files pictures/ --n 100     # every image in its own file
    python sample.py runs/demo/student.pt --film film.gif              # watch the unmasking
    python sample.py runs/demo/student.pt --inpaint photo.png --mask mask.png --classes "red circle"
                                                                       # complete: white is drawn
    python sample.py runs/demo/policy.pt --bench           # what an image takes, in about a minute
    python sample.py mar_b --bench --steps 64              # random weights of that size
    python sample.py mar_b.pth --vae kl16.ckpt --classes 207 360 --steps 64  # MAR's released models

A checkpoint carries its own settings. A student or policy draws each token in one denoising step; a
policy also chooses its own number of unmasking iterations, unless --steps says it.
"""

import sys
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from maskrl import Sampling, generate, to_images
from workbench.bench import bench, bench_judge, bench_models, bench_table
from workbench.data import display_names, identity, read_class_names
from workbench.errors import InputError, run_script
from workbench.files import as_json, check_writable, write_text
from workbench.inpaint import read_inpainting
from workbench.kl16 import load_kl16
from workbench.latents import autoencoder_for
from workbench.options import ArgumentParser, add_device, find_device
from workbench.pictures import film, grid_columns, picture, pixel_mask, save_picture, write_files
from workbench.released import load_model
from workbench.report import hardware
from workbench.sampling import (
    check_request,
    check_steps,
    checked_sampling,
    class_labels,
    free_name,
    per_image,
    warn_if_unfinished,
    warn_of_other_images,
)
from workbench.settings import LIMITS, PRESETS, flag
from workbench.timing import clock

BATCH = 256  # images that are drawn at once, so that memory does not grow with --n
SHOWN = 1024  # images that --out has room for
NOT_FOR_BENCH = (
    *("classes", "out", "files", "film", "inpaint", "mask"),
    *("denoise_steps", "guidance", "temperature", "order"),
)


def parse(argv=None):
    parser = ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="teacher.pt, student.pt or policy.pt, or a file in MAR's own format")
    add("--vae", metavar="kl16.ckpt", help="the autoencoder of a generator of latents, as MAR's is")
    add("--heads", type=int, help="of a file in MAR's format whose width is not a released one")
    add("--classes", nargs="+", metavar="CLASS", help="names or a file of them (default: all)")
    add("--class-names", metavar="FILE", help="what to call them: lines such as n01440764 tench")
    add("--n", type=int, default=64, help="number of images, of all classes in turn (default: 64)")
    add("--out", help="picture to write (default: samples.png or, if there is one, samples-2.png)")
    add("--files", metavar="FOLDER", help="also write every image into a file of its own")
    add("--film", metavar="PATH", help="also draw the unmasking of 8 images, as .gif or in a .png")
    add("--inpaint", metavar="IMAGE", help="complete this image: tokens under --mask are drawn")
    add(
        "--mask",
        metavar="IMAGE",
        help="of the shape of --inpaint: a token is drawn if any pixel of it is white",
    )
    add(
        "--steps",
        type=steps_or_counts,
        metavar="K",
        help="unmasking iterations, or how many tokens each reveals, such as 1,2,3,4,6 (default: "
        "the checkpoint's; a policy chooses)",
    )
    add("--denoise-steps", type=int, help="of a teacher's chain (default: the checkpoint's)")
    add(
        "--guidance",
        type=float,
        help="s of a teacher, in eps = eps_null + s (eps_class - eps_null); 1: none (default: the "
        "checkpoint's)",
    )
    add(
        "--temperature",
        type=float,
        help="factor on the noise of a teacher's chain, or on the z of a one-step generator: below "
        "1 images are cleaner and less varied (default: 1; a policy falls from 1 to its own)",
    )
    add(
        "--refresh",
        type=int,
        default=1,
        metavar="N",
        help="faster: compute all contexts only at first and in every Nth iteration (default: 1, "
        "which is exact)",
    )
    add(
        "--order",
        choices=LIMITS["order"]["choices"],
        help="in which tokens are revealed: at random, as in MAR, or spread over the image by "
        "Halton's sequence (default: the checkpoint's)",
    )
    add("--seed", type=int, default=0)
    add_device(parser)
    add = parser.add_argument_group("bench").add_argument
    add(
        "--bench",
        nargs="?",
        const="bench.json",
        metavar="PATH",
        help="write the seconds that an image takes in every way: of the checkpoint, and of others "
        "in its folder, or of a preset's size with random weights (default: bench.json)",
    )
    add("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    add("--rounds", type=int, default=5, metavar="N", help="the first warms up (default: 5)")
    add(
        "--judge",
        action="store_true",
        help="also train a judge and draw some 2,000 images in every way, for their quality: many "
        "times as long",
    )
    add(
        "--data",
        default="shapes",
        metavar="FOLDER",
        help="what the judge compares with: a folder, or mnist and so on, as for training "
        "(default: the shapes)",
    )
    return parser.parse_args(argv)


def steps_or_counts(text):
    """The value of --steps: a number, or a tuple of counts."""
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        message = f"{text!r} is neither a number nor counts such as 1,2,3,4,6"
        raise ArgumentTypeError(message) from None
    return counts[0] if len(counts) == 1 else counts


def run_bench(args, device):
    """--bench: print the table and write the JSON."""
    if args.rounds < 2 or min(args.batches) < 1:
        raise InputError("--rounds must be at least 2, and --batches at least 1")
    if Path(args.bench).suffix != ".json":
        raise InputError(
            f"--bench {args.bench}: the name must end in .json, and the checkpoint stand before it"
        )
    unused = [flag(name) for name in NOT_FOR_BENCH if getattr(args, name) is not None]
    if unused:
        raise InputError(f"--bench has no use for {', '.join(unused)}")
    check_writable(args.bench)
    random = args.checkpoint in PRESETS
    vae = load_kl16(args.vae, device) if args.vae else None
    models, decode = bench_models(args.checkpoint, device, vae, args.heads)
    check_steps(args.steps, next(iter(models.values())).length)
    judge = None
    if args.judge and not random:
        judge = bench_judge(models, args.data, vae, device)
    result = {
        "weights": "random: for speed only" if random else args.checkpoint,
        "hardware": hardware(device),
        **bench(models, decode, judge, args.steps, args.batches, args.rounds),
    }
    write_text(args.bench, as_json(result, indent=1))
    print(f"{args.bench}; weights: {result['weights']}; {result['hardware']}")
    print(bench_table(result))


def main(argv=None):
    args = parse(argv)
    device = find_device(args.device, args.threads)
    if args.bench:
        run_bench(args, device)
        return
    if args.judge:
        raise InputError("--judge is for --bench alone")
    args.out = args.out or str(free_name(Path("samples.png")))
    check_request(args, SHOWN)
    if args.files:
        warn_of_other_images(args.files)

    model = load_model(args.checkpoint, None, device, args.heads)
    warn_if_unfinished(args.checkpoint)
    settings = model.settings
    vae = autoencoder_for(model.channels // settings.patch**2, args.vae, device)
    decode = vae.decode if vae else identity
    names = read_class_names(args.class_names, model.classes) if args.class_names else {}
    labels, classes = class_labels(args.classes, model, names, args.n)
    file_names = display_names(model.classes, names)
    given = mask = None
    if args.inpaint:
        if not args.classes and classes > 1:
            print(f"no --classes: completed as each of {classes} classes in turn", file=sys.stderr)
        given, mask = read_inpainting(args.inpaint, args.mask, settings, vae)
        given, mask = given.to(device), mask.to(device)
    sampling = Sampling(
        args.steps, args.guidance, args.denoise_steps, args.temperature, args.order, progress=True
    )
    sampling = checked_sampling(model, sampling, args.refresh, mask)

    grid, steps, seconds = [], 0, 0.0
    for first in range(0, args.n, BATCH):
        start = clock(device)
        part = labels[first : first + BATCH]
        known = (given.expand(len(part), -1, -1), mask) if args.inpaint else None
        numbers = range(first, first + len(part))
        own_sampling, noise = per_image(model, sampling, args.seed, numbers)
        tokens, trace = generate(model, part, own_sampling, noise, known, trace=True)
        seconds += clock(device) - start
        steps += int(trace.steps.sum())
        images = decode(to_images(tokens, settings)).cpu()
        if first < SHOWN:
            grid.append(images)
        if args.film and first == 0:
            film(args.film, tokens, trace, settings, decode)
        if args.files:
            write_files(args.files, images, [file_names[y] for y in part.tolist()], first)

    if args.inpaint:  # the picture begins with what was given
        given = decode(to_images(given, settings)).cpu()
        grid.insert(0, torch.where(pixel_mask(mask, images.shape[-1]), 0.0, given))
    shown = torch.cat(grid)
    save_picture(args.out, picture(shown, grid_columns(len(shown), classes)))
    written = ", ".join(path for path in (args.out, args.film, args.files) if path)
    print(
        f"{written}: {args.n} images of a {model.kind}, {steps / args.n:.1f} unmasking iterations "
        f"x {sampling.denoise_steps} denoising steps, guidance {sampling.guidance:g}, "
        f"{1000 * seconds / args.n:.1f} ms per image on {device}"
    )


if __name__ == "__main__":
    run_script(main)
