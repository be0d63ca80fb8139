"""Sampled answers: their length, whether they end, and their rewards."""

from alignkit.evaluate.context import POLICY, ROWS, Context, Figure, Metric, make_figure, mean_of_groups, share


def measure(context: Context) -> list[Figure]:
    samples, resamples = context.options.samples, context.options.resamples
    answers = [group[:samples] for group in context.sampled]
    lengths = [[float(len(answer.ids)) for answer in group] for group in answers]
    ended = [[float(answer.ended) for answer in group] for group in answers]
    figures = [
        make_figure("response_length", mean_of_groups(lengths, resamples=resamples), unit="tokens"),
        make_figure("ended_share", share(ended, resamples=resamples), unit="share"),
    ]
    rewards = {"true_reward": context.true_reward} if context.is_toy else {}
    if context.reward is not None and context.reward.name not in rewards:
        name = context.reward.name
        rewards[name if name == "true_reward" else f"reward/{name}"] = context.reward
    for name, reward in rewards.items():
        found = mean_of_groups(context.score(reward, answers), resamples=resamples)
        figures.append(make_figure(name, found, better="higher"))
    return context.place(figures, samples=samples, **context.sampling)


METRIC = Metric(measure, (ROWS, POLICY, (lambda context: context.prompts, "the rows hold no prompts")))
