"""A teacher, then its one-step student by GSIM (MARVAL, stage 1).

    python train_distill.py                                   # the shapes, minutes on a laptop
    python train_distill.py --data photos/ --out runs/photos  # photos/<class name>/*.jpg
    python train_distill.py --data imagenet/ --classes n01440764 n02102040 --class-names names.txt
    python train_distill.py --teacher runs/demo/teacher.pt    # distil an existing teacher
    python train_distill.py --teacher mar_b.pth --vae kl16.ckpt --data imagenet/train
                                                              # or a released one of MAR
    python train_distill.py --data photos/ --out runs/photos --resume   # after an interruption
    torchrun --nproc_per_node=4 train_distill.py --data photos/         # on 4 GPUs

Writes teacher.pt, student.pt, log.jsonl, metrics.json, samples.png, neighbours.png and curves.png
into --out; and reward.pt and judge.pt, networks that --resume does not train again.
"""

import torch

from maskrl import Distillation, TeacherTraining, rng, to_tokens
from workbench.errors import run_script
from workbench.judge import Judge
from workbench.monitors import ValidationMetric, student_measurements
from workbench.options import add_device, add_settings, clip_options, prepare, training_parser
from workbench.pretrained import pretrained_features
from workbench.quality_net import kept_quality_net
from workbench.released import load_model, read_model
from workbench.report import report
from workbench.sampling import warn_if_unfinished


def parse(argv=None):
    parser = training_parser(__doc__)
    add_device(parser)
    add_settings(parser)
    return parser.parse_args(argv)


def train_teacher(run):
    """A teacher from random weights."""
    data, settings, device = run.data, run.settings, run.device
    torch.manual_seed(settings.seed)  # of the first weights
    training = TeacherTraining(settings, data.classes, device, data.learned.channels)
    with run.stage(training) as stage:
        for step in stage:
            # images and, in `update`, noise depend on (seed, step) alone: --resume draws the same
            generator = rng(settings.seed, "teacher images", step)
            images, labels = data.learned.batch(settings.batch, generator, device, settings.flip)
            stage.log(training.update(step, to_tokens(images, settings), labels, settings.seed))
    return training.ema  # the average of the weights makes better images than the last ones


def train_student(run, teacher, reward_net):
    """A one-step student of the teacher; of its weights those of the best validation."""
    data, settings, device = run.data, run.settings, run.device
    training = Distillation(teacher, settings)
    # measured, because the loss does not tell how good the images are
    times, n = student_measurements(settings, len(data.train))
    validation = ValidationMetric(reward_net, data, settings, device, n=n)
    with run.stage(training, validation, times) as stage:
        for step in stage:
            generator = rng(settings.seed, "gsim images", step)
            images, labels = data.learned.batch(settings.batch, generator, device, settings.flip)
            stage.log(training.update(step, to_tokens(images, settings), labels, settings.seed))
    return training.ema


def given_teacher(run):
    """--teacher. Where a checkpoint leaves settings open, the run's hold."""
    teacher = load_model(run.args.teacher, "teacher", run.device, run.settings.heads)
    teacher.settings = run.settings
    teacher.classes = run.data.classes  # MAR's own files do not name them
    return teacher


def make_judge(run):
    """The judge of the report, which nothing is trained on. It looks as --features says."""
    data, settings, device = run.data, run.settings, run.device
    embed = pretrained_features(run.args.features, clip_options(run.args), device)
    path = run.out / "judge.pt"
    net = kept_quality_net(path, "judge", data.judge, settings, device, run.resume)
    return Judge(data, settings, device, embed, net=net)


def make_reward_net(run):
    """The reward network: RL's default reward, and features that the validation logs."""
    path, images = run.out / "reward.pt", run.data.train
    return kept_quality_net(path, "reward", images, run.settings, run.device, run.resume)


def main(argv=None):
    args = parse(argv)
    base = None
    if args.teacher:
        base = read_model(args.teacher, "teacher", getattr(args, "heads", None))
        warn_if_unfinished(args.teacher)
    with prepare(args, ["student.pt", "teacher.pt"], base) as run:
        judge = make_judge(run)
        reward_net = make_reward_net(run)
        teacher = given_teacher(run) if args.teacher else train_teacher(run)
        student = train_student(run, teacher, reward_net)
        models = {"teacher": teacher, "student": student}
        extra = {"minutes": run.minutes}
        return report(run.out, run.settings, run.data, judge, models, extra)


if __name__ == "__main__":
    run_script(main)
