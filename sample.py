"""Images from any checkpoint: teacher, student or policy.

    python sample.py runs/demo/student.pt
    python sample.py runs/demo/teacher.pt --classes "red circle,blue square" --n 32 --guidance 1.5 --out two.png

    python sample.py runs/demo/student.pt --film film.gif                        # watch images being unmasked
    python sample.py runs/demo/student.pt --inpaint photo.png --mask mask.png --classes "red circle"
                                                                  # complete an image: where the mask is white

A checkpoint carries its own settings. A student or policy draws each token in one denoising step; a policy also
chooses its own number of unmasking iterations, unless --steps says it.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets.folder import default_loader
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

import maskrl


def read_image(path, size):
    """An image file, resized and centre-cropped to uint8 [3, size, size]."""
    return TF.pil_to_tensor(TF.center_crop(TF.resize(default_loader(path), size, antialias=True), [size, size]))



def picture(images, columns, pixels=64):
    """A PIL image of a grid of images [N, 3, S, S] in [-1, 1], small ones enlarged to about `pixels`, with hard edges."""
    scale = max(1, round(pixels / images.shape[-1]))
    images = images.clamp(-1, 1).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid((images + 1) / 2, columns, padding=4, pad_value=1.0)
    return Image.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def labelled_rows(path, rows, columns):
    """Save a picture of {label: images}, each block of images under its label."""
    font = ImageFont.load_default(size=15)
    blocks = [(label, picture(images, columns)) for label, images in rows.items()]
    sheet = Image.new("RGB", (max(b.width for _, b in blocks), sum(b.height + 26 for _, b in blocks)), "white")
    y = 0
    for label, block in blocks:
        ImageDraw.Draw(sheet).text((6, y + 4), label, fill="black", font=font)
        sheet.paste(block, (0, y + 26))
        y += block.height + 26
    save_image(path, sheet)


def save_image(path, image, **how):
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **how)
    except OSError as error:
        raise maskrl.InputError(f"{path} cannot be written: {error}") from None


def film(path, tokens, trace, s):
    """The states of up to 8 images before every iteration and at the end, hidden tokens grey: an animation, or one row an image."""
    hidden = trace.masks()[0][:8]  # [8, T, L]
    hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], 1)
    images = maskrl.to_images(tokens[:8], s).cpu()[:, None]  # a revealed token never changes
    frames = torch.where(grown(hidden, s), torch.zeros(()), images)  # [8, T + 1, 3, S, S]
    if Path(path).suffix.lower() != ".gif":
        return save_image(path, picture(frames.flatten(0, 1), frames.shape[1], 48))
    pictures = [picture(frame, 4) for frame in frames.transpose(0, 1)]
    save_image(path, pictures[0], save_all=True, append_images=pictures[1:] + [pictures[-1]] * 6, duration=250, loop=0)


def grown(mask, s):
    """mask [..., L] of tokens -> of pixels [..., 1, S, S]."""
    side = s.image_size // s.patch
    mask = mask.cpu().unflatten(-1, (side, side))[..., None, :, :]
    return mask.repeat_interleave(s.patch, -1).repeat_interleave(s.patch, -2)


def to_complete(image, mask, s, device):
    """--inpaint and --mask, of equal shape, as tokens [1, L, D] and a mask [L]: true where any pixel of a token is white."""
    def read(option, path, size):
        try:
            width, height = Image.open(path).size
            return read_image(path, size or min(width, height)), width / height
        except (OSError, SyntaxError, ValueError) as error:
            raise maskrl.InputError(f"--{option} {path}: {error}") from None

    (pixels, shape), (white, mask_shape) = read("inpaint", image, s.image_size), read("mask", mask, None)
    if abs(shape / mask_shape - 1) > 0.02:
        raise maskrl.InputError(f"--mask {mask} is not of the shape of {image}: width / height {mask_shape:.2f}, not {shape:.2f}")
    white = (white.float().mean(0, keepdim=True) > 127).float()
    chosen = F.adaptive_max_pool2d(white, s.image_size // s.patch).flatten() > 0
    if not chosen.any():
        raise maskrl.InputError(f"--mask {mask} has no white pixel: nothing to draw")
    return maskrl.to_tokens(pixels[None].float() / 127.5 - 1, s).to(device), chosen.to(device)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", help="teacher.pt, student.pt or policy.pt")
    parser.add_argument("--classes", help="comma-separated class names (default: all, in turn)")
    parser.add_argument("--n", type=int, default=64, help="number of images (default: 64)")
    parser.add_argument("--steps", type=int, help="K, unmasking iterations (default: the checkpoint's; a policy chooses)")
    parser.add_argument("--denoise-steps", type=int, help="denoising steps per iteration (default: the checkpoint's for a "
                        "teacher; 1 for a student or policy)")
    parser.add_argument("--guidance", type=float, help="s in eps = eps_null + s (eps_class - eps_null); 1 = none "
                        "(default: the checkpoint's for a teacher; a student has it baked in)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the chain's noise (default: 1)")
    parser.add_argument("--film", metavar="PATH", help="also draw the unmasking of the first 8 images: a .gif moves, "
                        "a .png is a strip")
    parser.add_argument("--inpaint", metavar="IMAGE", help="complete this image: the tokens under --mask are drawn, the others kept; "
                        "the picture begins with what was given")
    parser.add_argument("--mask", metavar="IMAGE", help="of --inpaint, and of its shape: a token is drawn if any pixel of it is white")
    parser.add_argument("--out", default="samples.png", help="picture to write (default: samples.png)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = maskrl.find_device(args.device)
    if args.n < 1:
        raise maskrl.InputError(f"--n {args.n} must be at least 1")
    if args.film and Path(args.film).absolute() == Path(args.out).absolute():
        raise maskrl.InputError(f"--film {args.film} would overwrite --out")
    for path in filter(None, (args.out, args.film)):
        if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
            raise maskrl.InputError(f"{path}: the name must end in .png, .jpg or another image format")
    model = maskrl.load_checkpoint(args.checkpoint, device=device)
    names = [name.strip() for name in args.classes.split(",") if name.strip()] if args.classes else model.classes
    unknown = [name for name in names if name not in model.classes]
    if unknown:
        raise maskrl.InputError(f"no class {unknown[0]!r} in {args.checkpoint}; there are: {', '.join(model.classes)}")
    labels = torch.tensor([model.classes.index(names[i % len(names)]) for i in range(args.n)], device=device)

    known = None
    if args.inpaint or args.mask:
        if not (args.inpaint and args.mask):
            raise maskrl.InputError("--inpaint and --mask belong together")
        tokens, mask = to_complete(args.inpaint, args.mask, model.settings, device)
        known = tokens.expand(args.n, -1, -1), mask

    one_step = model.kind != "teacher"
    denoise_steps = (1 if one_step else model.settings.denoise_steps) if args.denoise_steps is None else args.denoise_steps
    if one_step and denoise_steps != 1:
        raise maskrl.InputError(f"--denoise-steps {denoise_steps}: a {model.kind} takes one step; only a teacher walks a chain")
    if not 1 <= denoise_steps <= 1000:
        raise maskrl.InputError(f"--denoise-steps {denoise_steps} must lie in 1...1000")
    if denoise_steps == 1 and args.temperature != 1:
        raise maskrl.InputError("--temperature: one step has no chain whose noise it could scale")
    guidance = (1.0 if denoise_steps == 1 else model.settings.guidance) if args.guidance is None else args.guidance
    if not (0 <= args.temperature < math.inf and 0 <= guidance < math.inf):
        raise maskrl.InputError("--temperature and --guidance must be numbers from 0 up")
    start = time.perf_counter()
    s, learned = model.settings, model.schedule is not None and args.steps is None
    tokens, trace = maskrl.generate(model, labels, args.steps, guidance, denoise_steps, args.temperature,
                                    seed=args.seed, trace="steps", progress=True, known=known)
    steps = f"{trace.steps.float().mean():.1f}" if learned else int(trace.steps[0])
    seconds = time.perf_counter() - start
    images = maskrl.to_images(tokens, s)
    if known:  # what was given comes first
        images = torch.cat([torch.where(grown(mask, s), torch.zeros(()), maskrl.to_images(known[0][:1], s).cpu()), images.cpu()])
    save_image(args.out, picture(images, columns=len(names) if len(names) > 2 and not known else 8))
    if args.film:
        film(args.film, tokens, trace, s)
    film_too = f" and {args.film}" if args.film else ""
    print(f"{args.out}{film_too}: {args.n} images of a {model.kind}, {steps} unmasking iterations x "
          f"{denoise_steps} denoising steps, guidance {guidance:g}, {1000 * seconds / args.n:.1f} ms per image on {device}")


if __name__ == "__main__":
    maskrl.run(main)
