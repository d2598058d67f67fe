"""From scores to something a person looks at: a results folder per concept, and one self-contained
HTML page.

results.py    query.png, topk-lambda_*.jpg, topk-prompts-lambda_*.txt, metrics.json
page.py       report.html: query, concepts side by side, damping switch, histograms, settings
context.py    what both share; view_model.py: what the page says; templates/: its markup
"""

from ..scoring.result import ConceptResult, lambda_label
from .context import ReportContext
from .page import write_report
from .results import write_results

__all__ = ["ConceptResult", "ReportContext", "lambda_label", "write_report", "write_results"]
