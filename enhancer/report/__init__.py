"""The report of a run: one self-contained HTML page, made from the run folder's files only."""

from enhancer.report.page import write_report

__all__ = ["write_report"]
