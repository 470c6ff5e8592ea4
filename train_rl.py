r"""RL on the one-step student: a quality reward, a speed reward, and only the critical steps
(MaskFocus, Speed-RL), or the reward's own gradient (MARVAL, stage 2).

    python train_rl.py                                    # from nothing: teacher, student, then RL
    python train_rl.py --student runs/demo/student.pt     # RL on an existing student
    python train_rl.py --student runs/demo/student.pt --alpha 0 --no-learn-steps --out runs/quality
    python train_rl.py --student runs/demo/student.pt --rl-iters 0 --out runs/fast  # schedule alone
    python train_rl.py --student runs/demo/student.pt --action x --out runs/x      # train all of it
    python train_rl.py --student runs/demo/student.pt --action x --method backprop --out runs/marval
    python train_rl.py --student runs/demo/student.pt --reward clip --out runs/clip
    python train_rl.py --student runs/b/student.pt --vae kl16.ckpt --data imagenet/train \
        --reward clip                                     # of a student that makes latents
    python train_rl.py --student runs/b/student.pt --data photos --out runs/mix \
        --reward clip=0.7 my_rewards:sharpness=0.3 --held-out embedded

Without --student a teacher and a student are trained first, as by train_distill.py with the same
options. Writes policy.pt (and teacher.pt, student.pt), log.jsonl, metrics.json, samples.png,
neighbours.png, curves.png and gain.png into --out; and reward.pt and judge.pt, as that one does.
"""

from functools import partial
from pathlib import Path

import torch

from maskrl import PolicyGradient, RewardBackpropagation, rng, to_tokens
from train_distill import (
    given_teacher,
    make_judge,
    make_reward_net,
    train_student,
    train_teacher,
)
from workbench.errors import InputError, run_script
from workbench.files import load_checkpoint
from workbench.monitors import RLMonitor, policy_measurements
from workbench.options import add_device, add_settings, clip_options, prepare, training_parser
from workbench.pictures import gain_picture
from workbench.released import load_model, read_model
from workbench.report import compare_schedules, report
from workbench.rewards import RunRewards, check_held_out, reward_weights
from workbench.sampling import warn_if_unfinished
from workbench.settings import MODEL_SETTINGS

METHODS = {"grpo": PolicyGradient, "backprop": RewardBackpropagation}  # of --method


def parse(argv=None):
    parser = training_parser(__doc__)
    parser.add_argument(
        "--student",
        type=Path,
        metavar="student.pt",
        help="a student to start from, instead of training one",
    )
    parser.add_argument(
        "--reward",
        nargs="+",
        default=["embedded"],
        metavar="NAME[=WEIGHT]",
        help="what RL climbs: embedded (a network trained here on the data), fit (exact, for the "
        "shapes), clip, or module:function, a function of yours; of several their mean, by "
        "weights if given. All but embedded are scaled by the student's images, 10 %% of which "
        "then get less than about 0.1 and 10 %% more than 0.9 (default: embedded)",
    )
    parser.add_argument(
        "--held-out",
        metavar="NAME",
        help="a reward to log that RL does not climb, named as in --reward and never scaled "
        "(default: embedded; where RL climbs that, fit for the shapes and otherwise none)",
    )
    add_device(parser)
    add_settings(parser)
    args = parser.parse_args(argv)
    args.reward = reward_weights(args.reward)
    return args


def train_policy(run, student, quality, monitor, times=10):
    """RL on the student; the training, whose `model` is the policy and `reference` the student.

    monitor(model) -> what is logged about it, so many times."""
    data, settings, device = run.data, run.settings, run.device
    torch.manual_seed(settings.seed)  # of the first weights of the small networks that RL adds
    # what the information gain subtracts, so that it sees how images differ
    mean_image = to_tokens(data.learned.spaced().mean(0, keepdim=True), settings).to(device)
    method = METHODS[settings.method]
    training = method(student, settings, partial(quality_of_decoded, quality, data), mean_image)
    occurring = data.labels
    with run.stage(training, monitor, times) as stage:
        for step in stage:
            # there are no images here: RL learns from those that the policy makes
            generator = rng(settings.seed, "rl", step)
            prompts = torch.randint(len(occurring), (training.prompts(step),), generator=generator)
            labels = occurring[prompts].to(device)
            stage.log(training.update(step, labels, settings.seed))
    return training


def quality_of_decoded(quality, data, images, labels):
    """The quality of what a generator makes: images, or latents that `data` decodes."""
    return quality(data.decode(images), labels)


def given_models(run):
    """--student, and for the report the teacher: --teacher, or a fitting teacher.pt next to it."""
    args, settings, models = run.args, run.settings, {}
    student = load_checkpoint(args.student, "student", run.device)
    path = args.teacher or args.student.with_name("teacher.pt")
    if path.exists():
        teacher = load_model(path, "teacher", run.device, settings.heads)
        same = [getattr(teacher.settings, n) == getattr(settings, n) for n in MODEL_SETTINGS]
        if all(same) and teacher.classes == student.classes:
            models["teacher"], teacher.settings = teacher, settings
        elif args.teacher:
            raise InputError(f"{path} is not a teacher of {args.student}")
    models["student"], student.settings = student, settings
    return models


def trained_models(run, reward_net):
    teacher = given_teacher(run) if run.args.teacher else train_teacher(run)
    return {"teacher": teacher, "student": train_student(run, teacher, reward_net)}


def main(argv=None):
    args = parse(argv)
    if args.held_out:
        check_held_out(args.held_out, args.reward)
    if args.features == "clip" and "clip" in args.reward:
        raise InputError("--features clip: the judge must not look as --reward clip does")
    clip, heads = clip_options(args), getattr(args, "heads", None)
    given = [(path, kind) for kind in ("teacher", "student") if (path := getattr(args, kind))]
    contents = [read_model(path, kind, heads) for path, kind in given]
    written = ["policy.pt"] if args.student else ["policy.pt", "student.pt", "teacher.pt"]
    for path, _ in given:
        warn_if_unfinished(path)
    with prepare(args, written, contents[-1] if contents else None) as run:
        models = given_models(run) if args.student else None
        # first, because a wrong one should show before long work
        rewards = RunRewards(run, clip)
        judge = make_judge(run)
        reward_net = make_reward_net(run)
        models = models or trained_models(run, reward_net)
        student = models["student"]
        quality, held_out = rewards.of_student(student, reward_net)

        times, n = policy_measurements(run.settings, len(judge.labels))
        monitor = RLMonitor(run.settings, quality, held_out, judge, n, quality.raw)
        monitor.start(student)
        training = train_policy(run, student, quality, monitor, times)
        models["policy"] = training.model

        gain_picture(run.out, training, run.data.labels)
        rl = compare_schedules(training, quality, judge)
        extra = {"rl": rl, "rewards": quality.described(), "minutes": run.minutes}
        return report(run.out, run.settings, run.data, judge, models, extra)


if __name__ == "__main__":
    run_script(main)
