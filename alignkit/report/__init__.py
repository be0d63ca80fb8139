"""The report: one HTML file that shows what a run, or a whole recipe, was made of and how it went."""

from alignkit.report.page import REPORT, write_recipe_report, write_report

__all__ = ["REPORT", "write_recipe_report", "write_report"]
