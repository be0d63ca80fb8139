"""PPO: stage (what a command runs), trainer, rollout, roles, critic and math."""

from alignkit.train.ppo.stage import build, run

__all__ = ["build", "run"]
