"""Images from any checkpoint: teacher, student or policy.

    python sample.py runs/demo/student.pt
    python sample.py runs/demo/teacher.pt --classes "red circle" "blue square" --n 32 --guidance 2
    python sample.py runs/demo/policy.pt --files pictures/ --n 100     # every image in its own file
    python sample.py runs/demo/student.pt --film film.gif              # watch the unmasking
    python sample.py runs/demo/student.pt --inpaint photo.png --mask mask.png --classes "red circle"
                                                                       # complete: white is drawn
    python sample.py runs/demo/policy.pt --bench           # teacher, student and policy: seconds
    python sample.py mar_b --bench --steps 64              # random weights of that size
    python sample.py mar_b.pth --vae kl16.ckpt --classes 207 360 --steps 64  # MAR's released models

A checkpoint carries its own settings. A student or policy draws each token in one denoising step; a
policy also chooses its own number of unmasking iterations, unless --steps says it.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import maskrl
from maskrl import InputError

BATCH = 256  # images that are drawn at once: memory holds no more, however many there are
SHOWN = 1024  # images that --out has room for


def add_generator(parser):
    """The options that say what generates."""
    add = parser.add_argument
    add("checkpoint", help="teacher.pt, student.pt or policy.pt, or a file in MAR's own format")
    add(
        "--vae",
        metavar="kl16.ckpt",
        help="the autoencoder of a generator of latents, as MAR's released models are",
    )
    add("--heads", type=int, help="of a file in MAR's format whose width is not a released one")


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_generator(parser)
    add(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="names of classes, apart by spaces or commas, or a file with one a line "
        "(default: all, in turn)",
    )
    add(
        "--class-names",
        metavar="FILE",
        help="what the classes are called, in lines such as n01440764 tench; for --classes and "
        "the names of --files",
    )
    add("--n", type=int, default=64, help="number of images (default: 64)")
    add(
        "--steps",
        type=steps_or_counts,
        metavar="K",
        help="unmasking iterations (default: the checkpoint's; a policy chooses), or the counts "
        "of tokens that they reveal, such as 1,2,3,4,6",
    )
    add("--denoise-steps", type=int, help="of a teacher's chain (default: the checkpoint's)")
    add(
        "--guidance",
        type=float,
        help="s of a teacher, in eps = eps_null + s (eps_class - eps_null); "
        "1 is none (default: the checkpoint's)",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        help="factor on the noise of a teacher's chain, or on the z of a one-step generator: below "
        "1 images are cleaner and less varied (default: 1)",
    )
    add("--out", default="samples.png", help="picture to write (default: samples.png)")
    add("--files", metavar="FOLDER", help="also write every image into a file of its own")
    add(
        "--film",
        metavar="PATH",
        help="also draw the unmasking of the first 8 images: a .gif moves, a .png is a strip",
    )
    add(
        "--inpaint",
        metavar="IMAGE",
        help="complete this image: the tokens under --mask are drawn, "
        "the others kept; the picture begins with what was given",
    )
    add(
        "--mask",
        metavar="IMAGE",
        help="of --inpaint, and of its shape: a token is drawn if any pixel of it is white",
    )
    add(
        "--refresh",
        type=int,
        default=1,
        metavar="N",
        help="all contexts are computed in every Nth iteration and the first few only; 1, the "
        "default, is exact",
    )
    add(
        "--order",
        choices=maskrl.ORDERS,
        help="in which tokens are revealed: at random, as MAR does, or spread over the image by "
        "Halton's sequence (default: as the model was made)",
    )
    add("--seed", type=int, default=0)
    add_bench(parser)
    maskrl.add_device(parser)
    return parser.parse_args(argv)


def steps_or_counts(text):
    """The value of --steps: a number, or a tuple of counts."""
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        message = f"{text!r} is neither a number nor counts such as 1,2,3,4,6"
        raise argparse.ArgumentTypeError(message) from None
    return counts[0] if len(counts) == 1 else counts


def add_bench(parser):
    """The options of the bench."""
    add = parser.add_argument_group("bench").add_argument
    add(
        "--bench",
        nargs="?",
        const="bench.json",
        metavar="PATH",
        help="time the checkpoint, and teacher.pt, student.pt and policy.pt beside it, in every "
        "way to sample; or random weights of a preset. Writes PATH (default: bench.json)",
    )
    add("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    add("--rounds", type=int, default=5, metavar="N", help="the first warms up (default: 5)")
    add("--data", default="shapes", metavar="FOLDER", help="what the judge compares with")


def run_bench(args, device):
    """--bench: print the table and write the JSON."""
    if args.rounds < 2 or min(args.batches) < 1:
        raise InputError("--rounds must be at least 2, and --batches at least 1")
    random = args.checkpoint in maskrl.PRESETS
    vae = maskrl.load_kl16(args.vae, device) if args.vae else None
    models, decode = maskrl.bench_models(args.checkpoint, device, vae, args.heads)
    judge = None
    if not random:
        judge = maskrl.bench_judge(models, args.data, vae, device)
    result = {
        "weights": "random: for speed only" if random else args.checkpoint,
        "hardware": maskrl.hardware(device),
        **maskrl.bench(models, decode, judge, args.steps, args.batches, args.rounds),
    }
    maskrl.write_text(args.bench, maskrl.as_json(result, indent=1))
    print(f"{args.bench}; weights: {result['weights']}; {result['hardware']}")
    print(maskrl.bench_table(result))


def check_paths(args):
    """InputError, before any work, if a picture could not be written."""
    paths = [path for path in (args.out, args.film) if path is not None]
    for path in paths:
        if maskrl.EXTENSIONS.get(Path(path).suffix.lower()) not in Image.SAVE:
            raise InputError(f"{path}: the name must end in .png, .jpg or another image format")
    inputs = [path for path in (args.inpaint, args.mask) if path]
    if len({Path(path).resolve() for path in paths + inputs}) < len(paths + inputs):
        raise InputError(
            f"--out {args.out} would overwrite --film, --inpaint or --mask, or they "
            "name the same file"
        )


def labels_of(texts, model, names, n):
    """Labels [n] that go through the classes named by --classes, or through all of them."""
    chosen = range(len(model.classes))
    if texts:
        chosen = maskrl.find_classes(texts, model.classes, names)
    labels = torch.tensor([chosen[i % len(chosen)] for i in range(n)])
    return labels.to(model.device), len(chosen)


def read(option, path, size):
    """Pixels uint8 [3, S, S] of the image at `path`, and its width / height.

    size: S; None for as many pixels as the image has."""
    try:
        image = maskrl.read_rgb(path)
    except InputError as error:
        raise InputError(f"--{option} {error}") from None
    return maskrl.middle_square(image, size or min(image.size)), image.width / image.height


def to_complete(image, mask, settings, vae=None):
    """Tokens [1, L, D] of --inpaint, and of --mask a mask [L]: true where a pixel is white."""
    stride = vae.stride if vae else 1
    pixels, shape = read("inpaint", image, settings.image_size * stride)
    white, mask_shape = read("mask", mask, None)
    if abs(shape / mask_shape - 1) > 0.02:
        raise InputError(
            f"--mask {mask} is not of the shape of {image}: width / height "
            f"{mask_shape:.2f}, not {shape:.2f}"
        )
    white = (white.float().mean(0, keepdim=True) > 127).float()
    side = settings.image_size // settings.patch
    hidden = F.adaptive_max_pool2d(white, side).flatten() > 0
    if not hidden.any():
        raise InputError(f"--mask {mask} has no white pixel: nothing to draw")
    pixels = maskrl.to_unit(pixels[None])
    if vae:
        pixels = vae.encode(pixels.to(vae.device), maskrl.rng("inpaint"))
    return maskrl.to_tokens(pixels, settings), hidden


def write_files(folder, images, labels, classes, first=0):
    """Every image [N, 3, S, S] as folder/<number> <class>.png, numbered from `first`."""
    for i, (image, label) in enumerate(zip(images, labels.tolist()), first):
        name = classes[label].replace("/", "_")
        picture = maskrl.picture(image[None], 1, pixels=1, padding=0)
        maskrl.save_picture(Path(folder) / f"{i:05} {name}.png", picture)


def main(argv=None):
    args = parse(argv)
    device = maskrl.find_device(args.device, args.threads)
    if args.bench:
        run_bench(args, device)
        return
    if not 1 <= args.n <= 10**7:
        raise InputError(f"--n {args.n} must be at least 1 and at most {10**7}")
    if args.n > SHOWN and not args.files:
        raise InputError(
            f"--n {args.n}: a picture shows at most {SHOWN}; more of them need --files"
        )
    if bool(args.inpaint) != bool(args.mask):
        raise InputError("--inpaint and --mask belong together")
    check_paths(args)
    model = maskrl.load_model(args.checkpoint, None, device, args.heads)
    settings = model.settings
    image_channels = model.channels // settings.patch**2
    vae = maskrl.autoencoder_for(image_channels, args.vae, device)
    decode = vae.decode if vae else maskrl.unchanged
    names = {}
    if args.class_names:
        names = maskrl.read_class_names(args.class_names, model.classes)
    labels, columns = labels_of(args.classes, model, names, args.n)
    known = None
    if args.inpaint:
        given, mask = to_complete(args.inpaint, args.mask, settings, vae)
        known = given.to(device), mask.to(device)
    sampling = maskrl.Sampling(
        args.steps,
        args.guidance,
        args.denoise_steps,
        args.temperature,
        progress=True,
        refresh=args.refresh,
        order=args.order,
    ).resolve(model)

    shown_names = maskrl.display_names(model.classes, names)
    grid, written, steps, seconds = [], [args.out], 0, 0.0
    for first in range(0, args.n, BATCH):
        start = time.perf_counter()
        part = labels[first : first + BATCH]
        tokens, trace = maskrl.generate(
            model,
            part,
            sampling,
            known=known and (known[0].expand(len(part), -1, -1), known[1]),
            seed=(args.seed, first) if first else args.seed,
            trace=True,
        )
        seconds += time.perf_counter() - start
        steps += int(trace.steps.sum())
        images = decode(maskrl.to_images(tokens, settings)).cpu()
        if first < SHOWN:
            grid.append(images)
        if args.film and first == 0:
            maskrl.film(args.film, tokens, trace, settings, decode)
            written.append(args.film)
        if args.files:
            write_files(args.files, images, part, shown_names, first)
    if args.files:
        written.append(args.files)
    if known:  # what was given comes first
        given = decode(maskrl.to_images(known[0], settings)).cpu()
        grid.insert(0, torch.where(maskrl.pixel_mask(mask, images.shape[-1]), 0.0, given))
        columns = 8
    grid = maskrl.picture(torch.cat(grid), columns if columns > 2 else 8)
    maskrl.save_picture(args.out, grid)
    print(
        f"{', '.join(written)}: {args.n} images of a {model.kind}, {steps / args.n:.1f} "
        f"unmasking iterations x {sampling.denoise_steps} denoising steps, "
        f"guidance {sampling.guidance:g}, {1000 * seconds / args.n:.1f} ms per image on {device}"
    )


if __name__ == "__main__":
    maskrl.run(main)
