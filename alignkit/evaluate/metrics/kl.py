"""KL(pi || pi_ref) of a policy to its reference, in nats per answer, from sampled answers."""

from alignkit.evaluate.context import OWN, POLICY, ROWS, Context, Figure, Groups, Metric, make_figure, mean_of_groups


def measure(context: Context) -> list[Figure]:
    samples = context.options.samples
    asked = context.prompts, [group[:samples] for group in context.sampled]
    both = context.policy, context.reference
    ours, theirs = (policy.score_answers(*asked, temperature=context.options.temperature) for policy in both)
    figures = measure_kl(ours, theirs, resamples=context.options.resamples)
    return context.place(figures, reference=context.reference_source, samples=samples, **context.sampling)


METRIC = Metric(measure, (ROWS, POLICY, OWN, (
    lambda context: context.prompts and context.reference_source is not None,
    "it needs prompts and a reference (--reference)",
)))  # fmt: skip


def measure_kl(logps: Groups, reference_logps: Groups, *, resamples: int) -> list[Figure]:
    """Average log pi(y|x) - log pi_ref(y|x) over answers y sampled from pi, end token included, one group per prompt:
    the unbiased one-sample estimate that PPO's `objective/kl` is too. Single answers may be negative."""
    groups = [
        [ours - theirs for ours, theirs in zip(group, reference, strict=True)]
        for group, reference in zip(logps, reference_logps, strict=True)
    ]
    return [make_figure("kl", mean_of_groups(groups, resamples=resamples), unit="nats per answer")]
