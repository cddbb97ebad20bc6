"""``bench --report``: a benchmark that resumes, its data, and one page that shows them.

``run`` measures, ``page`` writes HTML of what was measured, ``charts`` draws, ``compare`` tells two
reports apart.
"""

from fused_resnet.report.compare import compare
from fused_resnet.report.page import page
from fused_resnet.report.run import run

__all__ = ["compare", "page", "run"]
