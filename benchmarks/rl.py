"""TRPO of ngd_rl beside that of sb3-contrib: the cost of a policy update, and learning curves.

    python benchmarks/rl.py                   # policy updates, and one seed of CartPole-v1
    python benchmarks/rl.py --full            # the classic tasks at 1e5 steps, the MuJoCo ones at 3e5, three seeds
    python benchmarks/rl.py --full --tasks Hopper-v5 --seeds 1
    python benchmarks/rl.py --steps 1000000 --tasks Hopper-v5 HalfCheetah-v5 Walker2d-v5 --seeds 5

Hyperparameters are those of rl-baselines3-zoo (hyperparams/trpo.yml). Updates are timed each time; learning runs that
are in results/rl.json, as long or longer, are not repeated. The table and the figure show all of them. Everything runs
on one thread; times are that thread's CPU time, which other processes disturb least.
"""

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from ngd_rl import TRPO
from rich.progress import track
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

RESULTS = Path(__file__).parent / "results"
ALGORITHMS = {"ngd_rl": TRPO, "sb3-contrib": sb3_contrib.TRPO}
COLORS = {"ngd_rl": "tab:blue", "sb3-contrib": "tab:orange"}
N_ENVS = 2
REPEATS = 15
EVALUATION_EPISODES = SMOOTHED_EPISODES = 20
_MUJOCO = {
    "steps": 300_000,
    "normalize": True,
    "settings": {"n_steps": 1024, "cg_max_steps": 25, "n_critic_updates": 20},
}
TASKS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "steps": 100_000,
        "normalize": False,
        "settings": {
            "n_steps": 512,
            "batch_size": 512,
            "cg_damping": 1e-3,
            "gae_lambda": 0.98,
            "n_critic_updates": 20,
        },
    },
    "Pendulum-v1": {
        "steps": 100_000,
        "normalize": False,
        "settings": {
            "n_steps": 1024,
            "gamma": 0.9,
            "n_critic_updates": 15,
            "use_sde": True,
            "sde_sample_freq": 4,
        },
    },
    "Acrobot-v1": {"steps": 100_000, "normalize": True, "settings": {"n_steps": 1024}},
    "Hopper-v5": _MUJOCO,
    "HalfCheetah-v5": {**_MUJOCO, "settings": {**_MUJOCO["settings"], "target_kl": 0.04}},
    "Walker2d-v5": _MUJOCO,
}
ONLY_TIMED = {"Humanoid-v5": _MUJOCO}
ALL = {**TASKS, **ONLY_TIMED}
UPDATES = [task for task in ALL if task != "Acrobot-v1"]


class Curve(BaseCallback):
    """The return of each episode, with the step at which it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.episodes: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        self.episodes += [
            (self.num_timesteps, i["episode"]["r"]) for i in self.locals["infos"] if "episode" in i
        ]
        return True


def make_env(task: str, seed: int) -> Any:
    """The task's environments."""
    env = make_vec_env(task, n_envs=N_ENVS, seed=seed)
    return (
        VecNormalize(env, gamma=ALL[task]["settings"].get("gamma", 0.99))
        if ALL[task]["normalize"]
        else env
    )


def make_model(name: str, task: str, seed: int, **more: Any) -> Any:
    """An untrained model; both algorithms get the same trust region."""
    settings = {"target_kl": 0.01, "cg_damping": 0.1, **ALL[task]["settings"], **more}
    env = make_env(task, seed)
    if name == "ngd_rl" and isinstance(
        env.action_space, gym.spaces.Box
    ):  # sb3-contrib averages the KL over them
        dimensions = env.action_space.shape[0]
        settings["target_kl"] *= dimensions
        settings["cg_damping"] *= dimensions
    return ALGORITHMS[name]("MlpPolicy", env, seed=seed, device="cpu", **settings)


def time_updates(task: str, repeats: int = REPEATS, **more: Any) -> dict[str, float]:
    """Median milliseconds of an update; the algorithms take turns on the same rollout."""
    models = {name: make_model(name, task, seed=0, **more) for name in ALGORITHMS}
    first = next(iter(models.values()))
    first.learn(2 * first.n_steps * N_ENVS)
    start = copy.deepcopy(first.policy.state_dict())
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in list(models.items())[:: 1 if turn % 2 else -1]:
            model.rollout_buffer = first.rollout_buffer
            model.set_logger(first.logger)
            model.policy.load_state_dict(start)
            began = time.process_time()
            model.train()
            seconds[name].append(time.process_time() - began)
    return {name: 1e3 * median(values[1:]) for name, values in seconds.items()}


def train(name: str, task: str, seed: int, steps: int) -> dict[str, Any]:
    """One learning run."""
    model = make_model(name, task, seed)
    update, seconds = model.train, []

    def timed_update() -> None:
        began = time.process_time()
        update()
        seconds.append(time.process_time() - began)

    model.train = timed_update
    curve = Curve()
    began = time.process_time()
    model.learn(steps, callback=curve)
    total = time.process_time() - began
    env = make_env(task, seed + 1000)
    if isinstance(env, VecNormalize):
        env.obs_rms, env.training, env.norm_reward = model.env.obs_rms, False, False
    mean_return, _ = evaluate_policy(model, env, EVALUATION_EPISODES)
    return {
        "algorithm": name,
        "task": task,
        "seed": seed,
        "steps": steps,
        "return": float(mean_return),  # pyright: ignore[reportArgumentType]
        "train_seconds": sum(seconds),
        "total_seconds": total,
        "curve": [(step, round(float(value), 2)) for step, value in curve.episodes],
    }


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def write(results: dict[str, Any]) -> None:
    """The results as json, as a table and as a figure."""
    (RESULTS / "rl.json").write_text(json.dumps(results, indent=None, separators=(",", ":")) + "\n")
    lines = [
        f"Policy update, and the whole of train() with the critic's, median CPU time of {REPEATS} (and of "
        f"{REPEATS // 3}) on the same rollout, one thread:",
        "",
        "| task | samples | ngd_rl, ms | sb3-contrib, ms | ratio | whole, ngd_rl | whole, sb3-contrib | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, ms in results["updates"].items():
        samples = N_ENVS * ALL[task]["settings"]["n_steps"]
        ours, theirs = ms["ngd_rl"], ms["sb3-contrib"]
        line = f"| {task} | {samples} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |"
        ours, theirs = (results["whole"][task][name] for name in ("ngd_rl", "sb3-contrib"))
        lines.append(f"{line} {ours:.0f} | {theirs:.0f} | {theirs / ours:.2f} |")
    lines += [
        "",
        f"Mean return of the training episodes in the last tenth of the steps, and of the final policy's most likely "
        f"actions over {EVALUATION_EPISODES} episodes (mean ± standard deviation over seeds); CPU seconds in updates "
        "(policy and critic) and in all:",
        "",
        "| task | steps | seeds | | training | most likely actions | updates, s | total, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lengths = {(run["task"], run["steps"]) for run in results["runs"]}
    for task, steps in sorted(lengths, key=lambda pair: (list(TASKS).index(pair[0]), pair[1])):
        for name in ALGORITHMS:
            runs = [
                run
                for run in results["runs"]
                if (run["task"], run["steps"], run["algorithm"]) == (task, steps, name)
            ]
            if not runs:
                continue
            training = spread(
                [fmean(value for step, value in run["curve"] if step > 0.9 * steps) for run in runs]
            )
            evaluated = spread([run["return"] for run in runs])
            seconds = " | ".join(
                f"{fmean(run[what] for run in runs):.0f}"
                for what in ("train_seconds", "total_seconds")
            )
            lines.append(
                f"| {task} | {steps} | {len(runs)} | {name} | {training} | {evaluated} | {seconds} |"
            )
    (RESULTS / "rl.md").write_text("\n".join(lines) + "\n")
    draw(results["runs"])


def draw(runs: list[dict[str, Any]]) -> None:
    """Learning curves of the length with the most seeds: their mean and range."""
    tasks = [task for task in TASKS if any(run["task"] == task for run in runs)]
    figure = Figure(figsize=(4 * len(tasks), 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        lengths = [run["steps"] for run in runs if run["task"] == task]
        length = max(lengths, key=lambda steps: (lengths.count(steps), steps))
        for name, color in COLORS.items():
            chosen = [
                run
                for run in runs
                if (run["task"], run["algorithm"], run["steps"]) == (task, name, length)
            ]
            if not chosen:
                continue
            grid = np.linspace(0.05, 1, 60) * length
            curves = np.array([smoothed(run["curve"], grid) for run in chosen])
            axes.plot(grid, curves.mean(0), color=color, label=name)
            axes.fill_between(
                grid, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0
            )
        axes.set(title=task, xlabel="environment steps")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        if task == tasks[0]:
            axes.set_ylabel("return while training")
            axes.legend(frameon=False)
    figure.savefig(RESULTS / "rl.png", dpi=120)


def smoothed(curve: list[tuple[int, float]], grid: np.ndarray) -> list[float]:
    """Mean return of the last episodes at some numbers of steps."""
    steps, returns = np.array(curve).T
    ends = np.searchsorted(steps, grid, side="right").clip(min=1)
    return [returns[max(0, end - SMOOTHED_EPISODES) : end].mean() for end in ends]


def main() -> None:
    """Run what is missing, then write table and figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all tasks, at full length")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="only these")
    parser.add_argument("--steps", type=int, help="environment steps of each learning run")
    parser.add_argument("--seeds", type=int, help="number of seeds; default 1, with --full 3")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", message="Mean of empty slice"
    )  # sb3-contrib's log, without critic updates
    warnings.filterwarnings("ignore", message="invalid value encountered in scalar divide")

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "rl.json"
    results: dict[str, Any] = {"updates": {}, "runs": []}
    if path.exists() and not args.again:
        results = json.loads(path.read_text())
    results.setdefault("whole", {})
    for task in track(UPDATES, "updates"):
        results["updates"][task] = time_updates(task, n_critic_updates=0)
        results["whole"][task] = time_updates(task, REPEATS // 3)
    tasks = args.tasks or (list(TASKS) if args.full else ["CartPole-v1"])
    seeds = args.seeds or (3 if args.full else 1)
    done = {(run["algorithm"], run["task"], run["seed"]): run["steps"] for run in results["runs"]}
    wanted = [(name, task, seed) for seed in range(seeds) for task in tasks for name in ALGORITHMS]
    for name, task, seed in track(wanted, "learning runs"):
        steps = args.steps or TASKS[task]["steps"] // (1 if args.full else 4)
        if done.get((name, task, seed), 0) < steps:
            results["runs"].append(train(name, task, seed, steps))
            write(results)
    write(results)
    print((RESULTS / "rl.md").read_text())


if __name__ == "__main__":
    main()
