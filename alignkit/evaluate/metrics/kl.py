"""How far a policy has moved from its reference: KL(pi || pi_ref) in nats per answer, from sampled answers."""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.evaluate.intervals import Figure, make_figure, mean_of_groups


def measure_kl(
    logps: Sequence[Sequence[float]], reference_logps: Sequence[Sequence[float]], *, resamples: int
) -> list[Figure]:
    """Return the mean of log pi(y|x) - log pi_ref(y|x) over answers y sampled from pi, end token included.

    One group per prompt. It is the unbiased one-sample estimate that PPO's `objective/kl` is too: single answers may
    be negative, and over few of them the mean may.
    """
    groups = [
        [ours - theirs for ours, theirs in zip(group, reference, strict=True)]
        for group, reference in zip(logps, reference_logps, strict=True)
    ]
    return [make_figure("kl", mean_of_groups(groups, resamples=resamples), unit="nats per answer")]
