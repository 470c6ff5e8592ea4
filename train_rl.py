r"""RL on the one-step student: a quality reward, a speed reward, and only the critical steps
(MaskFocus, Speed-RL), or the reward's own gradient (MARVAL, stage 2).

    python train_rl.py                                    # from nothing: teacher, student, then RL
    python train_rl.py --student runs/demo/student.pt     # RL on a student that is there
    python train_rl.py --student runs/demo/student.pt --alpha 0 --no-learn-steps --out runs/quality
    python train_rl.py --student runs/demo/student.pt --action x --out runs/x      # train all of it
    python train_rl.py --student runs/demo/student.pt --action x --method backprop --out runs/marval
    python train_rl.py --student runs/demo/student.pt --reward clip --out runs/clip
    python train_rl.py --student runs/b/student.pt --vae kl16.ckpt --data imagenet/train \
        --reward clip                                     # of a student that makes latents

Where no --student is given, a teacher and a student are made first, as by train_distill.py with the
same options. Writes policy.pt (and teacher.pt, student.pt), log.jsonl, metrics.json, samples.png,
neighbours.png, curves.png and gain.png into --out.
"""

import time
from pathlib import Path

import maskrl


def parse(argv=None):
    parser = maskrl.training_parser(__doc__)
    add = parser.add_argument
    add(
        "--student",
        type=Path,
        metavar="student.pt",
        help="a student to start from, instead of making one",
    )
    add(
        "--reward",
        default="embedded",
        help="what RL climbs: embedded (a network trained here on the data), fit (exact, for the "
        "shapes), clip, or module:function, a function of yours (default: %(default)s)",
    )
    maskrl.add_device(parser)
    maskrl.add_settings(parser)
    return parser.parse_args(argv)


def given_models(args, settings, device):
    """--student, and for the report the teacher: --teacher, or a fitting teacher.pt beside it."""
    models = {}
    path = args.teacher or args.student.with_name("teacher.pt")
    if path.exists():
        teacher = maskrl.load_model(path, "teacher", device, settings.heads)
        if all(
            getattr(teacher.settings, name) == getattr(settings, name)
            for name in maskrl.MODEL_SETTINGS
        ):
            models["teacher"], teacher.settings = teacher, settings
        elif args.teacher:
            raise maskrl.InputError(f"{path} is not a teacher of {args.student}")
    models["student"] = maskrl.load_checkpoint(args.student, "student", device)
    models["student"].settings = settings
    return models


def held_out_reward(name, data, critic, device):
    """A reward that is not trained on, to expose reward hacking; None if there is none."""
    if name != "embedded":
        return critic.quality
    if data.name != "shapes":
        return None
    return maskrl.ShapeFit(data.train.size, device)


def main(argv=None):
    args = parse(argv)
    maskrl.check_reward_name(args.reward)
    if args.reward == args.features == "clip":
        raise maskrl.InputError("--features clip: the judge must not look as --reward clip does")
    clip = maskrl.clip_options(args)
    heads = getattr(args, "heads", None)
    given = [(args.teacher, "teacher"), (args.student, "student")]
    contents = [maskrl.read_model(path, kind, heads) for path, kind in given if path]
    written = ["policy.pt"] if args.student else ["policy.pt", "student.pt", "teacher.pt"]
    settings, data, device = maskrl.prepare(args, written, contents[-1] if contents else None)
    models = given_models(args, settings, device) if args.student else None

    quality = None
    if args.reward != "embedded":  # first, for a wrong one should show before long work
        quality = maskrl.make_reward(args.reward, settings, data, device, clip=clip)
    judge = maskrl.make_judge(args, settings, data, device)
    critic = maskrl.train_critic("reward", data.train, settings, device)
    quality = quality or maskrl.make_reward("embedded", settings, data, device, critic)
    minutes = {}
    if models is None:
        models, minutes = maskrl.teacher_and_student(args, settings, data, device, critic)
    maskrl.calibrate(critic, models["student"], data)

    held_out = held_out_reward(args.reward, data, critic, device)
    watch = maskrl.Watch(settings, quality, held_out, judge)
    start = time.perf_counter()
    training = maskrl.train_policy(
        models["student"], settings, quality, data, args.out, args.resume, watch
    )
    minutes["policy"] = (time.perf_counter() - start) / 60
    models["policy"] = training.model
    maskrl.gain_picture(args.out, training, data.labels)
    schedules = maskrl.compare_schedules(training, quality, judge)
    return maskrl.report(
        args.out, settings, data, judge, models, {"rl": schedules, "minutes": minutes}
    )


if __name__ == "__main__":
    maskrl.run(main)
