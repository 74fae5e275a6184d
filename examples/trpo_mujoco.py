"""Trust Region Policy Optimization (Schulman et al. 2015) in one file, on MuJoCo.

Run it:

    python examples/trpo_mujoco.py
    python examples/trpo_mujoco.py --env HalfCheetah-v5 --steps 1000000

It prints its progress and draws the learning curve.
"""

import argparse
from collections import deque
from pathlib import Path
from statistics import fmean

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ngd_optim import NaturalCG


def mlp(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two hidden layers of 64, orthogonal weights."""
    layers = [
        nn.Linear(inputs, 64),
        nn.Tanh(),
        nn.Linear(64, 64),
        nn.Tanh(),
        nn.Linear(64, outputs),
    ]
    for layer, gain in ((layers[0], 2**0.5), (layers[2], 2**0.5), (layers[4], last_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Policy(nn.Module):
    """A Gaussian over actions, whose mean is a network of the observation."""

    def __init__(self, observation_size: int, action_size: int) -> None:
        super().__init__()
        self.mean = mlp(observation_size, action_size, last_gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(action_size))

    def forward(self, observations: Tensor) -> Independent:
        """One action, all its components together, is one sample."""
        return Independent(Normal(self.mean(observations), self.log_std.exp()), 1)


def advantages_of(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016): all arguments and the result have shape (time, envs)."""
    errors = rewards + gamma * next_values * ~terminated - values
    advantages, following = torch.empty_like(errors), torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        following = errors[t] + gamma * lam * following * ~done[t]
        advantages[t] = following
    return advantages


def main() -> None:
    """Train, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--env", default="InvertedPendulum-v5", help="any environment with vectors as actions"
    )
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps in all")
    parser.add_argument("--n-envs", type=int, default=4)
    parser.add_argument("--rollout", type=int, default=2048, help="environment steps per update")
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--lam", type=float, default=0.95, help="λ of the advantage estimator")
    parser.add_argument("--max-kl", type=float, default=0.01, help="δ, in nats per action")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/trpo_mujoco.png"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the networks are small: more threads would wait for each other
    envs = gym.make_vec(args.env, args.n_envs, vectorization_mode="sync")
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    envs = gym.wrappers.vector.NormalizeObservation(envs)
    observation_space, action_space = envs.single_observation_space, envs.single_action_space
    assert isinstance(observation_space, gym.spaces.Box)
    assert isinstance(action_space, gym.spaces.Box), "the policy is Gaussian"

    policy = Policy(observation_space.shape[0], action_space.shape[0])
    critic = mlp(observation_space.shape[0], 1, last_gain=1.0)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    optimizer = NaturalCG(
        policy.parameters(),
        trust_region="boundary",
        max_kl=args.max_kl,
        damping=args.damping,
        adapt_damping=False,
        max_cg_iters=15,
        warm_start=0.0,
    )

    n_steps = args.rollout // args.n_envs
    n_updates = args.steps // (n_steps * args.n_envs)
    recent: deque[float] = deque(maxlen=20)
    episodes: list[tuple[int, float]] = []
    kls: list[tuple[int, float]] = []
    observation, _ = envs.reset(seed=args.seed)
    done = np.zeros(args.n_envs, dtype=bool)
    progress = Progress(
        TextColumn(args.env),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
    )
    with progress:
        task = progress.add_task("", total=n_updates, news="")
        for update in range(1, n_updates + 1):
            # A rollout. After the end of an episode the next step only resets the environment: it is no sample.
            rollout = []
            with torch.no_grad():
                for t in range(1, n_steps + 1):
                    x = torch.as_tensor(observation, dtype=torch.float32)
                    action = policy(x).sample()
                    clipped = action.numpy().clip(action_space.low, action_space.high)
                    is_sample = ~done
                    observation, reward, terminated, truncated, infos = envs.step(clipped)
                    done = terminated | truncated
                    next_x = torch.as_tensor(observation, dtype=torch.float32)
                    numbers = (torch.as_tensor(a) for a in (reward, terminated, done, is_sample))
                    rollout.append((x, next_x, action, *numbers))
                    if "episode" in infos:
                        returns = infos["episode"]["r"][infos["_episode"]].tolist()
                        recent.extend(returns)
                        episodes += [
                            (((update - 1) * n_steps + t) * args.n_envs, value) for value in returns
                        ]
            x, next_x, actions, rewards, terminated, ended, is_sample = (
                torch.stack(column) for column in zip(*rollout, strict=True)
            )
            with torch.no_grad():
                values, next_values = critic(x).squeeze(-1), critic(next_x).squeeze(-1)
                advantages = advantages_of(
                    rewards.float(), values, next_values, terminated, ended, args.gamma, args.lam
                )
                targets = (values + advantages)[is_sample]
                x, actions, advantages = x[is_sample], actions[is_sample], advantages[is_sample]
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                old_log_prob = policy(x).log_prob(actions)

            # The policy. With π the new and π₀ the old policy, TRPO
            #     maximises    L(θ) = mean[ π(a|s) / π₀(a|s) · A(s, a) ]
            #     subject to   mean[ KL(π₀(·|s) ‖ π(·|s)) ] ≤ δ.
            # To first order L is L(θ₀) + gᵀd, to second order the KL is ½ dᵀH d, with H the Fisher information. So
            #     d = √(2δ / xᵀH x) · x,   where H x = g,
            # which conjugate gradients solve with products H v alone; then d shrinks until L grows and the KL is
            # indeed at most δ. All of that is one step on −L, with the distribution that defines the KL:
            def surrogate() -> tuple[Tensor, Independent]:
                distribution = policy(x)  # noqa: B023  # called in this turn of the loop
                ratio = (distribution.log_prob(actions) - old_log_prob).exp()  # noqa: B023
                return -(ratio * advantages).mean(), distribution  # noqa: B023

            optimizer.step(surrogate)
            report = optimizer.last_step
            assert report is not None

            # The critic.
            for _ in range(10):
                for batch in torch.randperm(len(x)).split(128):
                    critic_optimizer.zero_grad()
                    F.mse_loss(critic(x[batch]).squeeze(-1), targets[batch]).backward()
                    critic_optimizer.step()

            kls.append((update * n_steps * args.n_envs, report.kl))
            news = f"KL {report.kl:.4f}, {report.n_product} products"
            if recent:
                news = f"return {fmean(recent):.0f}, {news}"
            progress.update(task, advance=1, news=news)
    envs.close()
    draw(args, episodes, kls)
    print(f"mean return of the last {len(recent)} episodes: {fmean(recent):.1f}; {args.figure}")


def draw(
    args: argparse.Namespace, episodes: list[tuple[int, float]], kls: list[tuple[int, float]]
) -> None:
    """The learning curve, and the KL of each update beside its bound."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    steps, returns = np.array(episodes).T
    smooth = [returns[max(0, i - 19) : i + 1].mean() for i in range(len(returns))]
    left.plot(steps, returns, ".", markersize=3, alpha=0.3, color="tab:blue", label="episodes")
    left.plot(steps, smooth, color="tab:blue", label="mean of the last 20")
    left.set(xlabel="environment steps", ylabel="return", title=f"TRPO on {args.env}")
    left.legend(frameon=False)
    right.plot(*np.array(kls).T, ".", color="tab:orange", label="measured")
    right.axhline(args.max_kl, color="black", linewidth=1, label="bound δ")
    right.set(
        xlabel="environment steps", ylabel="nats per action", title="KL(old ‖ new) of each update"
    )
    right.set_ylim(0, 1.2 * args.max_kl)
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=150)


if __name__ == "__main__":
    main()
