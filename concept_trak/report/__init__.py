"""From scores to something a person looks at: a results folder per concept, and one self-contained
HTML page.

concept.py    one concept's scores over all dampings, with its truth-based metrics where truth is known
results.py    query.png, topk-lambda_*.jpg, topk-prompts-lambda_*.txt, metrics.json
page.py       report.html: query, concepts side by side, damping switch, histograms, settings
"""

from ..scoring.concept import ConceptResult, lambda_label
from .page import write_report
from .results import write_results

__all__ = ["ConceptResult", "lambda_label", "write_report", "write_results"]
