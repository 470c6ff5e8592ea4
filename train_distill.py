"""A teacher, then its one-step student by GSIM (MARVAL, stage 1).

    python train_distill.py                                   # the shapes, minutes on a laptop
    python train_distill.py --data photos/ --out runs/photos  # photos/<class name>/*.jpg
    python train_distill.py --data imagenet/ --classes n01440764 n02102040 --class-names names.txt
    python train_distill.py --teacher runs/demo/teacher.pt    # distil a teacher that is there
    python train_distill.py --teacher mar_b.pth --vae kl16.ckpt --data imagenet/train
                                                              # or a released one of MAR
    python train_distill.py --data photos/ --out runs/photos --resume   # after an interruption

Writes teacher.pt, student.pt, log.jsonl, metrics.json, samples.png, neighbours.png and curves.png
into --out.
"""

import maskrl


def parse(argv=None):
    parser = maskrl.training_parser(__doc__)
    maskrl.add_device(parser)
    maskrl.add_settings(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    base = None
    if args.teacher:
        base = maskrl.read_model(args.teacher, "teacher", getattr(args, "heads", None))
    settings, data, device = maskrl.prepare(args, ["student.pt", "teacher.pt"], base)
    judge = maskrl.make_judge(args, settings, data, device)
    critic = maskrl.train_critic("reward", data.train, settings, device)
    models, minutes = maskrl.teacher_and_student(args, settings, data, device, critic)
    return maskrl.report(args.out, settings, data, judge, models, {"minutes": minutes})


if __name__ == "__main__":
    maskrl.run(main)
