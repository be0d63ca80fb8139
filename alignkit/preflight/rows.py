"""What is worth knowing about the rows of a stage, and what makes its result doubtful; in words.

It reads what was counted while the rows were encoded, never the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.train.tables import Tables

# Beyond these a run still works, but its result may not mean what it seems to.
_MANY_DUPLICATES = 0.01
_LENGTH_BIAS = 0.65
_FORMS = {"chat": "turns of the chat template", "text": "text, prompt and answer joined", "raw": "raw text"}


def describe_rows(tables: Tables) -> dict[str, str]:
    """Return what is worth knowing about the rows of a stage, in words."""
    import numpy as np

    report, lengths = tables.report.to_dict(), tables.lengths
    facts = {}
    for source in report["sources"]:
        formats = ", ".join(f"{count} {name}" for name, count in source["formats"].items())
        ignored = ", ".join(source["ignored_columns"])
        facts[f"data {source['path']}"] = (
            f"{source['read']} rows read, {source['kept']} kept ({formats})"
            + (f", {source['rejected']} do not fit" if source["rejected"] else "")
            + (f", {source['duplicates_dropped']} duplicates dropped" if source["duplicates_dropped"] else "")
            + (f"; columns not used: {ignored}" if ignored else "")
            + (f"; read as {', '.join(_FORMS[form] for form in source['forms'])}" if source["forms"] else "")
        )
    middle, high = np.percentile(tables.train.data.column("length").to_numpy(), [50, 95])
    prompts_only = "prompt" in tables.train.column_names
    trained = "all in prompts" if prompts_only else f"of which {lengths.num_trained_tokens:,} are trained"
    facts["tokens"] = f"{lengths.num_tokens:,}, {trained}"
    facts["tokens a row"] = f"median {middle:.0f}, 95 % below {high:.0f}, longest {lengths.longest_tokens}"
    facts["too long"] = f"{lengths.truncated_share:.1%}: {lengths.num_truncated} cut, {lengths.num_too_long} left out"
    if lengths.first_cut:
        facts["too long"] += f"; first cut: {lengths.first_cut}"
    if lengths.num_untrained:
        facts["nothing to learn"] = f"{lengths.num_untrained} rows left out"
    if lengths.num_apart:
        facts["learnt apart"] = f"{lengths.num_apart} answers, each in a text of its own: later turns rewrite them"
    facts["duplicates"] = f"{report['duplicates']} rows, {report['duplicate_prompts']} prompts"
    if report["longer_chosen_share"] is not None:
        facts["chosen is longer"] = f"in {report['longer_chosen_share']:.0%} of {report['comparisons']} comparisons"
    if tables.eval is not None:
        facts["held out"] = f"{len(tables.eval)} rows, {report['overlap']} prompts of them also in the training rows"
    return facts


def find_doubts(report: dict[str, Any]) -> list[str]:
    """Return what lets a stage run but makes its result doubtful; `report` is DataReport.to_dict()."""
    doubts = []
    if report["duplicates"] > _MANY_DUPLICATES * report["rows"]:
        doubts.append(f"{report['duplicates']} of {report['rows']} rows repeat an earlier one; dedupe: true drops them")
    equal = sum(source["equal_answers"] for source in report["sources"])
    if equal:
        doubts.append(f"{equal} rows have the same answer as chosen and rejected")
    share = report["longer_chosen_share"]
    if share is not None and abs(share - 0.5) > _LENGTH_BIAS - 0.5:
        kind = "longer" if share > 0.5 else "shorter"
        doubts.append(
            f"the chosen answer is the {kind} one in {max(share, 1 - share):.0%} of comparisons: "
            "the model may learn length instead of quality"
        )
    if report["overlap"]:
        places = ", ".join(report["overlap_places"])
        doubts.append(f"{report['overlap']} held-out rows have a prompt that is also trained on, first at {places}")
    return doubts
