"""KL(pi || pi_ref) of a policy to its reference, in nats per answer, from sampled answers."""

from collections.abc import Sequence

from alignkit.evaluate.context import OWN, POLICY, ROWS, Context, Metric
from alignkit.evaluate.intervals import Figure, make_figure, mean_of_groups


def measure(context: Context) -> list[Figure]:
    samples = context.options.samples
    answers = [group[:samples] for group in context.sampled]
    ours, theirs = (
        policy.score_answers(context.prompts, answers, temperature=context.options.temperature)
        for policy in (context.policy, context.reference)
    )
    figures = measure_kl(ours, theirs, resamples=context.options.resamples)
    return context.place(figures, reference=context.reference_source, samples=samples, **context.sampling)


METRIC = Metric(
    measure, first=(ROWS, POLICY, OWN),
    needs=(lambda context: context.prompts and context.reference_source is not None,
           "it needs prompts and a reference (--reference)"),
)  # fmt: skip


def measure_kl(
    logps: Sequence[Sequence[float]], reference_logps: Sequence[Sequence[float]], *, resamples: int
) -> list[Figure]:
    """Average log pi(y|x) - log pi_ref(y|x) over answers y sampled from pi, end token included.

    One group per prompt. It is the unbiased one-sample estimate that PPO's `objective/kl` is too: single answers may
    be negative, and over few of them the mean may.
    """
    groups = [
        [ours - theirs for ours, theirs in zip(group, reference, strict=True)]
        for group, reference in zip(logps, reference_logps, strict=True)
    ]
    return [make_figure("kl", mean_of_groups(groups, resamples=resamples), unit="nats per answer")]
